"""What a SLURM job does on its nodes: each node's task, start after start; the first node's runs the job's driver.

SLURM warns before it takes the nodes away: a checkpoint, then the job is queued again. A node that is lost ends the
start, and the job is queued again as well.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FrameType

import submitit

from cluster.allocation import AllocationError, Node, RayOnNodes, SettingError, visible_gpus
from cluster.launch import Job
from cluster.local import STOPPED
from cluster.settings import SlurmSettings
from orchestrator.control.guard import ENDING_VARIABLE

_POLL_S = 0.5
LEAVE_MARGIN_S = 15.0  # of the warning time, for ending Ray and queueing the job again
_STOP_S = 600.0  # for the checkpoint of a job that was asked to end, and for Ray's end
_CUT, _MOST_CUT_STARTS = "cut", 3  # of a job: a time limit that leaves nothing must not be met without end
_LOST, _MOST_LOST_STARTS = "lost", 20  # of a job: nodes that never come up must not be asked for without end
_KILLED_S = 15.0  # for its end where SLURM kills it soon
_MOST_ENDING_S, _SLOWER_S = 180.0, 30.0  # for a checkpoint where nobody is in a hurry; for what follows it
_COMMAND_S = 60.0
_PATIENCE_S, _AGAIN_S = 120.0, 5.0  # with a SLURM that does not answer
_BY_SLURM = STOPPED[-1], "ended by SLURM (cancelled, or its time was over): the same command goes on"


class _Fate(Enum):
    """Of a job whose start goes wrong."""

    STAYS = "stays"  # it has its nodes still: what goes wrong is not SLURM's doing
    QUEUED = "queued"  # SLURM has queued it again
    ENDED = "ended"  # by scancel, or at its time limit


class Start:
    """What each node's task does: called once a start. Stateless, for SLURM runs the same pickle again."""

    def __init__(self, job: Job, folder: Path, settings: SlurmSettings, environment: dict[str, str]) -> None:
        """``environment``: of the machine that it was launched from."""
        self._job, self._folder, self._settings, self._environment = job, folder, settings, environment
        self._driver: subprocess.Popen[bytes] | None = None
        self._ray: RayOnNodes | None = None
        self._is_terminated = False
        self._asked_s = self._until_s = 0.0  # when the driver was asked to end, and is killed

    def __call__(self) -> int:
        """The job's exit code."""
        self._ray = ray = self._ray_here()
        if submitit.JobEnvironment().global_rank:
            ray.join()
            return 0
        (self._folder / "ended.json").unlink(missing_ok=True)  # of an earlier start
        signal.signal(signal.SIGTERM, self._on_terminate)
        code, said = 1, ""
        try:
            with ray.head() as address:
                code, said = self._drive(ray, address)
        except AllocationError as error:
            ray.is_lost |= not isinstance(error, SettingError)
            said = str(error)
            self._print(f"error: {said}")
        fate = self._fate() if code else _Fate.STAYS
        if fate is _Fate.QUEUED:
            sys.exit(code)  # the next start says how the job ends
        if fate is _Fate.ENDED:  # whatever became of the driver, whose Ray was ended with it
            code, said = _BY_SLURM
        elif code != 0 and said and ray.is_lost and not self._is_stopped():
            starts = self._starts_marked(_LOST)
            if starts < _MOST_LOST_STARTS:
                self._print(f"{said}: the job is queued again")
                if not (hindered := self._queue_again(time.monotonic() + _PATIENCE_S)):
                    time.sleep(_COMMAND_S)  # SLURM ends this task
                    hindered = f"SLURM has not ended this start within {_COMMAND_S:.0f} s"
                said = f"it could not be queued again ({hindered}) after this: {said}"
            else:
                said = f"{starts} starts of this job have lost nodes: it is not queued again ({said})"
        self._write_end(code, said)
        if code:
            sys.exit(code)
        return code

    def _is_stopped(self) -> bool:
        with suppress(OSError):
            return (self._folder / "stop").exists()
        return False

    def _write_end(self, code: int, said: str) -> None:
        written = self._folder / "ended.new"
        written.write_text(json.dumps({"code": code, "said": said}))
        written.replace(self._folder / "ended.json")

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        """SLURM ends all processes of the start: by scancel, to queue it again, or since a node is gone."""
        self._is_terminated = True

    def _fate(self) -> _Fate:
        """What SLURM does with the job now. While its processes still end, all that is shown of it is COMPLETING."""
        text = ""
        with suppress(OSError, ValueError):
            text = command("scontrol", "show", "job", submitit.JobEnvironment().job_id, "--oneliner")
        if field(text, "JobState") in ("", "RUNNING"):
            return _Fate.STAYS
        is_next = int(field(text, "Restarts") or 0) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return _Fate.QUEUED if is_next else _Fate.ENDED

    def _ray_here(self) -> RayOnNodes:
        here, settings = submitit.JobEnvironment(), self._settings
        hosts = [host for host in here.hostnames if host != os.environ.get("SLURMD_NODENAME")]
        node = Node(
            here.global_rank,
            here.num_nodes,
            settings.cpus_per_node,
            visible_gpus(os.environ) if settings.gpus_per_node else 0,
            hosts[0] if hosts else "",
        )
        start = f"ray-{here.job_id}-{os.environ.get('SLURM_RESTART_COUNT') or 0}"
        return RayOnNodes(
            self._folder / start, node, join_timeout_s=settings.join_timeout_s, interface=settings.interface
        )

    # -- the first node -----------------------------------------------------------------------------------------

    def _drive(self, ray: RayOnNodes, address: str) -> tuple[int, str]:
        """Run the job's driver to its end: its exit code, and what is to be said of it."""
        environment = os.environ | self._environment | ray.environment | {"RAY_ADDRESS": address}
        environment |= {"PYTHONUNBUFFERED": "1", ENDING_VARIABLE: str(self._ending_s)}
        # RAY_AUTH_TOKEN would come before the file that names this cluster's token.
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_AUTH_TOKEN"):
            environment.pop(name, None)
        for mark in self._folder.glob(f"ray-*/{_CUT}"):
            mark.unlink(missing_ok=True)
        with (self._folder / "log.txt").open("ab") as log:
            driver = self._driver = subprocess.Popen(
                ["env", "--ignore-signal=USR2", sys.executable, *self._job.argv],
                cwd=self._job.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while (code := driver.poll()) is None:
                if self._is_terminated:
                    self._is_terminated = False
                    if self._fate() is _Fate.ENDED:
                        self._write_end(*_BY_SLURM)  # now: SLURM kills what takes its time
                        self._ask(_KILLED_S)  # where it has told this process alone
                lost = ray.lost()
                if lost or self._is_stopped():
                    self._ask(self._ending_s + _SLOWER_S if ray.is_lost else _STOP_S)
                if self._asked_s and time.monotonic() > self._until_s:
                    driver.kill()
                time.sleep(_POLL_S)
        finally:
            driver.kill()
        return (code if code >= 0 else 128 - code), ray.lost()

    @property
    def _ending_s(self) -> float:
        """What the driver is given for a checkpoint when it is asked to end."""
        return max(LEAVE_MARGIN_S, min(_MOST_ENDING_S, self._settings.warning_s - 2 * LEAVE_MARGIN_S))

    def _ask(self, ending_s: float) -> None:
        """Ask the driver to make a checkpoint and end; once, for a second time means: without one."""
        if not self._asked_s and self._driver is not None and self._driver.poll() is None:
            self._asked_s, self._until_s = time.monotonic(), time.monotonic() + ending_s
            self._driver.send_signal(signal.SIGTERM)

    def checkpoint(self) -> None:
        """SLURM has warned: a checkpoint within the warning time, then the queue. Does not return."""
        until_s = time.monotonic() + self._settings.warning_s - LEAVE_MARGIN_S
        driver, code = self._driver, None
        if driver is not None:
            self._ask(self._settings.warning_s)
            if driver.poll() is None:
                self._print(f"SLURM takes the nodes away in {self._settings.warning_s} s: a checkpoint, then the queue")
            while (code := driver.poll()) is None and time.monotonic() < until_s:
                if self._ray is not None:
                    self._ray.beat()  # this is the signal's handler: the loop of _drive stands still
                time.sleep(_POLL_S)
            driver.kill()
        if self._ray is not None:
            self._ray.end()
        is_lost = self._ray is not None and self._ray.is_lost
        if code is not None and code not in (*STOPPED, -signal.SIGTERM) and not (code and is_lost):
            self._write_end(code if code >= 0 else 128 - code, "")  # it has ended by itself
        elif self._is_stopped():
            self._write_end(STOPPED[-1], "")
        elif driver is None and self._starts_marked(_CUT) >= _MOST_CUT_STARTS:
            said = f"{_MOST_CUT_STARTS} starts were over before their nodes were a cluster: a longer --slurm.time-min"
            self._print(f"error: {said}")
            self._write_end(1, said)
        elif is_lost and self._starts_marked(_LOST) >= _MOST_LOST_STARTS:
            self._write_end(1, f"{_MOST_LOST_STARTS} starts of this job have lost nodes: it is not queued again")
        elif hindered := self._queue_again(until_s):
            self._write_end(1, f"it could not be queued again ({hindered}): the same command goes on")
        sys.exit(code or 1)

    def _starts_marked(self, name: str) -> int:
        """Starts with a mark of this name, this one included, which gets it."""
        if self._ray is not None:
            self._ray.mark(name)
        return sum(1 for _ in self._folder.glob(f"ray-*/{name}"))

    def _queue_again(self, until_s: float) -> str:
        """What has hindered it. SLURM may not answer for a moment: it is asked until ``until_s``."""
        if "SLURM_JOB_ID" not in os.environ:
            return "SLURM has not started it"
        number = submitit.JobEnvironment().job_id  # of an array's element ID_N: the raw one may be the whole array's
        while True:
            try:
                command("scontrol", "requeue", number)
                return ""
            except (OSError, ValueError) as error:
                if time.monotonic() > until_s:
                    return str(error)
            time.sleep(_AGAIN_S)

    def _print(self, text: str) -> None:
        with suppress(OSError), (self._folder / "log.txt").open("a") as log:
            log.write(text + "\n")


def command(*words: str) -> str:
    """What one of SLURM's commands prints; "" where it does not know the job. Raises OSError."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except FileNotFoundError:
        raise ValueError(f"there is no {words[0]} here: ask from a machine of the SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"SLURM does not answer ({words[0]}, {_COMMAND_S:.0f} s)") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(f"SLURM refuses {words[0]}: {words_of(done.stderr)}")
    return done.stdout.strip().partition("\n")[0]


def field(text: str, name: str) -> str:
    """Of what ``scontrol show`` prints; "" where it is not there."""
    match = re.search(rf"\b{name}=(\S+)", text)
    return match.group(1) if match else ""


def words_of(text: str) -> str:
    return " ".join(text.split())[:300]
