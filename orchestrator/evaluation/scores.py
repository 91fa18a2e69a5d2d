"""Score files: what one model said of every image of a split. All that comes after an evaluation reads these alone.

In a run's folder::

    scores/<split>-<protocol>-<key>.arrow   Arrow IPC file, one uncompressed record batch (``schema``), one row an image
                                            in the order of the split's index, so that a reader maps it into memory
    scores/<split>-<protocol>-<key>.json    its record, published last: size, SHA-256 and ``ScoresInfo``

The file's schema metadata carry the same ``ScoresInfo`` under "info". The same input gives the same bytes. What an
ensemble says is such a file too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from orchestrator.data.shards import UNLABELLED, ClassInfo
from orchestrator.plain import digest
from orchestrator.storage import Storage

FORMAT = "resnet-orchestrator-scores/1"
FOLDER = "scores"
_KEY_DIGITS = 12
_CHUNK_BYTES = 8 << 20  # of what is looked at or copied at a time


@dataclass(frozen=True)
class ScoresInfo:
    """What a score file speaks of. Plain data where another module defines the form.

    ``protocol``: how it was tested. ``model``: a finished model's record, or {"ensemble": [{"url", "sha256", "weight",
    "model"}, …]}. ``data``: {"url", "sha256", "name", "sources"} of the data set.
    """

    split: str
    protocol: Mapping[str, Any]
    classes: tuple[ClassInfo, ...]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    code_version: str
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": [asdict(each) for each in self.classes]}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> ScoresInfo:
        """Inverse of ``to_json``. Raises ValueError, KeyError or TypeError for what is none."""
        if plain["format"] != FORMAT:
            raise ValueError(f"it has the format {plain['format']!r}, this program reads {FORMAT!r}")
        return ScoresInfo(**{**plain, "classes": tuple(ClassInfo(**each) for each in plain["classes"])})


@dataclass(frozen=True)
class ScoreRecord:
    """What makes a score file exist: its name in the storage, size in bytes, SHA-256, and what it speaks of."""

    name: str
    nbytes: int
    sha256: str
    info: ScoresInfo

    def to_bytes(self) -> bytes:
        record = {"nbytes": self.nbytes, "sha256": self.sha256, "info": self.info.to_json()}
        return (json.dumps({"sha256": digest(record), "record": record}, indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, eq=False)
class Scores:
    """A score file, verified. Rows are images, in the order of the split's index.

    names: [N] string. labels: [N] int32, −1 where unlabelled. decoded: [N] bool. width, height: [N] int32, pixels of
    the stored image. scores: [N, C] float32, read-only, not in memory until it is looked at.
    """

    url: str
    sha256: str
    info: ScoresInfo
    names: pa.Array
    labels: np.ndarray
    decoded: np.ndarray
    width: np.ndarray
    height: np.ndarray
    scores: np.ndarray
    _buffer: Any = field(repr=False, default=None)  # holds the mapping

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.info.classes)


def schema(num_classes: int) -> pa.Schema:
    """Columns of a score file."""
    return pa.schema(
        [
            ("name", pa.string()),  # file name in the source
            ("label", pa.int32()),  # −1: unlabelled
            (
                "decoded",
                pa.uint8(),
            ),  # 0: the image has no pixels; its scores are the class prior, and it counts as wrong
            ("width", pa.int32()),  # pixels, as stored
            ("height", pa.int32()),
            ("scores", pa.list_(pa.float32(), num_classes)),
        ]
    )


def key(weights_sha256: str, data_sha256: str, split: str, protocol: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that name what is scored how: weights, data, split, protocol."""
    plain = {"weights": weights_sha256, "data": data_sha256, "split": split, "protocol": dict(protocol)}
    return digest(plain)[:_KEY_DIGITS]


def file_name(split: str, protocol: str, key: str) -> str:
    """Name of a score file in its run's folder. ``protocol``: its short name (``ten_crop``)."""
    return f"{FOLDER}/{split}-{protocol}-{key}.arrow"


# -- writing ----------------------------------------------------------------------------------------------------


