"""What the paper reports, as data: its tables 2 to 6, and what its figures show. Numbers are percent, as printed in the
tables of Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun, arXiv:1512.03385)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from orchestrator.config import Family, Protocol, Shortcut

SOURCE = "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, arXiv:1512.03385"


@dataclass(frozen=True)
class Scale:
    """The size of an experiment: images and classes of its training set, side of what the network sees in pixels,
    optimizer steps, and images on which errors are measured; tested_on: which these are."""

    images: int
    classes: int
    px: int
    steps: int
    tested_images: int
    tested_on: str = "validation images"


class Task(Enum):
    """What is trained on."""

    IMAGENET = "ImageNet"
    CIFAR10 = "CIFAR-10"

    @property
    def marks(self) -> tuple[str, ...]:
        """Of which one is part of the name of such a data set, in lower case."""
        return ("imagenet", "ilsvrc") if self is Task.IMAGENET else ("cifar",)

    @property
    def scale(self) -> Scale:
        """Sections 3.4, 4.1 and 4.2."""
        if self is Task.IMAGENET:
            return Scale(images=1_281_167, classes=1000, px=224, steps=600_000, tested_images=50_000)
        return Scale(50_000, classes=10, px=32, steps=64_000, tested_images=10_000, tested_on="test images")


@dataclass(frozen=True)
class Network:
    """A network as the paper names it. shortcut: its option, of residual networks on ImageNet."""

    label: str
    family: Family
    depth: int
    shortcut: Shortcut | None = None

    @property
    def task(self) -> Task:
        return Task.CIFAR10 if self.family in (Family.CIFAR_RESNET, Family.CIFAR_PLAIN) else Task.IMAGENET


@dataclass(frozen=True)
class Row:
    """One network's errors, percent; "" where the paper has none. parameters: as printed."""

    network: Network
    top1: str
    top5: str = ""
    parameters: str = ""


@dataclass(frozen=True)
class PaperTable:
    """One table. protocol: how its networks were tested, on the validation split; None: as validation in training does.

    key: an anchor; has_top5: whether the paper gives top-5 errors too.
    """

    key: str
    title: str
    protocol: Protocol | None
    rows: tuple[Row, ...]
    has_top5: bool = True


def _plain(depth: int) -> Network:
    return Network(f"plain-{depth}", Family.PLAIN, depth)


def _resnet(depth: int, shortcut: Shortcut) -> Network:
    return Network(f"ResNet-{depth} {shortcut.value}", Family.RESNET, depth, shortcut)


def _cifar(depth: int) -> Network:
    return Network(f"ResNet-{depth}", Family.CIFAR_RESNET, depth)


def _cifar_plain(depth: int) -> Network:
    return Network(f"plain-{depth}", Family.CIFAR_PLAIN, depth)


