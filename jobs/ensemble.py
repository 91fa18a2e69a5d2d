"""Average score files into an ensemble, and see what each member adds: no model is run.

    python jobs/ensemble.py --scores RUN/scores/….arrow RUN/scores/….arrow … --out URL [--greedy | --weights W …]

Give the files of all members and of all splits (val and test): members are told apart by their models. In OUT: the
averaged scores (a score file, from which jobs/submission.py writes), report.md and report.json, figures, and
ensemble.json, the manifest. The same command again changes nothing; with other files, what was in OUT is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.markdown import Markdown

from jobs import command_line
from orchestrator.code_version import code_version
from orchestrator.evaluation import ensemble, scores
from orchestrator.evaluation.ensemble import Choice
from orchestrator.storage import Storage


@dataclass(frozen=True)
class Arguments:
    """What is averaged."""

    scores: tuple[str, ...]
    """URLs of score files (….arrow), of all members and splits"""
    out: str
    """URL of the ensemble's folder"""
    greedy: bool = False
    """choose members and weights on the labelled images, with replacement"""
    weights: tuple[float, ...] = ()
    """one for each member, in the order in which the members are first named; empty: all alike"""
    folds: int = 5
    """of the cross-validation of the greedy choice"""
    seed: int = 0
    """deals images out to folds, and draws the intervals"""


def main() -> int:
    return command_line.launchable_as("ensemble", run, parse)


def parse(argv: Sequence[str]) -> Arguments:
    """What is typed. Raises ValueError for what contradicts itself."""
    config = (tyro.conf.FlagCreatePairsOff,)
    arguments = tyro.cli(Arguments, args=argv, prog="python jobs/ensemble.py", description=__doc__, config=config)
    if arguments.greedy and arguments.weights:
        raise ValueError("--greedy chooses the weights: leave --weights out, or --greedy")
    return arguments


def run(arguments: Arguments) -> int:
    """Average, and show what came of it. Returns the exit code."""
    choice = Choice.GREEDY if arguments.greedy else Choice.GIVEN if arguments.weights else Choice.PLAIN
    out = Storage(arguments.out)
    files = [scores.load(url) for url in arguments.scores]
    made = ensemble.build(
        files,
        out,
        choice=choice,
        weights=arguments.weights,
        num_folds=arguments.folds,
        seed=arguments.seed,
        code_version=code_version(),
    )
    show(made, out)
    if own := sum(ensemble.is_own(file, out) for file in files):
        print(f"note: {own} of the score files given are averages that were made in --out: they were left out")
    return 0


def show(made: ensemble.Ensemble, out: Storage) -> None:
    """The report in the terminal, and where everything is."""
    console = Console(highlight=False)
    console.print(Markdown(out.read("report.md").decode(), hyperlinks=False))
    for name in [*made.scores.values(), "report.md", *made.figures, ensemble.MANIFEST]:
        console.print(f"{out.url}/{name}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, interrupted="the same command goes on"))
