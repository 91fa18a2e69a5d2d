"""Look at what a network is fed: ``python jobs/contact_sheet.py [RECIPE] --data URL --out sheet.png``.

Writes the first training batch of a recipe (mean added back), as the stream and DALI make it, with the class of each
image, and the first validation images below it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jobs import cifar10, command_line, imagenet
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.inputs import eval_input, train_input
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import sample_stream, views_of

RECIPES = {**imagenet.RECIPES, **cifar10.RECIPES}


@dataclass(frozen=True)
class Arguments:
    """What is drawn."""

    data: str
    """URL of the prepared data set"""
    recipe: Annotated[str, tyro.conf.Positional] = "resnet50"
    """recipe of jobs/imagenet.py or jobs/cifar10.py"""
    out: str = "contact_sheet.png"
    """PNG file to write"""
    step: int = 0
    """optimizer step whose batch is shown"""
    columns: int = 8
    """images in a row"""
    rows: int = 4
    """rows of training images; one row of validation images follows"""
    seed: int = 0
    """seed of the stream"""


def main() -> int:
    return command_line.launchable_as("contact-sheet", run, parse)


def parse(argv: Sequence[str]) -> Arguments:
    """What is typed. Raises ValueError for what cannot be drawn."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    if arguments.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {arguments.recipe!r}: choose one of {', '.join(RECIPES)}")
    if arguments.columns < 1 or arguments.rows < 1 or arguments.step < 0:
        raise ValueError("--columns and --rows must be at least 1, --step at least 0")
    return arguments


def run(arguments: Arguments) -> int:
    """Draw the sheet. Returns the exit code."""
    config = RECIPES[arguments.recipe]()
    data = DataSet(Storage(arguments.data))
    view, test_view, mean, axes = views_of(config, data)
    split, count = data.split("train"), arguments.columns * arguments.rows
    settings = DecodeSettings(device="cuda" if torch.cuda.is_available() else "cpu", num_threads=2)
    stream = sample_stream(replace(config, seed=arguments.seed), split)
    first = arguments.step * config.batch.global_batch_size
    source = train_input(
        data,
        split,
        stream,
        view,
        axes,
        mean,
        settings,
        lambda step: np.arange(first, first + count) + step * count,
        0,
        len(split),
    )
    training = next(source)
    source.close()
    checks = eval_input(data, data.split("val"), test_view, mean, settings, arguments.columns, 0)
    validation = next(checks.batches(0, 1))
    checks.close()
    shown = int(validation.valid.sum() + validation.num_unreadable)  # the rest of the batch is padding

    added_back = torch.from_numpy(mean.value.reshape(3, *mean.value.shape[1:] or (1, 1)))
    images = torch.cat([training.images.cpu().float(), validation.images[:shown].cpu().float()]) + added_back
    labels = torch.cat([training.labels, validation.labels[:shown]]).tolist()
    rows = arguments.rows + 1
    figure = Figure(figsize=(1.5 * arguments.columns, 1.75 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        axis = figure.add_subplot(rows, arguments.columns, number + 1)
        axis.imshow(image.clamp(0, 255).byte().permute(1, 2, 0).numpy())
        axis.set_axis_off()
        words = (data.manifest.classes[label].words or data.manifest.classes[label].wnid)[:24]
        axis.set_title(words if number < count else f"val: {words}", fontsize=7, parse_math=False)
    temporary = Path(arguments.out).with_suffix(".tmp.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in scripts that the font lacks show as boxes
        figure.savefig(temporary)
    temporary.replace(arguments.out)
    print(f"wrote {arguments.out}: {count} training images from stream position {first}, one row of validation images")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, interrupted="nothing was written"))
