"""What a start would do, against what starts do."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from orchestrator.config import (
    BatchConfig,
    EvaluationConfig,
    Family,
    ModelConfig,
    NumericsConfig,
    PlacementConfig,
    PlateauError,
    PolicyKind,
    Precision,
    Protocol,
    RhythmConfig,
    ScheduleConfig,
    TrainConfig,
    WarmupKind,
)
from orchestrator.control import dry_run, facts, page
from orchestrator.control.checks import Verdict
from orchestrator.control.facts import (
    Machines,
    Plan,
    PredictionFacts,
    RunState,
    batch_facts,
    measured_speed,
    placement_facts,
    schedule_facts,
)
from orchestrator.control.terminal import duration
from orchestrator.ray_session import Cluster, Node
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.trainer import _validation_due, train
from orchestrator.world import World
from tests.data.build import build, jpeg, noise_image
from tests.object_store import Bucket
from tests.training.group import Group, open_run, small_config, take_number

HERE = Machines("a described machine", Cluster((Node(cpus=2, gpus=0),)))
NO_TRACKING = "http://127.0.0.1:9"  # nobody answers: a warning


def rehearse(config: TrainConfig, machines: Machines = HERE) -> Plan:
    """The plan; asserts that it leaves the disk as it was."""
    folder = Path(config.storage)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    folders = sorted(folder.rglob("*"))
    plan = dry_run.plan(config, machines, NO_TRACKING)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(folder.rglob("*")) == folders
    return plan


def verdicts(plan: Plan) -> dict[str, str]:
    return {f.name: f.verdict.value for f in plan.findings}


def text_of(plan: Plan, name: str) -> str:
    return next(f.text for f in plan.findings if f.name == name)


def page_of(plan: Plan, width: int = 60) -> str:
    """The page, its lines joined; asserts that it is plain text and fits ``width``, but for words that are longer."""
    stream = io.StringIO()
    page.show(Console(file=stream, width=width, highlight=False), plan, TrainConfig())
    text = stream.getvalue()
    assert "\x1b" not in text
    assert all(len(line) <= width or " " not in line[12:].strip() for line in text.splitlines()), text
    return " ".join(text.split())


def test_a_run_before_between_and_after_its_starts(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "r")
    # A small network takes its steps in no time.
    model, schedule = ModelConfig(family=Family.CIFAR_RESNET, depth=8), replace(config.schedule, max_steps=30)
    rhythm = replace(config.rhythm, validate_every_epochs=2.5, keep_last=100)
    config = replace(config, model=model, schedule=schedule, rhythm=rhythm)
    new = rehearse(config)
    assert not new.refusals, new.findings
    assert new.run is not None
    assert (new.run.state, new.run.step, new.run.attempt) == (RunState.NEW, 0, 0)
    assert not (tmp_path / "runs").exists()

    group = Group(config, 1)
    group.kill_when(lambda event: event["kind"] == "checkpoint" and event["step"] >= 6)
    records = open_run(group.run_path).records()
    between = rehearse(config)
    assert between.run is not None
    assert (between.run.state, between.run.step, between.run.attempt) == (RunState.GOES_ON, records[-1].step, 1)
    assert not between.refusals, between.findings
    assert between.space is not None
    assert abs(between.space.checkpoint_bytes / records[-1].files["tensors.safetensors"].nbytes - 1) < 0.05

    text = page_of(between)
    assert f"goes on: a start would train from step {records[-1].step} of 30, the newest checkpoint" in text
    # Its speed is read out of its journal.
    journal = [
        e["metrics"]["images_per_s"] for e in newest_journal(Storage(str(group.run_path))) if e["kind"] == "train"
    ]
    assert between.prediction is not None
    assert between.prediction.speed.images_per_s == np.median(journal[-10:])
    assert between.prediction.steps_left == 30 - records[-1].step
    assert f"images/s (measured up to step {records[-1].step}," in text
    start = r"this would be start number 2; while number 1 \(process \d+ on \S+, .{19}\) is at work it is refused"
    assert re.search(start, text)

    # The newest is damaged: a start goes back to the one before, and says so.
    damaged = group.run_path / records[-1].folder / "tensors.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    back = rehearse(config)
    assert back.run is not None
    assert back.run.step == records[-2].step
    assert verdicts(back)["checkpoints"] == "warning"
    damaged.write_bytes(whole)

    changed = rehearse(replace(config, seed=7))
    assert [f.name for f in changed.refusals] == ["identity"]
    assert "seed: 0 → 7" in text_of(changed, "identity")
    assert changed.run is not None
    assert changed.run.state is RunState.UNKNOWN

    train(config, World(), attempt=take_number(Storage(str(group.run_path))), cpus=1)
    done = rehearse(replace(config, data="/nowhere"))  # as a start: what is not needed any more may be gone
    assert not done.refusals, done.findings
    assert done.run is not None
    assert done.run.outcome is not None
    assert (done.run.state, done.run.step) == (RunState.FINISHED, 30)
    assert done.prediction is None
    assert "finished: 30 steps done" in page_of(done)
    assert [f.name for f in rehearse(replace(config, seed=7)).refusals] == ["identity"]

    # What was foretold is what happened.
    assert new.schedule is not None
    snapshot = open_run(group.run_path).newest()
    assert snapshot is not None
    assert new.schedule.validations == sum(e["kind"] == "validation" for e in snapshot.journal)
    assert new.schedule.checkpoints == len(open_run(group.run_path).records())


def test_validations_and_checkpoints_are_counted_by_the_trainers_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_AT_A_TIME", 7)
    for images, size, steps, validate, save in (
        (96, 24, 50, 0.5, 3),
        (100, 24, 61, 1.0, 4),
        (10, 24, 30, 1.0, 1000),
        (1000, 8, 300, 0.3, 7),
        (7, 8, 15, 2.5, 5),
        (1000, 8, 14, 9.0, 7),
    ):
        config = TrainConfig(
            schedule=ScheduleConfig(max_steps=steps),
            batch=BatchConfig(size, 8),
            rhythm=RhythmConfig(validate_every_epochs=validate, checkpoint_every_steps=save),
        )
        due = [step == steps or _validation_due(step, size, images, validate) for step in range(1, steps + 1)]
        saved = [is_due or step % save == 0 for step, is_due in enumerate(due, 1)]
        found = schedule_facts(config, images)
        assert (found.validations, found.checkpoints) == (sum(due), sum(saved)), (images, size, steps)
    half = replace(TrainConfig(), schedule=ScheduleConfig(max_epochs=0.5))
    found = schedule_facts(half, 1_281_167)
    assert (found.steps, found.images_seen, round(found.steps_per_epoch, 1)) == (2503, 640_768, 5004.6)


def test_a_measured_speed_is_the_median_of_the_newest() -> None:
    events = [{"kind": "train", "step": n, "metrics": {"images_per_s": float(n)}} for n in range(1, 30)]
    found = measured_speed([*events, {"kind": "validation", "step": 30, "metrics": {}}])
    assert found is not None
    assert (found.images_per_s, found.step) == (24.5, 29)
    assert measured_speed([]) is None
    assert measured_speed([{"kind": "train", "step": 1, "metrics": {}}]) is None


def test_policies_in_words() -> None:
    def words(**fields: object) -> str:
        return facts.policy_in_words(replace(ScheduleConfig(), **fields), 1000)  # type: ignore[arg-type]

    assert words(policy=PolicyKind.CONSTANT) == "0.1 throughout"
    assert words(policy=PolicyKind.STEPS, drop_steps=(300, 6000)) == "0.1, times 0.1 at steps 300, 6,000"
    assert "half a cosine until step 1,000" in words(policy=PolicyKind.COSINE)
    assert words(warmup=WarmupKind.LINEAR, warmup_steps=50).startswith("rises from 0.01 in 50 steps; then 0.1, ")
    assert words(warmup=WarmupKind.UNTIL_ERROR).startswith("0.01 until the training error is below 80 %; then 0.1")
    plateau = words(plateau_error=PlateauError.TRAINING, plateau_min_steps=5, plateau_stop=True)
    assert "do not better the training error by 0.1 points, 5 steps apart; the next plateau ends" in plateau


def test_the_workers_of_a_described_cluster() -> None:
    eight = Machines("eight GPUs", Cluster((Node(cpus=64, gpus=4), Node(cpus=48, gpus=4))))
    found = placement_facts(TrainConfig(), eight)
    assert (found.placement.num_workers, found.placement.cpus_per_worker, found.placement.use_gpu) == (8, 12, True)
    assert [s.first_group for s in found.shares] == list(range(8))
    three = placement_facts(TrainConfig(placement=PlacementConfig(num_workers=3)), eight)
    assert [s.num_groups for s in three.shares] == [3, 3, 2]
    for machines, saying in (
        (HERE, "more CPUs than"),
        (Machines("lost", None, trouble="no answer"), "no answer"),
        (replace(HERE, world_size=9), "9 workers cannot share"),
    ):
        with pytest.raises(ValueError, match=saying):
            placement_facts(TrainConfig(placement=PlacementConfig(num_workers=8)), machines)
    assert len(placement_facts(TrainConfig(), replace(HERE, world_size=4)).shares) == 4
    assert batch_facts(256, 32).worker_counts == (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
    assert batch_facts(24, 8).worker_counts == (1, 2, 3, 6, 12, 24)


def test_where_a_run_would_be() -> None:
    config = TrainConfig()
    assert dry_run.machines_of(config, {}).cluster == Cluster((dry_run.this_machine(),))
    assert "this machine" in dry_run.machines_of(config, {"RAY_ADDRESS": "local"}).words  # which would start one
    under_torchrun = dry_run.machines_of(config, {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert (under_torchrun.world_size, under_torchrun.local_world_size) == (4, 2)
    lost = dry_run.machines_of(replace(config, placement=PlacementConfig(ray_address="127.0.0.1:9")), {})
    assert lost.cluster is None
    assert "no Ray cluster answers at 127.0.0.1:9" in lost.trouble


def test_cpus_are_counted_as_ray_counts_them(tmp_path: Path) -> None:
    code = "from ray._private.utils import get_num_cpus; print(get_num_cpus(override_docker_cpu_warning=True))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ray = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert dry_run.this_machine().cpus == int(ray.stdout)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert dry_run._num_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert dry_run._num_cpus(tmp_path) == os.cpu_count()
    (tmp_path / "cpuset").mkdir()
    (tmp_path / "cpuset" / "cpuset.cpus").write_text("3\n")
    assert dry_run._num_cpus(tmp_path) == 1


def two_classes(folder: Path, broken: dict[int, bytes] | None = None) -> Path:
    rng = np.random.default_rng(0)
    build(folder, [(f"{i}.jpg", jpeg(noise_image(rng, 48, 40)), i % 2) for i in range(24)], broken=broken)
    return folder


def test_two_classes_are_enough(tmp_path: Path) -> None:
    config = small_config(two_classes(tmp_path / "data"), tmp_path / "runs", "two")
    config = replace(config, schedule=ScheduleConfig(max_steps=2, lr=0.003))
    plan = rehearse(config)
    assert not plan.refusals, plan.findings
    assert plan.model is not None
    assert plan.model.num_classes == 2
    run = Path(config.storage) / config.name
    run.mkdir(parents=True)
    outcome = train(config, World(), attempt=take_number(Storage(str(run))), cpus=1)
    assert outcome.steps == 2
    assert outcome.validation_top5_error == 0
    assert 0 <= outcome.validation_top1_error <= 100


def test_an_image_that_cannot_be_decoded_is_a_warning(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "data", broken={0: b"no image at all"})
    plan = rehearse(small_config(data, tmp_path / "runs", "r"))
    assert not plan.refusals, plan.findings
    assert verdicts(plan)["decoding"] == "warning"
    assert "0.jpg" in text_of(plan, "decoding")
    strict = small_config(data, tmp_path / "runs", "r")
    strict = replace(strict, input=replace(strict.input, max_undecodable=0))
    assert [f.name for f in rehearse(strict).refusals] == ["decoding"]


def test_a_network_that_cannot_take_the_crop_is_refused(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "r")
    config = replace(config, input=replace(config.input, crop_px=2))
    plan = rehearse(config)
    assert [f.name for f in plan.refusals] == ["network"]
    assert "raise input.crop_px" in text_of(plan, "network")


def test_an_object_store_is_left_as_it_was(prepared: Path) -> None:
    for path in prepared.rglob("*"):
        if path.is_file():
            Bucket.objects[f"name/data/{path.relative_to(prepared).as_posix()}"] = path.read_bytes()
    before = dict(Bucket.objects)
    config = replace(small_config(prepared, prepared, "r"), data="bucket://name/data", storage="bucket://name/runs")
    plan = dry_run.plan(config, HERE, NO_TRACKING)
    assert not plan.refusals, plan.findings
    assert plan.data is not None
    assert (plan.data.is_local, plan.data.num_classes) == (False, 6)
    assert plan.space is not None
    assert plan.space.free_bytes is None
    assert Bucket.objects == before
    Bucket.objects.clear()


def test_a_page_holds_everything_at_any_width(prepared: Path, tmp_path: Path) -> None:
    plan = rehearse(small_config(prepared, tmp_path / "runs", "r"))
    many = placement_facts(TrainConfig(), Machines("a large one", Cluster((Node(128, 64), Node(8, 0)))))
    large = Machines("a large one", Cluster((Node(128, 64), Node(8, 0))))
    plan = replace(plan, placement=many, machines=large)
    assert page_of(plan, 30) == page_of(plan, 200)
    text = page_of(plan)
    assert "a large one: 1 node with 128 CPUs and 64 GPUs; 1 node with 8 CPUs and 0 GPUs" in text
    assert "64 GPU workers with 2 CPUs each" in text
    assert "worker 0: images 0-3 of group 0; … worker 63: images 28-31 of group 7" in text
    assert plan.data is not None
    assert plan.data.sha256 in text
    stream = io.StringIO()
    page.show(Console(file=stream, width=80, force_terminal=True, highlight=False), plan, TrainConfig())
    assert "\x1b[" in stream.getvalue()  # a terminal has colours


def test_a_described_cluster_is_packed_node_by_node(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "r")
    config = replace(config, batch=BatchConfig(2048, 32))
    text = page_of(dry_run.plan(config, dry_run.described(["8x64x8"]), NO_TRACKING))
    assert "as described (8x64x8): 8 nodes with 64 CPUs and 8 GPUs each" in text
    assert "64 GPU workers with 8 CPUs each" in text
    assert "packed: workers 0-63 on nodes 0-7, 8 each" in text
    config = replace(config, placement=PlacementConfig(num_workers=21))
    text = page_of(dry_run.plan(config, dry_run.described(["1x8x2", "2x96x8", "1x32x4"]), NO_TRACKING))
    assert "packed: workers 0-15 on nodes 0-1, 8 each; workers 16-19 on node 2; worker 20 on node 3" in text
    elastic = replace(config, placement=PlacementConfig(num_workers=21, min_workers=9, ray_address="10.0.0.1:6379"))
    small = dry_run.plan(elastic, Machines("a small one", Cluster((Node(8, 8),))), NO_TRACKING)
    assert verdicts(small)["workers"] == "warning"
    assert "a start would wait 600 s for machines" in text_of(small, "workers")
    assert verdicts(dry_run.plan(elastic, dry_run.described(["1x8x8"]), NO_TRACKING))["workers"] == "refused"


def test_time_storage_and_checkpoints_are_foretold(prepared: Path, tmp_path: Path) -> None:
    small = small_config(prepared, tmp_path / "runs", "r")
    config = replace(
        small,
        batch=BatchConfig(256, 32),
        schedule=ScheduleConfig(max_steps=10_000),
        evaluation=EvaluationConfig(protocols=(Protocol.TEN_CROP,), splits=("val", "test")),
    )

    def foretold(config: TrainConfig, nodes: str) -> tuple[PredictionFacts, str]:
        plan = dry_run.plan(config, dry_run.described([nodes]), NO_TRACKING)
        assert not plan.refusals, plan.findings
        assert plan.prediction is not None
        assert plan.model is not None
        assert plan.space is not None
        if not plan.prediction.trouble:
            training_s = 256 * 10_000 / plan.prediction.speed.images_per_s
            assert plan.schedule is not None
            validation_s = plan.schedule.validations * 30 / plan.prediction.speed.images_per_s / 3
            assert plan.prediction.seconds == pytest.approx(training_s + validation_s)
        s = plan.prediction.stored
        assert s is not None
        assert s.checkpoints == plan.space.checkpoint_bytes * (small.rhythm.keep_last + 2)
        assert s.model == plan.space.checkpoint_bytes - 4 * plan.model.parameters
        assert s.scores == (30 + 10) * 6 * 4
        return plan.prediction, page_of(plan)

    one, text = foretold(config, "1x1x0")
    four, _ = foretold(config, "4x1x0")
    assert four.speed.images_per_s == pytest.approx(4 * one.speed.images_per_s)
    assert four.best_s == pytest.approx(one.best_s / 2, rel=0.01)  # four nodes fail four times as often
    assert "(assumed, by multiply-adds from 10 billion a second and core; input and network left out)" in text
    assert f"rhythm.checkpoint_every_steps 3 is one in {duration(3 * 256 / one.speed.images_per_s)};" in text
    assert "CPU worker hours) for the 10,000 steps left" in text
    gpu, text = foretold(config, "1x64x8")
    assert gpu.speed.images_per_s > 8 * one.speed.images_per_s
    assert "from ResNet-50 at 3,080 on an H200" in text
    shared, text = foretold(config, "2x64x8")
    assert shared.speed.images_per_s == 0
    assert "prediction unknown before it has trained: 16 workers share 8 batch-norm groups, never timed" in text
    fp32 = replace(config, numerics=NumericsConfig(precision=Precision.FP32))
    assert "what is known of GPUs is of bf16" in foretold(fp32, "1x64x8")[1]
    own = replace(config, model=ModelConfig(factory="tests.training.networks:tiny"))
    assert "what an own network costs is not known" in foretold(own, "1x64x8")[1]
    lost = dry_run.plan(config, Machines("lost", None, trouble="no answer"), NO_TRACKING)
    assert "prediction unknown: see the checks" in page_of(lost)


@pytest.mark.parametrize("words", ["8", "8x64", "0x1x1", "1x0x1", "axbxc", "1x2x-1"])
def test_a_cluster_is_described_in_three_numbers(words: str) -> None:
    with pytest.raises(ValueError, match="describe machines as NODESxCPUSxGPUS, as 8x64x8"):
        dry_run.described([words])


def test_facts_are_plain_data(prepared: Path, tmp_path: Path) -> None:
    plan = rehearse(small_config(prepared, tmp_path / "runs", "r"))
    assert json.dumps(dataclasses.asdict(plan), default=str)
    assert {f.verdict for f in plan.findings} == {Verdict.OK, Verdict.WARNING}
    assert plan.data is not None
    assert [(s.name, s.images) for s in plan.data.splits] == [("train", 96), ("val", 30), ("test", 10)]
    assert plan.data.odd
