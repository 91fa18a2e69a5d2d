"""Train a CIFAR-10 network of the paper's section 4.2: ``python jobs/cifar10.py [RECIPE] --data URL --storage URL``.

A recipe is a function that returns the config; its docstring is its promise: command, hours and hardware, expected
error, sources. Any field can be changed on the command line. Errors are top-1 on the 10,000 test images after the
last step, as in the paper's Table 6: trained on all 50,000 others, which is a set of ``python -m data_prep.cifar10 …
--validation 0`` (without that option 5,000 are held back, on which the paper chose its schedule). Seeds of a recipe are
a campaign: ``jobs/campaign.py cifar10_resnet20``. No recipe has been run to its end on all of CIFAR-10 here yet;
benchmarks/RESULTS.md has what was run.
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
    TrackingConfig,
    TrainConfig,
    WarmupKind,
)

# -- Table 6 and Figure 6 -------------------------------------------------------------------------------------------


def resnet20() -> TrainConfig:
    """ResNet-20 as in the paper: batch 128 in two groups of 64 (its two GPUs), lr 0.1, a tenth of it from 32k and 48k
    iterations on, 64k in all, images padded by 4 pixels, random crop, flip, mean image, weight decay 1e-4. All 50,000
    images train and the test set validates: prepare with --validation 0.

    Run: python jobs/cifar10.py resnet20 --data /data/cifar10 --storage /runs
    Takes: 5–6 hours of 2 CPU cores (an estimate: 370–460 images/s, measured over 100 steps); no GPU was timed
    Expect: 8.75 % test error (paper, Table 6)
    """
    return TrainConfig(
        model=ModelConfig(family=Family.CIFAR_RESNET, depth=20),
        input=InputConfig(crop_px=32, crop_style=CropStyle.PADDED, colour_std=0.0, test_shorter_side_px=32),
        batch=BatchConfig(global_batch_size=128, bn_group_size=64),
        schedule=ScheduleConfig(max_steps=64_000, lr=0.1, policy=PolicyKind.STEPS, drop_steps=(32_000, 48_000)),
        rhythm=RhythmConfig(
            log_every_steps=100, validate_every_epochs=2, validation_batch_size=500, checkpoint_every_steps=2_000
        ),
        tracking=TrackingConfig(experiment="cifar10"),
    )


def resnet32() -> TrainConfig:
    """ResNet-32, otherwise as resnet20.

    Run: python jobs/cifar10.py resnet32 --data /data/cifar10 --storage /runs
    Takes: 8–10 hours of 2 CPU cores (an estimate: resnet20's rate, 1.7 times the multiply-adds)
    Expect: 7.51 % test error (paper, Table 6)
    """
    return _residual(32)


def resnet44() -> TrainConfig:
    """ResNet-44, otherwise as resnet20.

    Run: python jobs/cifar10.py resnet44 --data /data/cifar10 --storage /runs
    Takes: 12–15 hours of 2 CPU cores (an estimate: resnet20's rate, 2.4 times the multiply-adds)
    Expect: 7.17 % test error (paper, Table 6)
    """
    return _residual(44)


def resnet56() -> TrainConfig:
    """ResNet-56, otherwise as resnet20.

    Run: python jobs/cifar10.py resnet56 --data /data/cifar10 --storage /runs
    Takes: 15–19 hours of 2 CPU cores (an estimate: resnet20's rate, 3.1 times the multiply-adds)
    Expect: 6.97 % test error (paper, Table 6)
    """
    return _residual(56)


def resnet110() -> TrainConfig:
    """ResNet-110, otherwise as resnet20, with lr 0.01 until the training error is below 80 % (in the paper after about
    400 iterations), then 0.1.

    Run: python jobs/cifar10.py resnet110 --data /data/cifar10 --storage /runs
    Takes: 31–38 hours of 2 CPU cores (an estimate: resnet20's rate, 6.2 times the multiply-adds)
    Expect: 6.61 ± 0.16 % test error over 5 runs, the best 6.43 % (paper, Table 6)
    """
    return _warmed(_residual(110))


def resnet1202() -> TrainConfig:
    """ResNet-1202 (19.4 million parameters), as resnet110.

    Run: python jobs/cifar10.py resnet1202 --data /data/cifar10 --storage /runs
    Takes: 350–430 hours of 2 CPU cores (an estimate: resnet20's rate, 70 times the multiply-adds)
    Expect: 7.93 % test error (paper, Table 6), below 0.1 % in training (paper, section 4.2)
    """
    return _warmed(_residual(1202))


def resnet110_cold() -> TrainConfig:
    """ResNet-110 at lr 0.1 from the first step.

    Run: python jobs/cifar10.py resnet110_cold --data /data/cifar10 --storage /runs
    Takes: 31–38 hours of 2 CPU cores (an estimate: resnet20's rate, 6.2 times the multiply-adds)
    Expect: no number: below 90 % only after several epochs, then an error like resnet110's (paper, footnote 5)
    """
    return _residual(110)


def plain20() -> TrainConfig:
    """The plain network of 20 layers, otherwise as resnet20.

    Run: python jobs/cifar10.py plain20 --data /data/cifar10 --storage /runs
    Takes: 5–6 hours of 2 CPU cores (an estimate: resnet20's rate, the same multiply-adds)
    Expect: no number, a curve (paper, Figure 6)
    """
    return _plain(20)


def plain32() -> TrainConfig:
    """The plain network of 32 layers, otherwise as resnet20.

    Run: python jobs/cifar10.py plain32 --data /data/cifar10 --storage /runs
    Takes: 8–10 hours of 2 CPU cores (an estimate: resnet20's rate, 1.7 times the multiply-adds)
    Expect: no number, a curve (paper, Figure 6)
    """
    return _plain(32)


def plain44() -> TrainConfig:
    """The plain network of 44 layers, otherwise as resnet20.

    Run: python jobs/cifar10.py plain44 --data /data/cifar10 --storage /runs
    Takes: 12–15 hours of 2 CPU cores (an estimate: resnet20's rate, 2.4 times the multiply-adds)
    Expect: no number, a curve (paper, Figure 6)
    """
    return _plain(44)


def plain56() -> TrainConfig:
    """The plain network of 56 layers, otherwise as resnet20.

    Run: python jobs/cifar10.py plain56 --data /data/cifar10 --storage /runs
    Takes: 15–19 hours of 2 CPU cores (an estimate: resnet20's rate, 3.1 times the multiply-adds)
    Expect: no number: above plain20 in training and test, the degradation (paper, Figures 1 and 6)
    """
    return _plain(56)


def plain110() -> TrainConfig:
    """The plain network of 110 layers, otherwise as resnet20.

    Run: python jobs/cifar10.py plain110 --data /data/cifar10 --storage /runs
    Takes: 31–38 hours of 2 CPU cores (an estimate: resnet20's rate, 6.2 times the multiply-adds)
    Expect: an error above 60 % (paper, Figure 6)
    """
    return _plain(110)


# -- beyond the paper -----------------------------------------------------------------------------------------------


def resnet56_modern() -> TrainConfig:
    """ResNet-56 as it would be trained today: cosine from lr 0.2 after a linear warm-up of 1,000 steps, label smoothing
    0.1, weight decay 5e-4 (none on batch norm and biases), the weights' moving average (0.999) tested. The same 64k
    iterations.

    Run: python jobs/cifar10.py resnet56_modern --data /data/cifar10 --storage /runs
    Takes: 15–19 hours of 2 CPU cores (an estimate: resnet56's, without what the average costs)
    Expect: no error is promised (not in the paper, not run to its end)
    """
    base = resnet56()
    return replace(
        base,
        schedule=ScheduleConfig(
            max_steps=64_000,
            lr=0.2,
            policy=PolicyKind.COSINE,
            warmup=WarmupKind.LINEAR,
            warmup_lr=0.02,
            warmup_steps=1_000,
        ),
        optimizer=OptimizerConfig(weight_decay=5e-4, decay_batch_norm=False),
        regularization=RegularizationConfig(label_smoothing=0.1, average_decay=0.999),
    )


def short() -> TrainConfig:
    """ResNet-20 in 600 steps with drops at 300 and 450, for a small piece of the set and machines without a GPU.

    Run: python jobs/cifar10.py short --data /data/cifar10_part --storage /runs --placement.num-workers 2
    Takes: 3 minutes of 2 CPU cores (an estimate: resnet20's rate, without start and validation)
    Expect: 40.25 % test error on 800 images after training on 3,200 (one run, benchmarks/RESULTS.md)
    """
    base = resnet20()
    return replace(
        base,
        schedule=replace(base.schedule, max_steps=600, drop_steps=(300, 450)),
        rhythm=replace(base.rhythm, log_every_steps=25, checkpoint_every_steps=200, validation_batch_size=200),
    )


def _residual(depth: int) -> TrainConfig:
    return replace(resnet20(), model=ModelConfig(family=Family.CIFAR_RESNET, depth=depth))


def _plain(depth: int) -> TrainConfig:
    return replace(resnet20(), model=ModelConfig(family=Family.CIFAR_PLAIN, depth=depth))


def _warmed(config: TrainConfig) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, warmup=WarmupKind.UNTIL_ERROR, warmup_lr=0.01))


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        resnet1202,
        resnet110_cold,
        plain20,
        plain32,
        plain44,
        plain56,
        plain110,
        resnet56_modern,
        short,
    )
}


def main() -> int:
    return command_line.main(RECIPES, default="resnet20", data_variable="CIFAR10_DATA")


if __name__ == "__main__":
    sys.exit(main())
