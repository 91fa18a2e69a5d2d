"""Train several networks and submit their average: ``python jobs/campaign.py [RECIPE] --data URL --storage URL``.

One command from recipes to the ILSVRC file: the members are packed onto whatever the cluster has, each is trained,
finished and scored by the same workers, the scores are averaged, the submission is written and validated. Killed
anywhere, the same command goes on. ``python jobs/campaign.py status --storage URL --name NAME [--watch]`` shows how a
campaign stands, from anywhere; ``python jobs/campaign.py member MEMBER …`` with the same arguments trains one member
alone, on machines of its own: what is done is found by the campaign.

Recipes are in campaign_recipes.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.command_line import Described
from jobs import command_line
from jobs.campaign_display import Display, console_of_table, pause_s
from jobs.campaign_recipes import ON_CIFAR10, RECIPES
from jobs.member import run as run_member
from orchestrator.campaign import opening
from orchestrator.campaign import status as campaign_status
from orchestrator.campaign.decisions import Done, account_of, decide
from orchestrator.campaign.driver import Driver
from orchestrator.campaign.journal import Journal, fix_identity
from orchestrator.campaign.opening import Opened
from orchestrator.campaign.plan import Campaign, CampaignConfig, Member, has_room, pack
from orchestrator.campaign.products import summary
from orchestrator.campaign.telling import note_of
from orchestrator.campaign.tracking import CampaignTracker
from orchestrator.config import TrainConfig
from orchestrator.control.description import data_note, network
from orchestrator.control.tracking import RunStatus, default_uri
from orchestrator.control.tracking import check as check_tracking
from orchestrator.ray_session import Cluster
from orchestrator.storage import Storage

_DEFAULT = "ilsvrc2015"
_GOES_ON = "nothing that is done is lost: the same command goes on"
# Fields of a member that the campaign sets.
_OF_THE_CAMPAIGN = ("data", "storage", "name", "seed", "evaluation", "placement", "guard", "tracking")

# -- command line ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """The command line as tyro reads it."""

    config: Annotated[CampaignConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a field of every member's run, as schedule.max_steps=100, or of one, as r34:schedule.lr=0.05; may be repeated"""
    dry_run: bool = False
    """train nothing: tell members, workers, and what is done"""
    dry_run_on: tuple[str, ...] = ()
    """the same on machines that need not be there, as NODESxCPUSxGPUS: 8x64x8"""


@dataclass(frozen=True)
class _StatusOptions:
    """How a campaign stands."""

    storage: str = ""
    """URL of the folder that holds all campaigns; empty: IMAGENET_STORAGE"""
    name: str = ""
    """name of the campaign"""
    watch: bool = False
    """go on showing it until Ctrl-C"""


@dataclass(frozen=True)
class Command:
    """What was typed: the campaign, its members as the recipe has them, and whether only to tell."""

    campaign: Campaign
    recipe: Campaign
    dry_run: bool
    dry_run_on: tuple[str, ...] = ()


def parse(argv: Sequence[str]) -> Command:
    """``[RECIPE] [--field value …]``. Prints help or what is wrong and exits (0, 2) as argparse does."""
    name, arguments = command_line.chosen(argv, RECIPES, _DEFAULT)
    recipe = RECIPES[name]()
    variable = "CIFAR10_DATA" if RECIPES[name] in ON_CIFAR10 else "IMAGENET_DATA"
    data, storage = os.environ.get(variable, ""), os.environ.get("IMAGENET_STORAGE", "")
    base = replace(recipe.config, recipe=name, name=name, data=data, storage=storage)
    typed = tyro.cli(
        _Options,
        args=arguments,
        default=_Options(base),
        prog=f"python {Path(sys.argv[0])} {name}",
        description=_description(),
        config=(tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff),
    )
    is_dry = typed.dry_run or bool(typed.dry_run_on)
    members = tuple(
        Member(m.name, changed(m.config, _changes_of(m.name, recipe, typed.change))) for m in recipe.members
    )
    return Command(Campaign(members, typed.config), replace(recipe, config=typed.config), is_dry, typed.dry_run_on)


def _description() -> str:
    lines = ["python jobs/campaign.py [RECIPE] --data URL --storage URL --name NAME [--dry-run] [any field below]", ""]
    lines += ["python jobs/campaign.py status --storage URL --name NAME [--watch]", ""]
    lines += ["python jobs/campaign.py member MEMBER [RECIPE] …: one member alone", ""]
    lines += ["The same command goes on with an interrupted campaign. Recipes:", ""]
    return "\n".join([*lines, *command_line.promised(RECIPES, _DEFAULT)])


