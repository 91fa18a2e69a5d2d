"""Launching a job: submitted in a moment, then asked for its status, its log, its end, in the same words everywhere.

``local.py``, ``ray_jobs.py`` and ``slurm.py`` are launchers. A launch leaves a numbered folder in the launch folder:

    LAUNCHES/NAME/000001/job.json     what runs, where, and by which handle it is found again (a process, an id)
    LAUNCHES/NAME/000001/…            what the launcher writes (docs/running_on_your_cluster.md)
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Protocol

from orchestrator.masking import masked

_RECORD = "job.json"


class Where(Enum):
    """Where a job can run."""

    LOCAL = "local"  # in the background of this machine
    RAY = "ray"  # as a job of a running Ray cluster
    SLURM = "slurm"  # on nodes of SLURM, with a Ray cluster of its own


class State(Enum):
    """How a job stands."""

    WAITING = "waiting"  # for its turn or its machines
    RUNNING = "running"
    FINISHED = "finished"  # exit code 0
    FAILED = "failed"
    STOPPED = "stopped"  # on request: the same command goes on
    LOST = "lost"  # nobody knows of it any more

    @property
    def is_over(self) -> bool:
        return self not in (State.WAITING, State.RUNNING)


@dataclass(frozen=True)
class Status:
    """``said``: where it runs, why it waits, how it ended."""

    state: State
    said: str = ""


@dataclass(frozen=True)
class Array:
    """Parts of a job that run side by side, each on machines of its own; the job itself comes when all have ended.

    ``argv``: of each part, by its name; ``at_once``: at most so many of them, 0: all.
    """

    argv: dict[str, tuple[str, ...]]
    at_once: int = 0


@dataclass(frozen=True)
class Job:
    """A launched job.

    ``argv``: what follows ``python``; ``submitted``: ISO 8601, UTC; ``handle``: by which its launcher finds it, {}
    until that is known; KEY/PART is a part's own KEY.
    """

    name: str
    number: int
    where: Where
    argv: tuple[str, ...]
    directory: str
    submitted: str
    handle: dict[str, str]
    nonce: str = ""  # others may have launch folders of their own, and jobs of the same name
    array: Array | None = None

    @property
    def id(self) -> str:
        """Nobody else's, and the same for the same launch."""
        return "-".join(filter(None, [self.name, f"{self.number:06d}", self.nonce]))


class Launcher(Protocol):
    """One kind of place to run. ``folder`` is the job's numbered folder.

    All raise ValueError for what the user must mend, OSError where the place does not answer.
    """

    def preview(self, job: Job, folder: Path) -> str:
        """What ``submit`` would hand over. Nothing is written."""
        ...

    def submit(self, job: Job, folder: Path) -> dict[str, str]:
        """Start ``job`` or queue it, and return at once; its handle. The same job twice is one."""
        ...

    def status(self, job: Job, folder: Path) -> Status: ...

    def log(self, job: Job, folder: Path) -> str:
        """All that it has printed so far."""
        ...

    def stop(self, job: Job, folder: Path) -> None:
        """Ask it to make a checkpoint and end; returns at once."""
        ...


LauncherOf = Callable[[Where], Launcher]


