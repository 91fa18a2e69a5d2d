"""The docstring of a recipe promises a command, hardware, hours, an error and a source: they hold what the paper, the
page and arithmetic say."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs import campaign, campaign_recipes, cifar10, command_line, imagenet
from jobs.command_line import promise_of
from orchestrator import models
from orchestrator.campaign.plan import CampaignConfig
from orchestrator.config import ModelConfig, Protocol, TrainConfig
from orchestrator.report import paper
from orchestrator.report.matching import recipe_of
from tests.docs.test_commands import understood
from tests.jobs.conftest import Run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproducing_the_paper.md"
JOBS = {"jobs/cifar10.py": cifar10, "jobs/imagenet.py": imagenet, "jobs/campaign.py": campaign}
ALL = [(job, name) for job, module in JOBS.items() for name in module.RECIPES]
WHAT, PROMISES = {}, {}
for key in ALL:
    WHAT[key], lines = promise_of(JOBS[key[0]].RECIPES[key[1]])
    PROMISES[key] = dict(line.partition(": ")[::2] for line in lines)
TAKES = re.compile(
    r"(?P<time>[\d–]+) (?P<unit>hours|minutes) of (?P<on>2 CPU cores|one H100)\b.* \((an estimate|measured)\b"
)
SOURCE = re.compile(
    r"\((paper, (Tables?|Figures?|footnote|section) \d|not in the paper|fb\.resnet\.torch|Goyal et al\.|GluonCV|"
    r"(one run|three campaigns), benchmarks/RESULTS\.md)"
)
PROTOCOLS = {"10-crop": Protocol.TEN_CROP, "multi-scale": Protocol.MULTI_SCALE}
# Small, not in the paper, or several of what the page's tables have.
NOT_ON_THE_PAGE = {"short", "small", "demo", "resnet18_64px", "resnet18", "resnet50_large_batch", "resnet50_modern"}
NOT_ON_THE_PAGE |= {name for name in campaign.RECIPES if name.startswith("cifar10_")}
# What the hours are computed from: see the page.
CIFAR10_IMAGES_PER_S, IMAGENET_IMAGES_PER_S = (460, 370), (1_533,)

every_recipe = pytest.mark.parametrize(("job", "name"), ALL)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


# -- each by itself -------------------------------------------------------------------------------------------------


@every_recipe
def test_it_promises_everything(job: str, name: str) -> None:
    promise = PROMISES[job, name]
    assert WHAT[job, name].endswith(".")
    assert list(promise) == ["Run", "Takes", "Expect"]
    assert TAKES.match(promise["Takes"])
    assert SOURCE.search(promise["Expect"])
    assert numbers(promise["Expect"]) or promise["Expect"].startswith("no ")


@every_recipe
def test_the_command_runs_this_recipe(job: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, expected = PROMISES[job, name]["Run"], PROMISES[job, name]["Expect"]
    for variable in ("RANK", "IMAGENET_DATA", "IMAGENET_STORAGE", "CIFAR10_DATA"):
        monkeypatch.delenv(variable, raising=False)
    python, program, recipe, *options = shlex.split(command)
    assert (python, program, recipe) == ("python", job, name)
    assert not understood(command.removeprefix("python "), monkeypatch)
    config: CampaignConfig | TrainConfig
    if job == "jobs/campaign.py":
        typed = campaign.parse([recipe, *options])
        config = typed.campaign.config
        assert (typed.campaign.members == typed.recipe.members) == ("--change" not in options)
    else:
        config = command_line.parse([recipe, *options], JOBS[job].RECIPES, default="", program="").config
        assert config.identity() == JOBS[job].RECIPES[name]().identity()
    assert config.data
    assert config.storage
    # What is promised is measured, and a single run is not tested for what is not promised.
    promised = {protocol for words, protocol in PROTOCOLS.items() if words in expected}
    assert promised <= set(config.evaluation.protocols)
    assert job == "jobs/campaign.py" or promised == set(config.evaluation.protocols)


def test_help_shows_each_promise_on_a_line_of_its_own(typed: Run) -> None:
    for job, module in JOBS.items():
        code, text = typed("--help", main=module.main)
        assert code == 0
        lines = [line.strip() for line in text.splitlines()]
        for name in module.RECIPES:
            for label, said in PROMISES[job, name].items():
                assert f"{label}: {said}" in lines
        if job == "jobs/campaign.py":
            assert "python jobs/campaign.py status --storage URL --name NAME [--watch]" in lines


# -- against the paper ----------------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, str, paper.Row]]:
    for table in (*paper.IMAGENET_TABLES, *paper.CIFAR_TABLES):
        for row in table.rows:
            yield table.title.split(":")[0].split(",")[0], row.network.label, row


@pytest.mark.parametrize(("title", "label", "row"), list(rows()))
def test_the_papers_errors_are_promised(title: str, label: str, row: paper.Row) -> None:
    """To the recipe that a report takes for the paper's."""
    job = "jobs/cifar10.py" if row.network.task is paper.Task.CIFAR10 else "jobs/imagenet.py"
    configs = {name: recipe() for name, recipe in JOBS[job].RECIPES.items()}
    found = recipe_of(row.network, list(configs.values()))
    (name,) = [name for name, config in configs.items() if config is found]
    expected = PROMISES[job, name]["Expect"]
    assert numbers(row.top1) <= numbers(expected), name
    assert not row.top5 or f"{row.top1} / {row.top5} %" in expected, name
    kind, number = title.split()
    assert re.search(rf"\(paper, {kind}s? (\d and )?{number}\b", expected), (name, title)


