"""ImageNet networks of He et al. 2015, Table 1: ResNet-18/34/50/101/152 and their plain counterparts.

Parameter names are torchvision's (conv1, layer1.0.bn2, layer2.0.downsample.0, fc), so that its weights load into
ResNet(depth, stride_on=StrideOn.CONV3X3, pool=Pool.PADDED).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.config import Pool, Shortcut, StrideOn
from orchestrator.models.batch_norm import BatchNorm2d

# Blocks per stage (conv2_x to conv5_x), Table 1 of the paper.
BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Projection(nn.Sequential):
    """1×1 convolution and BN on a shortcut: [N, in_channels, H, W] → [N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), BatchNorm2d(out_channels))


class ZeroPadding(nn.Module):
    """Option A: every stride-th pixel, zero channels appended; shapes as Projection, no parameters.

    The paper does not say where the zeros go; at the end, as in fb.resnet.torch (`models/resnet.lua`, type A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.num_zero_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        features = features[:, :, :: self.stride, :: self.stride]
        return F.pad(features, (0, 0, 0, 0, 0, self.num_zero_channels))


def make_shortcut(shortcut: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The module that carries a residual block's input to its addition."""
    same_size = stride == 1 and in_channels == out_channels
    if shortcut is Shortcut.C or (shortcut is Shortcut.B and not same_size):
        return Projection(in_channels, out_channels, stride)
    return nn.Identity() if same_size else ZeroPadding(in_channels, out_channels, stride)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: [N, in_channels, H, W] → [N, width, ⌈H/stride⌉, ⌈W/stride⌉].

    With shortcut None it is the plain block of the same layers."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut and make_shortcut(shortcut, in_channels, width, stride)

    @property
    def last_bn(self) -> BatchNorm2d:
        return self.bn2

    def forward(self, features: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out += self.downsample(features)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1: [N, in_channels, H, W] → [N, 4·width, ⌈H/stride⌉, ⌈W/stride⌉].

    With shortcut None it is the plain block of the same layers."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, shortcut: Shortcut | None, stride_on: StrideOn
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_on is StrideOn.CONV1X1 else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_3x3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut and make_shortcut(shortcut, in_channels, out_channels, stride)

    @property
    def last_bn(self) -> BatchNorm2d:
        return self.bn3

    def forward(self, features: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            out += self.downsample(features)
        return self.relu(out)


class ResNet(nn.Module):
    """The residual (or, with residual=False, plain) network of 18, 34, 50, 101 or 152 weighted layers.

    images: [N, 3, H, W] float, normalized, any H and W from 32 (paper: 224) → logits: [N, num_classes].

    Defaults are those of the released models. The paper's Table 2 compares plain nets with option A, Table 3 gives
    34 layers with A, B and C, and 50 layers on use B (Table 4): so B is the default at every depth, and a recipe for
    Table 2 passes Shortcut.A. `zero_gamma` starts every residual block as the identity (Goyal et al. 2017, section
    5.1). `width` is the number of channels of conv1 (64); a smaller one makes a toy of the same shape.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        num_classes: int = 1000,
        residual: bool = True,
        shortcut: Shortcut = Shortcut.B,
        stride_on: StrideOn = StrideOn.CONV1X1,
        pool: Pool = Pool.CAFFE,
        zero_gamma: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"No ResNet of depth {depth}: choose one of {', '.join(map(str, BLOCKS_PER_STAGE))}.")
        if zero_gamma and not residual:
            raise ValueError("zero_gamma needs residual=True: a plain net would output zeros and never learn.")
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True) if pool is Pool.CAFFE else nn.MaxPool2d(3, 2, padding=1)

        in_channels = width
        stages = []
        for stage, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
            blocks = nn.Sequential()
            for index in range(num_blocks):
                # conv3_1, conv4_1 and conv5_1 halve the resolution; conv2_1 follows the pooling, which has.
                stride = 2 if stage > 0 and index == 0 else 1
                args = (in_channels, width * 2**stage, stride, shortcut if residual else None)
                block = BasicBlock(*args) if depth < 50 else Bottleneck(*args, stride_on)
                in_channels = width * 2**stage * block.expansion
                blocks.append(block)
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(in_channels, num_classes)
        self._initialize(zero_gamma)

    def _initialize(self, zero_gamma: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # N(0, 2/fan_in), as the paper's reference [13]; torchvision takes the fan-out.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif zero_gamma and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_bn.weight)
        # The paper does not say. Goyal et al. 2017, section 5.1: N(0, 0.01²), so that training starts at log(classes).
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → the last stage's output [N, 8·width·expansion, ⌈H/32⌉, ⌈W/32⌉] (224: 7×7)."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(features))))

    def classify(self, features: Tensor) -> Tensor:
        """features [N, C, h, w] of any h and w → logits [N, num_classes]: global average, then fc."""
        # pool5 is a 7×7 average (224 px); the mean over all pixels is the same and takes any image size.
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
