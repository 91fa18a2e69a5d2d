"""The finished model of a run: the weights of one checkpoint as they are tested, with the mean that goes with them.

::

    model/000600000-last-bn50000.safetensors   model/<name>: weights and buffers; input/mean: what is subtracted
    model/000600000-last-bn50000.json          its record, published last: a file without one does not exist

A model is tested with the mean that it was trained with, whatever data set it is tested on.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.config import Tested, TrainConfig
from orchestrator.data.inputs import train_input
from orchestrator.data.pipeline import Batch
from orchestrator.data.shards import DataSet
from orchestrator.models import BatchNorm2d
from orchestrator.plain import digest, from_plain, to_plain
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import DigestError, Storage, sha256_hex, size_bytes
from orchestrator.training import tensor_file
from orchestrator.training.assembly import (
    autocast_dtype,
    build_model,
    decode_settings,
    sample_stream,
    set_arithmetic,
    shard_cache,
    views_of,
)
from orchestrator.training.checkpoint import Checkpoints, weights_sha256
from orchestrator.training.commit_record import CommitRecord
from orchestrator.training.failures import NotFiniteError
from orchestrator.training.notices import Event, notice
from orchestrator.training.precise_statistics import Walk, precise_statistics
from orchestrator.training.run import check_identity, eventually, finished, run_storage
from orchestrator.world import World

FOLDER = "model"


@dataclass(frozen=True)
class ModelRecord:
    """What a finished model is, and where it came from.

    file: its name in the run's folder; weights_sha256: over model/* (``checkpoint.weights_sha256``); step: optimizer
    steps done; checkpoint: URL of the folder whose weights these are, and the SHA-256 of its tensors; errors in
    percent; precise_bn_images: training images over which batch norm's statistics were to be averaged (0: as trained),
    averaged_bn_images: over which they were (whole groups; 0: as trained, or there is no batch norm); run:
    URL of the run's folder; config: its identity, data set apart, whose digest is data_sha256; wnids: of the classes
    that the logits are of, in their order.
    """

    file: str
    nbytes: int
    sha256: str
    weights_sha256: str
    step: int
    checkpoint: str
    checkpoint_sha256: str
    validation_top1_error: float | None
    precise_bn_images: int
    run: str
    name: str
    recipe: str
    config: dict[str, Any]
    data_sha256: str
    num_classes: int
    code_version: str
    wnids: tuple[str, ...] = ()
    averaged_bn_images: int = 0

    @property
    def record_name(self) -> str:
        """The record's own name in the run's folder."""
        return self.file.removesuffix(".safetensors") + ".json"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return typing.cast(dict[str, Any], to_plain(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelRecord:
        """Inverse of ``to_json``. Raises ValueError for an unknown, missing or ill-typed field."""
        return typing.cast(ModelRecord, from_plain(ModelRecord, data, "model"))

    def to_bytes(self) -> bytes:
        plain = self.to_json()
        return json.dumps({"sha256": digest(plain), "model": plain}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> ModelRecord:
        """Raises ValueError, KeyError or TypeError for what is not whole."""
        content = json.loads(data)
        if content["sha256"] != digest(content["model"]):
            raise ValueError("its SHA-256 is not right")
        return ModelRecord.from_json(content["model"])


# -- making one -----------------------------------------------------------------------------------------------------


def finish_model(
    config: TrainConfig,
    world: World,
    *,
    cpus: int,
    code_version: str,
    emit: Callable[[Event], None] = lambda event: None,
    alive: Callable[[], None] = lambda: None,
    owned: Callable[[], None] = lambda: None,
    storing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> ModelRecord:
    """Make what ``config.evaluation`` tests of the run, of its last or best checkpoint.

    Returns at once where it is there. Of a run that has not ended its newest checkpoint is the last. emit: takes
    notices; alive: is told of every batch; owned: is called before anything is written, and raises where that may not
    be; storing: is entered while the file goes to storage. Collective. Raises ValueError for what the user must mend,
    OSError where storage fails, NotFiniteError.
    """
    run, e = run_storage(config), config.evaluation
    tell = emit if world.is_first else (lambda event: None)
    source = _source(run, e.checkpoint) if world.is_first else (0, 0)
    step, attempt = (world.from_first(number) for number in source)
    name, folder = _record_name(config, step), CommitRecord(step, attempt, {}, ()).folder
    if world.from_first(int(world.is_first and _is_whole(run, name, folder, tell))):
        return eventually(lambda: _read_record(run, name), f"{run.url}/{name}")

    # -- the checkpoint ---------------------------------------------------------------------------------------------
    data = DataSet(Storage(config.data))
    check_identity(run, config, data)  # the mean, and the images of the statistics, are those of the training
    checkpoints = Checkpoints(run, attempt=0, keep_last=1, notice=lambda text: None)
    record = checkpoints.record(step, attempt) if world.is_first else None
    if world.is_first and record is None:
        raise ValueError(
            f"run {run.url}: the checkpoint of step {step} is to be tested, and is gone ({folder}): restore it, or "
            f"test the {'best' if e.checkpoint is Tested.LAST else 'last'} one with --evaluation.checkpoint"
        )
    # The others read it only where they have work to do.
    tensors: dict[str, Tensor] = {}
    if world.is_first or e.precise_bn_images:
        record = record or eventually(lambda: checkpoints.record(step, attempt), f"checkpoint of step {step}")
        snapshot = checkpoints.load(record)
        tensors = tested_weights(config, snapshot.tensors)
        model = load_model(config, data.num_classes, tensors, f"{run.url}/{folder}")

    # -- its statistics ---------------------------------------------------------------------------------------------
    num_averaged = 0
    if e.precise_bn_images:
        statistics, num_averaged = _precise(
            config,
            world,
            data,
            model,
            step,
            kept_share=snapshot.hw_decoder_share,
            cpus=cpus,
            tell=tell,
            emit=emit,
            alive=alive,
        )
        tensors |= statistics
        if not all(map(tensor_file.is_finite, tensors.values())):
            raise NotFiniteError(
                f"run {config.name!r}: batch norm's statistics over {e.precise_bn_images} images are not finite with "
                f"the weights of step {step}: look at the end of its curves; --evaluation.precise-bn-images 0 tests "
                "it as trained"
            )

    # -- publish ----------------------------------------------------------------------------------------------------
    if world.is_first:
        assert record is not None
        mean = views_of(config, data)[2].value
        content = tensor_file.pieces(tensors | {"input/mean": torch.from_numpy(mean)})
        made = ModelRecord(
            file=name.removesuffix(".json") + ".safetensors",
            nbytes=size_bytes(content),
            sha256=sha256_hex(content),
            weights_sha256=weights_sha256(tensors),
            step=step,
            checkpoint=f"{run.url}/{folder}",
            checkpoint_sha256=record.files["tensors.safetensors"].sha256,
            validation_top1_error=record.validation_top1_error,
            precise_bn_images=e.precise_bn_images,
            run=run.url,
            name=config.name,
            recipe=config.recipe,
            config=config.identity(),
            data_sha256=data.digest,
            num_classes=data.num_classes,
            code_version=code_version,
            wnids=tuple(each.wnid for each in data.manifest.classes),
            averaged_bn_images=num_averaged,
        )
        owned()
        with storing():
            run.publish(made.file, content)
        run.publish(name, made.to_bytes())
    world.barrier()
    return eventually(lambda: _read_record(run, name), f"{run.url}/{name}")


def _record_name(config: TrainConfig, step: int) -> str:
    return f"{FOLDER}/{step:09d}-{config.evaluation.checkpoint.value}-bn{config.evaluation.precise_bn_images}.json"


def _source(run: Storage, tested: Tested) -> tuple[int, int]:
    """Step and start number of the checkpoint that is tested. Raises ValueError where there is none."""
    outcome = finished(run)
    if outcome is not None:  # it may be gone, and a model made of it be there
        url = outcome.checkpoint if tested is Tested.LAST else outcome.best_checkpoint
        step, _, attempt = PurePosixPath(url).name.partition("-a")
        return int(step), int(attempt)
    checkpoints = Checkpoints(run, attempt=0, keep_last=1, notice=lambda text: None)
    records = checkpoints.records()
    record = (records[-1] if records else None) if tested is Tested.LAST else checkpoints.best()
    if record is None:
        kind = "checkpoint" if tested is Tested.LAST or not records else "checkpoint that followed a validation"
        raise ValueError(f"run {run.url} has no {kind} yet: there is nothing to test; train it first")
    return record.step, record.attempt


def _is_whole(run: Storage, name: str, folder: str, tell: Callable[[Event], None]) -> bool:
    """Whether the model of this record, made of this checkpoint, is there, byte for byte."""
    record = _record_of(run, name, folder)
    if record is None:
        return False
    try:
        run.read(record.file, record.sha256)
    except (DigestError, FileNotFoundError) as error:
        tell(notice(f"the finished model {record.file} is not what was published ({error}): it is made again"))
        return False
    return True


def _record_of(run: Storage, name: str, folder: str) -> ModelRecord | None:
    record = _read_record(run, name)
    is_it = record is not None and PurePosixPath(record.checkpoint).name == PurePosixPath(folder).name
    return record if is_it else None


def _precise(
    config: TrainConfig,
    world: World,
    data: DataSet,
    model: nn.Module,
    step: int,
    *,
    kept_share: float | None,
    cpus: int,
    tell: Callable[[Event], None],
    emit: Callable[[Event], None],
    alive: Callable[[], None],
) -> tuple[dict[str, Tensor], int]:
    """model/<name> of batch norm's statistics over the images that the run's next steps would see, and how many images
    these are; nothing and 0 for a network without batch norm.
    """
    e, b, numerics = config.evaluation, config.batch, config.numerics
    set_arithmetic(
        world.device, num_threads=max(1, cpus), deterministic=numerics.deterministic, precision=numerics.precision
    )
    if not any(isinstance(module, BatchNorm2d) for module in model.modules()):
        return {}, 0
    walk = Walk.of(world, e.precise_bn_images, step * b.global_batch_size, b.global_batch_size, b.bn_group_size)
    tell(notice(f"batch norm's statistics are averaged over {walk.num_images} training images after step {step}"))
    cache = shard_cache(config, data)
    split = data.split("train", cache.open if cache else None)
    view, _, mean, axes = views_of(config, data)
    stream = sample_stream(config, split)
    ahead = cache.follow(split, stream.upcoming_shards) if cache else lambda position: None
    decode = decode_settings(config, world.device, cpus, kept_share)
    limit = config.input.max_undecodable
    with closing(
        train_input(data, split, stream, view, axes, mean, decode, walk.positions, 0, limit, ahead)
    ) as batches:
        model = model.to(world.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        autocast = autocast_dtype(numerics.precision, world.device)

        def replaced(batch: Batch) -> Batch:
            for bad, stand_in in batch.replaced:
                emit(notice(f"after step {step}: image {bad} cannot be decoded, {stand_in} takes its place"))
            return batch

        found = precise_statistics(model, map(replaced, batches), walk, world, autocast, alive)
    if cache:
        cache.close()
    return {f"model/{name}": tensor for name, tensor in found.items()}, walk.num_images


# -- reading one ----------------------------------------------------------------------------------------------------


def read_model(run: Storage, record: ModelRecord) -> dict[str, Tensor]:
    """model/<name> as trained, and input/mean [3, S, S] or [3] float32 on the 0–255 scale, in host memory.

    Raises DigestError where they are not what was published, FileNotFoundError where they are gone.
    """
    data = run.read(record.file, record.sha256)
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DigestError(f"{run.url}/{record.file} is no file of tensors: {error}") from None


def tested_weights(config: TrainConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """model/<name> of the weights that are tested, of a checkpoint's ``tensors``: their average where there is one."""
    tested = "average/" if config.regularization.average_decay else "model/"
    return {f"model/{name.removeprefix(tested)}": t for name, t in tensors.items() if name.startswith(tested)}


