"""The paper's campaign of six networks on more and more GPUs, on paper: ``python -m benchmarks.scale [--gpus 8 64 …]``.

Nothing is trained and no GPU is there: orchestrator/control/prediction.py is asked. Every number that it starts from
is an option below, with where it comes from. Two kinds of rows: the paper's batch of 256 with the number of GPUs that
is done soonest (of equals within 2 % the fewest: more do not help), which ``jobs/campaign.py`` takes as well; and a
batch that grows with the GPUs, 32 images each, as Goyal et al. 2017 did with a learning rate that grows with it and a
warm-up (no recipe here does so yet). The last line is machine-readable.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import line_of, record
from jobs.campaign_recipes import ilsvrc2015
from orchestrator import models
from orchestrator.config import EvaluationConfig, Protocol, TrainConfig
from orchestrator.control.prediction import (
    GPU_FIXED_S,
    GPU_IMAGES_PER_S,
    GPU_PASS_IMAGES,
    NODE_MTBF_S,
    STALL_S_PER_BYTE,
    CampaignTime,
    Chip,
    Faults,
    ModelCost,
    Site,
    Stored,
    Wires,
    Work,
    campaign_time,
    goodput,
    run_time,
    stored,
)
from orchestrator.training.assembly import build_model
from orchestrator.training.optimization import total_steps

TRAIN, VAL, TEST, CLASSES = 1_281_167, 50_000, 100_000, 1000  # ILSVRC2012
SCALES_PX, ASPECT = (224, 256, 384, 480, 640), 4 / 3  # multi-scale: shorter sides; the longer one, assumed
HEADER = (
    "GPUs",
    "batch",
    "GPUs a member",
    "at work",
    "step of r152, ms",
    "efficiency",
    "days",
    "GPU hours",
    "goodput",
    "checkpoint every",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(name: str, default: float, text: str) -> None:
        parser.add_argument(name, type=float, default=default, help=f"{text} (default: {default:.4g})")

    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096], help="sizes of the cluster")
    number(
        "--images-per-s",
        GPU_IMAGES_PER_S,
        f"of ResNet-50 on one GPU in passes of {GPU_PASS_IMAGES} images; default: NVIDIA's published figure for "
        "PyTorch with mixed precision on an H200 (synthetic images, NCHW). Other depths by their multiply-adds",
    )
    number(
        "--fixed-ms",
        1e3 * GPU_FIXED_S,
        "of each pass of ResNet-50, however few images; default: from groups of 32 and of 256 on an H100 "
        "(benchmarks/RESULTS.md). Other depths by their layers, assumed",
    )
    number(
        "--input-images-per-s",
        5960,
        "that the input side decodes for a GPU; default: 426 a core (benchmarks/RESULTS.md) on the 14 cores that a "
        "GPU of a DGX H200 has",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8, as a DGX H200 has")
    number("--nvlink-gbyte", 450, "10^9 bytes/s of a GPU in each direction; default: NVLink of an H200")
    number("--link-gbit", 400, "10^9 bits/s of a network card; default: a DGX H200's")
    parser.add_argument("--links-per-node", type=int, default=8, help="network cards of a node; default: a DGX H200's")
    number("--wire-share", 0.8, "of these speeds that a reduction reaches, assumed")
    number("--link-latency-us", 5.0, "of a hop between nodes, assumed")
    number("--nvlink-latency-us", 3.0, "of a hop within a node, assumed")
    number("--launch-us", 20.0, "that a reduction takes before anything is sent, assumed")
    number(
        "--node-mtbf-h",
        NODE_MTBF_S / 3600,
        "mean time between failures of a node; default: 419 in 54 days of 2,048 nodes (The Llama 3 Herd of Models)",
    )
    number("--restart-s", 180, "from a failure to the next step, assumed (a hang is noticed after 120 s)")
    number("--publish-s", 10, "from a checkpoint until it counts, assumed")
    number(
        "--stall-s-per-gb",
        1e9 * STALL_S_PER_BYTE,
        "that a checkpoint takes from training; default: 0.18 s for 205 MB on 2 cores (benchmarks/RESULTS.md)",
    )
    parser.add_argument(
        "--largest-batch",
        type=int,
        default=8192,
        help="where the batch grows; default: 8192, up to which errors stayed in Goyal et al. 2017 (figure 1)",
    )
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    parser.add_argument("--record", type=Path, help="file of results to append to, as benchmarks/RESULTS.md")
    return parser.parse_args()


# -- what is asked --------------------------------------------------------------------------------------------------


def cost_of(config: TrainConfig) -> ModelCost:
    """Counted on the network itself, which takes no memory."""
    with torch.device("meta"):
        model = build_model(config, CLASSES)
    return ModelCost(
        flops=models.count_flops(model, config.input.crop_px),
        layers=models.count_layers(model),
        parameters=models.count_parameters(model),
        buffers=sum(buffer.numel() for name, buffer in model.named_buffers() if name.partition(".running_")[1]),
        batch_norms=sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()),
    )


def views(evaluation: EvaluationConfig, crop_px: int) -> float:
    """Training views that have as many pixels as those by which one image is tested."""
    scales = 2 * sum(ASPECT * px**2 for px in SCALES_PX) / crop_px**2
    of = {Protocol.ONE_CROP: 1.0, Protocol.TEN_CROP: 10.0, Protocol.MULTI_SCALE: scales}
    return sum(of[protocol] for protocol in evaluation.protocols)


def works(a: argparse.Namespace, largest_batch_size: int) -> list[Work]:
    """The members of the paper's campaign; the batch grows up to ``largest_batch_size``, 0: not."""
    chip, found = Chip.measured(a.images_per_s, GPU_PASS_IMAGES, a.fixed_ms / 1e3), []
    for name, config in ilsvrc2015().run_configs().items():
        cost, size, e = cost_of(config), config.batch.global_batch_size, config.evaluation
        images = total_steps(config.schedule, TRAIN, size) * size
        validations = images / TRAIN / config.rhythm.validate_every_epochs
        tests = (VAL * ("val" in e.splits) + TEST * ("test" in e.splits)) * views(e, config.input.crop_px)
        forward = round(VAL * validations + tests + e.precise_bn_images)
        group = config.batch.bn_group_size
        found.append(Work(name, cost, chip.scaled(cost), images, forward, size, group, largest_batch_size))
    return found


