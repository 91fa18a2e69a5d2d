"""A dry run on the terminal: one page that wraps at the terminal's width, and plain text in a file.

Words are wrapped, never cut or broken: a path or a digest can be copied, and found in a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from orchestrator.config import Order, TrainConfig
from orchestrator.control import prediction
from orchestrator.control.checks import Verdict
from orchestrator.control.facts import (
    BatchFacts,
    DataFacts,
    Machines,
    PlacementFacts,
    Plan,
    PredictionFacts,
    RunFacts,
    RunState,
    TestFacts,
)
from orchestrator.control.terminal import duration
from orchestrator.masking import masked
from orchestrator.world import Share

_INDENT = 12
_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.REFUSED: "bold red", Verdict.SKIPPED: "dim"}
_MANY_WORKERS = 16  # more are not listed one by one


def show(console: Console, plan: Plan, recipe: TrainConfig) -> None:
    """Print ``plan``; fields in which its config differs from ``recipe`` are marked."""
    page = _Page(console)
    page.line(Text(f"DRY RUN of {plan.config.name or '(no name)'}: nothing is trained, taken or kept", "bold"))
    sections = {
        "run": _run_lines(plan),
        "config": _config_lines(plan.config, recipe),
        "data": _data_lines(plan.data, plan.config),
        "network": _model_lines(plan),
        "schedule": _schedule_lines(plan) if plan.trains else (),
        "tests": _test_lines(plan.tests),
        "batch": _batch_lines(plan.batch),
        "workers": _worker_lines(plan.machines, plan.placement),
        "prediction": _prediction_lines(plan),
    }
    for label, lines in sections.items():
        for number, line in enumerate(lines):
            page.row(label if number == 0 else "", line)
    for finding in plan.findings:
        verdict = Text(finding.verdict.value, _STYLES[finding.verdict])
        page.row(verdict, Text.assemble((finding.name, "bold"), f": {masked(finding.text)}"))
    page.line(_verdict(plan))


class _Page:
    """Rows of a label and a text beside it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def row(self, label: str | Text, text: str | Text) -> None:
        label = label if isinstance(label, Text) else Text(label, "bold cyan")
        text = text if isinstance(text, Text) else Text(text)
        for number, part in enumerate(_wrapped(text, self._console.width - _INDENT)):
            first = label if number == 0 else Text("")
            self._print(Text.assemble(first, " " * max(1, _INDENT - first.cell_len), part))

    def line(self, text: Text) -> None:
        for part in _wrapped(text, self._console.width):
            self._print(part)

    def _print(self, line: Text) -> None:
        line.rstrip()
        self._console.print(line, soft_wrap=True)  # a path longer than a line is for the terminal to fold


def _wrapped(text: Text, width: int) -> Iterable[Text]:
    """Lines of at most ``width`` columns, but for words that are longer; rich would break or cut those."""
    starts, column = list[int](), 0
    for word in re.finditer(r"\S+\s*", text.plain):
        if column and column + cell_len(word[0].rstrip()) > width:
            starts.append(word.start())
            column = 0
        column += cell_len(word[0])
    return text.divide(starts)


def _verdict(plan: Plan) -> Text:
    if plan.refusals:
        names = ", ".join(f.name for f in plan.refusals)
        return Text(f"A start would be refused ({names}): exit code 2.", "bold red")
    return Text("A start would go on: exit code 0.", "bold green")


# -- sections -------------------------------------------------------------------------------------------------------


def _run_lines(plan: Plan) -> Iterator[str]:
    run, of = plan.run, f" of {plan.schedule.steps:,}" if plan.schedule else ""
    if run is None:
        yield "unknown: see the checks"
        return
    match run.state:
        case RunState.NEW:
            yield f"new: a start would train from step 0{of}"
        case RunState.GOES_ON:
            yield f"goes on: a start would train from step {run.step:,}{of}, the newest checkpoint"
        case RunState.FINISHED:
            left = "test it, and " if plan.tests and not plan.tests.are_done else "only "
            yield f"finished: {run.step:,} steps done; a start would {left}bring to MLflow what is not there yet"
            if run.outcome is not None:
                o = run.outcome
                yield f"validation {o.validation_top1_error:.2f} % top-1, {o.validation_top5_error:.2f} % top-5 error"
        case RunState.TESTED:
            yield "a start would test it as it stands, and not train it"
        case RunState.UNKNOWN:
            yield "does not go on as it is: see the checks"
    yield masked(run.url)
    if run.attempt and run.state is not RunState.FINISHED:
        yield _attempt_line(run)


def _attempt_line(run: RunFacts) -> str:
    by = f" ({run.attempt_by})" if run.attempt_by else ""
    return f"this would be start number {run.attempt + 1}; while number {run.attempt}{by} is at work it is refused"


