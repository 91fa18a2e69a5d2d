"""From a finished model and a split to a score file, by any number of workers, from wherever it was interrupted.

A split is cut into parts that nothing but the data set and the protocol decide. Worker r of n does the parts of number
r modulo n that are not in storage yet, each published as it is done; the first worker then waits for all of them and
makes the score file. There are no collectives: who is done goes on. On CPUs the bytes depend neither on the number of
workers nor on interruptions; on that of a worker's threads they may, as the library sums in another order, and parts
made with another number are not taken up again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.config import Protocol, TrainConfig
from orchestrator.data.inputs import scoring_input
from orchestrator.data.pipeline import check_undecodable
from orchestrator.data.shards import UNLABELLED, DataSet
from orchestrator.evaluation import scores
from orchestrator.evaluation.parts import Parts
from orchestrator.evaluation.protocols import check_model, check_split, plan, procedure_of
from orchestrator.evaluation.ranking import errors
from orchestrator.evaluation.tested_network import TestedNetwork
from orchestrator.plain import digest
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import Storage
from orchestrator.training.assembly import autocast_dtype, decode_settings, set_arithmetic, shard_cache
from orchestrator.training.finished_model import ModelRecord
from orchestrator.training.notices import Event, notice
from orchestrator.world import World

_LOOK_EVERY_S = 1.0
_NAMED = 20  # undecodable images that are told by name


def evaluate(
    record: ModelRecord,
    model: nn.Module,
    mean: Tensor,
    config: TrainConfig,
    data: DataSet,
    split_name: str,
    protocol: Protocol,
    world: World,
    *,
    cpus: int,
    run: Storage,
    code_version: str,
    emit: Callable[[Event], None] = lambda event: None,
    alive: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
    owned: Callable[[], None] = lambda: None,
    storing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str:
    """Score a split with a finished model; the name of the score file in ``run``, at once where it is there.

    Every worker calls it, each at its own time; the file is there when the first worker returns. model: with the
    record's weights, on the world's device; mean: what it was trained with, [3, S, S] or [3] float32 on the 0–255
    scale; cpus: threads for this worker; emit: takes the events of the first worker (progress, then what came out) and
    the notices of all; alive: is told of every piece of work, and may raise to leave it; waiting: is told while the
    first worker waits for others; owned: is called before the file is published, and before parts are removed, and
    raises where that may not be; storing: is entered while the whole file goes to storage or comes from there. Raises
    ValueError for what the user must mend, OSError where storage fails.
    """
    return _Evaluation(
        record,
        model,
        mean,
        config,
        data,
        split_name,
        protocol,
        world,
        cpus,
        run,
        code_version,
        emit,
        alive,
        waiting,
        owned,
        storing,
    ).score_file()


def score_name(weights_sha256: str, config: TrainConfig, data_sha256: str, split_name: str, protocol: Protocol) -> str:
    """Name of the score file that ``evaluate`` makes, in the run's folder. Raises ValueError as ``procedure_of``."""
    key = scores.key(weights_sha256, data_sha256, split_name, procedure_of(protocol, config).to_json())
    return scores.file_name(split_name, protocol.value, key)


class _MadeElsewhereError(Exception):
    """The score file is there: somebody else has made it."""


