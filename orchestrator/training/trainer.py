"""One training run from (config, world, storage): the one plain loop.

It runs in any process group; Ray Train, torchrun and tests only make a World and call ``train``. Everything that a run
remembers is in storage: the same call goes on from the newest verified checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from orchestrator.config import TrainConfig
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.inputs import TrainBatches, eval_input, train_input
from orchestrator.data.shards import DataSet, Encoding
from orchestrator.data.tuning import WINDOW_STEPS, Trials, tune
from orchestrator.storage import Storage
from orchestrator.training.assembly import (
    autocast_dtype,
    build_model,
    compile_mode,
    decode_settings,
    draws,
    groups_at_once,
    open_settings,
    sample_stream,
    set_arithmetic,
    shard_cache,
    views_of,
)
from orchestrator.training.checkpoint import Checkpoints, Snapshot, checkpoint_event, weights_sha256
from orchestrator.training.clock import Clock, StepTimes
from orchestrator.training.failures import NotFiniteError, PreemptedError
from orchestrator.training.meters import Totals
from orchestrator.training.notices import Event, notice
from orchestrator.training.optimization import (
    Decision,
    PolicyState,
    after_measurement,
    after_validation,
    learning_rate,
    total_steps,
)
from orchestrator.training.ownership import check_ownership
from orchestrator.training.profiling import Profiler
from orchestrator.training.pulse import Phase, Pulse, Wish
from orchestrator.training.run import Outcome, check_identity, eventually, finish, finished, run_storage
from orchestrator.training.step import ClassificationStep
from orchestrator.training.stragglers import Stragglers
from orchestrator.training.time_parts import CHECKPOINT, VALIDATION
from orchestrator.training.validation import validate
from orchestrator.world import World


def train(
    config: TrainConfig,
    world: World,
    *,
    attempt: int,
    cpus: int,
    emit: Callable[[Event], None] = lambda event: None,
    pulse: Pulse | None = None,
    seen: Callable[[int, np.ndarray], None] = lambda step, images: None,
) -> Outcome:
    """Train to the end, from wherever the run stands. Collective.

    attempt: number of this start (``run.next_attempt``), used on rank 0; cpus: threads for this worker; emit: takes the
    events of rank 0 (journal lines, progress) and the notices of every rank, and must not block; pulse: says where this
    worker is, and what is wished of it; seen: takes the number of each step (0-based) and the images [N] int64 that
    this worker trained on in it, when the step is done. Raises ValueError for what the user must mend, SupersededError
    where another driver took over, OSError where storage fails, NotFiniteError, PreemptedError (see failures).
    """
    run, rhythm, batch_size = run_storage(config), config.rhythm, config.batch.global_batch_size
    if world.is_first:
        check_ownership(run, attempt)
    tell = emit if world.is_first else (lambda event: None)
    pulse = pulse or Pulse()

    # -- what is trained on -----------------------------------------------------------------------------------------
    set_arithmetic(
        world.device,
        num_threads=max(1, cpus),
        deterministic=config.numerics.deterministic,
        precision=config.numerics.precision,
    )
    data = DataSet(Storage(config.data))
    check_identity(run, config, data)  # this machine may see other data under the same path
    cache = shard_cache(config, data)
    train_split, val_split = (
        data.split(name, cache.open if cache else None, check_beside=True) for name in ("train", "val")
    )
    view, test_view, mean, axes = views_of(config, data)
    stream = sample_stream(config, train_split)
    steps = total_steps(config.schedule, len(train_split), batch_size)

    # -- what is trained --------------------------------------------------------------------------------------------
    autocast = autocast_dtype(config.numerics.precision, world.device)
    torch.manual_seed(config.seed)
    model = build_model(config, data.num_classes).to(world.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    times = StepTimes(world.device)

    def gradients_ready() -> None:
        times.ready()
        if pulse.phase is Phase.COMPUTE:  # not in the passes that settle buckets
            pulse.at(Phase.REDUCE, pulse.step)

    take_step = ClassificationStep(
        model,
        world,
        config.batch,
        config.optimizer,
        autocast=autocast,
        crop_px=config.input.crop_px,
        seed=config.seed,
        groups_at_once=groups_at_once(config, world.device),
        compile_mode=compile_mode(config),
        reduce_in_bf16=config.numerics.reduce_in_bf16,
        draws=draws(config),
        label_smoothing=config.regularization.label_smoothing,
        average_decay=config.regularization.average_decay,
        ready=gradients_ready,
        reduced=times.reduced,
    )

    # -- where the run stands ---------------------------------------------------------------------------------------
    checkpoints = Checkpoints(
        run,
        attempt=attempt,
        keep_last=rhythm.keep_last,
        notice=lambda text: tell(notice(text)),
        published=lambda record, is_best: tell(checkpoint_event(run, record, is_best=is_best)),
        patience_s=config.guard.storage_patience_s,
        waiting=lambda waits: setattr(pulse, "waits_for_storage", waits),
    )
    snapshot = _agreed_snapshot(checkpoints, world)
    step, skipped, policy, totals, journal = 0, 0, PolicyState(), Totals(), list[Event]()
    share: float | None = None  # of a batch, for the GPU's JPEG engine: what the run keeps to
    if snapshot is not None:
        share = snapshot.hw_decoder_share
        step, skipped, journal = snapshot.step, snapshot.state["skipped_steps"], snapshot.journal
        policy, totals = PolicyState(**snapshot.state["policy"]), Totals(*snapshot.state["totals"])
        take_step.load(snapshot.tensors, snapshot.state["lr"])
        tell(notice(f"going on from the checkpoint of step {step}"))
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

    # -- the input side ---------------------------------------------------------------------------------------------
    for split in (train_split, val_split):
        split.check()
    limit = config.input.max_undecodable
    decode = decode_settings(config, world.device, cpus, share)
    decodes, cpus_of_workers = data.manifest.encoding is Encoding.JPEG, world.gather(cpus)
    if decodes and step < steps and (candidates := open_settings(config, world.device, cpus_of_workers, share)):
        first = step

        def window(number: int) -> np.ndarray:
            return take_step.positions(first + number % WINDOW_STEPS)

        tried = train_split if data.storage.is_local else train_split.remembered()  # not the store is to be timed

        def open_input(settings: DecodeSettings) -> TrainBatches:
            return train_input(data, tried, stream, view, axes, mean, settings, window, 0, limit)

        with closing(Trials(open_input, world, pulse.alive)) as trials:
            tuned = tune(decode, candidates, trials)
        decode = tuned.settings
        record("tuned", **tuned.to_json(batch_size))
    if world.device.type == "cuda":
        share = decode.hw_decoder_share  # for good: it alters pixels
    ahead = cache.follow(train_split, stream.upcoming_shards) if cache else lambda position: None
    batches = train_input(
        data, train_split, stream, view, axes, mean, decode, take_step.positions, step, limit, ahead, times.copies
    )
    val_batches = eval_input(data, val_split, test_view, mean, decode, rhythm.validation_batch_size, limit)
    if cache:
        cache.want("val", val_split.info.shards)
    unreadable_told: set[int] = set()

    # -- the loop ---------------------------------------------------------------------------------------------------
    clock, stragglers, agreement = Clock(), Stragglers(), world.agreement()
    profiler = Profiler(
        run, attempt, world, step, config.tracking.profile_steps, lambda text: emit(notice(text)), pulse
    )
    tell({"kind": "start", "step": step, "steps": steps, "images": len(train_split), "workers": world.size})

    times.between()
    while step < steps and not policy.stop:
        if profiler.at(step):
            times.between()
        pulse.at(Phase.INPUT, step)
        with clock.waiting():
            batch = next(batches)
        pulse.at(Phase.COMPUTE, step)
        times.begins()
        for bad, stand_in in batch.replaced:
            emit(notice(f"step {step}: image {bad} cannot be decoded, {stand_in} takes its place"))

        take_step(batch, step, learning_rate(config.schedule, policy, step, steps))
        times.ended()
        seen(step, batch.indices)
        step += 1
        clock.stepped(batch_size)
        wish = Wish(agreement.ask(pulse.take_wish()))
        if clock.progress_due():
            tell({"kind": "progress", "step": step, "learning_rate": take_step.optimizer.lr, **clock.speed()})

        # -- measure
        last = step == steps
        if last or step % rhythm.log_every_steps == 0:
            pulse.at(Phase.MEASURE, step)
            totals = totals + take_step.take_totals()
            _check_skipped(config, step, skipped + totals.skipped_steps)
            stragglers.look(world.gather(times.own_seconds() / len(batch.indices)))
            seconds = clock.seconds(times.take())
            metrics = _train_metrics(totals, take_step.optimizer.lr, clock.speed() | stragglers.metrics())
            record("train", metrics=metrics, samples=f"{totals.samples:016x}", seconds=seconds)
            if totals.skipped_steps:
                tell(notice(f"{totals.skipped_steps} of the steps up to {step} changed nothing: {_NOT_FINITE}"))
            if slow := stragglers.slow_warning():
                tell(notice(slow))
            policy = decided(*after_measurement(config.schedule, policy, step, totals.top1_error))
            skipped, totals = skipped + totals.skipped_steps, Totals()
            clock.restart()

        # -- validate, and decide once on the globally reduced error
        validation: Totals | None = None
        if last or _validation_due(step, batch_size, len(train_split), rhythm.validate_every_epochs):
            pulse.at(Phase.VALIDATE, step)
            with clock.stalled(VALIDATION) as stall:
                validation = validate(take_step.tested, val_batches, world, autocast, pulse.alive)
            if validation.not_finite:
                raise NotFiniteError(
                    f"run {config.name!r}: the validation loss of {validation.not_finite} images at step {step} is not "
                    f"finite: {_ADVICE}"
                )
            for index in val_batches.undecodable - unreadable_told:
                emit(notice(f"validation image {val_split.names[index].as_py()} cannot be decoded: it counts as wrong"))
            unreadable_told = set(val_batches.undecodable)
            training_error = _new_training_error(journal)
            seconds = {VALIDATION: round(stall.seconds, 4)}
            record("validation", metrics=_validation_metrics(validation, stall.seconds), seconds=seconds)
            policy = decided(*after_validation(config.schedule, policy, step, validation.top1_error, training_error))

        # -- save
        ends = last or policy.stop or wish is Wish.LEAVE
        if ends or wish is Wish.SAVE or validation is not None or step % rhythm.checkpoint_every_steps == 0:
            pulse.at(Phase.SAVE, step)
            with clock.stalled(CHECKPOINT) as stall:
                totals = totals + take_step.take_totals()
                _check_skipped(config, step, skipped + totals.skipped_steps)
                if world.is_first:
                    state = {"policy": asdict(policy), "totals": totals.as_list(), "skipped_steps": skipped}
                    state |= {"lr": take_step.optimizer.lr, "hw_decoder_share": share}
                    error = None if validation is None else validation.top1_error
                    checkpoints.save(Snapshot(step, take_step.tensors(), state, list(journal), error))
            tell({"kind": "saving", "step": step, "stall_s": stall.seconds})
        times.between()
        if wish is Wish.LEAVE and not (last or policy.stop):
            profiler.close()
            checkpoints.close()
            world.barrier()
            raise PreemptedError(
                f"run {config.name!r} left its place at step {step}, whose checkpoint is kept: the same command goes on"
            )

    # -- the end ----------------------------------------------------------------------------------------------------
    pulse.at(Phase.END, step)
    profiler.close()
    batches.close()
    val_batches.close()
    if cache:
        cache.close()
    if world.is_first:
        checkpoints.close()
        check_ownership(run, attempt)
        finish(run, _outcome(run, checkpoints, weights_sha256(take_step.tensors()), journal))
    world.barrier()
    outcome = eventually(lambda: finished(run), f"{run.url}/finished.json")
    tell({"kind": "finished", **asdict(outcome)})
    return outcome


def _agreed_snapshot(checkpoints: Checkpoints, world: World) -> Snapshot | None:
    """Rank 0 chooses the newest verified checkpoint; every rank loads that one, or fails."""
    snapshot = checkpoints.newest() if world.is_first else None
    step = world.from_first(snapshot.step if snapshot is not None else -1)
    attempt = world.from_first(checkpoints.loaded_attempt)
    if step < 0 or world.is_first:
        return snapshot
    return checkpoints.load(eventually(lambda: checkpoints.record(step, attempt), f"checkpoint of step {step}"))


def _outcome(run: Storage, checkpoints: Checkpoints, sha256: str, journal: list[Event]) -> Outcome:
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
        weights_sha256=sha256,
    )


def _validation_due(step: int, batch_size: int, num_images: int, every_epochs: float) -> bool:
    """Whether the step that ended now crossed a multiple of ``every_epochs``."""
    return (step * batch_size) // (num_images * every_epochs) > ((step - 1) * batch_size) // (num_images * every_epochs)


def _train_metrics(totals: Totals, lr: float, speed: dict[str, float]) -> dict[str, float]:
    errors = {"train_top1_error": totals.top1_error, "train_top5_error": totals.top5_error}
    return {
        "train_loss": totals.loss,
        **errors,
        "replaced_images": totals.replaced,
        "skipped_steps": totals.skipped_steps,
        "learning_rate": lr,
        **speed,
    }


def _validation_metrics(totals: Totals, seconds: float) -> dict[str, float]:
    return {
        "validation_loss": totals.loss,
        "validation_top1_error": totals.top1_error,
        "validation_top5_error": totals.top5_error,
        "validation_s": seconds,
    }


def _new_training_error(journal: list[Event]) -> float | None:
    """The newest training error, percent; None where there is none since the last validation."""
    for event in reversed(journal):
        if event["kind"] == "validation":
            return None
        if event["kind"] == "train":
            return float(event["metrics"]["train_top1_error"])
    return None


_NOT_FINITE = "their loss or gradient was not finite"
_ADVICE = (
    "the checkpoints before that are kept; where it happens again, lower schedule.lr or use a warm-up, under a new name"
)


def _check_skipped(config: TrainConfig, step: int, skipped_steps: int) -> None:
    """Raises NotFiniteError where more steps were left out than are put up with: nothing of it is saved."""
    limit = config.guard.max_skipped_steps
    if skipped_steps > limit:
        raise NotFiniteError(
            f"run {config.name!r}: {skipped_steps} steps up to step {step} were left out, as {_NOT_FINITE} "
            f"(guard.max_skipped_steps is {limit}): {_ADVICE}"
        )