def _config_lines(config: TrainConfig, recipe: TrainConfig) -> Iterator[str | Text]:
    """What is not a default: of the recipe, or of the command line (marked, with what the recipe has)."""
    new, old, default = _flat(config), _flat(recipe), _flat(TrainConfig())
    parts = []
    for key, value in new.items():
        if value != old[key]:
            parts.append(Text(masked(f"*{key}={_value(value)}(recipe:{_value(old[key])})"), "bold yellow"))
        elif value != default[key]:
            parts.append(Text(masked(f"{key}={_value(value)}")))
    marks = "; * changed on the command line" if new != old else ""
    yield f"recipe {config.recipe or '(none)'}{marks}; other fields have their defaults (--help)"
    if parts:
        yield Text(" ").join(parts)


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Fields of the parts and the seed by their names on the command line: {"schedule.lr": 0.1, …}."""
    plain = config.to_json()
    parts = {f"{part}.{k}": v for part, values in plain.items() if isinstance(values, dict) for k, v in values.items()}
    return {"seed": plain["seed"], **parts}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"({','.join(map(_value, value))})"
    return str(value).removesuffix(".0") if value != "" else "''"


def _data_lines(data: DataFacts | None, config: TrainConfig) -> Iterator[str]:
    if data is None:
        yield "unknown: see the checks"
        return
    yield f"{masked(data.url)} ({'local disk' if data.is_local else 'remote'}), data set {data.name}"
    yield f"{data.num_classes:,} classes; digest {data.sha256}"
    for split in data.splits:
        bad = f", {split.undecodable:,} undecodable" if split.undecodable else ""
        yield f"{split.name}: {split.images:,} images in {_count(split.shards, 'shard')}, {_bytes(split.nbytes)}{bad}"
    for what, found in groupby(sorted(data.odd, key=lambda odd: odd[1]), key=lambda odd: odd[1]):
        yield f"{what}: {', '.join(f'{number:,} in {split}' if split else f'{number:,}' for split, _, number in found)}"
    if not data.odd:
        yield "no odd images"
    match data.order:
        case Order.FULL:
            order = "in a new order each epoch"
        case Order.WINDOWED:
            shards = _count(config.input.window_shards, "shard")
            order = f"in a new order each epoch, mixed within {shards} that hold {data.window_classes:,} of the classes"
            if 2 * data.window_classes < data.num_classes:
                order += " (few for a batch: raise input.window_shards, or prepare shards that mix classes)"
        case Order.SEQUENTIAL:
            order = "as they lie in the shards"
    crop_px = config.input.crop_px
    resized = f", resized to {crop_px}" if data.statistics_crop_px != crop_px else ""
    yield f"order {data.order.value}: {order}; mean image of {data.statistics_crop_px}-pixel views{resized}"


def _model_lines(plan: Plan) -> Iterator[str]:
    m, config = plan.model, plan.config.model
    if m is None:
        yield "unknown: see the checks"
        return
    yield (
        f"{config.family.value} of {m.layers} layers, {m.parameters:,} parameters, "
        f"{_amount(m.flops)} multiply-adds (FLOPs) for an image"
    )
    yield f"input 3 × {m.crop_px} × {m.crop_px}, {m.num_classes:,} classes (from the data)"


def _schedule_lines(plan: Plan) -> Iterator[str]:
    s = plan.schedule
    if s is None:
        yield "unknown: see the checks"
        return
    epochs = f"{_number(s.epochs)} epochs of {_number(s.steps_per_epoch)} steps"
    yield f"{s.steps:,} steps: {epochs}, {s.images_seen:,} images seen"
    yield f"learning rate {s.policy}"
    yield f"{_count(s.validations, 'validation')}, {_count(s.checkpoints, 'checkpoint')}"
    if plan.space is not None:
        free = plan.space.free_bytes
        beside = "what is free is not known" if free is None else f"{_bytes(free)} free"
        yield (
            f"a checkpoint has {plan.space.checkpoint_bytes:,} bytes; the newest {plan.config.rhythm.keep_last} and "
            f"the best are kept: {_bytes(plan.space.needed_bytes)} needed, {beside}"
        )


def _test_lines(of: TestFacts | None) -> Iterator[str]:
    if of is None:
        yield "none (--evaluation.protocols)"
        return
    averaged = f", batch norm averaged over {of.precise_bn_images:,} training images" if of.precise_bn_images else ""
    yield f"finished model of the {of.tested.value} checkpoint{averaged}: {_done(of.is_finished)}"
    for test, is_done in of.tests:
        yield f"{test}: {_done(is_done)}"


def _done(is_done: bool) -> str:
    return "done" if is_done else "to come"


def _batch_lines(batch: BatchFacts) -> Iterator[str]:
    groups = _count(batch.num_groups, "batch-norm group")
    yield f"{batch.global_batch_size:,} images = {groups} of {batch.bn_group_size:,}"
    yield f"numbers of workers that fit: {_ranges(batch.worker_counts)}"


def _worker_lines(machines: Machines, found: PlacementFacts | None) -> Iterator[str]:
    cluster = machines.cluster
    if cluster is not None:
        each = Counter(f"{_count(n.cpus, 'CPU')} and {_count(n.gpus, 'GPU')}" for n in cluster.nodes)
        kinds = [f"{_count(n, 'node')} with {has}{' each' if n > 1 else ''}" for has, n in each.items()]
        yield f"{machines.words}: {'; '.join(kinds)}"
    else:
        yield f"{machines.words}: unknown"
    if machines.world_size:
        yield f"torchrun has started {_count(machines.world_size, 'process')}"
    if found is None:
        return
    p, shares = found.placement, found.shares
    kind = "GPU" if p.use_gpu else "CPU"
    yield f"{_count(p.num_workers, f'{kind} worker')} with {_count(p.cpus_per_worker, 'CPU')} each"
    if len(p.workers_per_node) > 1:
        yield f"packed: {'; '.join(_nodes(p.workers_per_node))}"
    if len(shares) <= _MANY_WORKERS:
        yield "; ".join(f"worker {rank}: {_share(share)}" for rank, share in enumerate(shares))
    else:
        yield f"worker 0: {_share(shares[0])}; … worker {len(shares) - 1}: {_share(shares[-1])}"


def _nodes(workers_per_node: Iterable[int]) -> Iterator[str]:
    """Workers of each node, alike ones together."""
    node = rank = 0
    for workers, alike in groupby(workers_per_node):
        nodes = len(list(alike))
        last = rank + nodes * workers - 1
        ranks = f"workers {rank}-{last}" if last > rank else f"worker {rank}"
        yield f"{ranks} on nodes {node}-{node + nodes - 1}, {workers} each" if nodes > 1 else f"{ranks} on node {node}"
        node, rank = node + nodes, last + 1


def _share(share: Share) -> str:
    if share.sharers > 1:
        first = share.first_image
        return f"images {first}-{first + share.images_per_group - 1} of group {share.first_group}"
    last = share.first_group + share.num_groups - 1
    return f"group {last}" if share.num_groups == 1 else f"groups {share.first_group}-{last}"


def _prediction_lines(plan: Plan) -> Iterator[str]:
    of, rhythm = plan.prediction, plan.config.rhythm
    if of is None:
        return
    if of.trouble or plan.placement is None:
        yield of.trouble
    else:
        p = plan.placement.placement
        hours, kind = p.num_workers * of.seconds / 3600, "GPU" if p.use_gpu else "CPU worker"
        yield (
            f"about {duration(of.seconds)} ({_rounded(hours)} {kind} hours) for the {of.steps_left:,} steps left and "
            f"their validations, at {_rounded(of.speed.images_per_s)} images/s {_basis(of, p.use_gpu)}"
        )
        steps = max(1, round(of.best_s / of.step_s))
        yield (
            f"rhythm.checkpoint_every_steps {rhythm.checkpoint_every_steps:,} is one in {duration(of.every_s)}; "
            f"{steps:,} (one in {duration(of.best_s)}) would cost least if a node fails every "
            f"{prediction.NODE_MTBF_S / 3600:,.0f} h and a checkpoint holds training up for {of.stall_s:.2g} s (both "
            f"assumed; {_count(of.nodes, 'node')})"
        )
    if of.stored is not None:
        s = of.stored
        rest = f", finished model {_bytes(s.model)}, scores {_bytes(s.scores)}" if s.model else ""
        yield f"stored, at most: {_bytes(s.total)}: checkpoints {_bytes(s.checkpoints)}{rest}"


def _basis(of: PredictionFacts, use_gpu: bool) -> str:
    if of.speed.step:
        return f"(measured up to step {of.speed.step:,}, on the workers of then)"
    if use_gpu:
        known = f"ResNet-50 at {prediction.GPU_IMAGES_PER_S:,.0f} on an H200"
    else:
        known = f"{prediction.CPU_FLOPS_PER_CORE_S / 1e9:g} billion a second and core"
    return f"(assumed, by multiply-adds from {known}; input and network left out)"


# -- numbers --------------------------------------------------------------------------------------------------------


def _ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as "1-8, 16, 32"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _number(number: float) -> str:
    return f"{number:,.2f}".rstrip("0").rstrip(".")


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _amount(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
