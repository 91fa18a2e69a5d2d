"""Rehearse what may happen to a run before it does: ``python jobs/rehearse.py --storage URL``.

A short job is trained undisturbed, and once more with each class of fault injected at a random moment; the weights must
come out the same, and no image may be lost or repeated. Without an address a Ray cluster of several raylets is started
on this machine, whose nodes may be lost; without data a small set is generated. ``--soak-s`` injects faults for as long
as that, and tells how much of the time was of use. Exit code 0: all is as promised; 1: see the table.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import tyro
from rich.console import Console

from cluster.raylets import LocalNodes
from jobs import command_line
from jobs.rehearsal_report import Report, Row, show, tracking_faults
from orchestrator.config import (
    BatchConfig,
    GuardConfig,
    InputConfig,
    ModelConfig,
    NumericsConfig,
    PlacementConfig,
    PolicyKind,
    RhythmConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from orchestrator.control.driven_run import DrivenRun, MlflowServer, digest_of, wrong_images
from orchestrator.control.faults import FAULTS, NETWORK, ORDERS_VARIABLE, Fault, Orders, Promise, Scene
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal

_GROUP = 8  # images of a batch-norm group
_PACE_S = 0.2  # each step of a disturbed run takes that much longer: it has to last for its faults
_RECOVER_S = 240.0
_CORRUPT, _DISK_FULL = "corrupt-image", "disk-full"  # these need a run of their own
_SMALL_DISK_MB = 24
NAMES = (*(fault.name for fault in FAULTS), _CORRUPT, _DISK_FULL)
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Placement:
    """Where the rehearsal computes."""

    ray_address: str = ""
    """Ray cluster to join, none of whose nodes is lost; empty: one of several raylets, started on this machine"""


@dataclass(frozen=True)
class Options:
    """Rehearse what may happen to a run before it does."""

    storage: str = field(default_factory=lambda: os.environ.get("IMAGENET_STORAGE", ""))
    """URL of a folder that all nodes see; the rehearsal makes a folder of its own in it"""
    data: str = ""
    """URL of a prepared data set; empty: a small one is generated in storage"""
    out: Path = Path("rehearsal")
    """folder for the report and the logs"""
    workers: int = 2
    faults: str = ""
    """classes of faults, separated by commas; empty: all"""
    seed: int = 0
    """of the moments and of what is struck"""
    soak_s: float = 0.0
    """seconds for which faults are injected, one after another, into one run; 0: each class once"""
    mean_time_between_faults_s: float = 60.0
    """of a soak"""
    placement: Placement = field(default_factory=Placement)

    @property
    def chosen(self) -> list[str]:
        """Classes of faults."""
        return self.faults.split(",") if self.faults else list(NAMES)


def main() -> int:
    return command_line.launchable_as("rehearsal", run, parse)


def parse(argv: Sequence[str]) -> Options:
    """What is typed. Raises ValueError for what cannot be rehearsed."""
    options = tyro.cli(Options, args=argv, prog="python jobs/rehearse.py", config=(tyro.conf.FlagCreatePairsOff,))
    if unknown := [name for name in options.chosen if name not in NAMES]:
        raise ValueError(f"unknown fault {', '.join(unknown)}: choose of {', '.join(NAMES)}")
    if not options.storage:
        raise ValueError("nowhere to rehearse: give --storage URL, a folder that all nodes see")
    if options.workers < 2:
        raise ValueError(f"--workers is {options.workers}: a rehearsal needs at least 2")
    if options.soak_s < 0 or options.mean_time_between_faults_s <= 0:
        raise ValueError("--soak-s must not be negative, and --mean-time-between-faults-s must be positive")
    return options


def run(options: Options) -> int:
    """Rehearse, and show what came of it. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is as clean as Ctrl-C
    with Rehearsal(options, options.chosen) as rehearsal:
        report = rehearsal.soak() if options.soak_s else rehearsal.all_faults()
    if left := [p.name() for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]:
        report.notes.append(f"left running: {', '.join(left)}")
    show(report, options.out)
    return 0 if report.is_as_promised else command_line.EXIT_FAILED