def load_model(config: TrainConfig, num_classes: int, tensors: dict[str, Tensor], where: str) -> nn.Module:
    """The network of ``config`` with the weights model/<name> of ``tensors``, in host memory.

    Raises ValueError, naming the differences, where they are of another network.
    """
    model = build_model(config, num_classes)
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if different := _differences({name: tuple(t.shape) for name, t in model.state_dict().items()}, weights):
        shown = "; ".join(different[:4]) + (f"; and {len(different) - 4} more" if len(different) > 4 else "")
        raise ValueError(f"{where} holds the weights of another network than this config's: {shown}")
    model.load_state_dict(weights)
    return model


def _differences(expected: dict[str, tuple[int, ...]], weights: dict[str, Tensor]) -> list[str]:
    lines = []
    for name in [*expected, *(n for n in weights if n not in expected)]:
        if name not in weights:
            lines.append(f"{name} is not there")
        elif name not in expected:
            lines.append(f"{name} is too many")
        elif tuple(weights[name].shape) != expected[name]:
            lines.append(f"{name} is {list(weights[name].shape)}, not {list(expected[name])}")
    return lines


def find_model(config: TrainConfig) -> ModelRecord | None:
    """The record of what ``finish_model`` makes for ``config``; None where it is still to be made. One look."""
    run = run_storage(config)
    try:
        step, attempt = _source(run, config.evaluation.checkpoint)
    except StoreRefusedError:
        raise
    except ValueError:  # there is nothing to test yet
        return None
    return _record_of(run, _record_name(config, step), CommitRecord(step, attempt, {}, ()).folder)


def has_weights(config: TrainConfig) -> bool:
    """Whether the run has come to a checkpoint that ``finish_model`` would take."""
    try:
        _source(run_storage(config), config.evaluation.checkpoint)
    except StoreRefusedError:
        raise
    except ValueError:
        return False
    return True


def find_models(run: Storage) -> list[ModelRecord]:
    """The finished models of a run, oldest step first; what cannot be read is passed over."""
    found = []
    for name in run.files(FOLDER):
        if name.endswith(".json") and (record := _read_record(run, name)) is not None:
            found.append(record)
    return sorted(found, key=lambda record: (record.step, record.file))


def _read_record(run: Storage, name: str) -> ModelRecord | None:
    """The record ``name``; None where there is none, or it is torn."""
    try:
        return ModelRecord.from_bytes(run.read(name))
    except StoreRefusedError:  # nothing is wrong with the record
        raise
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None
