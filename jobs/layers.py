"""Layer responses (the paper's Figure 7) and gradients (section 4.1) of runs that were trained.

    python jobs/layers.py --storage URL --name RUN [RUN …] [--data URL] [--num-images 2000] [--out layers.png]

Of each run's newest checkpoint, with the weights that are tested: the standard deviation of every 3×3 layer's output
after batch norm, over validation images; and the norms of the loss's gradient with respect to the layer's weights and
output, over training views in the run's batch-norm groups. All runs on a data set see the same images. What is measured
stays in the run's folder, layers/STEP-IMAGES.json, and is not measured again. --out is the figure of all of them.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import command_line
from orchestrator.config import TrainConfig
from orchestrator.control.checks import places_of, reading_storage
from orchestrator.evaluation import layer_figure
from orchestrator.evaluation.layer_figure import Curve
from orchestrator.evaluation.layer_record import LayerRecord, Measurement
from orchestrator.training.run import config_of


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    name: tuple[str, ...] = ()
    """names of the runs"""
    storage: str = ""
    """URL of the folder that holds all runs; empty: IMAGENET_STORAGE"""
    data: str = ""
    """URL of the runs' data set, where it is elsewhere now; empty: where each run has found it"""
    num_images: int = 2000
    """validation images over which responses are taken"""
    out: str = "layers.png"
    """PNG file to write"""


def main() -> int:
    return command_line.launchable_as("layers", run, parse)


def parse(argv: Sequence[str]) -> Arguments:
    """What is typed. Raises ValueError for what cannot be measured."""
    arguments = tyro.cli(
        Arguments,
        args=argv,
        default=Arguments(storage=os.environ.get("IMAGENET_STORAGE", "")),
        prog="python jobs/layers.py",
        description=__doc__,
    )
    if arguments.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, not {arguments.num_images}")
    for name in arguments.name or ("",):
        places_of(arguments.storage, name)
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out {out} is no PNG file: give a name that ends in .png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}: make it, or name another file")
    return arguments


def run(arguments: Arguments) -> int:
    """Measure what is not there yet, draw, and show numbers. Returns the exit code."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=120)  # a pipe has no width

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    # What cannot be measured is refused before any of the others takes its time.
    measurements = {name: _opened(arguments, name) for name in arguments.name}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cpus = len(os.sched_getaffinity(0))
    records = {name: each.record(device, cpus, say) for name, each in measurements.items()}
    curves = [Curve(name, each.is_plain, records[name].layers) for name, each in measurements.items()]
    temporary = Path(arguments.out).with_suffix(".tmp.png")
    temporary.write_bytes(layer_figure.png(curves))
    temporary.replace(arguments.out)
    console.print(_table(records))
    for name, each in measurements.items():
        say(f"{each.run.url}/{records[name].name}")
    say(arguments.out)
    return 0


def _opened(arguments: Arguments, name: str) -> Measurement:
    base = TrainConfig(storage=arguments.storage, name=name, data=arguments.data)
    with reading_storage(arguments.storage):
        return Measurement.of(config_of(places_of(arguments.storage, name)[1], base), arguments.num_images)


def _table(records: dict[str, LayerRecord]) -> Table:
    """Of each run the smallest, median and largest number of any layer."""
    table = Table("run", "step", box=SIMPLE_HEAD, caption="smallest, median and largest of all 3×3 layers")
    for title in ("response std", "|∇| of weights", "|∇| of responses"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, record in records.items():
        layers = record.layers
        table.add_row(
            *(Text(name), str(record.step)),
            _spread([layer.response_std for layer in layers]),
            _spread([layer.gradient_norm for layer in layers]),
            _spread([layer.response_gradient_norm for layer in layers]),
        )
    return table


def _spread(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, interrupted="what is measured is kept: the same command goes on"))