def submit(
    launcher_of: LauncherOf, launches: Path, name: str, where: Where, argv: Sequence[str], array: Array | None = None
) -> tuple[Job, bool]:
    """Launch ``python ARGV`` in this working directory; the job, and whether it is new.

    A job of this name that waits or runs is left alone and given back where it is the same, else ValueError.
    """
    _check_name(name)
    (launches / name).mkdir(parents=True, exist_ok=True)
    with (launches / name / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the same command typed twice at once
        return _submit(launcher_of, launches, name, where, argv, array)


def _submit(
    launcher_of: LauncherOf, launches: Path, name: str, where: Where, argv: Sequence[str], array: Array | None
) -> tuple[Job, bool]:
    newest = find(launches, name)
    if newest is not None and (not newest.handle or not status(launcher_of, newest, launches).state.is_over):
        if (newest.where, newest.argv, newest.array) != (where, tuple(argv), array):
            if not newest.handle:
                raise ValueError(
                    f"the submission of job {name!r} to {newest.where.value} was interrupted: repeat that command, or "
                    f"make sure that it does not run there and remove {folder_of(launches, newest)}"
                )
            raise ValueError(
                f"job {name!r} is at work on {newest.where.value} with another command: give another --launch-name, or "
                "stop it first"
            )
        # Without a handle: whoever submitted it was ended in between, and the launcher knows whether it got there.
        return newest if newest.handle else _hand_over(launcher_of(where), newest, launches), False
    number = newest.number + 1 if newest is not None else 1
    job = Job(name, number, where, tuple(argv), str(Path.cwd()), _now(), {}, secrets.token_hex(3), array)
    folder = folder_of(launches, job)
    folder.mkdir(mode=0o700)
    _write(folder, job)
    try:
        return _hand_over(launcher_of(where), job, launches), True
    except ValueError:  # refused: it is not in the way of the next one
        shutil.rmtree(folder)
        raise


def _hand_over(launcher: Launcher, job: Job, launches: Path) -> Job:
    folder = folder_of(launches, job)
    job = replace(job, handle=launcher.submit(job, folder))
    _write(folder, job)
    return job


def check_submitted(job: Job) -> None:
    """Raises ValueError where its launcher may not know it."""
    if not job.handle:
        raise ValueError(f"the submission of job {job.name!r} was interrupted: the same command submits it")


def status(launcher_of: LauncherOf, job: Job, launches: Path, member: str = "") -> Status:
    """Its status, or that of its part ``member``; LOST where its submission was ended in the middle."""
    folder = folder_of(launches, job)
    if member:
        job, folder = part(job, folder, member)
    if not job.handle:
        return Status(State.LOST, "its submission was interrupted: the same command submits it")
    return launcher_of(job.where).status(job, folder)


def preview(
    launcher: Launcher, launches: Path, name: str, where: Where, argv: Sequence[str], array: Array | None = None
) -> str:
    """What ``submit`` would hand over to the launcher."""
    _check_name(name)
    newest = find(launches, name)
    job = Job(name, newest.number + 1 if newest else 1, where, tuple(argv), str(Path.cwd()), _now(), {}, array=array)
    return launcher.preview(job, folder_of(launches, job))


def find(launches: Path, name: str) -> Job | None:
    """The newest job of this name. Raises ValueError for a damaged record."""
    folders = sorted(path for path in (launches / name).glob("[0-9]*") if path.is_dir())
    if not folders:
        return None
    path = folders[-1] / _RECORD
    try:
        plain = json.loads(path.read_text())
        array = plain.get("array")
        if array is not None:
            array = Array({name: tuple(words) for name, words in array["argv"].items()}, array["at_once"])
        return Job(**plain | {"where": Where(plain["where"]), "argv": tuple(plain["argv"]), "array": array})
    except FileNotFoundError:
        raise ValueError(f"a launch has no record {path}: it was interrupted at once; remove {folders[-1]}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no record of a job ({error}): remove {folders[-1]}") from None


def names(launches: Path) -> list[str]:
    """Of all jobs that were launched from this folder."""
    return sorted(path.name for path in launches.iterdir() if any(path.glob("[0-9]*"))) if launches.is_dir() else []


def folder_of(launches: Path, job: Job) -> Path:
    """The job's own folder, absolute."""
    return (launches / job.name / f"{job.number:06d}").absolute()


def part(job: Job, folder: Path, name: str) -> tuple[Job, Path]:
    """Part ``name`` of a job as a job, and its folder. Raises ValueError where there is none."""
    if job.array is None or name not in job.array.argv:
        known = f"it has {', '.join(job.array.argv)}" if job.array else "it was not launched as an array"
        raise ValueError(f"job {job.name!r} has no member {name!r}: {known}")
    end = f"/{name}"
    handle = {key.removesuffix(end): value for key, value in job.handle.items() if key.endswith(end)}
    return replace(job, argv=job.array.argv[name], handle=handle, array=None), folder / "members" / name


def parts(job: Job, folder: Path) -> dict[str, tuple[Job, Path]]:
    """All of them, by name; {} where it has none."""
    return {name: part(job, folder, name) for name in job.array.argv} if job.array else {}


def follow(launcher: Launcher, job: Job, folder: Path, pause: Iterator[None]) -> Iterator[str]:
    """Its log piece by piece as it grows, until it is over; ``pause`` is advanced between two looks."""
    seen = 0
    while True:
        is_over = launcher.status(job, folder).state.is_over
        text = launcher.log(job, folder)
        if len(text) > seen:
            yield text[seen:]
            seen = len(text)
        if is_over:
            return
        next(pause)


def environment_to_pass(environment: Mapping[str, str]) -> dict[str, str]:
    """Of ``environment`` what a job on other machines needs; nothing that may be secret.

    Credentials of object stores and of MLflow belong into the environment of the machines, or into their roles. Raises
    ValueError where the job cannot do without one that is.
    """
    needed, wanted = (
        ("IMAGENET_DATA", "CIFAR10_DATA", "IMAGENET_STORAGE"),
        ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    )
    found = {name: environment[name] for name in (*needed, *wanted) if environment.get(name)}
    secret = {name for name, value in found.items() if masked(value) != value and not _names_a_container(value)}
    if held := sorted(secret.intersection(needed)):
        raise ValueError(
            f"{held[0]} holds credentials, and is not handed to machines elsewhere: give the URL without them, and set "
            "them on the machines"
        )
    return {name: value for name, value in found.items() if name not in secret}


def _names_a_container(url: str) -> bool:
    """Azure's URLs have an @ that is no credential's: abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/…"""
    scheme, _, rest = url.partition("://")
    return scheme in ("abfs", "abfss", "wasb", "wasbs") and ":" not in rest.partition("@")[0] and "?" not in rest


def _check_name(name: str) -> None:
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ValueError(f"a job cannot be called {name!r}: give a --launch-name of letters, digits, - _ .")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, job: Job) -> None:
    path = folder / _RECORD
    written = path.with_suffix(".new")
    written.write_text(json.dumps(asdict(job) | {"where": job.where.value}, indent=1) + "\n")
    written.replace(path)
