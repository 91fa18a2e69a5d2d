"""One training run from (config, world, storage): the one plain loop.

It runs in any process group; Ray Train, torchrun and tests only make a World and call ``train``. Everything that a run
remembers is in storage: the same call goes on from the newest verified checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator import models
from orchestrator.config import MeanKind, Precision, TrainConfig
from orchestrator.data.pipeline import DecodeSettings, EvalInput, Mean, TrainInput
from orchestrator.data.sampling import Purpose, SampleStream, mix64
from orchestrator.data.shards import DataSet
from orchestrator.data.views import ColourAxes, TestView, TrainView
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import Checkpoints, CommitRecord, Snapshot
from orchestrator.training.meters import Meter, Totals, cross_entropy
from orchestrator.training.optimization import (
    SGD,
    Decision,
    PolicyState,
    after_measurement,
    after_validation,
    learning_rate,
    total_steps,
)
from orchestrator.training.validation import validate
from orchestrator.world import Share, World, share_of

Event = dict[str, Any]
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: errors in percent, of the last validation; SHA-256 over all weights and buffers."""

    steps: int
    validation_top1_error: float
    validation_top5_error: float
    best_validation_top1_error: float
    checkpoint: str
    best_checkpoint: str
    weights_sha256: str


def finished(run: Storage) -> Outcome | None:
    """The outcome of a run that is done, else None."""
    try:
        return Outcome(**json.loads(run.read("finished.json")))
    except FileNotFoundError:
        return None


