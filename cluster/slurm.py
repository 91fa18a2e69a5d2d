"""The launcher of SLURM jobs, by submitit: N nodes, on each a task, which together make a Ray cluster for one job.

SLURM warns before it takes the nodes away (time limit, preemption): the job makes a checkpoint, is queued again, and
goes on where it was. A node that is lost ends the start, and the job is queued again as well.

    slurm/ID_submission.sh, ID_N_log.out, …   submitit's: the batch script, what node N's task prints
    log.txt                                   what the job prints, all starts one after another
    stop                                      somebody has asked the job to end
    ended.json                                its exit code, once it has ended for good
    ray-ID-S/                                 of start S (cluster/allocation.py)

The parts of a job that is an array are elements of a SLURM job array, the job itself depends on their ends:

    slurm-array/                              submitit's, of the array
    members/NAME/                             log.txt, stop, ended.json, ray-ID-S/ of part NAME
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from cluster import launch
from cluster.allocation import AllocationError, Node, RayOnNodes, SettingError, visible_gpus
from cluster.launch import Array, Job, State, Status, environment_to_pass
from cluster.local import STOPPED, status_of
from cluster.settings import SlurmSettings
from orchestrator.control.guard import ENDING_VARIABLE

_OWN, _ARRAY = "slurm", "slurm-array"
_POLL_S = 0.5
_NO_LIMIT = 1_000_000  # restarts after a time limit: a campaign takes as many as it takes
_LEAVE_MARGIN_S = 15.0  # of the warning time, for ending Ray and queueing the job again
_STOP_S = 600.0  # for the checkpoint of a job that was asked to end, and for Ray's end
_CUT, _MOST_CUT_STARTS = "cut", 3  # of a job: a time limit that leaves nothing must not be met without end
_LOST, _MOST_LOST_STARTS = "lost", 20  # of a job: nodes that never come up must not be asked for without end
_KILLED_S = 15.0  # for its end where SLURM kills it soon
_MOST_ENDING_S, _SLOWER_S = 180.0, 30.0  # for a checkpoint where nobody is in a hurry; for what follows it
_COMMAND_S = 60.0
_PATIENCE_S, _AGAIN_S = 120.0, 5.0  # with a SLURM that does not answer
_WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESIZING")
_RUNS = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")


class Slurm:
    """The launcher."""

    def __init__(self, settings: SlurmSettings) -> None:
        self._settings = settings

    def preview(self, job: Job, folder: Path) -> str:
        _check(self._settings)
        parameters, text = _parameters(self._settings, job.id), ""
        if job.array is not None:
            text = _script(folder / _ARRAY, _of_array(parameters, job.array), len(job.array.argv)) + "\n"
            parameters = _behind(parameters, "ARRAY")
        return text + _script(folder / _OWN, parameters)

    def submit(self, job: Job, folder: Path) -> dict[str, str]:
        _check(self._settings)
        if shutil.which("sbatch") is None:
            raise ValueError("there is no sbatch here: launch from a machine of the SLURM cluster")
        parameters = _parameters(self._settings, job.id)
        if job.array is None:
            return {"job_id": _submit_once(folder / _OWN, parameters, [self._start(job, folder)])}
        starts = [self._start(*part) for part in launch.parts(job, folder).values()]
        array_id = _submit_once(folder / _ARRAY, _of_array(parameters, job.array), starts)
        try:
            job_id = _submit_once(folder / _OWN, _behind(parameters, array_id), [self._start(job, folder)])
        except ValueError:
            _slurm("scancel", array_id)
            shutil.rmtree(folder / _ARRAY)  # else the next try would take it for one that waits
            raise
        ids = [array_id] if len(starts) == 1 else [f"{array_id}_{number}" for number in range(len(starts))]
        return {"job_id": job_id} | {f"job_id/{name}": id for name, id in zip(job.array.argv, ids, strict=True)}

    def _start(self, job: Job, folder: Path) -> Start:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Start(job, folder, self._settings, environment_to_pass(os.environ))

    def status(self, job: Job, folder: Path) -> Status:
        """Without accounting: the queue, what the job has written at its end, then what SLURM still remembers."""
        found = {name: _status_of(*part) for name, part in launch.parts(job, folder).items()}
        left = [status.state for status in found.values() if not status.state.is_over]
        if not left:
            return _status_of(job, folder)
        said = [f"{name} {each.state.value}{f' ({each.said})' if each.said else ''}" for name, each in found.items()]
        return Status(State.RUNNING if State.RUNNING in left else State.WAITING, "; ".join(said))

    def log(self, job: Job, folder: Path) -> str:
        """Of an array each part's, then its own."""
        texts = [f"== {name} ==\n{self.log(*part)}" for name, part in launch.parts(job, folder).items()]
        with suppress(FileNotFoundError):
            texts.append((folder / "log.txt").read_text(errors="replace"))
        return "\n".join(texts)

    def stop(self, job: Job, folder: Path) -> None:
        # The job itself first: it is not to begin because its parts have ended.
        for each, at in [(replace(job, array=None), folder), *launch.parts(job, folder).values()]:
            state = _status_of(each, at).state
            if not state.is_over:
                (at / "stop").touch()
                if state is State.WAITING:
                    _slurm("scancel", each.handle["job_id"])


