"""Train one network on a prepared data set: ``python jobs/imagenet.py [RECIPE] --data URL --storage URL --name NAME``.

A recipe is a function that returns the config; its docstring is its promise. Any field can be changed on the command
line. Errors are top-1 on the ImageNet validation set; "paper" is He et al. 2015, "fb" is fb.resnet.torch's 1-crop
figure for networks of the same depth. No recipe has been run to its end on ImageNet here yet.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from jobs import command_line
from orchestrator.config import (
    BatchConfig,
    Family,
    InputConfig,
    ModelConfig,
    RhythmConfig,
    ScheduleConfig,
    Shortcut,
    TrainConfig,
)


def resnet50() -> TrainConfig:
    """ResNet-50 as in the paper: batch 256 in groups of 32, lr 0.1 divided at plateaus, 60e4 iterations, scale jitter,
    colour augmentation, mean image. Paper 24.7 % (1-crop), 22.9 % (10-crop); fb 24.0 %. 120 epochs on 1-8 GPUs."""
    return TrainConfig()


def resnet18() -> TrainConfig:
    """ResNet-18 with projection shortcuts (B), otherwise as resnet50. fb 30.4 % (1-crop), 28.2 % (10-crop)."""
    return _depth(18)


def resnet34() -> TrainConfig:
    """ResNet-34 B, otherwise as resnet50. Paper 24.5 % (10-crop); fb 26.7 %."""
    return _depth(34)


def resnet101() -> TrainConfig:
    """ResNet-101, otherwise as resnet50. Paper 23.6 % (1-crop), 21.8 % (10-crop); fb 22.4 %."""
    return _depth(101)


def resnet152() -> TrainConfig:
    """ResNet-152, otherwise as resnet50. Paper 23.0 % (1-crop), 21.4 % (10-crop); fb 22.2 %."""
    return _depth(152)


def resnet18a() -> TrainConfig:
    """ResNet-18 with identity shortcuts and zero padding: the network of Table 2. Paper 27.88 % (10-crop)."""
    return replace(resnet50(), model=ModelConfig(depth=18, shortcut=Shortcut.A))


def plain18() -> TrainConfig:
    """The plain network of 18 layers, otherwise as resnet50. Paper 27.94 % (10-crop)."""
    return replace(resnet50(), model=ModelConfig(family=Family.PLAIN, depth=18))


def plain34() -> TrainConfig:
    """The plain network of 34 layers, otherwise as resnet50. Paper 28.54 % (10-crop): worse than plain18."""
    return replace(resnet50(), model=ModelConfig(family=Family.PLAIN, depth=34))


def resnet18_64px() -> TrainConfig:
    """ResNet-18 on 64 × 64 pixels for small sets and machines without a GPU: batch 64 in two groups, 30 epochs."""
    return replace(
        resnet50(),
        model=ModelConfig(depth=18),
        input=InputConfig(crop_px=64, scale_min_px=73, scale_max_px=137, test_shorter_side_px=73),
        batch=BatchConfig(global_batch_size=64, bn_group_size=32),
        schedule=ScheduleConfig(
            max_epochs=30, lr=0.02, plateau_window=3, plateau_threshold_percent=0.5, plateau_min_steps=200
        ),
        rhythm=RhythmConfig(log_every_steps=25, checkpoint_every_steps=100),
    )


def demo() -> TrainConfig:
    """``make demo``: resnet18_64px on 480 generated images, 20 epochs with a quick plateau rule. Two to three
    minutes on 2 CPUs; the validation error falls from 87.5 % (chance) to about 50 %."""
    base = resnet18_64px()
    schedule = replace(base.schedule, max_epochs=20, plateau_window=3, plateau_min_steps=75, plateau_max_drops=2)
    return replace(base, schedule=schedule, rhythm=replace(base.rhythm, log_every_steps=10))


def _depth(depth: int) -> TrainConfig:
    return replace(resnet50(), model=ModelConfig(depth=depth))


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnet18a,
        plain18,
        plain34,
        resnet18_64px,
        demo,
    )
}


def main() -> int:
    return command_line.main(RECIPES, default="resnet50")


if __name__ == "__main__":
    sys.exit(main())