def test_campaigns_promise_the_errors_of_their_networks() -> None:
    assert f"{paper.ENSEMBLE_TOP5} % top-5" in PROMISES["jobs/campaign.py", "ilsvrc2015"]["Expect"]
    assert len(campaign_recipes.ilsvrc2015().members) == paper.ENSEMBLE_MEMBERS
    printed = {(row.network.family, row.network.depth): row.top1.split()[0] for row in paper.TABLE_6.rows}
    for name in [name for name in campaign.RECIPES if name.startswith("cifar10_")]:
        networks = {(m.config.model.family, m.config.model.depth) for m in campaign.RECIPES[name]().members}
        wanted = {printed[network] for network in networks if network in printed}
        assert wanted
        assert wanted <= numbers(PROMISES["jobs/campaign.py", name]["Expect"]), name


# -- against the page and what was measured -------------------------------------------------------------------------


def on_the_page(column: str) -> list[tuple[str, str, str, str]]:
    """Job, recipe, what the page's tables say of it in the column whose head begins so, and that head."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        if not (jobs := re.findall(r"recipes of `(\S+)`", " ".join(head))):
            continue
        (recipes,) = [n for n, cell in enumerate(head) if cell.startswith("recipes of")]
        (at,) = [n for n, cell in enumerate(head) if cell.startswith(column)]
        for cells in lines:
            commands = [name.removeprefix("python ") for name in re.findall(r"`([^`]+)`", cells[recipes])]
            each = cells[at].split(", ")
            values = each if len(each) == len(commands) else each * len(commands)
            for command, value in zip(commands, values, strict=True):
                job, name = command.split() if " " in command else (jobs[0], command)
                found.append((job, name, value, head[at].partition(" (")[0]))
    return found


def test_the_page_has_the_same_errors() -> None:
    printed = [(job, name, numbers(re.sub("`.*?`", "", cell))) for job, name, cell, _ in on_the_page("paper")]
    assert len({(job, name) for job, name, errors in printed if errors}) == 18
    for job, name, errors in printed:
        assert errors <= numbers(PROMISES[job, name]["Expect"]), name


def test_the_page_has_the_same_hours() -> None:
    cells = on_the_page("hours")
    assert {(job, name) for job, name, *_ in cells} == set(ALL) - {key for key in ALL if key[1] in NOT_ON_THE_PAGE}
    for job, name, cell, head in cells:
        assert cell == "as above" or PROMISES[job, name]["Takes"].startswith(f"{cell} {head}"), name


@every_recipe
def test_what_was_measured_is_recorded(job: str, name: str) -> None:
    """Parts of a promise that name the page of measurements, and times that were measured to the second."""
    promise = PROMISES[job, name]
    recorded = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    parts = [part for part in promise["Expect"].split("; ") if "RESULTS.md" in part]
    for number in numbers(" ".join(parts)):
        assert number in numbers(recorded), number
    for time in re.findall(r"\d+ min \d+ s", promise["Takes"]):
        assert time in recorded


@functools.cache
def flops(m: ModelConfig, px: int, classes: int) -> int:
    with torch.device("meta"):
        network = models.build(
            m.family, m.depth, num_classes=classes, image_size=px, shortcut=m.shortcut, stride_on=m.stride_on
        )
    return models.count_flops(network, px)


def times_the_multiply_adds(config: TrainConfig, base: TrainConfig, classes: int) -> float:
    ours, others = (flops(each.model, each.input.crop_px, classes) for each in (config, base))
    return ours / others


def hours_of(config: TrainConfig, images_per_s: float, base: TrainConfig, scale: paper.Scale) -> float:
    """At the rate of ``base``, in proportion to multiply-adds."""
    s = config.schedule
    images = s.max_epochs * scale.images if s.max_epochs else s.max_steps * config.batch.global_batch_size
    return images / images_per_s / 3600 * times_the_multiply_adds(config, base, scale.classes)


@pytest.mark.parametrize(("job", "name"), [key for key in ALL if "an estimate" in PROMISES[key].get("Takes", "")])
def test_estimates_follow_from_measured_rates(job: str, name: str) -> None:
    takes = TAKES.match(PROMISES[job, name]["Takes"])
    assert takes
    made = JOBS[job].RECIPES[name]()
    configs = [made] if isinstance(made, TrainConfig) else [member.config for member in made.members]
    if takes["on"] == "one H100":
        base, rates, task = imagenet.resnet50(), IMAGENET_IMAGES_PER_S, paper.Task.IMAGENET
    else:
        base, rates, task = cifar10.resnet20(), CIFAR10_IMAGES_PER_S, paper.Task.CIFAR10
    times = [sum(hours_of(config, rate, base, task.scale) for config in configs) for rate in rates]
    if takes["unit"] == "minutes":
        times = [60 * time for time in times]
    if of_eight := re.search(r", (\d+) of eight,", PROMISES[job, name]["Takes"]):
        assert of_eight[1] == f"{times[0] / 8:.0f}"
    rounded = [f"{round(time, -1 if time >= 100 else None):.0f}" for time in times]
    assert takes["time"] == "–".join(dict.fromkeys(rounded))


def test_the_rates_are_those_that_were_measured() -> None:
    page = " ".join(PAGE.read_text().split())
    assert "370 to 460 images/s" in page
    assert "1,533 images/s" in page
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert "370 to 460 images/s" in results
    assert "| 32 (the paper) | 1,533 (" in results
    assert "370–460 images/s" in PROMISES["jobs/cifar10.py", "resnet20"]["Takes"]
    assert "1,533 images/s" in PROMISES["jobs/imagenet.py", "resnet50"]["Takes"]
    ratios = re.search(r"of which ([\d, and]+) layers have ([\d., and]+) times as many", page)
    assert ratios
    depths, times = (re.split(", | and ", part) for part in ratios.groups())
    for depth, ratio in zip(depths, times, strict=True):
        for name in {f"resnet{depth}", f"plain{depth}"} & cifar10.RECIPES.keys():
            assert f" {ratio} times the multiply-adds" in PROMISES["jobs/cifar10.py", name]["Takes"]
            found = times_the_multiply_adds(cifar10.RECIPES[name](), cifar10.resnet20(), 10)
            assert ratio == (f"{found:.1f}" if found < 10 else f"{found:.0f}")
