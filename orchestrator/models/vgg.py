"""VGG-16 and VGG-19 (Simonyan and Zisserman 2015, configurations D and E), the paper's reference networks.

Parameter names are torchvision's (features.0, classifier.6), so that its weights load.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# 3×3 convolutions in each of the five stages of 64, 128, 256, 512 and 512 channels.
CONVOLUTIONS_PER_STAGE = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG without batch normalization; dropout 0.5 after each of the two hidden fully-connected layers.

    images: [N, 3, image_size, image_size] float, normalized → logits: [N, num_classes]. The first fully-connected
    layer fixes the size of the images; `forward_features` takes any from 32.
    """

    def __init__(self, depth: int = 16, *, num_classes: int = 1000, image_size: int = 224) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS_PER_STAGE:
            raise ValueError(f"No VGG of depth {depth}: choose one of {', '.join(map(str, CONVOLUTIONS_PER_STAGE))}.")
        if image_size < 32:
            raise ValueError(f"VGG halves its input five times: image_size must be at least 32, not {image_size}.")
        self.image_size = image_size
        self.features = nn.Sequential()
        in_channels = 3
        for width, num_convolutions in zip(WIDTHS, CONVOLUTIONS_PER_STAGE[depth], strict=True):
            for _ in range(num_convolutions):
                self.features.append(nn.Conv2d(in_channels, width, 3, padding=1))
                self.features.append(nn.ReLU(inplace=True))
                in_channels = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(512 * (image_size // 32) ** 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # He initialization, N(0, 2/fan_in). VGG's authors started from a trained shallower net (section 3.1),
                # as N(0, 0.01²) did not train from scratch.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # No rectifier follows the last layer; small, as in ResNet, so that training starts at log(classes).
        nn.init.normal_(self.classifier[-1].weight, std=0.01)  # type: ignore[arg-type]

    def forward_features(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → the last pooling's output [N, 512, ⌊H/32⌋, ⌊W/32⌋] (224: 7×7)."""
        return self.features(images)

    def classify(self, features: Tensor) -> Tensor:
        """features [N, 512, image_size // 32, image_size // 32] → logits [N, num_classes]."""
        side = self.image_size // 32
        if features.shape[2:] != (side, side):
            raise ValueError(
                f"This VGG classifies {side}×{side} features (images of {self.image_size} pixels), not "
                f"{features.shape[2]}×{features.shape[3]}: build it with the image_size that you feed it."
            )
        return self.classifier(features.flatten(1))

    def classify_windows(self, features: Tensor, window: int) -> Tensor:
        """features [N, 512, h, w] → logits [N, num_classes, h − window + 1, w − window + 1] (stride 1).

        The fully-convolutional form (section 3.2 of the VGG paper): the first fully-connected layer is a convolution
        by window × window, which must be the size that it was built for; the others are convolutions by 1×1.
        """
        first, *others = self.classifier
        assert isinstance(first, nn.Linear)
        side = self.image_size // 32
        if window != side:
            raise ValueError(f"This VGG classifies {side}×{side} features, not windows of {window}×{window}.")
        hidden = F.conv2d(features, first.weight.view(-1, 512, side, side), first.bias)
        hidden = hidden.permute(0, 2, 3, 1)
        for layer in others:
            hidden = layer(hidden)
        return hidden.permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, image_size, image_size] float → logits [N, num_classes]."""
        return self.classify(self.forward_features(images))