class _Evaluation:
    """One worker's share of it. N images, C classes."""

    def __init__(
        self,
        record: ModelRecord,
        model: nn.Module,
        mean: Tensor,
        config: TrainConfig,
        data: DataSet,
        split_name: str,
        protocol: Protocol,
        world: World,
        cpus: int,
        run: Storage,
        code_version: str,
        emit: Callable[[Event], None],
        alive: Callable[[], None],
        waiting: Callable[[], None],
        owned: Callable[[], None],
        storing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        if record.num_classes != data.num_classes:
            raise ValueError(
                f"the model {record.name!r} knows {record.num_classes} classes, the data set {data.storage.url!r} has "
                f"{data.num_classes}: score it on a data set of the same classes"
            )
        theirs = tuple(each.wnid for each in data.manifest.classes)
        if record.wnids and record.wnids != theirs:
            label = next(i for i, (a, b) in enumerate(zip(record.wnids, theirs, strict=True)) if a != b)
            raise ValueError(
                f"the model {record.name!r} knows label {label} as {record.wnids[label]}, in the data set "
                f"{data.storage.url!r} it is {theirs[label]}: score it on a data set of the same classes, in the same "
                "order"
            )
        check_model(protocol, model)
        self._procedure, self._split_name = procedure_of(protocol, config), split_name
        self._record, self._model, self._mean, self._config = record, model, mean.float(), config
        self._data, self._world, self._cpus = data, world, max(1, cpus)
        self._run, self._code_version, self._emit, self._alive = run, code_version, emit, alive
        self._waiting, self._owned, self._storing = waiting, owned, storing
        self._tell = emit if world.is_first else (lambda event: None)
        self._precision = autocast_dtype(config.numerics.precision, world.device)
        self.name = score_name(record.weights_sha256, config, data.digest, split_name, protocol)
        # What another arithmetic or another code has left is not mixed with this one's.
        megapixels = config.evaluation.batch_megapixels
        how: dict[str, Any] = {"code": code_version, "device": world.device.type, "precision": str(self._precision)}
        how |= {"threads": self._cpus if world.device.type == "cpu" else 0}
        self._parts = Parts(run, self.name, digest(how | {"batch_megapixels": megapixels})[:8])

    def score_file(self) -> str:
        """Do this worker's share; the first worker makes the file of all."""
        # In this order: once the file is there the parts go.
        done = self._parts.done()
        self._alive()
        found = self._published()
        if found is not None:
            if self._world.is_first:
                self._owned()
                self._parts.delete()
                self._report(self._load())
            return self.name
        cache = shard_cache(self._config, self._data)
        try:
            self._split = self._data.split(self._split_name, cache.open if cache else None)
            check_split(self._data, self._split)
            if cache:
                cache.want(self._split_name, self._split.info.shards)
            self._plan = plan(self._procedure, self._split, self._config.evaluation.batch_megapixels)
            self._start_s, self._scored = time.monotonic(), 0
            if self._world.is_first:
                self._tell_what_is_odd()
            mine = range(self._world.rank, len(self._plan.parts), self._world.size)
            self._do([number for number in mine if number not in done])
            if self._world.is_first:
                try:
                    self._wait_for_all()
                    self._report(self._assemble())
                except _MadeElsewhereError:
                    self._report(self._load())
                self._owned()
                self._parts.delete()
        finally:
            if cache:
                cache.close()
        return self.name

    def _published(self) -> scores.ScoreRecord | None:
        """The score file's record, where both are there."""
        try:
            record = scores.read_record(self._run, self.name)
            if record is not None and self._run.size_bytes(self.name) == record.nbytes:
                return record
        except (StoreRefusedError, PermissionError):
            raise
        except (ValueError, FileNotFoundError):  # damaged: it is made again
            pass
        return None

    def _leave_if_made(self) -> None:
        """A first worker of an earlier start may have been frozen: it makes the file and takes the parts away."""
        if self._published() is not None:
            raise _MadeElsewhereError

    def _load(self) -> scores.Scores:
        with self._storing():
            return scores.load(f"{self._run.url}/{self.name}")

    # -- parts ------------------------------------------------------------------------------------------------------

    def _do(self, numbers: list[int]) -> None:
        """Score and publish these parts."""
        if not numbers:
            return
        for number, decoded, said in self._score(numbers):
            self._parts.publish(number, decoded, said)
            self._alive()
            self._scored += len(decoded)
            self._progress()

    @torch.inference_mode()
    def _score(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part its number, decoded [n] bool and scores [n, C] float32, in the order of the plan."""
        device, config, model = self._world.device, self._config, self._model
        set_arithmetic(
            device,
            num_threads=self._cpus,
            deterministic=config.numerics.deterministic,
            precision=config.numerics.precision,
        )
        decode = decode_settings(config, device, self._cpus)  # nothing tuned: a score file follows from its inputs
        limit = config.input.max_undecodable
        source = scoring_input(self._data, self._split, self._procedure.view, decode, self._plan.largest_batch, limit)
        told: set[int] = set(np.flatnonzero(self._split.decodable == 0).tolist())
        megapixels = config.evaluation.batch_megapixels
        with closing(source), TestedNetwork(model, self._mean, self._procedure, megapixels, self._precision) as network:
            batches = source.batches(batch for number in numbers for batch in self._plan.parts[number])
            for number in numbers:
                decoded, said = list[np.ndarray](), list[Tensor]()
                for _ in self._plan.parts[number]:
                    batch = next(batches)
                    self._alive()
                    decoded.append(batch.decoded)
                    said.append(network(batch, self._alive))
                self._tell_undecodable(source.undecodable - told)
                told |= source.undecodable
                yield number, np.concatenate(decoded), torch.cat(said).cpu().numpy()  # waits for the device

    def _wait_for_all(self) -> None:
        """Until every part is there. Raises _MadeElsewhereError where the file is there first."""
        last = -1
        while len(done := self._parts.done()) < len(self._plan.parts):
            self._leave_if_made()
            self._waiting()
            if len(done) != last:
                last = len(done)
                self._progress(done)
            time.sleep(_LOOK_EVERY_S)

    # -- the score file ---------------------------------------------------------------------------------------------

    def _assemble(self) -> scores.Scores:
        """Publish the score file from the parts. Its scores are in a file meanwhile: they may be large."""
        split, num_classes = self._split, self._data.num_classes
        decoded = np.zeros(len(split), bool)
        with tempfile.TemporaryFile(prefix="scores-") as file:
            rows: np.ndarray = np.memmap(file, np.float32, "w+", shape=(len(split), num_classes))
            for number, (found, said) in self._verified():
                images = self._plan.images(number)
                decoded[images], rows[images] = found, said
                self._alive()
            # Here alone all are counted: a worker knows of its own share since its start.
            new = np.flatnonzero(~decoded & split.decodable.astype(bool)).tolist()
            check_undecodable(split, set(new), self._config.input.max_undecodable)
            if not decoded.all():
                rows[~decoded] = class_prior(self._data)
            self._owned()
            columns: dict[str, Any] = {"names": split.names, "labels": split.label, "decoded": decoded}
            columns |= {"width": split.width, "height": split.height, "scores": rows}
            with self._storing():
                record = scores.publish(self._run, self.name, self._info(), **columns)
            url = f"{self._run.url}/{self.name}"
            return scores.Scores(url=url, sha256=record.sha256, info=record.info, **columns)

    def _verified(self) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Every part by its number, whole: what is torn is done again. Raises _MadeElsewhereError."""
        for number in range(len(self._plan.parts)):
            shape = len(self._plan.images(number)), self._data.num_classes
            part = self._parts.read(number, *shape)
            if part is None:
                self._leave_if_made()
                self._tell(notice(f"part {number} of {self._what()} was torn in storage: it is scored again"))
                self._do([number])
                part = self._parts.read(number, *shape)
                if part is None:
                    raise OSError(
                        f"part {number} of {self._what()} is not read as it was written: check the storage "
                        f"{self._run.url!r}; the other parts are kept, the same command goes on"
                    )
            yield number, part

    def _info(self) -> scores.ScoresInfo:
        manifest = self._data.manifest
        return scores.ScoresInfo(
            split=self._split_name,
            protocol=self._procedure.to_json(),
            classes=manifest.classes,
            model=self._record.to_json(),
            data={
                "url": self._data.storage.url,
                "sha256": self._data.digest,
                "name": manifest.name,
                "sources": [asdict(source) for source in manifest.sources],
            },
            code_version=self._code_version,
        )

    # -- what is told -----------------------------------------------------------------------------------------------

    def _what(self) -> str:
        return f"the {self._procedure.kind.value} scores of the {self._split_name} set"

    def _event(self, kind: str, **content: Any) -> Event:
        return {"kind": kind, "split": self._split_name, "protocol": self._procedure.kind.value, **content}

    def _progress(self, done: Iterable[int] | None = None) -> None:
        """Images in all parts that are there; images a second of this worker."""
        if not self._world.is_first:
            return
        images = sum(len(self._plan.images(number)) for number in (self._parts.done() if done is None else done))
        speed = self._scored / max(1e-9, time.monotonic() - self._start_s)
        of = int(np.count_nonzero(self._split.decodable))
        self._tell(self._event("scoring", done=images, total=of, images_per_s=speed))

    def _report(self, found: scores.Scores) -> None:
        content: dict[str, Any] = {"file": self.name, "images": len(found)}
        content["undecodable"] = int((~found.decoded).sum())
        if (found.labels != UNLABELLED).any():
            of_all = errors(found)
            content |= {"top1_error": of_all.top1_error, "top5_error": of_all.top5_error}
        self._tell(self._event("scores", **content))

    def _tell_what_is_odd(self) -> None:
        split = self._split
        self._tell_undecodable(set(np.flatnonzero(split.decodable == 0).tolist()))
        if self._procedure.slides:
            longest = self._procedure.longest_side
            cut = split.decodable.astype(bool)
            cut &= np.maximum(split.width, split.height) > longest * np.minimum(split.width, split.height)
            if cut.any():
                first = split.names[int(np.flatnonzero(cut)[0])].as_py()
                self._tell(
                    notice(
                        f"scoring: {cut.sum()} {split.name} images are more than {longest} times as long as wide: "
                        f"{self._procedure.kind.value} sees their middle ({first}, …)"
                    )
                )

    def _tell_undecodable(self, images: set[int]) -> None:
        for index in sorted(images)[:_NAMED]:
            name = self._split.names[index].as_py()
            self._emit(notice(f"scoring: {self._split_name} image {name} cannot be decoded: it counts as wrong"))
        if len(images) > _NAMED:
            self._emit(notice(f"scoring: {len(images) - _NAMED} more {self._split_name} images cannot be decoded"))


def class_prior(data: DataSet) -> np.ndarray:
    """How frequent each class is in training, [C] float32; all the same where there is no training set."""
    count = np.zeros(data.num_classes, np.int64)
    if "train" in data.manifest.splits:
        labels = data.split("train").label
        count = np.bincount(labels[labels != UNLABELLED], minlength=data.num_classes)
    if not count.any():
        count += 1
    return (count / count.sum()).astype(np.float32)
