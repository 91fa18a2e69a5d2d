"""Train several networks and submit their average: ``python jobs/campaign.py [RECIPE] --data URL --storage URL``.

One command from recipes to the ILSVRC file: the members are packed onto whatever the cluster has, each is trained,
finished and scored by the same workers, the scores are averaged, the submission is written and validated. Killed
anywhere, the same command goes on. ``python jobs/campaign.py status --storage URL --name NAME [--watch]`` shows how a
campaign stands, from anywhere; ``python jobs/campaign.py member MEMBER …`` with the same arguments trains one member
alone, on machines of its own: what is done is found by the campaign.

A recipe is a function that returns the campaign; its docstring is its promise: command, hours and hardware, expected
error, sources.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.command_line import Described
from jobs import cifar10, command_line, imagenet
from jobs.campaign_display import Display, console_of_table, pause_s
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
from orchestrator.config import EvaluationConfig, Protocol, TrackingConfig, TrainConfig
from orchestrator.control.description import data_note, network
from orchestrator.control.tracking import RunStatus, default_uri
from orchestrator.control.tracking import check as check_tracking
from orchestrator.ray_session import Cluster
from orchestrator.storage import Storage

_GOES_ON = "nothing that is done is lost: the same command goes on"
# Fields of a member that the campaign sets.
_OF_THE_CAMPAIGN = ("data", "storage", "name", "seed", "evaluation", "placement", "guard", "tracking")

# -- recipes --------------------------------------------------------------------------------------------------------

_PAPERS_TESTS = EvaluationConfig(
    protocols=(Protocol.TEN_CROP, Protocol.MULTI_SCALE), splits=("val", "test"), precise_bn_images=51_200
)


def ilsvrc2015() -> Campaign:
    """The paper's ensemble: six models of different depth, two of them 152 layers, tested by 10-crop and multi-scale.
    Which depths the other four had is not published: 34, 50, 101 and 101 with another seed are our choice. Each by the
    recipe of its depth in jobs/imagenet.py; batch norm's statistics over 51,200 images. Not run to its end here.

    Run: python jobs/campaign.py ilsvrc2015 --data /data/ilsvrc2012 --storage /runs
    Takes: 330 hours of one H100, 41 of eight, to train (an estimate: 1,533 images/s of ResNet-50, by multiply-adds)
    Expect: 3.57 % top-5 error on the test set (paper, Table 5), where one model of 152 layers has 4.49 % on the
        validation set by multi-scale (paper, Table 4)
    """
    return Campaign(
        members=(
            _member("r152-a", imagenet.resnet152),
            _member("r152-b", imagenet.resnet152),
            _member("r101-a", imagenet.resnet101),
            _member("r101-b", imagenet.resnet101),
            _member("r50", imagenet.resnet50),
            _member("r34", imagenet.resnet34),
        ),
        config=CampaignConfig(evaluation=_PAPERS_TESTS),
    )


def small() -> Campaign:
    """Three networks of 18, 18 and 34 layers on 64 × 64 pixels by resnet18_64px, for small sets and machines without a
    GPU. With the changes below each trains for 10 epochs, not 30.

    Run: python jobs/campaign.py small --data /data/mini --storage /runs --change schedule.max_epochs=10 \
        --change schedule.policy=steps --change 'schedule.drop_steps=[90]'
    Takes: 9 minutes of 2 CPU cores on 800 photographs of 10 classes (measured: 9 min 9 s, 8 min 50 s, 8 min 49 s)
    Expect: 48.33–51.67 % top-1 error of the average by 10-crop, of members 53.67–69.00 % (three campaigns,
        benchmarks/RESULTS.md); chance is 90 %
    """
    return Campaign(
        members=(
            _member("r18-a", imagenet.resnet18_64px),
            _member("r18-b", imagenet.resnet18_64px),
            _member("r34", imagenet.resnet18_64px, depth=34),
        ),
        config=CampaignConfig(evaluation=replace(_PAPERS_TESTS, precise_bn_images=640)),
    )


def demo() -> Campaign:
    """As small, on the 480 images that ``make demo`` generates, with 8 epochs and two sizes of multi-scale.

    Run: python jobs/campaign.py demo --data build/demo/data --storage build/demo/campaigns
    Takes: 5 minutes of 2 CPU cores (measured: 4 min 41 s)
    Expect: 53.75 % top-1 error of the average by 10-crop, 43.75 % by multi-scale, on 80 images (one run,
        benchmarks/RESULTS.md); chance is 87.5 %
    """
    base = small()
    members = []
    for member in base.members:
        schedule = replace(member.config.schedule, max_epochs=8, plateau_min_steps=30, plateau_max_drops=1)
        rhythm = replace(member.config.rhythm, log_every_steps=10, checkpoint_every_steps=25)
        members.append(replace(member, config=replace(member.config, schedule=schedule, rhythm=rhythm)))
    evaluation = replace(base.config.evaluation, precise_bn_images=320, scales_px=(64, 96))
    return Campaign(tuple(members), replace(base.config, evaluation=evaluation))


def cifar10_resnet20() -> Campaign:
    """Five ResNet-20 of other seeds on CIFAR-10: mean and standard deviation of their test errors.

    Run: python jobs/campaign.py cifar10_resnet20 --data /data/cifar10 --storage /runs
    Takes: 25–31 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 8.75 % test error (paper, Table 6: one run)
    """
    return _seeds(5, cifar10.resnet20)


def cifar10_resnet110() -> Campaign:
    """Five ResNet-110 of other seeds on CIFAR-10, as in the paper.

    Run: python jobs/campaign.py cifar10_resnet110 --data /data/cifar10 --storage /runs
    Takes: 150–190 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 6.61 ± 0.16 % test error, the best 6.43 % (paper, Table 6)
    """
    return _seeds(5, cifar10.resnet110)


def cifar10_table6() -> Campaign:
    """Table 6 and Figure 6: residual networks of 20 to 110 layers and plain ones of 20 to 56, one seed each.

    Run: python jobs/campaign.py cifar10_table6 --data /data/cifar10 --storage /runs
    Takes: 110–140 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 8.75, 7.51, 7.17, 6.97 and 6.43 % test error of the residual networks (paper, Table 6), of the plain
        ones no number: the deeper, the higher in training (paper, Figure 6)
    """
    residual = (cifar10.resnet20, cifar10.resnet32, cifar10.resnet44, cifar10.resnet56, cifar10.resnet110)
    return _seeds(1, *residual, cifar10.plain20, cifar10.plain32, cifar10.plain44, cifar10.plain56)


def cifar10_degradation() -> Campaign:
    """Residual against plain at 56 layers, three seeds each. Give --change schedule.max_steps=… for a piece of the
    set.

    Run: python jobs/campaign.py cifar10_degradation --data /data/cifar10 --storage /runs
    Takes: 92–110 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 6.97 % test error of the residual networks (paper, Table 6), the plain ones above (paper, Figure 6, curves
        alone); 3,200 images and 400 steps: 70.4 ± 4.2 against 79.4 ± 2.4 % (benchmarks/RESULTS.md)
    """
    return _seeds(3, cifar10.resnet56, cifar10.plain56)


def _seeds(count: int, *recipes: Callable[[], TrainConfig]) -> Campaign:
    """``count`` members of each recipe, which are tested on the whole test set as it is."""
    members = [
        _member(f"{recipe.__name__}-{letter}" if count > 1 else recipe.__name__, recipe)
        for recipe in recipes
        for letter in "abcdefghij"[:count]
    ]
    evaluation = EvaluationConfig(protocols=(Protocol.ONE_CROP,), splits=("test",))
    return Campaign(
        tuple(members),
        CampaignConfig(evaluation=evaluation, submit=False, tracking=TrackingConfig(experiment="cifar10")),
    )


def _member(name: str, recipe: Callable[[], TrainConfig], depth: int = 0) -> Member:
    config = replace(recipe(), recipe=recipe.__name__)
    if depth:
        config = replace(config, model=replace(config.model, depth=depth))
    return Member(name, config)


_ON_CIFAR10 = (cifar10_resnet20, cifar10_resnet110, cifar10_table6, cifar10_degradation)
RECIPES: dict[str, Callable[[], Campaign]] = {
    recipe.__name__: recipe for recipe in (ilsvrc2015, small, demo, *_ON_CIFAR10)
}
_DEFAULT = "ilsvrc2015"

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
    variable = "CIFAR10_DATA" if RECIPES[name] in _ON_CIFAR10 else "IMAGENET_DATA"
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
