"""Which run is which network of the paper, and how far it is from the paper's: decided by what a run is. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from orchestrator.campaign.spread import seeds_of
from orchestrator.config import Family, ModelConfig, Shortcut, TrainConfig
from orchestrator.report.findings import DataFacts, Run
from orchestrator.report.paper import Network, Scale, Task
from orchestrator.report.tested import Test

# What the sizes tell, or what changes no number: not among the other settings.
_TOLD = {"seed", "rhythm.log_every_steps", "rhythm.checkpoint_every_steps"}
_TOLD |= {"model.family", "model.depth", "model.shortcut", "model.factory"}
_TOLD |= {"input.crop_px", "schedule.max_steps", "schedule.max_epochs"}


def fits(network: Network, model: ModelConfig, data: DataFacts) -> bool:
    """Whether ``model`` is ``network``, trained for its task or on a part of its images or classes.

    A data set that cannot be read any more, and of which nothing tells the name, is taken for the network's.
    """
    return is_network(network, model) and is_of_task(network.task, data)


def is_network(network: Network, model: ModelConfig) -> bool:
    """Whether ``model`` is ``network``, whatever it is trained on."""
    if model.factory or (model.family, model.depth) != (network.family, network.depth):
        return False
    return model.family is not Family.RESNET or (model.shortcut or Shortcut.B) is network.shortcut


def is_of_task(task: Task, data: DataFacts) -> bool:
    """Whether the data set is the task's, or may be: by its name and, of CIFAR-10, its number of classes."""
    named = not data.name or any(mark in data.name.lower() for mark in task.marks)
    return named and (task is not Task.CIFAR10 or data.classes in (None, task.scale.classes))


# -- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, on one data set, in the order in which they were found."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def by_seed(self) -> tuple[Run, ...]:
        """One run of each seed, the one that has come farthest: a repetition is no further sample."""
        found: dict[int, Run] = {}
        for run in self.runs:
            old = found.get(run.config.seed)
            if old is None or (run.is_finished, run.step) > (old.is_finished, old.step):
                found[run.config.seed] = run
        return tuple(found.values())

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.by_seed if run.is_finished)

    @property
    def counted(self) -> tuple[Run, ...]:
        """The finished runs; while there are none, all: unfinished ones do not mix into a mean."""
        return self.finished or self.by_seed

    @property
    def images_seen(self) -> int:
        """By the run that has come farthest."""
        return max(run.step * run.config.batch.global_batch_size for run in self.runs)

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """Finite ones, of the runs that count."""
        found = [of(run) for run in self.counted]
        return [value for value in found if value is not None and math.isfinite(value)]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The runs, those together that are one but for the seed; the largest training first."""
    by_data: dict[str, dict[str, Run]] = {}
    for run in runs:
        by_data.setdefault(run.data.sha256, {})[run.url] = run
    found = [
        Group(tuple(of_data[url] for url in urls))
        for of_data in by_data.values()
        for urls in seeds_of({url: run.config for url, run in of_data.items()})
    ]
    return sorted(found, key=lambda group: -group.images_seen)


def told(values: Sequence[float]) -> str:
    """``8.75 ± 0.10 (5 seeds)``; the deviation is of the sample (n − 1)."""
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed)" if values else ""
    return f"{mean(values):.2f} ± {stdev(values):.2f} ({len(values)} seeds)"


# -- against the paper ----------------------------------------------------------------------------------------------


def against(run: Run, scale: Scale | None, test: Test | None = None) -> str:
    """The size of a run, each number that is not the paper's beside it; None: of the paper's there is none.

    test: whose images count, where it is not the validation in training that the run is judged by.
    """
    data, paper = run.data, scale or Scale(0, 0, 0, 0, 0)
    is_test = test.split == "test" if test is not None else data.validation_is_test is True
    on = "test images" if is_test else "validation images"
    sizes = (
        ("images", data.train_images, paper.images),
        ("classes", data.classes, paper.classes),
        ("px", run.config.input.crop_px, paper.px),
        ("steps", run.steps, paper.steps),
        (on, test.images if test else data.validation_images, paper.tested_images),
    )
    parts = []
    for what, ours, papers in sizes:
        if ours is None:
            parts.append(f"{what} not known")
        elif scale is None:
            parts.append(f"{ours:,} {what}")
        elif what == on and on != scale.tested_on:
            parts.append(f"{ours:,} {what} instead of {papers:,} {scale.tested_on}")
        elif ours != papers:
            parts.append(f"{ours:,} of {papers:,} {what}")
    return ", ".join(parts) or "as in the paper"


def recipe_of(network: Network, recipes: Sequence[TrainConfig]) -> TrainConfig:
    """The first of ``recipes`` that trains ``network``; where none does, the first of its task with that network."""
    for recipe in recipes:
        if is_network(network, recipe.model):
            return recipe
    families = (Family.CIFAR_RESNET, Family.CIFAR_PLAIN)
    base = next(each for each in recipes if (each.model.family in families) is (network.task is Task.CIFAR10))
    return replace(base, model=ModelConfig(network.family, network.depth, network.shortcut))


def settings(recipe: TrainConfig, run: Run) -> list[str]:
    """What a run sets otherwise than the paper's ``recipe``, sizes apart: ``schedule.lr: 0.02 (0.1)``."""
    return list(_differences(recipe.identity(), run.config.identity(), ""))


def _differences(papers: Mapping[str, Any], ours: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted(papers.keys() | ours.keys()):
        a, b, name = papers.get(key), ours.get(key), f"{prefix}{key}"
        if name in _TOLD:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {json.dumps(b)} ({json.dumps(a)})")
    return found
