"""What all training jobs share: from the command line to an exit code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro
from rich.console import Console

from cluster import command_line as cluster_command_line
from cluster.command_line import Described
from orchestrator.config import Tested, TrainConfig
from orchestrator.control import bottleneck, supervisor
from orchestrator.control.run_tracking import FIGURE, journal_of, keep_figure, open_tracker
from orchestrator.control.terminal import Terminal, name_of_test, result_of_test
from orchestrator.control.tracking import RunStatus, default_uri
from orchestrator.control.tracking import check as check_tracking
from orchestrator.evaluation.results import is_tested, results_of
from orchestrator.remote import stop_waiting
from orchestrator.training.failures import NotFiniteError, PreemptedError
from orchestrator.training.notices import Event
from orchestrator.training.ownership import SupersededError
from orchestrator.training.run import Outcome, finished, run_storage

if TYPE_CHECKING:
    from orchestrator.control.metrics import Exporter

Recipe = Callable[[], TrainConfig]
Options = TypeVar("Options")
EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Command:
    """What was typed: the config, the recipe as it is without options, and whether only to tell what would happen.

    recipe: None where whoever has trained the run has told what it is. trains: False where the run is only tested, as
    far as it has come.
    """

    config: TrainConfig
    recipe: TrainConfig | None
    dry_run: bool
    trains: bool = True
    dry_run_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Options:
    """The command line as tyro reads it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    dry_run: bool = False
    """train nothing: tell what a start would do, and check all that it needs"""
    dry_run_on: tuple[str, ...] = ()
    """the same on machines that need not be there, as NODESxCPUSxGPUS: 8x64x8"""
    profile: int = 0
    """so many steps, after the first ten, are traced: STORAGE/NAME/profile, for https://ui.perfetto.dev"""


def main(recipes: Mapping[str, Recipe], *, default: str, data_variable: str = "IMAGENET_DATA") -> int:
    """A job whose recipes these are: from the command line of this process to its exit code.

    data_variable: environment variable that names the data set where --data does not.
    """
    program = f"python {Path(sys.argv[0])}"

    def typed(argv: Sequence[str]) -> Command:
        return parse(argv, recipes, default=default, program=program, data_variable=data_variable)

    return exit_code(launchable(lambda: run(typed(sys.argv[1:])), lambda argv: Described(typed(argv).config.name)))


def parse(
    argv: Sequence[str],
    recipes: Mapping[str, Recipe],
    *,
    default: str,
    program: str,
    data_variable: str = "IMAGENET_DATA",
) -> Command:
    """``[RECIPE] [--dry-run] [--field value …]``. Prints help or what is wrong and exits (0, 2) as argparse does."""
    name, arguments = chosen(argv, recipes, default)
    base = replace(
        recipes[name](),
        recipe=name,
        name=name,
        data=os.environ.get(data_variable, ""),
        storage=os.environ.get("IMAGENET_STORAGE", ""),
    )
    typed = tyro.cli(
        _Options,
        args=arguments,
        default=_Options(base),
        prog=f"{program} {name}",
        description=_description(recipes, default, program),
        config=(tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff),
    )
    config = typed.config
    if typed.profile:
        config = replace(config, tracking=replace(config.tracking, profile_steps=typed.profile))
    return Command(config, base, typed.dry_run or bool(typed.dry_run_on), dry_run_on=typed.dry_run_on)


