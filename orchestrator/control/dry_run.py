"""What a start would do, found out without one: no training, no GPU, no Ray cluster, nothing that stays in storage.

``plan`` gives facts; page.py shows them. The checks are those of a start (checks.py) and those that a start makes on
its way: the newest checkpoint, a write to storage (a probe that is deleted again), one image of each split decoded,
the placement of the workers, the tracking store.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch

from orchestrator import models
from orchestrator.config import Order, TrainConfig
from orchestrator.control import checks, supervisor, tracking
from orchestrator.control.checks import Check, Space, Start, Verdict
from orchestrator.control.facts import (
    DataFacts,
    Machines,
    ModelFacts,
    PlacementFacts,
    Plan,
    RunFacts,
    RunState,
    Speed,
    SplitFacts,
    TestFacts,
    batch_facts,
    measured_speed,
    placement_facts,
    prediction_facts,
    schedule_facts,
)
from orchestrator.control.placement import may_grow
from orchestrator.data.inputs import eval_input, train_input
from orchestrator.evaluation.results import all_tests, is_more_than_training, is_tested, missing_tests
from orchestrator.masking import masked
from orchestrator.ray_session import Cluster, ClusterError, Node, ray_session
from orchestrator.storage import Storage
from orchestrator.training.assembly import decode_settings, sample_stream
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.finished_model import find_model
from orchestrator.training.ownership import newest_attempt
from orchestrator.training.run import Outcome


def plan(config: TrainConfig, machines: Machines, tracking_uri: str, *, trains: bool = True) -> Plan:
    """Find out what a start of ``config`` on ``machines`` would do. Never raises for what a start would refuse.

    trains: False where the run is only tested, as far as it has come.
    Reads data and storage, writes and deletes one small file in storage, and asks a tracking server whether it lives.
    """
    return _Rehearsal(config, machines, tracking_uri, trains).plan()


# -- where it would run ---------------------------------------------------------------------------------------------


def machines_of(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> Machines:
    """The machines that a start with this environment would get: torchrun's, a running Ray cluster's, or this one."""
    here = this_machine()
    if "RANK" in environment:
        size, local = (int(environment.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return Machines("torchrun's process group", Cluster((here,)), world_size=size, local_world_size=local)
    address = config.placement.ray_address or environment.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Machines("this machine, where a local Ray cluster would be started", Cluster((here,)))
    words = f"the Ray cluster at {address}"
    try:
        with ray_session(address) as cluster:
            return Machines(words, cluster)
    except Exception as error:  # ValueError, and whatever Ray raises where versions or tokens do not match
        reason = str(error) if isinstance(error, ValueError) else f"{words}: {type(error).__name__}: {error}"
        return Machines(words, None, trouble=reason)


def described(nodes: Sequence[str]) -> Machines:
    """Machines that need not be there, each as NODESxCPUSxGPUS: ("8x64x8",). Raises ValueError."""
    found: list[Node] = []
    for text in nodes:
        try:
            number, cpus, gpus = (int(part) for part in text.split("x"))
            if number < 1 or cpus < 1 or gpus < 0:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--dry-run-on {text!r}: describe machines as NODESxCPUSxGPUS, as 8x64x8 for 8 nodes of 64 CPUs and "
                "8 GPUs each"
            ) from None
        found += [Node(cpus, gpus)] * number
    return Machines(f"as described ({' '.join(nodes)})", Cluster(tuple(found)), is_described=True)


def this_machine() -> Node:
    """CPUs, as Ray counts them (a container's quota included), and GPUs of this machine. Touches no GPU."""
    # device_count asks the driver's library NVML and makes no CUDA context.
    return Node(_num_cpus(), torch.cuda.device_count())


def _num_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    limits = [float(os.cpu_count() or 1)]
    with suppress(OSError, ValueError):  # cgroup v2
        quota, period = (cgroup / "cpu.max").read_text().split()
        limits.append(float(quota) / float(period))
    with suppress(OSError, ValueError):  # cgroup v1
        quota_us = float((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            limits.append(quota_us / float((cgroup / "cpu" / "cpu.cfs_period_us").read_text()))
    with suppress(OSError, ValueError):
        ranges = (part.partition("-") for part in (cgroup / "cpuset" / "cpuset.cpus").read_text().split(","))
        limits.append(sum(int(last or first) - int(first) + 1 for first, _, last in ranges))
    return max(1, int(min(limits)))


# -- the rehearsal --------------------------------------------------------------------------------------------------


class _Rehearsal:
    """Makes the checks, and keeps what they find for the facts."""

    def __init__(self, config: TrainConfig, machines: Machines, tracking_uri: str, trains: bool) -> None:
        self._config, self._machines, self._tracking_uri, self._trains = config, machines, tracking_uri, trains
        self._start = Start(config)
        self._done: Outcome | None = None
        self._step: int | None = None
        self._placement: PlacementFacts | None = None
        self._speed: Speed | None = None

    def plan(self) -> Plan:
        start, config = self._start, self._config
        findings = checks.look_at_all(checks.BEFORE_PLACEMENT if self._trains else checks.BEFORE_TESTS, start)
        if not self._trains:
            on_the_way = (
                Check("writing", self._look_at_writing, needs=("storage",)),
                Check("workers", self._look_at_workers, needs=("groups",)),
            )
            findings = checks.look_at_all(on_the_way, start, before=findings)
        elif self._is_done():  # what is not needed any more may be gone
            findings = checks.look_at_all([Check("identity", self._look_at_outcome)], start)
        else:
            before_training = (
                Check("checkpoints", self._look_at_checkpoints, needs=("storage", "identity")),
                Check("writing", self._look_at_writing, needs=("storage",)),
                Check("decoding", self._look_at_decoding, needs=("shards", "views")),
                Check("workers", self._look_at_workers, needs=("groups",)),
            )
            findings = checks.look_at_all(before_training, start, before=findings)
        findings = checks.look_at_all([Check("tracking", self._look_at_tracking)], start, before=findings)
        data = _data_facts(start)
        train_images = next((s.images for s in data.splits if s.name == "train"), 0) if data else 0
        space: Space | None = None
        if start.model is not None and start.run is not None:
            with suppress(Exception):  # the check of the space says why
                space = checks.space_of(start)
        schedule = schedule_facts(config, train_images) if train_images else None
        run, model, tests = self._run_facts(), self._model_facts(), self._test_facts()
        foretold = prediction_facts(
            config, self._machines, run, model, data, schedule, self._placement, space, tests, self._speed
        )
        return Plan(
            config=config,
            machines=self._machines,
            batch=batch_facts(config.batch.global_batch_size, config.batch.bn_group_size),
            run=run,
            model=model,
            data=data,
            trains=self._trains,
            schedule=schedule,
            space=space,
            placement=self._placement,
            tests=tests,
            prediction=foretold if self._trains else None,
            findings=findings,
        )

    def _is_done(self) -> bool:
        with suppress(Exception):  # the checks say why
            return self._start.outcome is not None and is_tested(self._config)
        return False

    # -- checks that a start makes on its way ---------------------------------------------------------------------

    def _look_at_outcome(self, start: Start) -> tuple[Verdict, str]:
        self._done = supervisor.outcome_of(self._config)
        return Verdict.OK, "finished with this config: a start needs nothing else"

    def _look_at_checkpoints(self, start: Start) -> tuple[Verdict, str]:
        assert start.run is not None
        notices: list[str] = []
        snapshot = Checkpoints(start.run, attempt=0, keep_last=1, notice=notices.append).newest()
        self._step = snapshot.step if snapshot is not None else 0
        self._speed = measured_speed(snapshot.journal) if snapshot is not None else None
        words = "none yet" if snapshot is None else f"the newest usable one, of step {snapshot.step}, was read whole"
        return (Verdict.WARNING if notices else Verdict.OK), "; ".join([words, *notices])

    def _look_at_writing(self, start: Start) -> tuple[Verdict, str]:
        assert start.run is not None
        where = start.run
        if where.is_local:  # folders that a start would make are not made here
            folder = Path(where.root)
            while not folder.exists():
                folder = folder.parent
            where = Storage(str(folder))
        where.check_writable()
        return Verdict.OK, f"a probe was written to {where.url}, read and deleted"

    def _look_at_decoding(self, start: Start) -> tuple[Verdict, str]:
        assert start.views is not None
        assert start.data is not None
        view, test_view, mean, axes = start.views
        train_split, val_split = start.splits["train"], start.splits["val"]
        limit = self._config.input.max_undecodable
        settings = decode_settings(self._config, torch.device("cpu"), 1)
        stream = sample_stream(self._config, train_split)
        first = train_input(
            start.data, train_split, stream, view, axes, mean, settings, lambda step: np.array([step]), 0, limit
        )
        with closing(first):
            image = next(first)
        val_input = eval_input(start.data, val_split, test_view, mean, settings, 1, limit)
        with closing(val_input):
            val_image = next(val_input.batches(0, 1))
        train_name, val_name = train_split.names[int(image.indices[0])].as_py(), val_split.names[0].as_py()
        bad = [name for name, _ in image.replaced] + ([val_name] if val_image.num_unreadable else [])
        if bad:
            text = f"cannot be decoded: {', '.join(bad)}; the run goes on, prepare the data set again if there are more"
            return Verdict.WARNING, text
        return Verdict.OK, f"{train_name} (train) and {val_name} (val) decoded on the CPU"

    def _look_at_workers(self, start: Start) -> tuple[Verdict, str]:
        try:
            self._placement = placement_facts(self._config, self._machines)
        except ClusterError as error:
            if self._machines.is_described or not may_grow(self._config):
                raise
            wait_s = self._config.guard.wait_for_workers_s
            return (
                Verdict.WARNING,
                f"a start would wait {wait_s:.0f} s for machines (guard.wait_for_workers_s): {error}",
            )
        return Verdict.OK, f"{self._placement.placement.num_workers} can be placed"

    def _look_at_tracking(self, start: Start) -> tuple[Verdict, str]:
        warning = tracking.check(self._tracking_uri)
        if warning:
            return Verdict.WARNING, warning
        return Verdict.OK, f"MLflow at {masked(self._tracking_uri)}"

    # -- facts ----------------------------------------------------------------------------------------------------

    def _run_facts(self) -> RunFacts | None:
        run, done = self._start.run, self._done
        if run is None:
            return None
        attempt, who = 0, ""
        with suppress(Exception):  # the check of the identity says why
            attempt = newest_attempt(run)
            if attempt:
                who = _who(run.read(f"attempts/{attempt:06d}.json"))
        if self._step is not None:  # its tests are left
            done = self._start.outcome
        if done is not None:
            return RunFacts(run.url, RunState.FINISHED, done.steps, attempt, who, done)
        if not self._trains:
            return RunFacts(run.url, RunState.TESTED, attempt=attempt, attempt_by=who)
        if self._step is None:
            return RunFacts(run.url, RunState.UNKNOWN, attempt=attempt, attempt_by=who)
        state = RunState.GOES_ON if self._step else RunState.NEW
        return RunFacts(run.url, state, self._step, attempt, who)

    def _test_facts(self) -> TestFacts | None:
        if not is_more_than_training(self._config):
            return None
        tests = all_tests(self._config)
        record, left = None, tests
        with suppress(Exception):  # the checks say why
            record = find_model(self._config)
            data = self._start.data
            left = missing_tests(self._config, record, data.digest if data else record.data_sha256) if record else tests
        done = tuple((test, test not in left) for test in tests)
        e = self._config.evaluation
        return TestFacts(e.checkpoint, e.precise_bn_images, record is not None, done)

    def _model_facts(self) -> ModelFacts | None:
        model, data = self._start.model, self._start.data
        if model is None or data is None or not self._start.flops:
            return None
        return ModelFacts(
            layers=models.count_layers(model),
            parameters=models.count_parameters(model),
            flops=self._start.flops,
            crop_px=self._config.input.crop_px,
            num_classes=data.num_classes,
        )


def _data_facts(start: Start) -> DataFacts | None:
    data = start.data
    if data is None:
        return None
    manifest = data.manifest
    odd = manifest.odd_counts()
    undecodable = Counter({split: number for (split, what), number in odd.items() if what == "undecodable"})
    order, window_classes = start.config.input.order, 0
    if order is Order.WINDOWED and "train" in start.splits:
        train = start.splits["train"]
        window = sample_stream(start.config, train).upcoming_shards(0)[: start.config.input.window_shards]
        window_classes = len(np.unique(train.label[np.isin(train.shard, window)]))
    return DataFacts(
        url=data.storage.url,
        is_local=data.storage.is_local,
        name=manifest.name,
        sha256=data.digest,
        num_classes=data.num_classes,
        splits=tuple(
            SplitFacts(name, s.count, sum(shard.nbytes for shard in s.shards), len(s.shards), undecodable[name])
            for name, s in sorted(manifest.splits.items(), key=lambda item: (item[0] != "train", item[0] != "val"))
        ),
        odd=tuple((*key, number) for key, number in sorted(odd.items())),
        statistics_crop_px=manifest.statistics_crop,
        order=order,
        window_classes=window_classes,
    )


def _who(record: bytes) -> str:
    """Who made a start, as the attempt's record says: host, process and time; "" where it does not."""
    who = json.loads(record)
    if not {"host", "pid", "time_s"} <= who.keys():
        return ""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["time_s"]))
    return f"process {who['pid']} on {who['host']}, {when}"
