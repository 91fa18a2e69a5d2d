"""Which run stands in which row, and what is said of it: on made-up runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jobs import cifar10, imagenet
from orchestrator.config import Family, InputConfig, ModelConfig, ScheduleConfig, Shortcut, TrainConfig
from orchestrator.control.curves import Curve
from orchestrator.report import paper
from orchestrator.report.figures import mean_curve, shown, spread
from orchestrator.report.findings import DataFacts, Findings, Run, Test
from orchestrator.report.matching import against, fits, groups_of, recipe_of, settings, told
from orchestrator.report.paper import FIGURE_4, Network, Task
from orchestrator.report.tables import Tables, tables

RECIPES = [recipe() for recipe in (*imagenet.RECIPES.values(), *cifar10.RECIPES.values())]
ILSVRC = DataFacts("1" * 64, "ilsvrc2012", 1_281_167, 50_000, 1000)
CIFAR = DataFacts("2" * 64, "cifar10", 50_000, 10_000, 10)


def made(name: str, config: TrainConfig, data: DataFacts = CIFAR, **fields: Any) -> Run:
    known = {"step": 64_000, "steps": 64_000, "is_finished": True, "curve": Curve({4: 50.0}, {4: 60.0})}
    known |= {"last_top1": 8.0, "last_top5": 1.0, "best_top1": 7.5, "seconds": 60.0, "bottleneck": "input"}
    return Run(url=f"/runs/{name}", name=name, campaign="", config=config, data=data, **(known | fields))


def rows_of(all_tables: Tables, key: str) -> dict[str, list[list[str]]]:
    """Texts of the cells of a table, by network; a number that is a link counts as text."""
    (table,) = [table for table in all_tables.results if table.key == key]
    found: dict[str, list[list[str]]] = {}
    for row in table.rows:
        texts = [cell.text or (cell.links[0].text if cell.links else "") for cell in row.cells]
        found.setdefault(texts[0], []).append(texts[1:])
    return found


# -- a run and a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (ModelConfig(depth=34), ["ResNet-34 B"]),
        (ModelConfig(depth=34, shortcut=Shortcut.B), ["ResNet-34 B"]),
        (ModelConfig(depth=34, shortcut=Shortcut.A), ["ResNet-34 A"]),
        (ModelConfig(depth=34, shortcut=Shortcut.C), ["ResNet-34 C"]),
        (ModelConfig(depth=18), []),
        (ModelConfig(depth=18, shortcut=Shortcut.A), ["ResNet-18 A"]),
        (ModelConfig(depth=50, shortcut=Shortcut.A), []),
        (ModelConfig(depth=152), ["ResNet-152 B"]),
        (ModelConfig(Family.PLAIN, 34), ["plain-34"]),
        (ModelConfig(Family.VGG, 16), ["VGG-16"]),
        (ModelConfig(Family.VGG, 19), []),
        (ModelConfig(depth=34, factory="mine:net"), []),
        (ModelConfig(Family.CIFAR_RESNET, 20), []),
    ],
)
def test_imagenet_rows(model: ModelConfig, labels: list[str]) -> None:
    networks = {row.network for table in paper.IMAGENET_TABLES for row in table.rows}
    assert [network.label for network in networks if fits(network, model, ILSVRC)] == labels


def test_the_data_set_decides_too() -> None:
    (r34,) = [row.network for row in paper.TABLE_4.rows if row.network.label == "ResNet-34 B"]
    model = ModelConfig(depth=34)
    assert fits(r34, model, replace(ILSVRC, train_images=480, classes=8))  # a part, told as such
    assert not fits(r34, model, DataFacts("3" * 64, "cats-and-dogs", 240, 80, 2))
    assert not fits(r34, model, CIFAR)
    assert fits(r34, model, DataFacts("4" * 64))  # nothing tells what it was
    r20, net = paper.TABLE_6.rows[0].network, ModelConfig(Family.CIFAR_RESNET, 20)
    assert fits(r20, net, CIFAR)
    assert not fits(r20, net, replace(CIFAR, name="cifar100", classes=100))
    assert not fits(r20, net, ILSVRC)


def test_names_decide_nothing() -> None:
    run = made("resnet152", replace(cifar10.plain20(), recipe="resnet110"))
    all_tables = tables(Findings((run,)), RECIPES, {})
    assert rows_of(all_tables, "plain-cifar")["plain-20"][0][3] == "8.00 (1 seed)"
    assert {cells[0][3] for cells in rows_of(all_tables, "table-6").values()} == {"not run"}


# -- groups ---------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one() -> None:
    base = cifar10.resnet20()
    runs = [made(f"s{seed}", replace(base, seed=seed), last_top1=8.0 + seed) for seed in range(3)]
    runs += [made("again", replace(base, seed=2), last_top1=10.0)]  # no further sample
    runs += [made("elsewhere", replace(base, seed=7), data=replace(CIFAR, sha256="9" * 64))]
    runs += [made("other", replace(base, schedule=replace(base.schedule, lr=0.2)))]
    groups = groups_of(runs)
    assert [[run.name for run in group.runs] for group in groups] == [
        ["s0", "s1", "s2", "again"],
        ["other"],
        ["elsewhere"],
    ]
    assert told(groups[0].values(lambda run: run.last_top1)) == "9.00 ± 1.00 (3 seeds)"
    assert told([8.756]) == "8.76 (1 seed)"
    assert told([]) == ""


def test_of_a_seed_that_ran_twice_the_farther_run_counts() -> None:
    base = cifar10.resnet20()
    half = made("half", base, is_finished=False, step=64_000, last_top1=50.0)
    whole = made("whole", base, step=60_000, last_top1=8.0)
    for runs in ([half, whole], [whole, half]):
        (group,) = groups_of(runs)
        assert [run.name for run in group.by_seed] == ["whole"]


def test_the_longest_training_comes_first() -> None:
    base = cifar10.resnet20()
    short = replace(base, schedule=replace(base.schedule, max_steps=600, drop_steps=(300,)))
    groups = groups_of([made("short", short, step=600), made("long", base)])
    assert [group.first.name for group in groups] == ["long", "short"]


def test_an_unfinished_run_is_in_no_mean() -> None:
    base = cifar10.resnet20()
    runs = [made("a", base), made("b", replace(base, seed=1), is_finished=False, step=10, last_top1=90.0)]
    assert groups_of(runs)[0].values(lambda run: run.last_top1) == [8.0]
    row = rows_of(tables(Findings(tuple(runs)), RECIPES, {}), "table-6")["ResNet-20"][0]
    assert row[3] == "8.00 (1 seed); 1 more unfinished"
    row = rows_of(tables(Findings((runs[1],)), RECIPES, {}), "table-6")["ResNet-20"][0]
    assert row[3] == "90.00 (1 seed), unfinished: step 10 of 64,000"


# -- against the paper ----------------------------------------------------------------------------------------------


def test_what_is_smaller_is_told() -> None:
    full = made("r", replace(imagenet.resnet34()), ILSVRC, step=600_000, steps=600_000)
    assert against(full, Task.IMAGENET.scale) == "as in the paper"
    small = made("s", imagenet.resnet18_64px(), replace(ILSVRC, train_images=480, classes=8), steps=60)
    said = against(small, Task.IMAGENET.scale)
    assert said == "480 of 1,281,167 images, 8 of 1,000 classes, 64 of 224 px, 60 of 600,000 steps"
    assert against(small, None) == "480 images, 8 classes, 64 px, 60 steps, 50,000 validation images"
    unknown = made("u", imagenet.resnet34(), DataFacts("5" * 64), steps=None)
    assert "images not known, classes not known, steps not known" in against(unknown, Task.IMAGENET.scale)


def test_other_settings_are_told() -> None:
    (network,) = [row.network for row in paper.TABLE_6.rows if row.network.depth == 56]
    recipe = recipe_of(network, RECIPES)
    assert recipe.model == cifar10.resnet56().model
    assert settings(recipe, made("r", replace(cifar10.resnet56(), seed=5))) == []
    found = settings(recipe, made("m", cifar10.resnet56_modern()))
    assert "regularization.label_smoothing: 0.1 (0.0)" in found
    assert 'schedule.policy: "cosine" ("steps")' in found
    # A network without a recipe of its own is compared with its task's first.
    assert recipe_of(Network("VGG-16", Family.VGG, 16), RECIPES).schedule == imagenet.vgg16().schedule
    vgg = recipe_of(Network("VGG-19", Family.VGG, 19), RECIPES)
    assert (vgg.model, vgg.schedule) == (ModelConfig(Family.VGG, 19), imagenet.resnet18().schedule)
    small = replace(vgg, input=InputConfig(crop_px=64), schedule=ScheduleConfig(max_steps=10))
    assert settings(vgg, made("v", small)) == []  # sizes are told elsewhere


def test_tests_of_another_kind_fill_no_cell() -> None:
    test = Test("val", "one_crop", 4, 30.0, 10.0, 50_000, 0)
    run = made("r", imagenet.resnet50(), ILSVRC, tests=(test,), last_top1=31.0, best_top1=29.5)
    all_tables = tables(Findings((run,)), RECIPES, {})
    row = rows_of(all_tables, "table-3")["ResNet-50 B"][0]
    assert (row[1], row[4]) == ("not tested by 10-crop", "31.00 (1 seed); best 29.50")
    assert "Table 3: ResNet-50 B: trained, not tested by 10-crop" in all_tables.absent
    tested = replace(run, tests=(test, replace(test, protocol="ten_crop", top1=22.0), replace(test, split="test")))
    assert rows_of(tables(Findings((tested,)), RECIPES, {}), "table-3")["ResNet-50 B"][0][1] == "22.00 (1 seed)"
    assert any(line.startswith("Table 3: VGG-16, plain-34,") for line in all_tables.absent)


def test_the_test_split_counts_in_table_6() -> None:
    test = Test("test", "one_crop", 64_000, 9.0, 1.0, 2_000, 0)
    row = rows_of(tables(Findings((made("r", cifar10.resnet20(), tests=(test,)),)), RECIPES, {}), "table-6")
    assert row["ResNet-20"][0][:5] == ["0.27M", "0.27M", "8.75", "9.00 (1 seed)", "7.50 (1 seed)"]
    assert row["ResNet-20"][0][5] == "2,000 of 10,000 test images"


def test_cells_lead_to_mlflow_or_to_the_list() -> None:
    run = made("r", cifar10.resnet20())
    for pages, href in (({}, "#run-1"), ({run.url: "http://host/#/runs/1"}, "http://host/#/runs/1")):
        (table,) = [t for t in tables(Findings((run,)), RECIPES, pages).results if t.key == "table-6"]
        assert [link.href for link in table.rows[0].cells[4].links] == [href]


# -- figures --------------------------------------------------------------------------------------------------------


def test_curves_of_a_panel() -> None:
    runs = [made("a", imagenet.resnet18a(), ILSVRC), made("b", imagenet.resnet34(), ILSVRC)]
    runs += [made("c", imagenet.resnet50(), ILSVRC), made("d", imagenet.plain18(), CIFAR)]
    assert [[g.first.name for g in shown(p, FIGURE_4.task, runs)] for p in FIGURE_4.panels] == [[], ["a", "b"]]


def test_the_mean_is_over_common_iterations() -> None:
    curve = mean_curve([Curve({1: 90.0, 2: 80.0}, {2: 70.0}), Curve({1: 80.0, 2: 60.0, 3: 50.0}, {2: 60.0, 3: 1.0})])
    assert (curve.training, curve.validation) == ({1: 85.0, 2: 70.0}, {2: 65.0})


def test_labels_do_not_cover_each_other() -> None:
    for heights in ([0.5, 0.5, 0.51], [1.0, 0.99, 0.98, 0.2], [1.3, 1.2], []):
        placed = spread(heights, 0.05)
        ordered = sorted(placed)
        assert all(b - a > 0.0499 for a, b in pairwise(ordered))
        assert max(placed, default=0) <= 1.0
    assert spread([0.1, 0.9], 0.05) == [0.1, 0.9]