def _changes_of(name: str, recipe: Campaign, changes: Sequence[str]) -> list[str]:
    """Those that are for every member, and those for this one. Raises ValueError for one for a member unknown."""
    found, names = [], [m.name for m in recipe.members]
    for change in changes:
        member, colon, rest = change.partition(":") if ":" in change.partition("=")[0] else ("", "", change)
        if colon and member not in names:
            raise ValueError(f"--change {change!r}: there is no member {member!r}: choose one of {', '.join(names)}")
        if member in ("", name):
            found.append(rest)
    return found


def changed(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """``config`` with other values, each as ``schedule.max_steps=100``. Raises ValueError for what does not exist."""
    plain = config.to_json()
    for change in changes:
        path, equals, text = change.partition("=")
        *parts, last = path.replace("-", "_").split(".")
        where: Any = plain
        for part in parts:
            where = where.get(part) if isinstance(where, dict) else None
        if not equals or not isinstance(where, dict) or last not in where or isinstance(where[last], dict):
            raise ValueError(f"--change {change!r} names no field of a run: give one as schedule.max_steps=100")
        if (parts or [last])[0] in _OF_THE_CAMPAIGN:
            raise ValueError(f"--change {change!r}: the campaign sets this for all members: give --{path} itself")
        where[last] = _value(text)
    try:
        return TrainConfig.from_json(plain)
    except ValueError as error:
        raise ValueError(f"--change {' '.join(changes)} cannot be: {error}") from None


def _value(text: str) -> Any:
    """As JSON, with Python's words for what JSON calls otherwise; else the text itself."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    return text


# -- running --------------------------------------------------------------------------------------------------------


def run(command: Command) -> int:
    """Train, score, average, submit, or tell what that would do. Returns the exit code."""
    console = console_of_table()
    campaign = opening.resolve(command.campaign)
    opened = opening.check(campaign)
    if command.dry_run:
        return _dry_run(opened, command.dry_run_on, console)
    recipes = replace(command.recipe, config=campaign.config).run_configs()
    tracker: CampaignTracker | None = None

    def follow() -> None:
        nonlocal tracker  # MLflow's run is another driver's until the campaign is this one's
        tracker = _open_tracker(opened, console)

    def seen(status: campaign_status.Status) -> None:
        if tracker is not None:
            tracker.tell(note_of(opened.folder, campaign, recipes, status))

    ending = command_line.Ending()
    with Display(console, opened.folder, seen) as display:
        try:
            with ending:
                Driver(
                    opened,
                    command=[sys.executable, str(Path(__file__).with_name("member.py"))],
                    argv=sys.argv,
                    recipes=recipes,
                    tell=display.tell,
                    taken=follow,
                    changed=display.wake,
                ).run()
                ending.status = RunStatus.FINISHED
        finally:
            display.look()
            wait_s = campaign.config.tracking.wait_s
            delivery = tracker.close(wait_s, ending.status, ending.reason) if tracker is not None else None
    console.print(campaign_status.table(campaign_status.read(opened.folder)))
    for text in summary(opened.folder, campaign):
        console.print(text, soft_wrap=True)
    if delivery is not None:
        console.print(f"MLflow       {delivery.where}", soft_wrap=True)
    return 0


def _open_tracker(opened: Opened, console: Console) -> CampaignTracker:
    """MLflow's side of the campaign."""
    campaign = opened.plan.campaign
    c = campaign.config
    uri = default_uri(c.tracking.uri or None, Path.cwd())
    if warning := check_tracking(uri):
        console.print(warning)
    networks = ", ".join(network(config.model) for config in campaign.run_configs().values())
    return CampaignTracker(
        uri=uri,
        experiment=c.tracking.experiment,
        name=c.name,
        folder=opened.folder,
        params=campaign.identity(),
        description=f"**Campaign** of {len(campaign.members)} members ({networks}), seed {c.seed}.",
        command=f"python {shlex.join(sys.argv)}",
        data=data_note(c.data, opened.data_sha256),
    )


def _dry_run(opened: Opened, described: Sequence[str], console: Console) -> int:
    """Members, workers on this machine or the cluster, and what comes next."""
    from orchestrator.control import dry_run

    plan, campaign = opened.plan, opened.plan.campaign
    console.print(Text(f"DRY RUN of {campaign.config.name}: nothing is trained, taken or kept", "bold"))
    config = next(iter(campaign.run_configs().values()))
    machines = dry_run.described(described) if described else dry_run.machines_of(config)
    journal = Journal(opened.folder).entries
    account = account_of([member.name for member in campaign.members], journal)
    packing = account.packing if account.asked == campaign.asked else None
    if packing is None and machines.cluster is not None:
        packing = pack(plan, machines.cluster)
    facts = opening.facts_of(opened)
    everything = decide(plan, journal, facts, machines.cluster or Cluster(()))
    fits = packing is None or machines.cluster is None or has_room(packing, machines.cluster)
    is_refused = not fits and len(facts.done) < len(campaign.members)
    for name in plan.by_weight():
        config = campaign.run_configs()[name]
        workers = f"{packing.workers.get(name, 0)} worker(s)" if packing else "workers not known"
        state = "done" if name in facts.done else "to do"
        console.print(
            f"{name:<12} {network(config.model):<14} seed {config.seed:<6} {plan.steps[name]} steps  {workers}  {state}"
        )
    console.print(f"machines     {machines.words}" + (f": {machines.trouble}" if machines.trouble else ""))
    if is_refused:
        console.print("             no worker fits there")
    submitted = campaign.submitted
    console.print(f"submission   {f'of {submitted.value}' if submitted else 'none: the test split is not scored'}")
    console.print(f"folder       {opened.folder.url}" + (", all is published" if everything == [Done()] else ""))
    return command_line.EXIT_USER_ERROR if is_refused else 0


# -- one member -----------------------------------------------------------------------------------------------------


def train_member(name: str, command: Command) -> int:
    """Train, finish and score one member on whatever cluster this process joins or starts, beside other processes that
    do so with others; the campaign itself averages what is done. Returns the exit code.
    """
    campaign = opening.resolve(command.campaign)
    opened = opening.check(campaign)
    if not command.dry_run:
        opened.folder.check_writable()
        fix_identity(opened.folder, opened.plan, opened.data_sha256)
    config = campaign.run_configs()[name]
    config = replace(config, placement=replace(config.placement, num_workers=campaign.config.workers_per_member))
    recipe = replace(command.recipe, config=campaign.config).run_configs()[name]
    return run_member(command_line.Command(config, recipe, command.dry_run, dry_run_on=command.dry_run_on))


def _parse_member(argv: Sequence[str]) -> tuple[str, Command]:
    """``MEMBER [RECIPE] [--field value …]``."""
    if not argv or argv[0].startswith("-"):
        raise ValueError("member needs the name of one first: python jobs/campaign.py member NAME [RECIPE] …")
    name, command = argv[0], parse(argv[1:])
    known = [each.name for each in command.campaign.members]
    if name not in known:
        raise ValueError(f"there is no member {name!r} in this campaign: choose one of {', '.join(known)}")
    return name, command


# -- status ---------------------------------------------------------------------------------------------------------


def status(argv: Sequence[str]) -> int:
    """Show the table of members, once or until Ctrl-C."""
    default = _StatusOptions(storage=os.environ.get("IMAGENET_STORAGE", ""))
    options = tyro.cli(_StatusOptions, args=list(argv), default=default, prog=f"python {Path(sys.argv[0])} status")
    if not options.storage or not options.name:
        raise ValueError("status needs --storage URL (or IMAGENET_STORAGE) and --name NAME of the campaign")
    folder, console = Storage(options.storage).sub(options.name), console_of_table()
    first = campaign_status.table(campaign_status.read(folder))
    if not options.watch:
        console.print(first)
        return 0
    with Live(first, console=console, auto_refresh=False) as live:
        while True:
            time.sleep(pause_s(folder))
            with contextlib.suppress(OSError, ValueError):  # the next look may see all of it again
                live.update(campaign_status.table(campaign_status.read(folder)), refresh=True)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["status"]:
        return command_line.exit_code(functools.partial(status, arguments[1:]), "the campaign itself goes on")
    if arguments[:1] == ["member"]:
        job = command_line.launchable(lambda: train_member(*_parse_member(arguments[1:])), _describe_member)
    else:
        job = command_line.launchable(lambda: run(parse(arguments)), _describe)
    return command_line.exit_code(job, _GOES_ON)


def _describe(argv: Sequence[str]) -> Described:
    campaign = parse(argv).campaign
    return Described(campaign.config.name, tuple(campaign.run_configs()), campaign.config.max_at_once)


def _describe_member(argv: Sequence[str]) -> Described:
    name, command = _parse_member(argv[1:])
    return Described(f"{command.campaign.config.name}-{name}")


if __name__ == "__main__":
    sys.exit(main())
