"""Save, newest verified, restore. Ours is the only checkpoint.

A checkpoint is published in two phases: its files in a folder of their own, then one commit record that names them with
their SHA-256. A reader goes from the newest record to older ones until every digest is right::

    checkpoints/000000400.json                   the commit record: a folder without one does not exist
    checkpoints/000000400-a000001/tensors.safetensors    model/… and momentum/…
    checkpoints/000000400-a000001/state.json             step, policy, meters, learning rate
    checkpoints/000000400-a000001/journal.jsonl          every event up to this step
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import safetensors.torch
from torch import Tensor

from orchestrator.remote import StoreRefusedError
from orchestrator.storage import DigestError, Storage, sha256_hex
from orchestrator.training.ownership import check_ownership


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: size in bytes and SHA-256."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CommitRecord:
    """What makes a checkpoint exist. ``validation_top1_error`` in percent, where it followed a validation."""

    step: int
    attempt: int
    folder: str
    files: dict[str, FileRecord]
    validation_top1_error: float | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> CommitRecord:
        raw = json.loads(data)
        raw["files"] = {name: FileRecord(**f) for name, f in raw["files"].items()}
        return CommitRecord(**raw)


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after ``step`` optimizer steps, in host memory.

    tensors: model/<name> and momentum/<name>; state: plain data; journal: the events so far.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    journal: list[dict[str, Any]]
    validation_top1_error: float | None = None


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of all weights and buffers (model/…): equal digests, equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.startswith("model/"):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def checkpoint_event(run: Storage, record: CommitRecord, *, is_best: bool) -> dict[str, Any]:
    """The event that tells of a published checkpoint."""
    event = {"kind": "checkpoint", "step": record.step, "time_ms": time.time_ns() // 1_000_000, "best": is_best}
    return event | {"url": f"{run.url}/{record.folder}", "validation_top1_error": record.validation_top1_error}


def newest_journal(run: Storage) -> list[dict[str, Any]]:
    """Every event up to the newest checkpoint with an undamaged journal; [] for a new run."""
    for record in reversed(Checkpoints(run, attempt=0, keep_last=1, notice=lambda text: None).records()):
        file = record.files.get("journal.jsonl")
        try:
            lines = run.read(f"{record.folder}/journal.jsonl", file.sha256 if file else None).splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError):
            continue
    return []


class Checkpoints:
    """The checkpoints of one run in storage. One writer: rank 0 of the newest attempt."""

    def __init__(
        self,
        run: Storage,
        *,
        attempt: int,
        keep_last: int,
        notice: Callable[[str], None],
        published: Callable[[CommitRecord, bool], None] = lambda record, is_best: None,
    ) -> None:
        """``published`` is called in the publishing thread with each new record and whether it is the best so far."""
        self._run, self._attempt, self._keep_last = run, attempt, keep_last
        self._notice, self._published = notice, published
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[CommitRecord] | None = None

    # -- reading ------------------------------------------------------------------------------------------------

    def records(self) -> list[CommitRecord]:
        """Readable commit records, oldest first."""
        found = []
        for name in self._run.files("checkpoints"):
            try:
                found.append(CommitRecord.from_bytes(self._run.read(name)))
            except StoreRefusedError:  # nothing is wrong with the record
                raise
            except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
                self._notice(f"checkpoint record {name} cannot be read ({error!r}): passed over")
        return sorted(found, key=lambda r: r.step)

    def best(self) -> CommitRecord | None:
        """The checkpoint with the lowest validation error, the earliest of equals."""
        measured = [r for r in self.records() if r.validation_top1_error is not None]
        return min(measured, key=lambda r: (r.validation_top1_error, r.step), default=None)

    def newest(self) -> Snapshot | None:
        """The newest checkpoint whose every digest is right; None where there is none. OSError where storage fails.

        Raises ValueError where there are checkpoints and none is usable: to begin again would be to give them up.
        """
        records = self.records()
        for record in reversed(records):
            try:
                return self.load(record)
            except StoreRefusedError:  # nothing is wrong with the checkpoint
                raise
            except (DigestError, FileNotFoundError, ValueError, safetensors.SafetensorError) as error:
                self._notice(f"checkpoint of step {record.step} is not usable ({error}): going back to the one before")
        if records:
            raise ValueError(
                f"none of the {len(records)} checkpoints of {self._run.url} is usable: restore one, or delete "
                "checkpoints/ there to begin again"
            )
        return None

    def load(self, record: CommitRecord) -> Snapshot:
        """Read and verify one checkpoint. Raises DigestError, OSError, ValueError."""
        data = {name: self._run.read(f"{record.folder}/{name}", f.sha256) for name, f in record.files.items()}
        if not {"tensors.safetensors", "state.json", "journal.jsonl"} <= data.keys():
            raise DigestError("its commit record names too few files")
        return Snapshot(
            step=record.step,
            tensors=safetensors.torch.load(data["tensors.safetensors"]),
            state=json.loads(data["state.json"]),
            journal=[json.loads(line) for line in data["journal.jsonl"].splitlines()],
            validation_top1_error=record.validation_top1_error,
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot) -> None:
        """Publish in the background. Waits only where the one before is still on its way; raises what that raised."""
        self.wait()
        self._pending = self._thread.submit(self._publish, snapshot)

    def wait(self) -> None:
        """Until what was saved is durable. Raises OSError where it could not be, SupersededError where it may not."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _publish(self, snapshot: Snapshot) -> CommitRecord:
        check_ownership(self._run, self._attempt)
        if not all(bool(t.isfinite().all()) for t in snapshot.tensors.values()):
            raise ValueError(
                f"the weights of step {snapshot.step} are not finite: they are not saved, and the checkpoints before "
                "are kept; lower schedule.lr or use a warm-up, under a new name"
            )
        folder = f"checkpoints/{snapshot.step:09d}-a{self._attempt:06d}"
        contents = {
            "tensors.safetensors": safetensors.torch.save(snapshot.tensors),
            "state.json": json.dumps(snapshot.state, sort_keys=True).encode(),
            "journal.jsonl": "".join(json.dumps(e, sort_keys=True) + "\n" for e in snapshot.journal).encode(),
        }
        files = {}
        for name, data in contents.items():
            self._run.publish(f"{folder}/{name}", data)
            files[name] = FileRecord(len(data), sha256_hex(data))
        record = CommitRecord(snapshot.step, self._attempt, folder, files, snapshot.validation_top1_error)
        check_ownership(self._run, self._attempt)
        self._run.publish(f"checkpoints/{snapshot.step:09d}.json", record.to_bytes())
        best = self._collect(snapshot.step)
        self._published(record, best is not None and best.step == record.step)
        return record

    def collect_orphans(self) -> None:
        """Delete what interrupted uploads of earlier attempts have left. For the one writer, before it writes.

        A folder of a step whose record exists stays where that record cannot be read.
        """
        check_ownership(self._run, self._attempt)
        readable = {f"{r.step:09d}": r.folder for r in self.records()}
        recorded = {PurePosixPath(name).stem for name in self._run.files("checkpoints")}
        for folder in self._run.folders("checkpoints"):
            step, _, attempt = PurePosixPath(folder).name.partition("-a")
            in_doubt = step in recorded and step not in readable
            if attempt.isdigit() and int(attempt) < self._attempt and folder != readable.get(step) and not in_doubt:
                self._run.delete(folder)

    def _collect(self, step: int) -> CommitRecord | None:
        """Delete all but the newest up to ``step`` and the best, which it returns; the record goes first.

        Records past ``step`` are of checkpoints that turned out damaged: the run has gone back behind them.
        """
        records, best = self.records(), self.best()
        keep = {r.step for r in [r for r in records if r.step <= step][-self._keep_last :]} | (
            {best.step} if best else set()
        )
        for record in records:
            if record.step not in keep:
                check_ownership(self._run, self._attempt)
                self._run.delete(f"checkpoints/{record.step:09d}.json")
                self._run.delete(record.folder)
        return best

    def close(self) -> None:
        """Wait and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)
