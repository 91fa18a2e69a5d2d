"""Which run stands in which row, and what is said of it: on made-up runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jobs import cifar10, imagenet
from orchestrator.config import Family, InputConfig, ModelConfig, ScheduleConfig, Shortcut, TrainConfig
from orchestrator.control.curves import Curve
from orchestrator.evaluation.ensemble import Choice
from orchestrator.evaluation.layer_responses import LayerNumbers
from orchestrator.report import paper
from orchestrator.report.figures import figures, label_of, mean_curve, shown, spread, with_responses
from orchestrator.report.findings import DataFacts, Ensemble, Findings, Run
from orchestrator.report.matching import against, fits, groups_of, recipe_of, settings, told
from orchestrator.report.paper import FIGURE_4, FIGURE_6, Network, Task
from orchestrator.report.tables import Tables, tables
from orchestrator.report.tested import Procedure, Test

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
    assert rows_of(all_tables, "plain-cifar")["plain-20"][0][3] == "8.00 (1 seed); validation, not the test set"
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
    assert row[3] == "8.00 (1 seed); 1 more unfinished; validation, not the test set"
    row = rows_of(tables(Findings((runs[1],)), RECIPES, {}), "table-6")["ResNet-20"][0]
    assert row[3].startswith("90.00 (1 seed), unfinished: step 10 of 64,000; validation")


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
    assert row["ResNet-20"][0][:5] == ["0.27M", "0.27M", "8.75", "9.00 (1 seed); test set", "7.50 (1 seed)"]
    assert row["ResNet-20"][0][5] == "2,000 of 10,000 test images"


def test_tests_of_other_procedures_are_not_averaged() -> None:
    test = Test("val", "ten_crop", 600_000, 22.0, 6.0, 50_000, 0)
    best = replace(test, top1=20.0, time_ms=9, procedure=Procedure(("best checkpoint instead of the last",)))
    first = made("a", imagenet.resnet50(), ILSVRC, tests=(best, test))
    second = made("b", replace(imagenet.resnet50(), seed=1), ILSVRC, tests=(best,))
    all_tables = tables(Findings((first, second)), RECIPES, {})
    row = rows_of(all_tables, "table-3")["ResNet-50 B"][0]
    assert row[1] == "22.00 (1 seed); 1 more not tested so"
    # Where there is nothing else it is marked, in the cell and below.
    all_tables = tables(Findings((replace(first, tests=(best,)), second)), RECIPES, {})
    row = rows_of(all_tables, "table-3")["ResNet-50 B"][0]
    says = "not as in the paper: best checkpoint instead of the last"
    assert row[1] == f"20.00 ± 0.00 (2 seeds); {says}"
    assert any("ResNet-50 B: tested otherwise than in the paper: best" in line for line in all_tables.absent)
    bn = replace(test, procedure=Procedure((), 51_200))
    all_tables = tables(Findings((replace(first, tests=(bn,)),)), RECIPES, {})
    row = rows_of(all_tables, "table-3")["ResNet-50 B"][0]
    assert row[1] == "22.00 (1 seed); batch norm over 51,200 images"


def test_one_split_for_all_seeds_in_table_6() -> None:
    base, test = cifar10.resnet20(), Test("test", "one_crop", 64_000, 9.0, 1.0, 10_000, 0)
    runs = (made("a", base, tests=(test,)), made("b", replace(base, seed=1)))

    def error(runs: tuple[Run, ...]) -> str:
        return rows_of(tables(Findings(runs), RECIPES, {}), "table-6")["ResNet-20"][0][3]

    assert error(runs) == "9.00 (1 seed); 1 more not tested so; test set"
    held_out = tuple(replace(run, tests=(), data=replace(CIFAR, validation_is_test=False)) for run in runs)
    assert error(held_out) == "8.00 ± 0.00 (2 seeds); validation, not the test set"
    same = tuple(replace(run, data=replace(CIFAR, validation_is_test=True)) for run in runs)
    assert error(same) == "8.00 ± 0.00 (2 seeds); test set"
    full = replace(same[0], step=64_000, steps=64_000)
    assert against(full, Task.CIFAR10.scale) == "as in the paper"
    assert against(held_out[0], Task.CIFAR10.scale) == "10,000 validation images instead of 10,000 test images"


def test_networks_are_counted_once() -> None:
    run = made("r", imagenet.resnet34(), ILSVRC)  # in Tables 3 and 4
    plain = made("p", cifar10.plain20())  # in none
    found = tables(Findings((run, plain)), RECIPES, {})
    assert (found.num_networks_run, found.num_networks) == (1, 17)


def test_of_the_rhythm_what_changes_numbers_is_told() -> None:
    recipe = imagenet.resnet34()
    rhythm = replace(
        recipe.rhythm, log_every_steps=7, checkpoint_every_steps=7, keep_last=7, validate_every_epochs=0.25
    )
    assert settings(recipe, made("r", replace(recipe, rhythm=rhythm))) == ["rhythm.validate_every_epochs: 0.25 (1.0)"]


def test_how_an_ensemble_was_chosen_is_told() -> None:
    member = ModelConfig(depth=34)
    found = Ensemble(
        url="/e",
        protocol="ten_crop",
        members=("a", "b"),
        runs=("", ""),
        models=(member, member),
        data_name="ilsvrc2012",
        classes=1000,
        errors={"val": (21.0, 5.0, 50_000)},
        choice=Choice.GREEDY,
        held_out=("val",),
        procedures=("averaged logits",),
    )
    (row,) = rows_of(tables(Findings((), (found,)), RECIPES, {}), "table-5").values()
    assert row[0][1] == "5.00 (val, 10-crop, held out from the choice); averaged logits"
    assert "2 of 6 members, chosen greedily on labelled images, on ilsvrc2012" in row[0][3]


def test_cells_lead_to_mlflow_or_to_the_list() -> None:
    run = made("r", cifar10.resnet20())
    for pages, href in (({}, "#run-1"), ({run.url: "http://host/#/runs/1"}, "http://host/#/runs/1")):
        (table,) = [t for t in tables(Findings((run,)), RECIPES, pages).results if t.key == "table-6"]
        assert [link.href for link in table.rows[0].cells[4].links] == [href]


# -- figures --------------------------------------------------------------------------------------------------------


def test_curves_of_a_panel() -> None:
    runs = [made("a", imagenet.resnet18a(), ILSVRC), made("b", imagenet.resnet34(), ILSVRC)]
    runs += [made("c", imagenet.resnet50(), ILSVRC), made("d", imagenet.plain18(), CIFAR)]
    assert [[g.first.name for g in shown(p, FIGURE_4.task, runs, RECIPES)] for p in FIGURE_4.panels] == [[], ["a", "b"]]


def test_a_panel_shows_the_papers_runs() -> None:
    runs = [made("3x", imagenet.plain34_3x(), ILSVRC, step=1_800_000), made("p34", imagenet.plain34(), ILSVRC)]
    runs += [made("b", imagenet.resnet34(), ILSVRC, step=900_000), made("a", imagenet.resnet34a(), ILSVRC)]
    assert [[g.first.name for g in shown(p, FIGURE_4.task, runs, RECIPES)] for p in FIGURE_4.panels] == [["p34"], ["a"]]
    runs = [made("modern", cifar10.resnet56_modern(), step=99_000), made("r56", cifar10.resnet56())]
    assert [g.first.name for g in shown(FIGURE_6.panels[1], FIGURE_6.task, runs, RECIPES)] == ["r56"]
    responses = (LayerNumbers("conv", 1.0, 1.0, 1.0),)
    measured = [replace(run, layers=responses, layers_step=run.step) for run in runs]
    assert [run.name for run in with_responses(measured, RECIPES)] == ["r56"]


def test_what_a_figure_does_not_have_from_the_paper_is_told() -> None:
    assert label_of(ModelConfig(depth=34)) == "ResNet-34 B"
    assert label_of(ModelConfig(Family.CIFAR_RESNET, 20)) == "ResNet-20"
    modern = made("m", cifar10.resnet56_modern(), replace(CIFAR, train_images=400))
    drawn, _ = figures([modern], [], RECIPES)
    (caption,) = [figure.caption for figure in drawn if figure.key == "figure-6"]
    assert "Bold lines: validation error (one crop)." in caption
    assert "ResNet-56: 400 of 50,000 images" in caption
    assert "regularization.label_smoothing: 0.1 (0.0)" in caption
    test_set = made("r", cifar10.resnet56(), replace(CIFAR, validation_is_test=True))
    drawn, _ = figures([test_set], [], RECIPES)
    (caption,) = [figure.caption for figure in drawn if figure.key == "figure-6"]
    assert "Bold lines: test error (one crop)." in caption
    assert "Against the paper" not in caption


def test_an_earlier_measurement_is_told() -> None:
    layers = (LayerNumbers("conv", 1.0, 1.0, 1.0),)
    run = made("r", cifar10.resnet20(), layers=layers, layers_step=32_000)
    drawn, _ = figures([run], [], RECIPES)
    (alt,) = [figure.alt for figure in drawn if figure.key == "figure-7"]
    assert "ResNet-20 (at step 32,000 of 64,000)" in alt


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
