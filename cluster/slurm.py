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
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from cluster import launch
from cluster.launch import Array, Job, State, Status, environment_to_pass
from cluster.local import status_of
from cluster.settings import SlurmSettings
from cluster.slurm_start import LEAVE_MARGIN_S, Start, command, field, words_of

_OWN, _ARRAY = "slurm", "slurm-array"
_NO_LIMIT = 1_000_000  # restarts after a time limit: a campaign takes as many as it takes
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
            command("scancel", array_id)
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
                    command("scancel", each.handle["job_id"])


def _status_of(job: Job, folder: Path) -> Status:
    """Of one job of SLURM's, an array's element or not."""
    number = job.handle["job_id"]
    queued = command("squeue", "--noheader", "--jobs", number, "--states", "all", "--format", "%T|%r|%N")
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
    return field(command("scontrol", "show", "job", number, "--oneliner"), "JobState")


def _check(settings: SlurmSettings) -> None:
    for name in ("nodes", "cpus_per_node", "time_min"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--slurm.{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    if settings.cpus_per_node < settings.gpus_per_node:
        raise ValueError(
            f"--slurm.cpus-per-node {settings.cpus_per_node} is less than --slurm.gpus-per-node "
            f"{settings.gpus_per_node}: a worker takes a CPU at least beside its GPU, and the others would idle"
        )
    if settings.warning_s >= settings.time_min * 60:
        raise ValueError(
            f"--slurm.warning-s {settings.warning_s} leaves nothing of a start of {settings.time_min} minutes"
        )
    if settings.warning_s <= LEAVE_MARGIN_S:
        raise ValueError(f"--slurm.warning-s must be more than {LEAVE_MARGIN_S:.0f}: a checkpoint takes its time")
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
    if number := command("squeue", "--noheader", "--name", parameters["job_name"], "--format", "%F"):
        return number
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=_NO_LIMIT)
    executor.update_parameters(**parameters)
    try:
        with executor.batch():
            submitted = [executor.submit(start) for start in starts]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"SLURM does not take the job: {words_of(str(error))}") from None
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