class Rehearsal:
    """A cluster, a data set and an MLflow server, and the runs on them. Ends all that it started."""

    def __init__(self, options: Options, chosen: Sequence[str]) -> None:
        self._options, self._chosen = options, chosen
        self._console = Console(highlight=False)
        self._rng = random.Random(options.seed)
        self._root = Storage(options.storage).sub(time.strftime("rehearsal-%Y%m%d-%H%M%S"))
        self._orders = Orders(f"{self._root.url}/orders")
        self._ends = ExitStack()
        options.out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Rehearsal:
        try:
            self._console.print(f"in {self._root.url}; report and logs in {self._options.out}", soft_wrap=True)
            self._server = MlflowServer(self._options.out.absolute())
            self._ends.callback(self._server.kill)
            self._server.start()
            self._nodes: LocalNodes | None = None
            if not self._options.placement.ray_address:
                self._nodes = LocalNodes(self._options.workers, {ORDERS_VARIABLE: self._orders.url})
                self._ends.callback(self._nodes.close)
            self._data = self._options.data or self._generate()
            self._server.wait_ready()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.close()

    # -- what runs need ---------------------------------------------------------------------------------------------

    def _generate(self) -> str:
        """A small data set of generated images, in storage."""
        self._console.print("generating a small data set")
        url = f"{self._root.url}/data"
        with tempfile.TemporaryDirectory() as archives:
            sizes = ["--num-classes", "4", "--train-per-class", "24", "--val-per-class", "4", "--test-images", "2"]
            sides = ["--min-side", "48", "--max-side", "80"]
            for words in (
                ["data_prep.demo", "--out", archives, *sizes, *sides],
                ["data_prep.ilsvrc", archives, "--out", url, "--crop", "36", "--num-tasks", "0"],
            ):
                done = subprocess.run(
                    [sys.executable, "-m", *words], cwd=_ROOT, capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise OSError(f"the rehearsal's data set cannot be made: {done.stderr.strip()[-500:]}")
        return url

    def _config(self, name: str, steps: int, *, data: str = "", checkpoint_every_steps: int = 5) -> TrainConfig:
        batch_size = _GROUP * self._options.workers
        num_images = len(DataSet(Storage(self._data)).split("train"))
        # Of a set of the user's only the last step is followed by a validation: it may be a large one.
        every_epochs = 1e6 if self._options.data else 20 * batch_size / num_images
        return TrainConfig(
            data=data or self._data,
            storage=self._root.url,
            name=name,
            seed=self._options.seed,
            model=ModelConfig(factory=NETWORK),
            input=InputConfig(crop_px=32, scale_min_px=36, scale_max_px=48, test_shorter_side_px=36),
            batch=BatchConfig(global_batch_size=batch_size, bn_group_size=_GROUP),
            schedule=ScheduleConfig(max_steps=steps, lr=0.01, policy=PolicyKind.CONSTANT),
            numerics=NumericsConfig(deterministic=True),
            rhythm=RhythmConfig(
                log_every_steps=1,
                validate_every_epochs=every_epochs,
                checkpoint_every_steps=checkpoint_every_steps,
                keep_last=4,
            ),
            placement=PlacementConfig(
                num_workers=self._options.workers, cpus_per_worker=1, ray_address=self._address()
            ),
            # A loss that is not finite sends the run back at once: a step left out would change the weights.
            guard=GuardConfig(hang_timeout_s=15, max_skipped_steps=0, max_failures=1000),
            tracking=TrackingConfig(uri=self._server.uri, experiment="rehearsal"),
        )

    def _address(self) -> str:
        return self._nodes.address if self._nodes else self._options.placement.ray_address

    def _environment(self) -> Mapping[str, str]:
        """What drivers need: the token of our cluster; for workers of another, as a submitted job gives it to them."""
        if self._nodes:
            return self._nodes.environment
        name = "RAY_JOB_CONFIG_JSON_ENV_VAR"
        job = json.loads(os.environ.get(name, "{}"))
        runtime = job.setdefault("runtime_env", {})
        runtime.setdefault("env_vars", {})[ORDERS_VARIABLE] = self._orders.url
        return {name: json.dumps(job)}

    def _run(self, config: TrainConfig) -> DrivenRun:
        run = DrivenRun(config, self._environment, self._options.out / f"{config.name}.log")
        self._ends.callback(run.interrupt)
        return run

    def _scene(self, run: DrivenRun) -> Scene:
        return Scene(
            run=self._root.sub(run.config.name),
            orders=self._orders,
            rng=self._rng,
            driver_pid=lambda: run.pid,
            second_driver=run.start_another,
            address=self._address(),
            nodes=self._nodes,
            server=self._server,
        )

    def _to_the_end(self, run: DrivenRun, timeout_s: float) -> str:
        """ "" once the driver has ended with 0, else what is wrong."""
        run.wait(lambda: False, timeout_s)
        code = run.exit_code()
        if code == 0:
            return ""
        why = f"ended with {code}" if code is not None else f"was not done after {timeout_s:.0f} s"
        return f"run {run.config.name} {why}: {' / '.join(run.lines[-3:])}"

    # -- rehearsals -------------------------------------------------------------------------------------------------

    def all_faults(self) -> Report:
        """Each class once."""
        report = Report(self._options.seed)
        faults = [fault for fault in FAULTS if fault.name in self._chosen]
        steps = 40 + 25 * len(faults)
        clean = self._run(self._config("clean", steps))
        self._console.print(f"a clean run of {steps} steps")
        clean.start()
        if wrong := self._to_the_end(clean, 120 + 2 * steps):
            raise OSError(f"the rehearsal's clean run failed: {wrong}")
        report.clean_sha256 = report.sha256 = digest_of(self._root.sub("clean"))
        report.wrong_images = wrong_images(self._root.sub("clean"), clean.config, steps)
        if faults:
            self._disturb(report, faults, steps)
        if _CORRUPT in self._chosen:
            report.rows.append(self._corrupt_image(report))
        if _DISK_FULL in self._chosen:
            report.rows.append(self._full_disk(report, steps))
        return report

    def _disturb(self, report: Report, faults: list[Fault], steps: int) -> None:
        """One run that meets all ``faults``, in an order that the seed draws."""
        run = self._run(self._config("disturbed", steps))
        self._orders.pace(_PACE_S)
        run.start()
        self._rng.shuffle(faults)
        for fault in faults:
            row = self.strike(run, fault, steps)
            report.rows.append(row)
            self._tell(row)
        self._orders.pace(0.0)
        if wrong := self._to_the_end(run, 300 + 2 * steps):
            report.notes.append(wrong)
        report.sha256 = digest_of(self._root.sub("disturbed"))
        report.wrong_images += wrong_images(self._root.sub("disturbed"), run.config, steps)
        report.tracking = tracking_faults(self._server.database, self._root.sub("disturbed").url, steps)

    def strike(self, run: DrivenRun, fault: Fault, steps: int) -> Row:
        """Inject one fault at a random moment of a run that is under way, and see it recover."""
        scene = self._scene(run)
        row = Row(fault.name, fault.what, fault.promise.value)
        if missing := fault.missing(scene):
            row.injected, row.note = False, f"not injected: {missing}"
            return row
        wanted = run.step + self._rng.randint(2, 8)
        if not run.wait(lambda: run.step >= wanted and _num_checkpoints(scene) >= fault.needs_checkpoints, _RECOVER_S):
            row.note = f"the run did not get to step {wanted}: {' / '.join(run.lines[-3:])}"
            self._revive(run)
            return row
        time.sleep(self._rng.uniform(0, 2 * _PACE_S))
        row.at_step, num_begun, num_lines = run.step, len(run.begins), len(run.lines)
        began_s = time.monotonic()
        try:
            row.struck = fault.inject(scene)
        except (OSError, RuntimeError) as error:
            row.note = str(error)
        if fault.promise is Promise.ENDS and not row.note:
            run.wait(lambda: False, _RECOVER_S)
            code = run.exit_code()
            if code not in fault.exit_codes:
                row.note = f"the driver ended with {code}, not {' or '.join(map(str, fault.exit_codes))}"
            self._revive(run)
        if fault.promise is not Promise.GOES_ON:
            run.wait(lambda: len(run.begins) > num_begun, _RECOVER_S)
        step = run.begins[-1][1] if len(run.begins) > num_begun else row.at_step
        recovered = run.wait(lambda: run.step > step, _RECOVER_S)
        if recovered:
            row.recover_s = time.monotonic() - began_s
        if len(run.begins) > num_begun:
            # What a killed driver has not printed is not counted.
            row.steps_redone = sum(max(0, before - first) for first, before in run.begins[num_begun:])
        said = any(re.search(fault.message, line) for line in run.lines[num_lines:])
        if not recovered:
            row.note = row.note or f"no new step: {' / '.join(run.lines[-3:])}"
        elif fault.promise is Promise.GOES_ON and len(run.begins) > num_begun:
            row.note = row.note or "the workers started again"
        elif fault.promise is Promise.RESTARTS and len(run.begins) == num_begun:
            row.note = row.note or "the workers did not start again"
        elif not said:
            row.note = row.note or f"nobody said {fault.message!r}"
        row.survived = not row.note
        self._revive(run)
        return row

    def _revive(self, run: DrivenRun) -> None:
        """What a user does after a driver has ended."""
        if run.exit_code() is None:
            return
        if self._nodes and not self._nodes.lives:
            self._nodes.renew()
            run.config = replace(run.config, placement=replace(run.config.placement, ray_address=self._nodes.address))
        run.start()

    def _corrupt_image(self, report: Report) -> Row:
        """A run of its own, on a copy of the generated set with an image that is none."""
        row = Row(_CORRUPT, "an image turns bad in a shard", Promise.GOES_ON.value)
        if self._options.data:
            row.injected, row.note = False, "not injected: your data is not the rehearsal's to damage: leave --data out"
            return row
        image, url = self._rng.randrange(10), f"{self._root.url}/data-corrupt"
        name = _copy_with_bad_image(Storage(self._data), Storage(url), image)
        steps = 12
        run = self._run(self._config(_CORRUPT, steps, data=url))
        run.start()
        row.struck, row.note = name, self._to_the_end(run, 300)
        if not any(f"image {name} cannot be decoded" in line for line in run.lines):
            row.note = row.note or "nobody said so"
        wrong = wrong_images(self._root.sub(_CORRUPT), run.config, steps, run.lines)
        row.survived, row.recover_s = not row.note and not wrong, 0.0
        report.wrong_images += wrong
        self._tell(row)
        return row

    def _full_disk(self, report: Report, steps: int) -> Row:
        """A run of its own, on a small file system in memory that is filled for some seconds."""
        row = Row(_DISK_FULL, "the disk is full for a while", Promise.GOES_ON.value)
        disk = self._options.out.absolute() / "small-disk"
        if not self._nodes or not self._mount(disk):
            row.injected, row.note = (
                False,
                "not injected: needs a cluster on this machine, and the right to mount a disk",
            )
            return row
        run = self._run(replace(self._config(_DISK_FULL, steps), storage=str(disk)))
        self._orders.pace(_PACE_S)
        run.start()
        wanted = self._rng.randint(6, 16)
        run.wait(lambda: run.step >= wanted, _RECOVER_S)
        row.at_step, began_s = run.step, time.monotonic()
        fill(disk / "ballast")
        run.wait(lambda: any("cannot be stored" in line for line in run.lines), _RECOVER_S)
        step = run.step
        goes_on = run.wait(lambda: run.step > step + 2, _RECOVER_S)
        (disk / "ballast").unlink()
        freed_s = time.monotonic()
        if run.wait(lambda: any("is stored now" in line for line in run.lines), _RECOVER_S):
            row.recover_s = time.monotonic() - freed_s
        self._orders.pace(0.0)
        row.struck = f"no room for {freed_s - began_s:.0f} s"
        row.note = (
            "" if goes_on and row.recover_s is not None else "training did not go on, or nothing was stored after"
        )
        row.note = self._to_the_end(run, 300 + 2 * steps) or row.note
        storage = Storage(str(disk)).sub(_DISK_FULL)
        if not row.note and digest_of(storage) != report.clean_sha256:
            row.note = "its weights are not the clean run's"
        row.survived = not row.note
        report.wrong_images += wrong_images(storage, run.config, steps)
        self._tell(row)
        return row

    def _mount(self, disk: Path) -> bool:
        disk.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK_MB}m", "tmpfs", str(disk)]
        with suppress(OSError):
            if subprocess.run(words, capture_output=True, check=False).returncode == 0:
                self._ends.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)
                return True
        disk.rmdir()
        return False

    def soak(self) -> Report:
        """Faults at random times, as many as the time allows, and how much of it was of use."""
        report = Report(self._options.seed)
        self._orders.pace(_PACE_S)
        clean = self._run(self._config("clean", 100, checkpoint_every_steps=50))
        self._console.print("a clean run of 100 steps")
        clean.start()
        if wrong := self._to_the_end(clean, 400):
            raise OSError(f"the rehearsal's clean run failed: {wrong}")
        step_s = _step_s(newest_journal(self._root.sub("clean")))
        run = self._run(self._config("soak", 1_000_000, checkpoint_every_steps=50))
        faults = [f for f in FAULTS if f.name in self._chosen and not f.missing(self._scene(run))]
        if not faults:
            raise ValueError(f"none of {', '.join(self._chosen)} can be injected into a soak: choose others")
        began_s = time.monotonic()
        run.start()
        run.wait(lambda: run.step > 0, _RECOVER_S)
        while (left_s := self._options.soak_s - (time.monotonic() - began_s)) > 0:
            pause_s = self._rng.expovariate(1 / self._options.mean_time_between_faults_s)
            run.wait(lambda: False, min(left_s, pause_s))
            self._revive(run)
            if pause_s < left_s:
                row = self.strike(run, self._rng.choice(faults), 0)
                report.rows.append(row)
                self._tell(row)
        code = run.interrupt()
        total_s = time.monotonic() - began_s
        if code != command_line.EXIT_INTERRUPTED:
            report.notes.append(f"the soak's driver ended with {code} at Ctrl-C: {' / '.join(run.lines[-3:])}")
        journal = newest_journal(self._root.sub("soak"))
        kept = max((int(e["step"]) for e in journal if e["kind"] == "train"), default=0)
        report.wrong_images = wrong_images(self._root.sub("soak"), run.config, kept)
        report.goodput_percent = 100 * kept * step_s / total_s
        self._console.print(
            f"{kept} steps of {1000 * step_s:.0f} ms kept in {total_s:.0f} s with {len(report.rows)} faults"
        )
        return report

    def _tell(self, row: Row) -> None:
        if not row.injected:
            return self._console.print(f"{row.fault}: {row.note}", soft_wrap=True)
        how = f"recovered in {row.recover_s:.1f} s" if row.survived and row.recover_s is not None else row.note
        self._console.print(f"{row.fault} at step {row.at_step} ({row.struck}): {how}", soft_wrap=True)