def site_of(a: argparse.Namespace) -> Site:
    wires = Wires(
        a.gpus_per_node,
        a.wire_share * a.nvlink_gbyte * 1e9,
        a.wire_share * a.links_per_node * a.link_gbit * 1e9 / 8,
        a.nvlink_latency_us / 1e6,
        a.link_latency_us / 1e6,
        a.launch_us / 1e6,
    )
    return Site(wires, a.input_images_per_s, a.node_mtbf_h * 3600, a.restart_s, a.publish_s, a.stall_s_per_gb / 1e9)


def storage() -> Stored:
    """Of all members."""
    total = [0, 0, 0]
    for config in ilsvrc2015().run_configs().values():
        cost, e = cost_of(config), config.evaluation
        scored = (VAL * ("val" in e.splits) + TEST * ("test" in e.splits)) * len(e.protocols)
        one = stored(cost.checkpoint_bytes, cost.model_bytes, config.rhythm.keep_last, scored, CLASSES)
        total = [total[0] + one.checkpoints, total[1] + one.model, total[2] + one.scores]
    return Stored(*total)


# -- what is told ---------------------------------------------------------------------------------------------------


def row(gpus: int, kind: str, found: CampaignTime) -> tuple[str, ...]:
    deepest = found.runs[0]
    efficiency = sum(run.efficiency * run.worker_s for run in found.runs) / found.worker_s
    return (
        f"{gpus:,}",
        f"{deepest.batch_size:,}{kind}",
        f"{deepest.workers}",
        f"{found.busy:,}",
        f"{1e3 * deepest.step.seconds:.1f}",
        f"{100 * efficiency:.0f} %",
        f"{found.wall_s / 86_400:.3g}",
        f"{found.worker_s / 3600:,.0f}",
        f"{100 * found.goodput:.2f} %",
        f"{deepest.interval_s / 60:.0f} min ({round(deepest.interval_s / deepest.step.seconds, -2):,.0f} steps)",
    )


