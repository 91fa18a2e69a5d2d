"""CIFAR networks of He et al. 2015, section 4.2: 6n+2 layers, residual (option A) and plain."""

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.models.batch_norm import BatchNorm2d
from orchestrator.models.resnet import BasicBlock, Shortcut


class CifarResNet(nn.Module):
    """A 3×3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, global average, fc.

    images: [N, 3, 32, 32] float, normalized (other sizes work) → logits: [N, num_classes].

    depth = 6n+2; the paper has 20, 32, 44, 56, 110 and 1202. Shortcuts are option A "in all cases", so that a residual
    net and its plain counterpart (residual=False) have exactly the same parameters.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, residual: bool = True) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"A CIFAR network has 6n+2 layers, n ≥ 1, not {depth}: choose 20, 32, 44, 56, 110 or 1202 (paper)."
            )
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        shortcut = Shortcut.A if residual else None
        in_channels = 16
        stages = []
        for width in (16, 32, 64):
            blocks = nn.Sequential()
            for _ in range(num_blocks):
                blocks.append(BasicBlock(in_channels, width, width // in_channels, shortcut))
                in_channels = width
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # "the weight initialization in [13]", for the fc too: N(0, 2/fan_in).
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → the last stage's output [N, 64, ⌈H/4⌉, ⌈W/4⌉]."""
        features = self.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(features)))

    def classify(self, features: Tensor) -> Tensor:
        """features [N, 64, h, w] → logits [N, num_classes]: global average, then fc."""
        return self.fc(features.mean((2, 3)))

    def classify_windows(self, features: Tensor, window: int) -> Tensor:
        """features [N, C, h, w] → logits [N, num_classes, h − window + 1, w − window + 1] (stride 1).

        The fully-convolutional form: ``classify`` of each window × window square of the features.
        """
        means = F.avg_pool2d(features, window, stride=1)
        return self.fc(means.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] float → logits [N, num_classes]."""
        return self.classify(self.forward_features(images))