class _Digesting:
    """A binary stream that counts and digests what passes; pyarrow hands it whole buffers, which are not copied."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            piece = view[start : start + _CHUNK_BYTES]
            self._sha256.update(piece)
            self._stream.write(piece)
        self.nbytes += len(view)
        return len(view)

    def flush(self) -> None:
        pass  # who opened the stream closes it

    def close(self) -> None:
        self.closed = True

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def publish(
    storage: Storage,
    name: str,
    info: ScoresInfo,
    *,
    names: Sequence[str] | pa.Array,
    labels: np.ndarray,
    decoded: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    scores: np.ndarray,
) -> ScoreRecord:
    """Publish a score file as ``name`` (….arrow) and its record (….json), which makes it exist.

    Arrays as in ``Scores``, [N] and [N, C]; ``scores`` may be mapped into memory and is not copied. Raises ValueError
    where a score is not finite, OSError where storage fails.
    """
    n, c = len(names), len(info.classes)
    columns = {"label": labels, "decoded": decoded, "width": width, "height": height}
    assert name.endswith(".arrow")
    assert scores.dtype == np.float32, scores.dtype
    assert scores.shape == (n, c), f"{scores.shape} where {n} images of {c} classes are"
    assert all(a.shape == (n,) for a in columns.values()), {key: a.shape for key, a in columns.items()}
    assert [each.label for each in info.classes] == list(range(c))
    assert not n or (labels.min() >= UNLABELLED and labels.max() < c), (labels.min(), labels.max())
    for rows in chunks(n, c):
        if not np.isfinite(scores[rows]).all():
            first = rows.start + int(np.argmin(np.isfinite(scores[rows]).all(axis=1)))
            raise ValueError(
                f"score file {name}: scores of image {first} are not finite: look at the model's weights; nothing was "
                "written"
            )
    form = schema(c).with_metadata({"info": json.dumps(info.to_json(), sort_keys=True)})
    values = pa.Array.from_buffers(pa.float32(), n * c, [None, pa.py_buffer(np.ascontiguousarray(scores))])
    arrays = [
        pa.array(names, pa.string()),
        *(pa.array(a.astype(np.uint8 if column == "decoded" else np.int32)) for column, a in columns.items()),
        pa.FixedSizeListArray.from_arrays(values, type=form.field("scores").type),
    ]
    with storage.publishing(name) as stream:
        digesting = _Digesting(stream)
        with pa.ipc.new_file(pa.PythonFile(digesting, "w"), form) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=form))
    record = ScoreRecord(name, digesting.nbytes, digesting.hexdigest(), info)
    storage.publish(_record_name(name), record.to_bytes())
    return record


def _record_name(name: str) -> str:
    return name.removesuffix(".arrow") + ".json"


# -- reading ----------------------------------------------------------------------------------------------------


def read_record(storage: Storage, name: str) -> ScoreRecord | None:
    """The record of the score file ``name``; None where there is none. Raises ValueError where it is damaged."""
    try:
        data = storage.read(_record_name(name))
    except FileNotFoundError:
        return None
    try:
        content = json.loads(data)
        plain = content["record"]
        if content["sha256"] != digest(plain):
            raise ValueError("its SHA-256 is not the recorded one")
        return ScoreRecord(name, plain["nbytes"], plain["sha256"], ScoresInfo.from_json(plain["info"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the record of the score file {storage.url}/{name} cannot be read ({error}): delete both files and score "
            "again, or copy them again"
        ) from None


def find(run: Storage) -> list[ScoreRecord]:
    """Records of the score files in a run's folder, by name. Raises ValueError where one is damaged."""
    names = [f"{each.removesuffix('.json')}.arrow" for each in run.files(FOLDER) if each.endswith(".json")]
    return [record for name in names if (record := read_record(run, name)) is not None]


def load(url: str) -> Scores:
    """The score file at ``url`` (….arrow, or its ….json), read through once and verified, then mapped into memory.

    A remote file is copied to a temporary one, which goes with the returned object. Raises ValueError saying what is
    wrong where there is none or it is damaged, OSError where storage fails.
    """
    folder, slash, base = url.rpartition("/")
    storage, name = Storage(folder or slash or "."), base.removesuffix(".arrow").removesuffix(".json") + ".arrow"
    where = f"{storage.url}/{name}"
    if (record := read_record(storage, name)) is None:
        have = [each for each in storage.files() if each.endswith(".arrow")]
        there = f"there is {', '.join(have[:5])}" if have else "there is none in that folder"
        raise ValueError(f"no score file at {url!r} (NAME.arrow and its record NAME.json): {there}")
    try:
        with _on_this_machine(storage, name, record) as path:
            buffer = pa.memory_map(str(path)).read_buffer()
            reader = pa.ipc.open_file(buffer)
            batch = reader.get_batch(0)
    except FileNotFoundError:
        raise ValueError(
            f"the score file {where} is missing, its record is there: copy it again, or score again"
        ) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"the score file {where} cannot be read ({error}): score again") from None
    c = len(record.info.classes)
    written = (batch.schema.metadata or {}).get(b"info", b"{}")
    if (
        batch.schema.remove_metadata() != schema(c)
        or json.loads(written) != record.info.to_json()
        or reader.num_record_batches != 1
    ):
        raise ValueError(f"the score file {where} does not fit its record: score again")
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    return Scores(
        url=where,
        sha256=record.sha256,
        info=record.info,
        names=columns["name"],
        labels=columns["label"].to_numpy(),
        decoded=columns["decoded"].to_numpy().view(np.bool_),
        width=columns["width"].to_numpy(),
        height=columns["height"].to_numpy(),
        scores=columns["scores"].flatten().to_numpy().reshape(batch.num_rows, c),
        _buffer=buffer,
    )


@contextlib.contextmanager
def _on_this_machine(storage: Storage, name: str, record: ScoreRecord) -> Iterator[Path]:
    """Path of the file, verified. Raises ValueError where its bytes are not those that were published."""
    local = storage.local_path(name)
    sha256, nbytes = hashlib.sha256(), 0
    with contextlib.ExitStack() as ends:
        stream = ends.enter_context(storage.reading(name))
        # What is mapped stays, also after the temporary file has lost its name.
        copy = None if local else ends.enter_context(tempfile.NamedTemporaryFile(prefix="scores-", suffix=".arrow"))
        while piece := stream.read(_CHUNK_BYTES):
            sha256.update(piece)
            nbytes += len(piece)
            if copy:
                copy.write(piece)
        if nbytes != record.nbytes:
            raise ValueError(
                f"the score file {storage.url}/{name} has {nbytes} bytes where its record says {record.nbytes}: copy "
                "it again, or delete it and score again"
            )
        if sha256.hexdigest() != record.sha256:
            raise ValueError(
                f"the score file {storage.url}/{name} is damaged (its SHA-256 is not the recorded one): copy it again, "
                "or delete it and score again"
            )
        if copy:
            copy.flush()
        yield local or Path(copy.name)  # type: ignore[union-attr]


def chunks(num_images: int, num_classes: int, nbytes: int = _CHUNK_BYTES) -> Iterator[slice]:
    """Slices over the images, each of about ``nbytes`` bytes of float32 scores."""
    step = max(1, nbytes // (4 * max(num_classes, 1)))
    for start in range(0, num_images, step):
        yield slice(start, min(start + step, num_images))