def main() -> None:
    a = arguments()
    try:
        site, fixed, growing = site_of(a), works(a, 0), works(a, a.largest_batch)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    rows, figures = [], dict[str, float]()
    for gpus in a.gpus:
        paper, grown = campaign_time(fixed, gpus, site), campaign_time(growing, gpus, site)
        rows += [row(gpus, "", paper), row(gpus, ", growing", grown)]
        for name, found in (("paper", paper), ("growing", grown)):
            figures |= {f"{name}_{gpus}_days": found.wall_s / 86_400, f"{name}_{gpus}_gpu_h": found.worker_s / 3600}
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for line in (HEADER, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()
    for text in remarks(a, fixed, site):
        print(text)
    if a.figure:
        draw(a.figure, fixed, growing, site, max(a.gpus))
    if a.record:
        note = " ".join(remarks(a, fixed, site))
        record(a.record, "Scale on paper: a prediction, not a measurement", HEADER, rows, note)
    print(line_of({**figures, "storage_gb": storage().total / 1e9}))


def remarks(a: argparse.Namespace, members: Sequence[Work], site: Site) -> Iterator[str]:
    s, by_name = storage(), {work.name: work for work in members}
    r50, r152 = by_name["r50"], by_name["r152-a"]
    yield f"Nothing was run: {a.images_per_s:,.0f} images/s of ResNet-50 on a GPU in passes of {GPU_PASS_IMAGES} images"
    yield f"are taken as given, and {a.fixed_ms:g} ms of each pass as fixed; every assumption and its source: --help."
    alone = run_time(r50, 1, site).step.seconds
    yield f"ResNet-50 in groups of 32 on one GPU: {r50.global_batch_size / alone:,.0f} images/s (the paper's batch)."
    ratios = [f"{n}: {run_time(r152, 8, site).useful_s / run_time(r152, n, site).useful_s:.2f}" for n in (16, 64, 256)]
    yield "ResNet-152 with the paper's batch, so many times as fast as on 8 GPUs, which have a group each: on"
    best = campaign_time(members, max(a.gpus), site)
    yield f"{', '.join(ratios)}. On {max(a.gpus):,} GPUs that batch has use for {best.busy:,} in all,"
    yield f"{best.runs[0].workers} a member."
    yield f"Storage of all members: {s.checkpoints / 1e9:.1f} GB checkpoints, {s.model / 1e9:.1f} GB finished models,"
    yield f"{s.scores / 1e9:.1f} GB scores."


def draw(path: Path, fixed: Sequence[Work], growing: Sequence[Work], site: Site, most: int) -> None:
    """Hours over GPUs; a step over the GPUs of a member; what faults and checkpoints take, over their interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11.0, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    hours, step, lost = figure.subplots(1, 3)
    gpus = [2**n for n in range(most.bit_length())]
    alone_h = campaign_time(fixed, 1, site).wall_s / 3600
    hours.plot(gpus, [alone_h / n for n in gpus], ":", color="0.6", label="one GPU's time shared out")
    curves = (
        ("batch 256 (the paper)", "-", [campaign_time(fixed, n, site) for n in gpus]),
        ("batch grows, 32 a GPU", "--", [campaign_time(growing, n, site) for n in gpus]),
    )
    for label, style, found in curves:
        hours.plot(gpus, [one.wall_s / 3600 for one in found], style, color="black", label=label)
    _panel(hours, "the campaign of six networks", "GPUs of the cluster", "hours")
    _steps(step, {work.name: work for work in fixed}, site)
    for axes in (hours, step):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
    hours.set_xticks(gpus[::3])
    step.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    step.set_yticks([10, 20, 50, 100, 200, 500])
    step.yaxis.set_minor_locator(NullLocator())
    _lost(lost, fixed[0].cost, site, sorted({1, most // site.wires.workers_per_node // 8, most // 8} - {0}))
    for axes in (hours, lost):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lost.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle("Predicted, not measured", fontsize=11)
    with path.open("wb") as stream:
        canvas.print_png(stream, metadata={"Software": None})


def _steps(axes: Any, by_name: Mapping[str, Work], site: Site) -> None:
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for name, shade in (("r152-a", "0"), ("r50", "0.55")):
        times = [run_time(by_name[name], n, site).step for n in counts]
        axes.plot(
            counts,
            [1e3 * t.seconds for t in times],
            "o-",
            color=shade,
            markersize=3,
            label=f"ResNet-{name[1:].split('-')[0]}",
        )
    axes.axvline(8, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("a group each", (8.8, 0.93), xycoords=("data", "axes fraction"), fontsize=7.5, color="0.35")
    _panel(axes, "a step of the paper's batch of 256", "GPUs of a member", "ms")


def _lost(axes: Any, cost: ModelCost, site: Site, nodes: Sequence[int]) -> None:
    seconds = np.geomspace(10, 86_400, 200)
    for shade, number in zip(("0.6", "0.35", "0"), nodes, strict=False):
        faults: Faults = site.faults(cost, number * site.wires.workers_per_node)
        percent = [100 * (1 - goodput(s, faults)) for s in seconds]
        axes.plot(seconds / 60, percent, color=shade, label=f"on {number:,} node{'s' if number > 1 else ''}")
        lowest = int(np.argmin(percent))
        axes.plot(seconds[lowest] / 60, percent[lowest], "o", color=shade, markersize=4)
    _panel(axes, "lost to faults and checkpoints (r152)", "minutes between checkpoints", "% of the time")
    axes.set_xscale("log")
    axes.set_yscale("log")


def _panel(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="0.9", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7.5, framealpha=0.9, edgecolor="0.8")


if __name__ == "__main__":
    main()