def fill(path: Path) -> None:
    """Write ``path`` until its file system is full."""
    for nbytes in (1 << 20, 1 << 12, 1):
        with suppress(OSError), path.open("ab", buffering=0) as file:
            while file.write(bytes(nbytes)) == nbytes:
                pass


def _num_checkpoints(scene: Scene) -> int:
    with suppress(OSError):
        return sum(name.endswith(".json") for name in scene.run.files("checkpoints"))
    return 0


def _step_s(journal: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a step of an undisturbed run, validations and checkpoints included, but for the first few."""
    times_ms = [event["time_ms"] for event in journal if event["kind"] == "train"][5:]
    return float(times_ms[-1] - times_ms[0]) / (len(times_ms) - 1) / 1000


def _copy_with_bad_image(source: Storage, target: Storage, index: int) -> str:
    """Copy a prepared set, with the bytes of a training image overwritten; the name of the image."""
    split = DataSet(source).split("train")
    shard = split.info.shards[split.shard[index]].name
    start, nbytes = int(split.offset[index]), int(split.nbytes[index])
    for name in source.find():
        content = source.read(name)
        if name == shard:
            content = content[:start] + b"no image".ljust(nbytes, b".") + content[start + nbytes :]
        target.publish(name, content)
    return str(split.names[index].as_py())


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, "all that the rehearsal started has been ended"))
