"""Save, newest verified, restore. Ours is the only checkpoint.

A checkpoint is published in two phases: its files in a folder of their own, then one commit record that names them with
their SHA-256. Names carry the number of the start that wrote them (``ownership``)::

    checkpoints/000000400-a000001.json                   the commit record: a folder without one does not exist
    checkpoints/000000400-a000001/tensors.safetensors    model/…, momentum/… (and average/…)
    checkpoints/000000400-a000001/state.json             step, policy, meters, learning rate
    checkpoints/000000400-a000001/journal.jsonl          every event up to this step

Which records count is told by their lineage (``commit_record``): not those that a superseded driver publishes late, nor
those that the run has gone back behind. A reader goes from the newest one to older ones until every digest is right.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn
from weakref import WeakSet

import safetensors.torch
from torch import Tensor

from orchestrator.remote import StoreRefusedError, StoreUnreachableError
from orchestrator.storage import Content, DigestError, Storage, sha256_hex, size_bytes
from orchestrator.training import tensor_file
from orchestrator.training.commit_record import CommitRecord, FileRecord, best, counting
from orchestrator.training.failures import NotFiniteError, StorageFailedError
from orchestrator.training.ownership import check_ownership

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_EXIT_S = 20.0  # a process that ends, for whatever reason, gives an upload this long


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after ``step`` optimizer steps, in host memory.

    tensors: model/<name>, momentum/<name> and, where weights are averaged, average/<name>; state: plain data; journal:
    the events so far.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    journal: list[dict[str, Any]]
    validation_top1_error: float | None = None

    @property
    def hw_decoder_share(self) -> float | None:
        """What the run has been trained with; None: it has not seen a GPU (or its config says it: an old run)."""
        share = self.state.get("hw_decoder_share")
        return None if share is None else float(share)


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of all weights and buffers (model/…, average/…): equal digests, equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.startswith(("model/", "average/")):
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


# Of one file and for good: what another checkpoint may not suffer from.
_READ_PAUSES_S = (1.0, 2.0, 4.0)
_BAD_SECTORS = {errno.EIO, errno.EACCES, errno.EPERM, errno.EISDIR}


class Checkpoints:
    """The checkpoints of one run in storage. One writer: rank 0 of the newest start."""

    def __init__(
        self,
        run: Storage,
        *,
        attempt: int,
        keep_last: int,
        notice: Callable[[str], None],
        published: Callable[[CommitRecord, bool], None] = lambda record, is_best: None,
        patience_s: float = 600.0,
        waiting: Callable[[bool], None] = lambda waits: None,
    ) -> None:
        """``attempt``: the number of this start; 0 for a reader, which writes nothing.

        ``published`` is called in the publishing thread with each new record and whether it is the best so far. What
        cannot be stored is tried again for ``patience_s`` seconds. ``waiting`` is told when the caller begins to wait
        for storage (True), and when that is over (False).
        """
        self._run, self._attempt, self._keep_last = run, attempt, keep_last
        self._notice, self._published, self._waiting = notice, published, waiting
        self._patience_s = patience_s
        self._pending: Future[None] | None = None
        self._starts: tuple[tuple[int, int], ...] | None = None
        self.loaded_attempt = 0  # the start that wrote what ``newest`` chose
        self._kept_step: int | None = None  # of the newest checkpoint that is known to be whole
        self._told: set[str] = set()

    # -- reading ------------------------------------------------------------------------------------------------

    def records(self) -> list[CommitRecord]:
        """The commit records that can be read and count, oldest first."""
        return counting(self._readable())

    def record(self, step: int, attempt: int) -> CommitRecord | None:
        """The commit record of ``step`` that start ``attempt`` wrote; None where it is not seen."""
        name = CommitRecord(step, attempt, {}, ()).name
        return next((r for r in self._readable() if r.name == name), None)

    def _readable(self) -> list[CommitRecord]:
        found = []
        for name in self._record_names():
            try:
                found.append(CommitRecord.from_bytes(self._run.read(name), name))
            except StoreRefusedError:  # nothing is wrong with the record
                raise
            except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
                if name not in self._told:
                    self._told.add(name)
                    self._notice(f"checkpoint record {name} cannot be read ({error!r}): passed over")
        return found

    def _record_names(self) -> list[str]:
        return [name for name in self._run.files("checkpoints") if name.endswith(".json")]

    def best(self) -> CommitRecord | None:
        """The checkpoint with the lowest validation error, the earliest of equals."""
        return best(self.records())

    def newest(self) -> Snapshot | None:
        """The newest checkpoint whose every digest is right; None where there is none. OSError where storage fails.

        What is saved from now on follows from it. Raises ValueError where there are checkpoints and none is usable: to
        begin again would be to give them up.
        """
        records = self.records()
        for record in reversed(records):
            try:
                snapshot = self._load_patiently(record)
            except StoreRefusedError:  # nothing is wrong with the checkpoint
                raise
            except (DigestError, FileNotFoundError, ValueError, safetensors.SafetensorError) as error:
                self._notice(f"checkpoint of step {record.step} is not usable ({error}): going back to the one before")
            except OSError as error:
                if error.errno not in _BAD_SECTORS or isinstance(error, StoreUnreachableError):
                    raise
                self._notice(f"checkpoint of step {record.step} is not usable ({error}): going back to the one before")
            else:
                self._starts = (*record.starts, (self._attempt, record.step))
                self._kept_step, self.loaded_attempt = record.step, record.attempt
                return snapshot
        if names := self._record_names():
            raise ValueError(
                f"none of the {len(names)} checkpoints of {self._run.url} is usable: restore one, or delete "
                "checkpoints/ there to begin again"
            )
        self._starts = ((self._attempt, 0),)
        return None

    def _load_patiently(self, record: CommitRecord) -> Snapshot:
        """A disk that does not answer for a moment is no damage: going back would give steps up for nothing."""
        for pause_s in _READ_PAUSES_S:
            try:
                return self.load(record)
            except OSError as error:
                if error.errno not in _BAD_SECTORS or isinstance(error, DigestError):
                    raise
                time.sleep(pause_s)
        return self.load(record)

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
        # Not a pool: Python waits for a pool's threads when it ends, and this one may try again for minutes.
        future = self._pending = Future()
        _UNDER_WAY.add(future)
        threading.Thread(target=self._fulfil, args=(future, snapshot), name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Until what was saved is durable.

        Raises StorageFailedError where it could not be, SupersededError where it may not.
        """
        if self._pending is None:
            return
        waits = not self._pending.done()
        try:
            if waits:
                self._waiting(True)
            self._pending.result()
        finally:
            if waits:
                self._waiting(False)
        self._pending = None

    def close(self) -> None:
        """As ``wait``."""
        self.wait()

    def _fulfil(self, future: Future[None], snapshot: Snapshot) -> None:
        try:
            self._publish(snapshot)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _publish(self, snapshot: Snapshot) -> None:
        if not all(map(tensor_file.is_finite, snapshot.tensors.values())):
            raise NotFiniteError(
                f"the weights of step {snapshot.step} are not finite: they are not saved, and the checkpoints before "
                "are kept; where it happens again, lower schedule.lr or use a warm-up, under a new name"
            )
        contents: dict[str, Content] = {
            "tensors.safetensors": tensor_file.pieces(snapshot.tensors),
            "state.json": json.dumps(snapshot.state, sort_keys=True).encode(),
            "journal.jsonl": "".join(json.dumps(e, sort_keys=True) + "\n" for e in snapshot.journal).encode(),
        }
        files = {name: FileRecord(size_bytes(data), sha256_hex(data)) for name, data in contents.items()}
        record = self._store_patiently(snapshot, files, contents)
        self._kept_step = record.step
        its_best = None
        try:
            its_best = self._collect(record.step, ahead=True)
            self._delete_orphans(self._attempt)  # what could not be deleted the last time
        except OSError as error:  # the checkpoint itself is stored
            self._notice(f"old checkpoints cannot be deleted ({error}): tried again with the next one")
        self._published(record, its_best is not None and its_best.name == record.name)

    def _store_patiently(
        self, snapshot: Snapshot, files: dict[str, FileRecord], contents: dict[str, Content]
    ) -> CommitRecord:
        began_s, tries, pause_s = time.monotonic(), 0, _FIRST_PAUSE_S
        step, failed_s = snapshot.step, None
        while True:
            record: CommitRecord | None = None
            try:
                check_ownership(self._run, self._attempt)
                record = CommitRecord(step, self._attempt, files, self._lineage(), snapshot.validation_top1_error)
                self._store(record, contents)
            except OSError as error:
                cause = error
            else:
                if failed_s is not None:
                    self._notice(f"the checkpoint of step {step} is stored now, {_since(failed_s)} s after a first try")
                return record
            # A store that does not answer has been waited for in the call.
            is_away = isinstance(cause, StoreUnreachableError)
            if failed_s is None:
                failed_s = began_s if is_away else time.monotonic()
            if not is_away:
                self._clear(record, cause)
            left_s = self._patience_s - (time.monotonic() - failed_s)
            if left_s <= 0 or _ENDING.is_set():
                self._give_up(step, _since(failed_s), cause, contents)
            tries += 1
            if tries == 1:
                self._notice(
                    f"the checkpoint of step {step} cannot be stored ({cause}): it is tried again for up to "
                    f"{self._patience_s:.0f} s while training goes on; {self._kept()}"
                )
            _ENDING.wait(min(pause_s, max(left_s, 0)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _store(self, record: CommitRecord, contents: dict[str, Content]) -> None:
        """The two phases."""
        for name, data in contents.items():
            self._run.publish(f"{record.folder}/{name}", data)
        check_ownership(self._run, self._attempt)
        self._run.publish(record.name, record.to_bytes())

    def _lineage(self) -> tuple[tuple[int, int], ...]:
        """Of what is saved now; without a ``newest`` before, it follows from whatever is the newest."""
        if self._starts is None:
            records = self.records()
            before = (records[-1].starts, records[-1].attempt, records[-1].step) if records else ((), 0, 0)
            self._starts = before[0] if before[1] == self._attempt else (*before[0], (self._attempt, before[2]))
        return self._starts

    def _clear(self, record: CommitRecord | None, cause: OSError) -> None:
        """Remove what a failed try has left, and where the disk is full what nobody reads."""
        with suppress(OSError):
            if record is not None:
                self._remove(record.folder)
            if cause.errno in _FULL:
                self.collect_orphans()

    def _give_up(self, step: int, waited_s: str, cause: OSError, contents: dict[str, Content]) -> NoReturn:
        room, advice = "", "mend the storage"
        if cause.errno in _FULL:
            needs, free = sum(map(size_bytes, contents.values())), None
            with suppress(OSError):
                free = self._run.free_bytes()
            if free is not None:
                room = f"; {free / 1e6:.1f} MB are free, {needs / 1e6:.1f} MB needed"
            advice = "make room"
        raise StorageFailedError(
            f"run {self._run.url}: the checkpoint of step {step} could not be stored for {waited_s} s ({cause}{room}): "
            f"training stops, and {self._kept()}; {advice}, then the same command goes on"
        ) from cause

    def _kept(self) -> str:
        if self._kept_step is None:
            return "there is none before it"
        return f"the checkpoint of step {self._kept_step} is kept"

    def _remove(self, folder: str) -> None:
        """A checkpoint, its record first: a kill in between leaves a folder that does not exist for readers."""
        self._run.delete(f"{folder}.json")
        self._run.delete(folder)

    def collect_orphans(self) -> None:
        """Delete what earlier starts have left: of interrupted uploads, and beyond what is kept. For the one writer.

        Before it writes: behind the checkpoint that it has gone on from. A folder whose record is there stays, also
        where that cannot be read.
        """
        check_ownership(self._run, self._attempt)
        try:
            self._delete_orphans(self._attempt - 1)
        except OSError as error:  # it takes room, and harms nobody
            self._notice(f"old checkpoints cannot be deleted ({error}): tried again with the next one")
        self._run.delete_fragments("checkpoints")
        if self._kept_step is not None:
            self._collect(self._kept_step, ahead=False)

    def _delete_orphans(self, last_attempt: int) -> None:
        recorded = {name.removesuffix(".json") for name in self._record_names()}
        for folder in self._run.folders("checkpoints"):
            attempt = PurePosixPath(folder).name.partition("-a")[2]
            if attempt.isdigit() and int(attempt) <= last_attempt and folder not in recorded:
                self._run.delete(folder)

    def _collect(self, step: int, *, ahead: bool) -> CommitRecord | None:
        """Delete all but the last ones up to ``step`` and the best, which it returns.

        ahead: those past ``step`` too. They turned out damaged, or are a superseded driver's: the run has gone back
        behind them. A record that cannot be read stays until it is older than all that are kept: it may stand for a
        sound checkpoint.
        """
        readable = self._readable()
        count = counting(readable)
        its_best, last = best(count), [r for r in count if r.step <= step][-self._keep_last :]
        keep = {r.name for r in last} | ({its_best.name} if its_best else set())
        oldest = min((r.folder for r in last), default="")
        unreadable = set(self._record_names()) - {r.name for r in readable}
        drop = [r.name for r in readable if r.name not in keep and (ahead or r.step <= step)]
        for name in drop + sorted(name for name in unreadable if name < oldest):
            check_ownership(self._run, self._attempt)
            self._remove(name.removesuffix(".json"))
        return its_best


def _since(moment_s: float) -> str:
    return f"{time.monotonic() - moment_s:.0f}"


_FULL = {errno.ENOSPC, errno.EDQUOT}

# What is being published; when the process ends, nothing is tried again.
_UNDER_WAY: WeakSet[Future[None]] = WeakSet()
_ENDING = threading.Event()


@atexit.register
def _finish_uploads() -> None:
    _ENDING.set()
    wait_for(list(_UNDER_WAY), timeout=_EXIT_S)
