"""What all training jobs share: from the command line to an exit code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from orchestrator.config import TrainConfig
from orchestrator.control import supervisor
from orchestrator.control.run_tracking import FIGURE, keep_figure, open_tracker
from orchestrator.control.terminal import Terminal
from orchestrator.control.tracking import RunStatus, default_uri
from orchestrator.control.tracking import check as check_tracking
from orchestrator.remote import stop_waiting
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.failures import NotFiniteError, PreemptedError
from orchestrator.training.notices import Event
from orchestrator.training.ownership import SupersededError
from orchestrator.training.run import Outcome, run_storage

Recipe = Callable[[], TrainConfig]
EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Command:
    """What was typed: the config, the recipe as it is without options, and whether only to tell what would happen."""

    config: TrainConfig
    recipe: TrainConfig
    dry_run: bool


@dataclass(frozen=True)
class _Options:
    """The command line as tyro reads it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    dry_run: bool = False
    """train nothing: tell what a start would do, and check all that it needs"""


def main(recipes: Mapping[str, Recipe], *, default: str) -> int:
    """A job whose recipes these are: from the command line of this process to its exit code."""
    program = f"python {Path(sys.argv[0])}"
    return exit_code(lambda: run(parse(sys.argv[1:], recipes, default=default, program=program)))


def parse(argv: Sequence[str], recipes: Mapping[str, Recipe], *, default: str, program: str) -> Command:
    """``[RECIPE] [--dry-run] [--field value …]``. Prints help or what is wrong and exits (0, 2) as argparse does."""
    arguments = list(argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown recipe {name!r}{hint}: choose one of {', '.join(recipes)}")
    base = replace(
        recipes[name](),
        recipe=name,
        name=name,
        data=os.environ.get("IMAGENET_DATA", ""),
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
    return Command(typed.config, base, typed.dry_run)


def _description(recipes: Mapping[str, Recipe], default: str, program: str) -> str:
    lines = [f"{program} [RECIPE] --data URL --storage URL --name NAME [--dry-run] [any field below]", ""]
    lines += ["The same command goes on with an interrupted run. Recipes:", ""]
    for name, recipe in recipes.items():
        lines += [f"{name}{' (default)' if name == default else ''}: {inspect.cleandoc(recipe.__doc__ or '')}", ""]
    return "\n".join(lines)


def run(command: Command) -> int:
    """Train, shown in the terminal and in MLflow, or tell what that would do. Returns the exit code."""
    console = Console(stderr=False, highlight=False)
    if command.dry_run:
        return _dry_run(command, console)
    config = command.config
    under_torchrun = "RANK" in os.environ
    is_first = os.environ.get("RANK", "0") == "0"
    config = supervisor.resolve(config)
    if not is_first:
        supervisor.run_in_process_group(config, _tell_notices)
        return 0
    run = run_storage(config) if config.storage and config.name else None
    done = supervisor.outcome_of(config)
    if done is None:
        supervisor.check(config)
    uri = default_uri(config.tracking.uri or None, Path.cwd())
    warning = check_tracking(uri)
    if warning:
        console.print(warning)
    assert run is not None  # else check has refused
    follow = functools.partial(
        open_tracker, config, command.recipe, uri=uri, run=run, command=f"python {shlex.join(sys.argv)}"
    )
    tracker = follow() if done is not None else None

    def listen(event: Event) -> None:
        nonlocal tracker
        if event["kind"] == "placed":  # what cannot be placed is refused before MLflow hears of it
            tracker = follow()
        elif tracker is not None:
            tracker.put(event)
        # A terminal that is gone (| head) must not end the run: rich leaves with SystemExit.
        with contextlib.suppress(OSError, SystemExit):
            terminal.put(event)

    status, outcome, reason = RunStatus.FAILED, done, ""
    with Terminal(console, name=config.name, batch_size=config.batch.global_batch_size) as terminal:
        try:
            if outcome is None:
                train = supervisor.run_in_process_group if under_torchrun else supervisor.run_job
                outcome = train(config, listen)
            status = RunStatus.FINISHED
        except KeyboardInterrupt:
            stop_waiting()
            status = RunStatus.KILLED
            raise
        except PreemptedError:
            status = RunStatus.KILLED
            raise
        except SupersededError:
            status = RunStatus.RUNNING  # the MLflow run is the newer driver's now
            raise
        except Exception as error:
            reason = str(error)
            raise
        finally:
            if tracker is not None and outcome is not None:
                tracker.replay(newest_journal(run))  # whatever was lost between a worker and here
            delivery = tracker.close(config.tracking.wait_s, status, reason) if tracker else None
            keep_figure(run)
    _summary(console, config, outcome)
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
    plan = dry_run.plan(command.config, dry_run.machines_of(command.config), uri)
    page.show(console, plan, command.recipe)
    return EXIT_USER_ERROR if plan.refusals else 0


def _tell_notices(event: Event) -> None:
    """What a process other than the first says: it has no terminal line and no MLflow."""
    if event["kind"] == "notice":
        print(event["text"], file=sys.stderr)


_GOES_ON = "the same command goes on from the newest checkpoint"


def exit_code(job: Callable[[], int], interrupted: str = _GOES_ON) -> int:
    """Run ``job``; every error that a user can meet becomes one message and an exit code."""
    try:
        return job()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (supervisor.RunFailedError, SupersededError, NotFiniteError, PreemptedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        stop_waiting()
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _summary(console: Console, config: TrainConfig, outcome: Outcome) -> None:
    rows = {
        "run": f"{config.name}: {outcome.steps} steps done",
        "validation": f"{outcome.validation_top1_error:.2f} % top-1, {outcome.validation_top5_error:.2f} % top-5 error "
        f"(best top-1 {outcome.best_validation_top1_error:.2f} %)",
        "checkpoint": outcome.checkpoint,
        "best": outcome.best_checkpoint,
        "weights": f"SHA-256 {outcome.weights_sha256}",
        "curves": f"{run_storage(config).url}/{FIGURE}",
    }
    for name, text in rows.items():
        console.print(f"{name:<13} {text}", soft_wrap=True)
