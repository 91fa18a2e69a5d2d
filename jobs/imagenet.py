"""Train one network on a prepared data set: ``python jobs/imagenet.py [RECIPE] --data URL --storage URL --name NAME``.

A recipe is a function that returns the config; its docstring is its promise: command, hours and hardware, expected
error, sources. Any field can be changed on the command line. Errors are on the ImageNet validation set; "paper" is
He et al. 2015, "the authors' released model" stands in github.com/KaimingHe/deep-residual-networks, fb.resnet.torch's
networks are those of the same depth. Hours do not count the tests that follow training. No recipe has been run to its
end on ImageNet here yet.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from jobs import command_line
from orchestrator.config import (
    BatchConfig,
    CropStyle,
    Family,
    InputConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyKind,
    RegularizationConfig,
    RhythmConfig,
    ScheduleConfig,
    Shortcut,
    StrideOn,
    TrainConfig,
    WarmupKind,
)

# -- Tables 2 to 4 --------------------------------------------------------------------------------------------------


def resnet50() -> TrainConfig:
    """ResNet-50 as in the paper: batch 256 in groups of 32, lr 0.1 divided at plateaus, 60e4 iterations (120 epochs),
    scale jitter, colour augmentation, mean image.

    Run: python jobs/imagenet.py resnet50 --data /data/ilsvrc2012 --storage /runs \
        --evaluation.protocols ten_crop multi_scale
    Takes: 28 hours of one H100 to train (an estimate: 1,533 images/s, measured over 30 steps)
    Expect: 22.85 / 6.71 % top-1 / top-5 error by 10-crop, 20.74 / 5.25 % by multi-scale (paper, Tables 3 and 4),
        24.7 / 7.8 % by 1-crop (the authors' released model), 24.0 % top-1 by 1-crop (fb.resnet.torch)
    """
    return TrainConfig()


def resnet18() -> TrainConfig:
    """ResNet-18 with projection shortcuts (B), otherwise as resnet50.

    Run: python jobs/imagenet.py resnet18 --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 13 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 30.4 % top-1 error by 1-crop, 28.2 % by 10-crop (fb.resnet.torch; the paper has option A alone)
    """
    return _depth(18)


def resnet34() -> TrainConfig:
    """ResNet-34 B, otherwise as resnet50.

    Run: python jobs/imagenet.py resnet34 --data /data/ilsvrc2012 --storage /runs \
        --evaluation.protocols ten_crop multi_scale
    Takes: 26 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 24.52 / 7.46 % top-1 / top-5 error by 10-crop, 21.84 / 5.71 % by multi-scale (paper, Tables 3 and 4),
        26.7 % top-1 by 1-crop (fb.resnet.torch)
    """
    return _depth(34)


def resnet101() -> TrainConfig:
    """ResNet-101, otherwise as resnet50.

    Run: python jobs/imagenet.py resnet101 --data /data/ilsvrc2012 --storage /runs \
        --evaluation.protocols ten_crop multi_scale
    Takes: 55 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 21.75 / 6.05 % top-1 / top-5 error by 10-crop, 19.87 / 4.60 % by multi-scale (paper, Tables 3 and 4),
        23.6 / 7.1 % by 1-crop (the authors' released model), 22.4 % top-1 by 1-crop (fb.resnet.torch)
    """
    return _depth(101)


def resnet152() -> TrainConfig:
    """ResNet-152, otherwise as resnet50.

    Run: python jobs/imagenet.py resnet152 --data /data/ilsvrc2012 --storage /runs \
        --evaluation.protocols ten_crop multi_scale
    Takes: 81 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 21.43 / 5.71 % top-1 / top-5 error by 10-crop, 19.38 / 4.49 % by multi-scale (paper, Tables 3 and 4),
        23.0 / 6.7 % by 1-crop (the authors' released model), 22.2 % top-1 by 1-crop (fb.resnet.torch)
    """
    return _depth(152)


def resnet18a() -> TrainConfig:
    """ResNet-18 with identity shortcuts and zero padding (A): the network of Table 2.

    Run: python jobs/imagenet.py resnet18a --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 13 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 27.88 % top-1 error by 10-crop (paper, Table 2)
    """
    return _shortcuts(18, Shortcut.A)


def resnet34a() -> TrainConfig:
    """ResNet-34 A, the network of Table 2.

    Run: python jobs/imagenet.py resnet34a --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 26 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 25.03 / 7.76 % top-1 / top-5 error by 10-crop (paper, Tables 2 and 3)
    """
    return _shortcuts(34, Shortcut.A)


def resnet34c() -> TrainConfig:
    """ResNet-34 with projections everywhere (C).

    Run: python jobs/imagenet.py resnet34c --data /data/ilsvrc2012 --storage /runs \
        --evaluation.protocols ten_crop multi_scale
    Takes: 28 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 24.19 / 7.40 % top-1 / top-5 error by 10-crop, 21.53 / 5.60 % by multi-scale (paper, Tables 3 and 4)
    """
    return _shortcuts(34, Shortcut.C)


def plain18() -> TrainConfig:
    """The plain network of 18 layers, otherwise as resnet50.

    Run: python jobs/imagenet.py plain18 --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 13 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 27.94 % top-1 error by 10-crop (paper, Table 2)
    """
    return _plain(18)


def plain34() -> TrainConfig:
    """The plain network of 34 layers, otherwise as resnet50.

    Run: python jobs/imagenet.py plain34 --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 26 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 28.54 / 10.02 % top-1 / top-5 error by 10-crop (paper, Tables 2 and 3): worse than plain18
    """
    return _plain(34)


def vgg16() -> TrainConfig:
    """VGG-16, the row above the plain networks in Table 3. Trained as Simonyan and Zisserman say: batch 256, lr 0.01
    divided at plateaus, weight decay 5e-4, dropout, 370,000 iterations; from He's initialization instead of a shallower
    net's weights.

    Run: python jobs/imagenet.py vgg16 --data /data/ilsvrc2012 --storage /runs --evaluation.protocols ten_crop
    Takes: 69 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 28.07 / 9.33 % top-1 / top-5 error by 10-crop (paper, Table 3: its authors' test of the published model)
    """
    base = resnet50()
    return replace(
        base,
        model=ModelConfig(family=Family.VGG, depth=16),
        schedule=replace(base.schedule, lr=0.01, max_steps=370_000),
        optimizer=replace(base.optimizer, weight_decay=5e-4),
    )


# -- footnotes ------------------------------------------------------------------------------------------------------


def plain34_3x() -> TrainConfig:
    """plain34 with three times the iterations.

    Run: python jobs/imagenet.py plain34_3x --data /data/ilsvrc2012 --storage /runs
    Takes: 79 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: no number: the degradation is still there (paper, footnote 3)
    """
    base = plain34()
    return replace(base, schedule=replace(base.schedule, max_steps=3 * base.schedule.max_steps))


def plain50() -> TrainConfig:
    """The plain network of 50 layers, of bottlenecks.

    Run: python jobs/imagenet.py plain50 --data /data/ilsvrc2012 --storage /runs
    Takes: 25 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: no number: plain networks of bottlenecks have degradation too (paper, footnote 4)
    """
    return _plain(50)


def plain101() -> TrainConfig:
    """The plain network of 101 layers, of bottlenecks, as plain50.

    Run: python jobs/imagenet.py plain101 --data /data/ilsvrc2012 --storage /runs
    Takes: 52 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: no number: plain networks of bottlenecks have degradation too (paper, footnote 4)
    """
    return _plain(101)


# -- beyond the paper -----------------------------------------------------------------------------------------------


def resnet50_large_batch() -> TrainConfig:
    """ResNet-50 (v1.5) at batch 8,192 in groups of 32 on up to 256 GPUs (Goyal et al. 2017): lr 0.1 · 8192 / 256, five
    epochs of linear warm-up, a tenth from epochs 30, 60 and 80 on, 90 in all, zero gamma, no decay on batch norm, a
    random area.

    Run: python jobs/imagenet.py resnet50_large_batch --data /data/ilsvrc2012 --storage /runs
    Takes: 22 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds; more GPUs were not timed)
    Expect: 23.74 ± 0.09 % top-1 error by 1-crop, where batch 256 has 23.60 ± 0.12 % (Goyal et al. 2017)
    """
    base = _usual()
    batch = BatchConfig(global_batch_size=8_192, bn_group_size=32)
    epoch = _TRAIN_IMAGES / batch.global_batch_size
    return replace(
        base,
        batch=batch,
        schedule=ScheduleConfig(
            max_epochs=90,
            lr=0.1 * batch.global_batch_size / 256,
            policy=PolicyKind.STEPS,
            drop_steps=tuple(round(at * epoch) for at in (30, 60, 80)),
            warmup=WarmupKind.LINEAR,
            warmup_lr=0.1,
            warmup_steps=round(5 * epoch),
        ),
        rhythm=RhythmConfig(log_every_steps=20, checkpoint_every_steps=200),
    )


def resnet50_modern() -> TrainConfig:
    """ResNet-50 (v1.5) with label smoothing 0.1, cosine from lr 0.4 at batch 1,024 after five epochs of warm-up, 120
    epochs, zero gamma, no decay on batch norm and biases, random area, and a moving average of the weights (0.9999),
    which is tested.

    Run: python jobs/imagenet.py resnet50_modern --data /data/ilsvrc2012 --storage /runs
    Takes: 30 hours of one H100 to train (an estimate: resnet50's rate, by multiply-adds)
    Expect: 22.33 / 6.18 % top-1 / top-5 error by 1-crop (GluonCV's ResNet50_v1b, trained so without the average and
        with colours changed more), where resnet50 has 24.7 / 7.8 % (the authors' released model)
    """
    base = _usual()
    batch = BatchConfig(global_batch_size=1_024, bn_group_size=128)
    return replace(
        base,
        batch=batch,
        schedule=ScheduleConfig(
            max_epochs=120,
            lr=0.4,
            policy=PolicyKind.COSINE,
            warmup=WarmupKind.LINEAR,
            warmup_lr=0.04,
            warmup_steps=round(5 * _TRAIN_IMAGES / batch.global_batch_size),
        ),
        regularization=RegularizationConfig(label_smoothing=0.1, average_decay=0.9999),
    )


# -- small ----------------------------------------------------------------------------------------------------------


def resnet18_64px() -> TrainConfig:
    """ResNet-18 on 64 × 64 pixels for small sets and machines without a GPU: batch 64 in two groups, 30 epochs.

    Run: python jobs/imagenet.py resnet18_64px --data /data/mini --storage /runs
    Takes: 4 minutes of 2 CPU cores on 800 images (measured: 4 min 13 s)
    Expect: 43.33 % top-1 error on 300 photographs of 10 classes (one run, benchmarks/RESULTS.md); chance is 90 %
    """
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
    """resnet18_64px on the 480 images that ``make demo`` generates, 20 epochs with a quick plateau rule.

    Run: python jobs/imagenet.py demo --data build/demo/data --storage build/demo/runs
    Takes: 3 minutes of 2 CPU cores (measured: 2 min 34 s)
    Expect: 50.00 % top-1 error on 80 images (one run, benchmarks/RESULTS.md); chance is 87.5 %
    """
    base = resnet18_64px()
    schedule = replace(base.schedule, max_epochs=20, plateau_window=3, plateau_min_steps=75, plateau_max_drops=2)
    return replace(base, schedule=schedule, rhythm=replace(base.rhythm, log_every_steps=10))


_TRAIN_IMAGES = 1_281_167  # of ILSVRC2012


def _depth(depth: int) -> TrainConfig:
    return replace(resnet50(), model=ModelConfig(depth=depth))


def _shortcuts(depth: int, shortcut: Shortcut) -> TrainConfig:
    return replace(resnet50(), model=ModelConfig(depth=depth, shortcut=shortcut))


def _plain(depth: int) -> TrainConfig:
    return replace(resnet50(), model=ModelConfig(family=Family.PLAIN, depth=depth))


def _usual() -> TrainConfig:
    """What recipes after the paper share."""
    base = resnet50()
    return replace(
        base,
        model=ModelConfig(stride_on=StrideOn.CONV3X3, zero_gamma=True),
        input=replace(base.input, crop_style=CropStyle.RANDOM_AREA),
        optimizer=OptimizerConfig(decay_batch_norm=False),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnet18a,
        resnet34a,
        resnet34c,
        plain18,
        plain34,
        vgg16,
        plain34_3x,
        plain50,
        plain101,
        resnet50_large_batch,
        resnet50_modern,
        resnet18_64px,
        demo,
    )
}


def main() -> int:
    return command_line.main(RECIPES, default="resnet50")


if __name__ == "__main__":
    sys.exit(main())