def _status_of(job: Job, folder: Path) -> Status:
    """Of one job of SLURM's, an array's element or not."""
    number = job.handle["job_id"]
    queued = _slurm("squeue", "--noheader", "--jobs", number, "--states", "all", "--format", "%T|%r|%N")
    state, _, rest = queued.partition("|")
    why, _, nodes = rest.partition("|")
    if state in _WAITS:
        return Status(State.WAITING, why)
    if state in _RUNS:
        return Status(State.RUNNING, f"on {nodes}" if nodes else why)
    with suppress(FileNotFoundError):
        ended = json.loads((folder / "ended.json").read_text())
        found = status_of(int(ended["code"]))
        return Status(found.state, ended.get("said") or found.said)
    if (folder / "stop").exists():
        return Status(State.STOPPED, "ended by scancel: the same command goes on")
    if not state:
        state = _state_of(number)
    if state in ("CANCELLED", "PREEMPTED"):
        return Status(State.STOPPED, f"SLURM: {state}; the same command goes on")
    if state:
        return Status(State.FAILED, f"SLURM: {state}; the same command goes on")
    return Status(State.LOST, "SLURM does not know it any more, and it has not written how it ended: same command")


def _state_of(number: str) -> str:
    """A job's state as SLURM remembers it; "" where it does not."""
    return _field(_slurm("scontrol", "show", "job", number, "--oneliner"), "JobState")


def _field(text: str, name: str) -> str:
    """Of what ``scontrol show`` prints; "" where it is not there."""
    match = re.search(rf"\b{name}=(\S+)", text)
    return match.group(1) if match else ""


