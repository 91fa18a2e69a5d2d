"""The layer responses and gradients of a run, measured once and kept in its folder.

::

    layers/000064000-2000.json     of the checkpoint of step 64,000, over 2,000 validation images

Every run on a data set is measured on the same images: validation images that lie evenly over the split, and training
views of the first positions of the stream of seed 0, whatever the run's own seed. The arithmetic is float32, whatever
the run's own.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from orchestrator.code_version import code_version
from orchestrator.config import Family, Precision, TrainConfig
from orchestrator.data.inputs import eval_input, train_input
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.evaluation.layer_responses import LayerNumbers, gradient_norms, layers_of, response_stds
from orchestrator.plain import digest, from_plain, to_plain
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, decode_settings, set_arithmetic, views_of
from orchestrator.training.checkpoint import Checkpoints, Snapshot, weights_sha256
from orchestrator.training.commit_record import CommitRecord
from orchestrator.training.failures import NotFiniteError
from orchestrator.training.finished_model import load_model, tested_weights
from orchestrator.training.run import data_digest, run_storage

FOLDER = "layers"
_NAME = re.compile(FOLDER + r"/\d+-\d+\.json")
GRADIENT_BATCHES = 8  # of the run's global batch size
_STREAM_SEED = 0
_LARGEST_BATCH = 100  # validation images that go through the network at a time


@dataclass(frozen=True)
class LayerRecord:
    """What was measured, and of what.

    step: optimizer steps done; weights_sha256: of the weights that are tested (``checkpoint.weights_sha256``);
    checkpoint, checkpoint_sha256: the folder in the run's, and the SHA-256 of its tensors; num_images: validation
    images over which responses were taken, of asked_images; gradient_batches: training batches over which gradients
    were averaged; layers: in the order of the network.
    """

    step: int
    checkpoint: str
    checkpoint_sha256: str
    weights_sha256: str
    data_sha256: str
    asked_images: int
    num_images: int
    gradient_batches: int
    code_version: str
    layers: tuple[LayerNumbers, ...]

    @property
    def name(self) -> str:
        """Its file's in the run's folder."""
        return _name(self.step, self.asked_images)

    def to_bytes(self) -> bytes:
        plain = to_plain(self)
        return json.dumps({"sha256": digest(plain), "measured": plain}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> LayerRecord:
        """Raises ValueError, KeyError or TypeError for what is not whole."""
        content = json.loads(data)
        if content["sha256"] != digest(content["measured"]):
            raise ValueError("its SHA-256 is not right")
        return typing.cast(LayerRecord, from_plain(LayerRecord, content["measured"], "measured"))


def newest_record(run: Storage, problem: Callable[[str], None]) -> LayerRecord | None:
    """What was measured of a run's farthest checkpoint, over most images; None where nothing was.

    problem: is told of what cannot be read, in whose place the next one comes.
    """
    found = [name for name in run.files(FOLDER) if _NAME.fullmatch(name)]
    for name in sorted(found, key=lambda name: tuple(map(int, re.findall(r"\d+", name))), reverse=True):
        try:
            return LayerRecord.from_bytes(run.read(name))
        except StoreRefusedError:  # nothing is wrong with the file
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            problem(f"{run.url}/{name} cannot be read ({error})")
    return None


def _name(step: int, asked_images: int) -> str:
    return f"{FOLDER}/{step:09d}-{asked_images}.json"


@dataclass(frozen=True)
class Measurement:
    """One that can be made: the run is there, has a checkpoint, its data set is unchanged, and it has batch norm."""

    config: TrainConfig
    data: DataSet
    num_images: int

    @staticmethod
    def of(config: TrainConfig, num_images: int) -> Measurement:
        """Raises ValueError, saying what to do, where it cannot be made; computes nothing."""
        run, data = run_storage(config), DataSet(Storage(config.data))
        if data.digest != (trained_on := data_digest(run)):
            raise ValueError(
                f"the data set {data.storage.url!r} ({data.digest[:12]}) is not the one that run {config.name!r} was "
                f"trained on ({trained_on[:12]}): give the URL of that one with --data"
            )
        if not _checkpoints(run, lambda text: None).records():
            raise ValueError(f"run {run.url} has no checkpoint yet: there is nothing to measure; train it first")
        with torch.device("meta"):
            layers = layers_of(build_model(config, data.num_classes), config.input.crop_px)
        if not layers:
            raise ValueError(
                f"run {config.name!r}: its network has no 3×3 convolution that batch norm follows, of which the "
                "responses are measured: leave it out"
            )
        return Measurement(config, data, num_images)

    @property
    def run(self) -> Storage:
        return run_storage(self.config)

    @property
    def is_plain(self) -> bool:
        """Whether it is one of the paper's plain networks."""
        model = self.config.model
        return not model.factory and model.family in (Family.PLAIN, Family.CIFAR_PLAIN)

    def record(self, device: torch.device, cpus: int, say: Callable[[str], None]) -> LayerRecord:
        """Of the run's newest checkpoint: from its folder, else measured on ``device`` and published there.

        say: takes what is begun, and notices. Raises ValueError for what the user must mend, OSError where storage
        fails, NotFiniteError.
        """
        checkpoints = _checkpoints(self.run, say)
        record = checkpoints.records()[-1]
        found = self._found(record)
        if found is not None:
            return found
        snapshot = checkpoints.newest()
        assert snapshot is not None
        if (snapshot.step, checkpoints.loaded_attempt) != (record.step, record.attempt):  # damaged, or a newer one came
            other = checkpoints.record(snapshot.step, checkpoints.loaded_attempt)
            if other is None:  # the run goes on, and has deleted it meanwhile
                return self.record(device, cpus, say)
            record, found = other, self._found(other)
        if found is None:
            found = self._measured(snapshot, record, device, cpus, say)
            self.run.publish(found.name, found.to_bytes())
        return found

    def _found(self, record: CommitRecord) -> LayerRecord | None:
        """What was measured of this checkpoint before, in the same way; None where that is not there, or torn."""
        try:
            found = LayerRecord.from_bytes(self.run.read(_name(record.step, self.num_images)))
        except StoreRefusedError:  # nothing is wrong with the file
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        there = (found.checkpoint, found.checkpoint_sha256, found.data_sha256, found.gradient_batches)
        wanted = (record.folder, _tensors_sha256(record), self.data.digest, GRADIENT_BATCHES)
        return found if there == wanted else None

    def _measured(
        self,
        snapshot: Snapshot,
        record: CommitRecord,
        device: torch.device,
        cpus: int,
        say: Callable[[str], None],
    ) -> LayerRecord:
        config = replace(self.config, numerics=replace(self.config.numerics, precision=Precision.FP32))
        deterministic, precision = config.numerics.deterministic, config.numerics.precision
        set_arithmetic(device, num_threads=cpus, deterministic=deterministic, precision=precision)
        tensors = tested_weights(config, snapshot.tensors)
        model = load_model(config, self.data.num_classes, tensors, f"{self.run.url}/{record.folder}").to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        layers = layers_of(model, config.input.crop_px)
        say(f"{config.name}: {len(layers)} layers at step {record.step}")
        num_images = 0

        def counted(images: Tensor) -> Tensor:
            nonlocal num_images
            num_images += len(images)
            return images

        stds = response_stds(model, layers, map(counted, self._validation_images(config, device, cpus)))
        if not num_images:
            raise ValueError(
                f"no validation image of {self.data.storage.url!r} can be decoded: prepare the data set again"
            )
        smoothing, group_size = config.regularization.label_smoothing, config.batch.bn_group_size
        batches = self._training_batches(config, device, cpus)
        of_weights, of_responses = gradient_norms(model, layers, batches, group_size, smoothing)
        numbers = tuple(
            LayerNumbers(layer.name, *its) for layer, *its in zip(layers, stds, of_weights, of_responses, strict=True)
        )
        if wrong := [each.name for each in numbers if not each.is_finite]:
            raise NotFiniteError(
                f"run {config.name!r}: responses or gradients of {', '.join(wrong[:3])} are not finite with the "
                f"weights of step {record.step}: look at the end of its curves"
            )
        return LayerRecord(
            step=record.step,
            checkpoint=record.folder,
            checkpoint_sha256=_tensors_sha256(record),
            weights_sha256=weights_sha256(tensors),
            data_sha256=self.data.digest,
            asked_images=self.num_images,
            num_images=num_images,
            gradient_batches=GRADIENT_BATCHES,
            code_version=code_version(),
            layers=numbers,
        )

    def _validation_images(self, config: TrainConfig, device: torch.device, cpus: int) -> Iterator[Tensor]:
        """Batches [N, 3, S, S] float32, ``num_images`` in all, evenly over the split: that may be in the order
        of its classes. What cannot be decoded is left out.
        """
        split = self.data.split("val")
        _, view, mean, _ = views_of(config, self.data)
        batch_size, every, shown = spread(len(split), self.num_images)
        settings, limit = decode_settings(config, device, cpus), config.input.max_undecodable
        with closing(eval_input(self.data, split, view, mean, settings, batch_size, limit)) as inputs:
            for batch in inputs.batches(0, every):
                chosen = np.flatnonzero(batch.valid & np.isin(batch.indices, shown))
                yield batch.images[torch.from_numpy(chosen).to(device)]

    def _training_batches(
        self, config: TrainConfig, device: torch.device, cpus: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """GRADIENT_BATCHES global batches: images [N, 3, S, S] float32 and labels [N] int64."""
        split = self.data.split("train")
        view, _, mean, axes = views_of(config, self.data)
        stream, size = SampleStream(len(split), _STREAM_SEED), config.batch.global_batch_size
        settings, limit = decode_settings(config, device, cpus), config.input.max_undecodable

        def positions(number: int) -> np.ndarray:
            return np.arange(number * size, (number + 1) * size)

        with closing(train_input(self.data, split, stream, view, axes, mean, settings, positions, 0, limit)) as batches:
            for _ in range(GRADIENT_BATCHES):
                batch = next(batches)
                yield batch.images, batch.labels


def spread(size: int, num_images: int) -> tuple[int, int, np.ndarray]:
    """Which ``num_images`` of a split of ``size`` images are shown: one batch of this many images is read, of so many;
    and of what is read these indices [n] int64 are shown, at least half.
    """
    batch_size, every = min(_LARGEST_BATCH, num_images), max(1, size // num_images)
    read = np.flatnonzero(np.arange(size) // batch_size % every == 0)
    num_shown = min(num_images, len(read))
    return batch_size, every, read[np.arange(num_shown) * len(read) // num_shown]


def _checkpoints(run: Storage, say: Callable[[str], None]) -> Checkpoints:
    return Checkpoints(run, attempt=0, keep_last=1, notice=say)


def _tensors_sha256(record: CommitRecord) -> str:
    return record.files["tensors.safetensors"].sha256