TABLE_2 = PaperTable(
    "table-2",
    "Table 2: plain against residual networks, ImageNet validation, 10-crop",
    Protocol.TEN_CROP,
    (
        Row(_plain(18), "27.94"),
        Row(_plain(34), "28.54"),
        Row(_resnet(18, Shortcut.A), "27.88"),
        Row(_resnet(34, Shortcut.A), "25.03"),
    ),
    has_top5=False,
)
TABLE_3 = PaperTable(
    "table-3",
    "Table 3: ImageNet validation, 10-crop",
    Protocol.TEN_CROP,
    (
        Row(Network("VGG-16", Family.VGG, 16), "28.07", "9.33"),
        Row(_plain(34), "28.54", "10.02"),
        Row(_resnet(34, Shortcut.A), "25.03", "7.76"),
        Row(_resnet(34, Shortcut.B), "24.52", "7.46"),
        Row(_resnet(34, Shortcut.C), "24.19", "7.40"),
        Row(_resnet(50, Shortcut.B), "22.85", "6.71"),
        Row(_resnet(101, Shortcut.B), "21.75", "6.05"),
        Row(_resnet(152, Shortcut.B), "21.43", "5.71"),
    ),
)
TABLE_4 = PaperTable(
    "table-4",
    "Table 4: single models, ImageNet validation, multi-scale",
    Protocol.MULTI_SCALE,
    (
        Row(_resnet(34, Shortcut.B), "21.84", "5.71"),
        Row(_resnet(34, Shortcut.C), "21.53", "5.60"),
        Row(_resnet(50, Shortcut.B), "20.74", "5.25"),
        Row(_resnet(101, Shortcut.B), "19.87", "4.60"),
        Row(_resnet(152, Shortcut.B), "19.38", "4.49"),
    ),
)
# Its only row of residual networks: "six models of different depth … (only two 152-layer ones)", section 4.1.
TABLE_5_KEY, TABLE_5_TITLE = "table-5", "Table 5: ensembles, ImageNet"
ENSEMBLE_LABEL, ENSEMBLE_TOP5, ENSEMBLE_MEMBERS = "ResNet (ILSVRC'15), six models", "3.57", 6
TABLE_6 = PaperTable(
    "table-6",
    "Table 6: CIFAR-10 test set",
    None,
    (
        Row(_cifar(20), "8.75", parameters="0.27M"),
        Row(_cifar(32), "7.51", parameters="0.46M"),
        Row(_cifar(44), "7.17", parameters="0.66M"),
        Row(_cifar(56), "6.97", parameters="0.85M"),
        Row(_cifar(110), "6.43 (6.61 ± 0.16, 5 runs)", parameters="1.7M"),
        Row(_cifar(1202), "7.93", parameters="19.4M"),
    ),
    has_top5=False,
)
# The paper gives these as curves alone, and of plain-110 that its error is higher than 60 % (Figure 6).
FIGURE_6_PLAIN = PaperTable(
    "plain-cifar",
    "Figure 6, left: plain networks on CIFAR-10 (the paper has curves, no numbers)",
    None,
    (
        Row(_cifar_plain(20), ""),
        Row(_cifar_plain(32), ""),
        Row(_cifar_plain(44), ""),
        Row(_cifar_plain(56), ""),
        Row(_cifar_plain(110), "> 60"),
    ),
    has_top5=False,
)
IMAGENET_TABLES = (TABLE_2, TABLE_3, TABLE_4)
CIFAR_TABLES = (TABLE_6, FIGURE_6_PLAIN)


@dataclass(frozen=True)
class Panel:
    """One half of a figure: curves of networks."""

    title: str
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class PaperFigure:
    """A figure of error curves. task: whose runs are drawn."""

    key: str
    title: str
    task: Task
    panels: tuple[Panel, ...]


_CIFAR_DEPTHS = (20, 32, 44, 56)
FIGURE_1 = PaperFigure(
    "figure-1",
    "Figure 1: deeper plain networks on CIFAR-10",
    Task.CIFAR10,
    (Panel("plain networks", (_cifar_plain(20), _cifar_plain(56))),),
)
FIGURE_4 = PaperFigure(
    "figure-4",
    "Figure 4: training on ImageNet",
    Task.IMAGENET,
    (
        Panel("plain networks", (_plain(18), _plain(34))),
        Panel("residual networks", (_resnet(18, Shortcut.A), _resnet(34, Shortcut.A))),
    ),
)
FIGURE_6 = PaperFigure(
    "figure-6",
    "Figure 6: training on CIFAR-10",
    Task.CIFAR10,
    (
        Panel("plain networks", tuple(map(_cifar_plain, _CIFAR_DEPTHS))),
        Panel("residual networks", tuple(map(_cifar, (*_CIFAR_DEPTHS, 110)))),
        Panel("110 and 1202 layers", (_cifar(110), _cifar(1202))),
    ),
)
FIGURE_7_KEY, FIGURE_7_TITLE = "figure-7", "Figure 7: standard deviation of layer responses, CIFAR-10"
ERROR_FIGURES = (FIGURE_4, FIGURE_1, FIGURE_6)