def _check(settings: SlurmSettings) -> None:
    for name in ("nodes", "cpus_per_node", "time_min"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--slurm.{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    if settings.warning_s >= settings.time_min * 60:
        raise ValueError(
            f"--slurm.warning-s {settings.warning_s} leaves nothing of a start of {settings.time_min} minutes"
        )
    if settings.warning_s <= _LEAVE_MARGIN_S:
        raise ValueError(f"--slurm.warning-s must be more than {_LEAVE_MARGIN_S:.0f}: a checkpoint takes its time")
    for each in settings.extra:
        if "=" not in each:
            raise ValueError(f"--slurm.extra {each!r}: give it as option=value")


class _Preview(submitit.SlurmExecutor):
    """Writes scripts also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _script(folder: Path, parameters: dict[str, Any], num_elements: int = 0) -> str:
    """The batch script; ``num_elements``: of an array."""
    executor = _Preview(folder=folder)
    executor.update_parameters(**parameters)
    if num_elements > 1:
        executor.parameters["map_count"] = num_elements  # as submitit does for an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _submit_once(folder: Path, parameters: dict[str, Any], starts: Sequence[Start]) -> str:
    """The id under which SLURM queues ``starts``, an array where they are several. Raises ValueError."""
    found = [path.name.split("_")[0] for path in folder.glob("[0-9]*_submission.sh")]
    if found:  # whoever submitted it was ended before it could write that down
        return found[0]
    if number := _slurm("squeue", "--noheader", "--name", parameters["job_name"], "--format", "%F"):
        return number
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=_NO_LIMIT)
    executor.update_parameters(**parameters)
    try:
        with executor.batch():
            submitted = [executor.submit(start) for start in starts]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"SLURM does not take the job: {_words(str(error))}") from None
    return str(submitted[0].job_id).partition("_")[0]


def _of_array(parameters: dict[str, Any], array: Array) -> dict[str, Any]:
    """``parameters`` of the job for its parts."""
    at_once = array.at_once or len(array.argv)
    return parameters | {"job_name": f"{parameters['job_name']}-members", "array_parallelism": at_once}


def _behind(parameters: dict[str, Any], array_id: str) -> dict[str, Any]:
    """``parameters`` of a job that begins when all elements of an array have ended, however they did."""
    more = parameters["additional_parameters"] | {"dependency": f"afterany:{array_id}"}
    return parameters | {"additional_parameters": more}


def _parameters(settings: SlurmSettings, job_name: str) -> dict[str, Any]:
    """In submitit's words."""
    s = settings
    found: dict[str, Any] = {
        "job_name": job_name,
        "nodes": s.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": s.cpus_per_node,
        "time": s.time_min,
        "signal_delay_s": s.warning_s,
        "stderr_to_stdout": True,
        # srun does not take over what sbatch was given.
        # The tasks see what the batch script sets, also where the job was submitted with an empty environment.
        "srun_args": [f"--cpus-per-task={s.cpus_per_node}", "--export=ALL"],
        "additional_parameters": {"requeue": True, **dict(each.split("=", 1) for each in s.extra)},
    }
    found |= {"gpus_per_node": s.gpus_per_node} if s.gpus_per_node else {}
    found |= {"mem": f"{s.mem_gb}GB" if s.mem_gb else "0"}
    found |= {name: value for name in ("partition", "account", "qos") if (value := getattr(s, name))}
    return found


def _slurm(*words: str) -> str:
    """What one of SLURM's commands prints; "" where it does not know the job. Raises OSError."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except FileNotFoundError:
        raise ValueError(f"there is no {words[0]} here: ask from a machine of the SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"SLURM does not answer ({words[0]}, {_COMMAND_S:.0f} s)") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(f"SLURM refuses {words[0]}: {_words(done.stderr)}")
    return done.stdout.strip().partition("\n")[0]


def _words(text: str) -> str:
    return " ".join(text.split())[:300]


# -- on the nodes ---------------------------------------------------------------------------------------------------


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
            text = _slurm("scontrol", "show", "job", submitit.JobEnvironment().job_id, "--oneliner")
        if _field(text, "JobState") in ("", "RUNNING"):
            return _Fate.STAYS
        is_next = int(_field(text, "Restarts") or 0) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)
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
        return max(_LEAVE_MARGIN_S, min(_MOST_ENDING_S, self._settings.warning_s - 2 * _LEAVE_MARGIN_S))

    def _ask(self, ending_s: float) -> None:
        """Ask the driver to make a checkpoint and end; once, for a second time means: without one."""
        if not self._asked_s and self._driver is not None and self._driver.poll() is None:
            self._asked_s, self._until_s = time.monotonic(), time.monotonic() + ending_s
            self._driver.send_signal(signal.SIGTERM)

    def checkpoint(self) -> None:
        """SLURM has warned: a checkpoint within the warning time, then the queue. Does not return."""
        until_s = time.monotonic() + self._settings.warning_s - _LEAVE_MARGIN_S
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
                _slurm("scontrol", "requeue", number)
                return ""
            except (OSError, ValueError) as error:
                if time.monotonic() > until_s:
                    return str(error)
            time.sleep(_AGAIN_S)

    def _print(self, text: str) -> None:
        with suppress(OSError), (self._folder / "log.txt").open("a") as log:
            log.write(text + "\n")