def chosen(argv: Sequence[str], recipes: Collection[str], default: str) -> tuple[str, list[str]]:
    """The name of the recipe, and the arguments behind it. Raises ValueError for a name that there is not."""
    arguments = list(argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown recipe {name!r}{hint}: choose one of {', '.join(recipes)}")
    return name, arguments


def _description(recipes: Mapping[str, Recipe], default: str, program: str) -> str:
    lines = [f"{program} [RECIPE] --data URL --storage URL --name NAME [--dry-run] [any field below]", ""]
    lines += ["The same command goes on with an interrupted run. Recipes:", ""]
    return "\n".join([*lines, *promised(recipes, default)])


def promised(recipes: Mapping[str, Callable[[], object]], default: str) -> list[str]:
    """Lines of a page of help: what each recipe is and, below it, the lines of its promise."""
    lines = []
    for name, recipe in recipes.items():
        what, promise = promise_of(recipe)
        lines += [f"{name}{' (default)' if name == default else ''}: {what}"]
        lines += [f"    {line}" for line in promise]  # indented, or tyro joins each to the one before
        lines += [""]
    return lines


def promise_of(recipe: Callable[[], object]) -> tuple[str, list[str]]:
    """The first paragraph of a recipe's docstring, which says what it is, and the lines after it: Run, Takes, Expect.

    A line that is indented goes on with the one before it.
    """
    what, _, rest = inspect.cleandoc(recipe.__doc__ or "").partition("\n\n")
    lines = re.sub(r"\n[ \t]+", " ", rest).splitlines()
    return " ".join(what.split()), [" ".join(line.split()) for line in lines if line]


def run(command: Command) -> int:
    """Train and test, shown in the terminal and in MLflow, or tell what that would do. Returns the exit code."""
    console = Console(stderr=False, highlight=False)
    if command.dry_run:
        return _dry_run(command, console)
    config = command.config
    under_torchrun = "RANK" in os.environ
    is_first = os.environ.get("RANK", "0") == "0"
    config = supervisor.resolve(config)
    if under_torchrun:
        work = supervisor.run_in_process_group if command.trains else supervisor.score_in_process_group
    else:
        work = supervisor.run_job if command.trains else supervisor.score_job
    if not is_first:
        work(config, _tell_notices)
        return 0
    run = run_storage(config) if config.storage and config.name else None
    data_sha256 = None
    is_done = command.trains and supervisor.outcome_of(config) is not None
    if not is_done:
        data_sha256 = supervisor.check(config, trains=command.trains).digest
        is_done = not command.trains and is_tested(config, data_sha256)
    uri = default_uri(config.tracking.uri or None, Path.cwd())
    warning = check_tracking(uri)
    if warning:
        console.print(warning)
    assert run is not None  # else check has refused
    follow = functools.partial(
        open_tracker, config, command.recipe, uri=uri, run=run, command=f"python {shlex.join(sys.argv)}"
    )
    tracker = follow() if is_done else None

    def listen(event: Event) -> None:
        nonlocal tracker
        if event["kind"] == "placed":  # what cannot be placed is refused before MLflow hears of it
            tracker = follow()
        elif tracker is not None:
            tracker.put(event)
        if exporter is not None:
            exporter.put(event)
        # A terminal that is gone (| head) must not end the run: rich leaves with SystemExit.
        with contextlib.suppress(OSError, SystemExit):
            terminal.put(event)

    exporter: Exporter | None = None
    if config.tracking.metrics_port and not is_done:
        from orchestrator.control.metrics import Exporter

        exporter = Exporter(config.name, config.tracking.metrics_host, config.tracking.metrics_port)
    ending = Ending()
    with Terminal(console, name=config.name, batch_size=config.batch.global_batch_size) as terminal:
        try:
            with ending:
                if not is_done:
                    work(config, listen)
                is_done = True
                # What was only tested may have been stopped before its end.
                ending.status = RunStatus.FINISHED if finished(run) is not None else RunStatus.KILLED
        finally:
            if exporter is not None:
                exporter.close()
            if tracker is not None and is_done:
                tracker.replay(journal_of(run))  # whatever was lost between a worker and here
            delivery = tracker.close(config.tracking.wait_s, ending.status, ending.reason) if tracker else None
            keep_figure(run)
    _summary(console, config, finished(run), results_of(config, data_sha256))
    if delivery is not None:
        console.print(f"MLflow        {delivery.where}", soft_wrap=True)
        if delivery.pending:
            console.print(f"              {delivery.pending} events are not there yet ({delivery.error}): ", end="")
            console.print("the same command delivers them")
    return 0


def _dry_run(command: Command, console: Console) -> int:
    """The page of a dry run. Under torchrun the first process speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    from orchestrator.control import dry_run, page

    uri = default_uri(command.config.tracking.uri or None, Path.cwd())
    config = command.config
    machines = dry_run.described(command.dry_run_on) if command.dry_run_on else dry_run.machines_of(config)
    plan = dry_run.plan(config, machines, uri, trains=command.trains)
    page.show(console, plan, command.recipe or config)
    return EXIT_USER_ERROR if plan.refusals else 0


def _tell_notices(event: Event) -> None:
    """What a process other than the first says: it has no terminal line and no MLflow."""
    if event["kind"] == "notice":
        print(event["text"], file=sys.stderr)


_GOES_ON = "the same command goes on from the newest checkpoint"


class Ending:
    """How a block of a job ends, for MLflow: by an error as that error says, else as the block has set ``status``."""

    def __init__(self) -> None:
        self.status, self.reason = RunStatus.FAILED, ""

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            stop_waiting()
        if isinstance(error, KeyboardInterrupt | PreemptedError):
            self.status = RunStatus.KILLED
        elif isinstance(error, SupersededError):
            self.status = RunStatus.RUNNING  # the MLflow run is the newer driver's now
        elif error is not None:
            self.status, self.reason = RunStatus.FAILED, str(error) if isinstance(error, Exception) else ""


def launchable(job: Callable[[], int], describe: Callable[[list[str]], Described]) -> Callable[[], int]:
    """``job``, or with --on what launches the same command elsewhere, as ``describe`` says of its arguments."""
    if not cluster_command_line.is_launch(sys.argv[1:]):
        return job
    return lambda: cluster_command_line.run(sys.argv[1:], sys.argv[0], describe)


def launchable_as(name: str, run: Callable[[Options], int], parse: Callable[[list[str]], Options]) -> int:
    """``run`` what is typed, or with --on launch it elsewhere, as a job called ``name``. Returns the exit code."""

    def describe(argv: list[str]) -> Described:
        parse(argv)
        return Described(name)

    return launchable(lambda: run(parse(sys.argv[1:])), describe)()


def exit_code(job: Callable[[], int], interrupted: str = _GOES_ON) -> int:
    """Run ``job``; every error that a user can meet becomes one message and an exit code.

    SIGTERM (``ray job stop``, SLURM) ends it as Ctrl-C does, with an exit code of its own; a run that is under way
    makes a checkpoint first (``supervisor.asked_to_leave``).
    """
    terminated = threading.Event()
    try:
        with _ended_by_sigterm(terminated):
            return job()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except PreemptedError as error:
        print(f"left: {error}", file=sys.stderr)
        return EXIT_TERMINATED
    except (supervisor.RunFailedError, SupersededError, NotFiniteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        stop_waiting()
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_TERMINATED if terminated.is_set() else EXIT_INTERRUPTED


@contextlib.contextmanager
def _ended_by_sigterm(terminated: threading.Event) -> Iterator[None]:
    """Within it, SIGTERM does what SIGINT does at that moment."""

    def on_terminate(number: int, frame: FrameType | None) -> None:
        terminated.set()
        # Ray has its own way to end a run that is interrupted. A shell's background jobs ignore SIGINT.
        if callable(signal.getsignal(signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(console: Console, config: TrainConfig, outcome: Outcome | None, tests: list[Event]) -> None:
    run, rows = run_storage(config), list[tuple[str, str]]()
    if outcome is not None:
        error = f"{outcome.validation_top1_error:.2f} % top-1, {outcome.validation_top5_error:.2f} % top-5 error"
        rows += [
            ("run", f"{config.name}: {outcome.steps} steps done"),
            ("validation", f"{error} (best top-1 {outcome.best_validation_top1_error:.2f} %)"),
            ("checkpoint", outcome.checkpoint),
            ("best", outcome.best_checkpoint),
            ("weights", f"SHA-256 {outcome.weights_sha256}"),
            ("curves", f"{run.url}/{FIGURE}"),
        ]
        times = bottleneck.account_of(journal_of(run))
        rows += [("time", text) for text in (times.line(), times.advice()) if text]
    if tests:
        rows += [
            (
                "tested",
                f"{'best' if config.evaluation.checkpoint is Tested.BEST else 'last'} checkpoint, of step "
                f"{tests[0]['step']}",
            )
        ]
    for event in tests:
        rows += [("", f"{name_of_test(event)}: {result_of_test(event)}"), ("", f"{run.url}/{event['file']}")]
    for name, text in rows:
        console.print(f"{name:<13} {text}", soft_wrap=True)
