"""``--on local|ray|slurm`` of every job, and ``python -m cluster status|log|stop|list`` for what was launched."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from cluster import launch
from cluster.launch import Job, Launcher, State, Where
from cluster.local import Local
from cluster.ray_jobs import RayJobs
from cluster.settings import RaySettings, SlurmSettings
from orchestrator.masking import masked

_PAUSE_S = 1.0


def _slurm(settings: SlurmSettings) -> Launcher:
    from cluster.slurm import Slurm  # submitit: half a second

    return Slurm(settings)


def known(where: Where) -> Launcher:
    """The launcher of jobs that are launched already: their handles say the rest."""
    match where:
        case Where.LOCAL:
            return Local()
        case Where.RAY:
            return RayJobs(RaySettings())
        case Where.SLURM:
            return _slurm(SlurmSettings())


# -- launching ------------------------------------------------------------------------------------------------------


def is_launch(argv: Sequence[str]) -> bool:
    """Whether the command line asks for a launch."""
    return any(word == "--on" or word.startswith("--on=") for word in argv)


@dataclass(frozen=True)
class Described:
    """What is to be known of a job before it is launched: its name where --launch-name gives none; the names of its
    members, each of which ``member NAME`` before the job's own arguments trains alone, at most ``at_once`` at a time.
    """

    name: str
    members: tuple[str, ...] = ()
    at_once: int = 0


def run(argv: Sequence[str], script: str, describe: Callable[[list[str]], Described]) -> int:
    """Launch ``python SCRIPT REST``, REST being ``argv`` without what is said of the launch; the exit code.

    ``describe``: checks REST as the job itself would. Raises ValueError and OSError as the launchers.
    """
    options, rest = _split(argv)
    plain = [word.replace("_", "-") for word in rest]  # an option may be typed with either
    if any(word.startswith("--dry-run-on") for word in plain):
        raise ValueError(
            "--dry-run-on launches nothing: leave out --on, or give --dry-run for what would be handed over"
        )
    is_dry = "--dry-run" in plain
    rest = [word for word in rest if word.replace("_", "-") != "--dry-run"]
    described = describe(rest)
    name, where, launches = options.launch_name or described.name, options.on, Path(options.launches)
    launchers: dict[Where, Callable[[], Launcher]] = {
        Where.LOCAL: Local,
        Where.RAY: lambda: RayJobs(options.ray),
        Where.SLURM: lambda: _slurm(options.slurm),
    }
    words, array = [script, *rest], None
    if options.slurm.array:
        if where is not Where.SLURM or not described.members:
            raise ValueError("--slurm.array is for a campaign (jobs/campaign.py) --on slurm: leave it out")
        members = {member: (script, "member", member, *rest) for member in described.members}
        array = launch.Array(members, described.at_once)
    if is_dry:
        print(launch.preview(launchers[where](), launches, name, where, words, array), end="")
        return 0
    job, is_new = launch.submit(lambda where: launchers[where](), launches, name, where, words, array)
    folder = launch.folder_of(launches, job)
    shown = {"submission_id": "submission_id", "job_id": "job_id", "pid": "pid"}
    shown |= {f"job_id/{member}": member for member in described.members}
    handle = ", ".join(f"{words} {job.handle[key]}" for key, words in shown.items() if key in job.handle)
    print(f"{'launched' if is_new else 'launched already'}: {name} on {where.value} ({handle}); its files: {folder}")
    at = "" if options.launches == _Options.launches else f" --launches {options.launches}"
    print(f"python -m cluster status|log|stop {name}{at}")
    return 0


def _split(argv: Sequence[str]) -> tuple[_Options, list[str]]:
    """What is said of the launch, and the rest. --help tells of the launch alone."""
    config = (tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff)
    options, rest = tyro.cli(_Options, args=list(argv), return_unknown_args=True, config=config)
    return options, list(rest)


@dataclass(frozen=True)
class _Options:
    """Of any job: where it runs. Everything else on the command line is the job's own."""

    on: Where
    """local: in the background of this machine; ray: a job of a Ray cluster; slurm: nodes of SLURM, by submitit"""
    launch_name: str = ""
    """by which it is asked for later; empty: the name of the run or campaign"""
    launches: str = "launches"
    """folder for launches; for slurm one that all nodes see"""
    ray: RaySettings = field(default_factory=RaySettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


# -- afterwards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatusOptions:
    """How a job stands. Exit code 0: waiting, running or finished; 1: failed, stopped or lost."""

    name: Annotated[str, tyro.conf.Positional]
    launches: str = "launches"
    member: str = ""
    """of a campaign with --slurm.array: this member's job alone"""


@dataclass(frozen=True)
class LogOptions:
    """What a job has printed."""

    name: Annotated[str, tyro.conf.Positional]
    launches: str = "launches"
    member: str = ""
    """of a campaign with --slurm.array: this member's job alone"""
    follow: bool = False
    """go on until the job has ended"""


@dataclass(frozen=True)
class StopOptions:
    """Ask a job to make a checkpoint and end; the same command goes on later."""

    name: Annotated[str, tyro.conf.Positional]
    launches: str = "launches"
    wait_s: float = 0.0
    """wait so long for its end"""


@dataclass(frozen=True)
class ListOptions:
    """All jobs launched from a folder."""

    launches: str = "launches"


Afterwards = (
    Annotated[StatusOptions, tyro.conf.subcommand("status")]
    | Annotated[LogOptions, tyro.conf.subcommand("log")]
    | Annotated[StopOptions, tyro.conf.subcommand("stop")]
    | Annotated[ListOptions, tyro.conf.subcommand("list")]
)


def afterwards(argv: Sequence[str]) -> int:
    """``python -m cluster …``; the exit code. Raises ValueError and OSError as the launchers."""
    forms: Any = Afterwards
    options = tyro.cli(forms, args=list(argv), prog="python -m cluster", config=(tyro.conf.FlagCreatePairsOff,))
    launches = Path(options.launches)
    match options:
        case ListOptions():
            return _list(launches)
        case StatusOptions(name, member=member):
            job = _find(launches, name)
            status = launch.status(known, job, launches, member)
            whose = f"{name} {member}".rstrip()
            print(f"{whose}: {status.state.value} on {job.where.value}{f' ({status.said})' if status.said else ''}")
            argv = launch.part(job, launches, member)[0].argv if member else job.argv
            print(f"python {masked(' '.join(argv))}")
            return int(status.state in (State.FAILED, State.STOPPED, State.LOST))
        case LogOptions(name, member=member, follow=follow):
            job = _find(launches, name)
            launch.check_submitted(job)
            launcher, folder = known(job.where), launch.folder_of(launches, job)
            if member:
                job, folder = launch.part(job, folder, member)
            elif follow and job.array:
                raise ValueError(f"--follow follows one log: give a --member of {name}: {', '.join(job.array.argv)}")
            pieces = launch.follow(launcher, job, folder, _pauses()) if follow else [launcher.log(job, folder)]
            for text in pieces:
                sys.stdout.write(text)
                sys.stdout.flush()
            return 0
        case StopOptions(name, wait_s=wait_s):
            job = _find(launches, name)
            launch.check_submitted(job)
            launcher, folder = known(job.where), launch.folder_of(launches, job)
            launcher.stop(job, folder)
            until_s = time.monotonic() + wait_s
            while not (status := launcher.status(job, folder)).state.is_over and time.monotonic() < until_s:
                time.sleep(_PAUSE_S)
            print(f"{name}: {status.state.value if status.state.is_over else 'asked to end'}")
            return 0
    raise AssertionError(options)


def _find(launches: Path, name: str) -> Job:
    job = launch.find(launches, name)
    if job is None:
        known_names = ", ".join(launch.names(launches)) or "none"
        raise ValueError(f"no job {name!r} was launched from {launches.absolute()} (launched: {known_names})")
    return job


def _list(launches: Path) -> int:
    table = Table("job", "on", "state", "", "submitted")
    for name in launch.names(launches):
        where, submitted = "", ""
        try:
            job = _find(launches, name)
            where, submitted = job.where.value, job.submitted
            status = launch.status(known, job, launches)
            table.add_row(name, where, status.state.value, status.said, submitted)
        except (OSError, ValueError) as error:
            table.add_row(name, where, "unknown", str(error), submitted)
    Console(width=int(os.environ.get("COLUMNS", "160"))).print(table)
    return 0


def _pauses() -> Iterator[None]:
    for _ in itertools.count():
        time.sleep(_PAUSE_S)
        yield
