"""Test a run that was trained: ``python jobs/evaluate.py --storage URL --name NAME --evaluation.protocols ten_crop``.

The network, and all that decides what it sees, are the run's own: nothing is repeated here. Of a run that has not ended
its newest checkpoint is tested (or its best one so far, with ``--evaluation.checkpoint best``), and it is not trained
any further. A test that is done is not done again, and one that was interrupted goes on. ``--data`` names another data
set of the same classes, once the model is finished; without it the run's own is scored.

The same options on ``jobs/imagenet.py`` do it at the end of training, by the workers that trained.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cluster.command_line import Described
from jobs import command_line
from orchestrator.config import EvaluationConfig, GuardConfig, InputConfig, PlacementConfig, TrackingConfig, TrainConfig
from orchestrator.control.checks import places_of, reading_storage
from orchestrator.training.run import config_of


@dataclass(frozen=True)
class Reading:
    """How images are read."""

    max_undecodable: int = InputConfig().max_undecodable
    """undecodable images, not known from the preparation, that a test puts up with"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    storage: str = ""
    """URL of the folder that holds all runs; empty: IMAGENET_STORAGE"""
    name: str = ""
    """name of the run"""
    data: str = ""
    """URL of the data set that is scored; empty: the run's own"""
    evaluation: Annotated[EvaluationConfig, tyro.conf.FlagConversionOff] = field(default_factory=EvaluationConfig)
    input: Reading = field(default_factory=Reading)
    placement: Annotated[PlacementConfig, tyro.conf.FlagConversionOff] = field(default_factory=PlacementConfig)
    guard: Annotated[GuardConfig, tyro.conf.FlagConversionOff] = field(default_factory=GuardConfig)
    tracking: Annotated[TrackingConfig, tyro.conf.FlagConversionOff] = field(default_factory=TrackingConfig)
    dry_run: bool = False
    """score nothing: tell what a start would do, and check all that it needs"""


def parse(argv: Sequence[str]) -> command_line.Command:
    """Raises ValueError, saying what to do; prints help or what is wrong and exits (0, 2) as argparse does."""
    options = tyro.cli(
        Options,
        args=list(argv),
        default=Options(storage=os.environ.get("IMAGENET_STORAGE", "")),
        prog="python jobs/evaluate.py",
        description=inspect.cleandoc(__doc__ or ""),
        config=(tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff),
    )
    _, run = places_of(options.storage, options.name)
    asked = options.evaluation
    if not asked.protocols and not asked.precise_bn_images:
        raise ValueError(
            "no test is asked for: give --evaluation.protocols one_crop, ten_crop or multi_scale, or several"
        )
    base = TrainConfig(
        data=options.data,
        storage=options.storage,
        name=options.name,
        input=InputConfig(max_undecodable=options.input.max_undecodable),
        evaluation=asked,
        placement=options.placement,
        guard=options.guard,
        tracking=options.tracking,
    )
    with reading_storage(options.storage):
        config = config_of(run, base)
    return command_line.Command(config, None, options.dry_run, trains=False)


def main() -> int:
    job = command_line.launchable(
        lambda: command_line.run(parse(sys.argv[1:])), lambda argv: Described(parse(argv).config.name)
    )
    return command_line.exit_code(job, interrupted="what is scored is kept: the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