def train(
    config: TrainConfig, world: World, *, attempt: int, cpus: int, emit: Callable[[Event], None] = lambda event: None
) -> Outcome:
    """Train to the end, from wherever the run stands.

    attempt: number of this start (``checkpoint.next_attempt``); cpus: threads for this worker; emit: takes the events
    of rank 0 (journal lines, progress, notices) and must not block. Raises ValueError for what the user must mend,
    checkpoint.SupersededError where another driver took over, OSError where storage fails.
    """
    run = Storage(config.storage).sub(config.name)
    tell = emit if world.is_first else (lambda event: None)
    rhythm = config.rhythm

    # -- arithmetic -------------------------------------------------------------------------------------------------
    torch.set_num_threads(max(1, cpus))
    on_gpu = world.device.type == "cuda"
    autocast_dtype = _autocast_dtype(config.numerics.precision, on_gpu)
    if on_gpu:
        _set_gpu_arithmetic(config.numerics.deterministic)

    # -- data -------------------------------------------------------------------------------------------------------
    data = DataSet(Storage(config.data))
    train_split, val_split = data.split("train"), data.split("val")
    share = share_of(world.rank, world.size, config.batch.global_batch_size, config.batch.bn_group_size)
    stream = SampleStream(len(train_split), config.seed, config.input.order)
    view, test_view, mean, axes = views_of(config, data)
    decode = DecodeSettings(
        device=world.device.type,
        device_id=world.device.index or 0,
        num_threads=max(1, cpus),
        prefetch_batches=config.placement.prefetch_batches,
        hw_decoder_share=config.numerics.hw_decoder_share,
        half=autocast_dtype is not None,
    )
    batch_size, group_size = config.batch.global_batch_size, config.batch.bn_group_size
    steps = total_steps(config.schedule, len(train_split), batch_size)

    # -- model and optimizer ----------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model = build_model(config, data.num_classes).to(world.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    models.share_groups(model, world.group_sum(share.sharers), share.sharers)
    statistics = models.RunningStatistics(model)
    optimizer = SGD(model, **asdict(config.optimizer))
    parallel = world.distribute(model)
    if world.size > 1:
        _settle_buckets(parallel, statistics, share, config.input.crop_px, world)

    # -- where the run stands ---------------------------------------------------------------------------------------
    checkpoints = Checkpoints(
        run,
        attempt=attempt,
        keep_last=rhythm.keep_last,
        notice=lambda text: tell(_notice(text)),
        published=lambda record, is_best: tell(_published(run, record, is_best, batch_size / len(train_split))),
    )
    snapshot = checkpoints.newest()
    step, policy, totals, journal = 0, PolicyState(), Totals(), list[Event]()
    if snapshot is not None:
        step, journal = snapshot.step, snapshot.journal
        policy, totals = PolicyState(**snapshot.state["policy"]), Totals(*snapshot.state["totals"])
        _load_tensors(model, optimizer, snapshot)
        tell(_notice(f"going on from the checkpoint of step {step}"))
    if world.is_first:
        checkpoints.collect_orphans()

    def record(kind: str, **content: Any) -> None:
        event = {"kind": kind, "step": step, "epoch": step * batch_size / len(train_split)}
        event |= {"time_ms": time.time_ns() // 1_000_000, **content}
        journal.append(event)
        tell(event)

    def decided(new: PolicyState, decision: Decision | None) -> PolicyState:
        if decision is not None:
            record("decision", decision=decision.to_json())
        return new

    # -- the loop ---------------------------------------------------------------------------------------------------
    batches = TrainInput(
        train_split, stream, view, axes, mean, decode, lambda s: share.positions(s, batch_size, group_size), step
    )
    val_batches = EvalInput(val_split, test_view, mean, decode, rhythm.validation_batch_size)
    meter, clock = Meter(world.device), Clock()
    has_dropout = any(isinstance(m, nn.Dropout) for m in model.modules())
    model.train()
    tell({"kind": "start", "step": step, "steps": steps, "images": len(train_split), "workers": world.size})

    while step < steps and not policy.stop:
        with clock.waiting():
            batch = next(batches)
        for bad, stand_in in batch.replaced:
            tell(_notice(f"step {step}: image {bad} cannot be decoded, {stand_in} takes its place"))
        if len(batches.undecodable) > config.input.max_undecodable:
            raise ValueError(_too_many_undecodable(batches, config.input.max_undecodable))

        # One batch-norm group after another: gradients add up, and are reduced over the workers with the last.
        for number in range(share.num_groups):
            group = slice(number * share.images_per_group, (number + 1) * share.images_per_group)
            images, labels = batch.images[group], batch.labels[group]
            if has_dropout:
                torch.manual_seed(_dropout_seed(config.seed, step, share.first_group + number, share.first_image))
            with world.reducing(parallel, now=number == share.num_groups - 1):
                with torch.autocast(world.device.type, autocast_dtype or torch.bfloat16, enabled=bool(autocast_dtype)):
                    logits = parallel(images)
                losses = cross_entropy(logits, labels)
                (losses.sum() / batch_size).backward()
            statistics.accumulate()
            meter.add(logits.detach().float(), labels, losses.detach())
        statistics.advance(world.sum_, batch_size // group_size)
        optimizer.step(learning_rate(config.schedule, policy, step, steps))
        optimizer.zero_grad()
        step += 1
        clock.stepped(batch_size)
        if clock.progress_due():
            tell({"kind": "progress", "step": step, "learning_rate": optimizer.lr, **clock.speed()})

        # -- measure
        last = step == steps
        if last or step % rhythm.log_every_steps == 0:
            totals = totals + meter.take(world.sum_)
            if totals.not_finite:
                raise ValueError(_not_finite(config, step, totals))
            record("train", metrics=_train_metrics(totals, optimizer.lr, clock.speed()))
            policy = decided(*after_measurement(config.schedule, policy, step, totals.top1_error))
            totals = Totals()
            clock.restart()

        # -- validate, and decide once on the globally reduced error
        validation: Totals | None = None
        if last or _validation_due(step, batch_size, len(train_split), rhythm.validate_every_epochs):
            with clock.stalled() as stall:
                validation = validate(model, val_batches, world, autocast_dtype)
            record("validation", metrics=_validation_metrics(validation, stall.seconds))
            training_error = _last_training_error(journal)
            policy = decided(*after_validation(config.schedule, policy, step, validation.top1_error, training_error))

        # -- save
        if last or policy.stop or validation is not None or step % rhythm.checkpoint_every_steps == 0:
            with clock.stalled() as stall:
                totals = totals + meter.take(world.sum_)
                if world.is_first:
                    state = {"policy": asdict(policy), "totals": totals.as_list(), "lr": optimizer.lr}
                    error = None if validation is None else validation.top1_error
                    checkpoints.save(Snapshot(step, _tensors(model, optimizer), state, list(journal), error))
            tell({"kind": "saving", "step": step, "stall_s": stall.seconds})

    # -- the end ----------------------------------------------------------------------------------------------------
    batches.close()
    val_batches.close()
    if world.is_first:
        checkpoints.close()
        run.publish("finished.json", json.dumps(asdict(_outcome(run, checkpoints, model, journal))).encode())
    world.barrier()
    outcome = finished(run)
    assert outcome is not None
    tell({"kind": "finished", **asdict(outcome)})
    return outcome


# -- parts of the run -----------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The config's model for ``num_classes`` classes, initialized from the current random state. Raises ValueError."""
    m = config.model
    return models.build(
        m.family,
        m.depth,
        num_classes=num_classes,
        image_size=config.input.crop_px,
        shortcut=m.shortcut,
        stride_on=m.stride_on,
        pool=m.pool,
        zero_gamma=m.zero_gamma,
    )


def views_of(config: TrainConfig, data: DataSet) -> tuple[TrainView, TestView, Mean, ColourAxes]:
    """Training view, test view, mean and colour axes that the config asks for. Raises ValueError."""
    i = config.input
    view = TrainView(
        crop=i.crop_px,
        style=i.crop_style,
        scale_min=i.scale_min_px,
        scale_max=i.scale_max_px,
        area_min=i.area_min,
        flip=i.flip,
        colour_std=i.colour_std,
    )
    statistics = data.statistics()
    match i.mean:
        case MeanKind.PIXEL:
            image = torch.from_numpy(statistics["mean_image"]).unsqueeze(0)
            size = (i.crop_px, i.crop_px)
            if image.shape[-2:] != size:
                # The mean of resized views is the resized mean of the views, up to rounding.
                image = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
            mean = Mean(image.squeeze(0).numpy())
        case MeanKind.CHANNEL:
            mean = Mean(statistics["channel_mean"].astype(np.float32))
    axes = ColourAxes(statistics["eigenvalues"], statistics["eigenvectors"])
    return view, TestView(i.crop_px, i.test_shorter_side_px), mean, axes


def _autocast_dtype(precision: Precision, on_gpu: bool) -> torch.dtype | None:
    match precision:
        case Precision.FP32:
            return None
        case Precision.BF16:
            return torch.bfloat16
        case Precision.AUTO:
            return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None


def _set_gpu_arithmetic(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def _settle_buckets(
    parallel: nn.Module, statistics: models.RunningStatistics, share: Share, crop_px: int, world: World
) -> None:
    """Two forward and backward passes that nobody sees.

    DDP lays its gradient buckets out anew after the first step, and a ring's order of additions follows the layout:
    without this, the first step after a restart would add in another order than the same step of an unbroken run.
    """
    images = torch.zeros(share.images_per_group, 3, crop_px, crop_px, device=world.device)
    for _ in range(2):
        parallel(images.contiguous(memory_format=torch.channels_last)).sum().backward()
    parallel.zero_grad(set_to_none=False)
    statistics.discard()


def _dropout_seed(seed: int, step: int, group: int, first_image: int) -> int:
    key = np.array([seed], np.uint64)
    for part in (step, group, first_image, Purpose.DROPOUT.value):
        key = mix64(key ^ np.uint64(part))
    return int(key[0] >> np.uint64(1))


# -- checkpoint contents --------------------------------------------------------------------------------------------


def _tensors(model: nn.Module, optimizer: SGD) -> dict[str, Tensor]:
    """Copies in host memory: model/<name> and momentum/<name>."""
    state = {f"model/{name}": t for name, t in model.state_dict().items()}
    state |= {f"momentum/{name}": t for name, t in optimizer.momentum().items()}
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}


def _load_tensors(model: nn.Module, optimizer: SGD, snapshot: Snapshot) -> None:
    weights = {n.removeprefix("model/"): t for n, t in snapshot.tensors.items() if n.startswith("model/")}
    momentum = {n.removeprefix("momentum/"): t for n, t in snapshot.tensors.items() if n.startswith("momentum/")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint of step {snapshot.step} is of another model: {error}") from None
    optimizer.load(momentum, snapshot.state["lr"])


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all weights and buffers: equal digests, equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _outcome(run: Storage, checkpoints: Checkpoints, model: nn.Module, journal: list[Event]) -> Outcome:
    validations = [e for e in journal if e["kind"] == "validation"]
    newest, best = checkpoints.records()[-1], checkpoints.best()
    assert best is not None
    return Outcome(
        steps=newest.step,
        validation_top1_error=validations[-1]["metrics"]["validation_top1_error"],
        validation_top5_error=validations[-1]["metrics"]["validation_top5_error"],
        best_validation_top1_error=min(e["metrics"]["validation_top1_error"] for e in validations),
        checkpoint=f"{run.url}/{newest.folder}",
        best_checkpoint=f"{run.url}/{best.folder}",
        weights_sha256=weights_sha256(model),
    )


# -- what is told ---------------------------------------------------------------------------------------------------


class Clock:
    """Images a second and the share of time spent waiting for data, since ``restart``; stalls are left out."""

    @dataclass
    class Stall:
        seconds: float = 0.0

    def __init__(self) -> None:
        self._last_progress = time.monotonic()
        self.restart()

    def restart(self) -> None:
        self._start, self._images, self._waited, self._stalled = time.monotonic(), 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def stalled(self) -> Iterator[Stall]:
        stall, start = Clock.Stall(), time.monotonic()
        yield stall
        stall.seconds = time.monotonic() - start
        self._stalled += stall.seconds

    def stepped(self, images: int) -> None:
        self._images += images

    def progress_due(self) -> bool:
        now = time.monotonic()
        due = now - self._last_progress >= _PROGRESS_EVERY_S
        if due:
            self._last_progress = now
        return due

    def speed(self) -> dict[str, float]:
        """images_per_s over all workers, data_wait_share in [0, 1] of this one."""
        elapsed = max(1e-9, time.monotonic() - self._start - self._stalled)
        return {"images_per_s": self._images / elapsed, "data_wait_share": self._waited / elapsed}


def _validation_due(step: int, batch_size: int, num_images: int, every_epochs: float) -> bool:
    """Whether the step that ended now crossed a multiple of ``every_epochs``."""
    return (step * batch_size) // (num_images * every_epochs) > ((step - 1) * batch_size) // (num_images * every_epochs)


def _train_metrics(totals: Totals, lr: float, speed: dict[str, float]) -> dict[str, float]:
    errors = {"train_top1_error": totals.top1_error, "train_top5_error": totals.top5_error}
    return {"train_loss": totals.loss, **errors, "learning_rate": lr, **speed}


def _validation_metrics(totals: Totals, seconds: float) -> dict[str, float]:
    return {
        "validation_loss": totals.loss,
        "validation_top1_error": totals.top1_error,
        "validation_top5_error": totals.top5_error,
        "validation_s": seconds,
    }


def _last_training_error(journal: list[Event]) -> float:
    measured = (e["metrics"]["train_top1_error"] for e in reversed(journal) if e["kind"] == "train")
    return float(next(measured, 100.0))


def _notice(text: str) -> Event:
    return {"kind": "notice", "text": text}


def _published(run: Storage, record: CommitRecord, is_best: bool, epochs_per_step: float) -> Event:
    event = {"kind": "checkpoint", "step": record.step, "epoch": record.step * epochs_per_step}
    event |= {"time_ms": time.time_ns() // 1_000_000, "url": f"{run.url}/{record.folder}", "best": is_best}
    return event | {"validation_top1_error": record.validation_top1_error}


def _not_finite(config: TrainConfig, step: int, totals: Totals) -> str:
    return (
        f"run {config.name!r}: the loss of {totals.not_finite} images is not finite in the "
        f"{config.rhythm.log_every_steps} steps before {step}; the checkpoints before are kept: "
        "lower schedule.lr or use a warm-up, under a new name"
    )


def _too_many_undecodable(batches: TrainInput, limit: int) -> str:
    names = ", ".join(batches.split.names[i].as_py() for i in sorted(batches.undecodable)[:20])
    return (
        f"{len(batches.undecodable)} training images cannot be decoded, more than input.max_undecodable {limit}: "
        f"{names}: prepare the data set again, or raise the limit"
    )
