"""A prepared data set read from end to end: is every byte what was prepared, and what is in it?

    python -m data_prep.verify /data/ilsvrc2012

Checks the manifest (against manifest.sha256), the indexes, the statistics, every shard (size, SHA-256, members against
the index, labels) and every image (size in pixels, decoded to its end). Prints a table of counts, classes and sizes,
warns of images that are there twice and of files that do not belong there, and draws image sizes and class balance.
Writes nothing to the data set. Exit code: 0 all is well, 1 damaged (what is, and what to do, is said), 2 nothing could
be checked (wrong option or URL, no data set, storage away), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from data_prep.fan_out import fan_out
from data_prep.overview import absent_classes, figure_of, images_twice, table_of
from data_prep.parts import MANIFEST, MANIFEST_SHA256, PREPARATION
from data_prep.preparation import answered, io_text, tasks_for
from data_prep.progress import Progress, in_order, listed_names, odd_lines
from data_prep.shard_check import DIGEST_BYTES, Expected, Rows, ShardCheck
from orchestrator.data.shards import UNDECODABLE, UNLABELLED, DataSet, Encoding, Manifest, Split, SplitInfo
from orchestrator.remote import stop_waiting
from orchestrator.storage import DigestError, Storage

_MAX_NAMED = 20
_STATISTICS = ("mean_image", "channel_mean", "covariance", "eigenvalues", "eigenvectors")


@dataclass(frozen=True)
class Arguments:
    """Verify a prepared data set."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or fsspec URL of the data set."""
    figure: str | None = "verify.png"
    """PNG file for image sizes and class balance; None: no figure."""
    num_tasks: int | None = None
    """Ray tasks at once; 0 or 1: in this process. Left out: as many as there are CPUs, or 0 for less than 256 MiB."""
    ray_address: str | None = None
    """Ray cluster to use. Left out: RAY_ADDRESS, else one started on this machine."""


@dataclass
class Verification:
    """What was found. ``problems``: one line each, of ``num_problems``. ``splits``: those whose index can be read."""

    manifest: Manifest | None = None
    digest: str = ""  # of the manifest
    splits: dict[str, Split] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    warnings: list[str] = field(default_factory=list)

    def problem(self, line: str) -> None:
        self.problems.append(line)
        self.num_problems += 1


def verify(storage: Storage, *, num_tasks: int | None = None, ray_address: str | None = None) -> Verification:
    """Read the data set once. Raises ValueError where there is none, and ValueError or OSError where storage fails."""
    found = Verification()
    # Whether it can be read at all is a question of settings; whether it makes sense, one of damage.
    if not answered(storage, "read", lambda: storage.exists(MANIFEST) and storage.read(MANIFEST) is not None):
        if storage.exists(PREPARATION):
            raise ValueError(f"the data set at {storage.url!r} is unfinished: run its preparation again")
        raise ValueError(f"no prepared data set at {storage.url!r} (no {MANIFEST}): give the --out of a preparation")
    try:
        data_set = DataSet(storage)
    except ValueError as error:
        found.problem(f"{MANIFEST}: {error}")
        return found
    found.manifest, found.digest = data_set.manifest, data_set.digest
    manifest = found.manifest
    _check_digest(storage, found)
    _check_manifest(manifest, found)
    for name in in_order(manifest.splits):
        try:
            found.splits[name] = data_set.split(name)
        except ValueError as error:
            found.problem(f"index of {name}: {error}")
        else:
            _check_index(found.splits[name], manifest, found)
    if manifest.encoding is Encoding.PLANES:
        sizes = {size for s in found.splits.values() for size in zip(s.width.tolist(), s.height.tolist(), strict=True)}
        if len(sizes) > 1:
            found.problem(f"{MANIFEST}: images of {len(sizes)} sizes where all planes have one")
    _check_statistics(data_set, found)

    shards = _expected(manifest, found.splits)
    digests = {name: np.zeros(len(split), f"S{DIGEST_BYTES}") for name, split in found.splits.items()}
    total_bytes = sum(shard.info.nbytes for shard in shards)
    with Progress(total_bytes=total_bytes) as progress:
        check = ShardCheck(storage, manifest.encoding)
        num_tasks = tasks_for(total_bytes, num_tasks)
        by_shard: dict[tuple[str, str], tuple[str, ...]] = {}
        for shard, result, _ in fan_out(check, shards, num_tasks=num_tasks, ray_address=ray_address):
            by_shard[shard.split, shard.info.name] = result.problems
            found.num_problems += result.num_problems
            if shard.rows is not None:
                rows = slice(shard.first_row, shard.first_row + len(shard.rows.names))
                digests[shard.split][rows] = np.frombuffer(result.digests, f"S{DIGEST_BYTES}")
            progress.advance(shard.info.count, shard.info.nbytes)
    for shard in shards:  # in the order of the data set, whichever came first
        found.problems += by_shard[shard.split, shard.info.name]
    found.warnings += images_twice(found.splits, digests)
    found.warnings += absent_classes(manifest, found.splits)
    _look_for_strangers(storage, manifest, found.warnings)
    return found


# -- what the small files say -------------------------------------------------------------------------------------


def _check_digest(storage: Storage, found: Verification) -> None:
    """That nothing has changed in the manifest, most of which nothing else would tell."""
    try:
        published = storage.read(MANIFEST_SHA256).decode(errors="replace").split()
    except FileNotFoundError:
        warnings = found.warnings
        warnings.append(
            f"there is no {MANIFEST_SHA256} (the preparation was older than such files): compare the digest with "
            "the one that the preparation printed"
        )
        return
    if published[:1] != [found.digest]:
        found.problem(f"{MANIFEST} is not what was published: its SHA-256 is not the one in {MANIFEST_SHA256}")


def _look_for_strangers(storage: Storage, manifest: Manifest, warnings: list[str]) -> None:
    """Warns of files that are no part of the data set."""
    named = {MANIFEST, MANIFEST_SHA256, manifest.statistics}
    for info in manifest.splits.values():
        named |= {info.index, *(shard.name for shard in info.shards)}
    try:
        unnamed = [name for name in storage.find() if name not in named]
    except (ValueError, OSError) as error:  # a link to nothing, a folder of another user
        warnings.append(f"strangers among the files cannot be looked for ({error})")
        return
    if unnamed:
        warnings.append(f"files that the manifest does not name: {len(unnamed)} ({listed_names(unnamed)})")


def _check_manifest(manifest: Manifest, found: Verification) -> None:
    absent = [name for name in ("train", "val") if name not in manifest.splits]
    if absent:
        found.problem(f"{MANIFEST}: lacks {' and '.join(absent)}; its splits are {listed_names(list(manifest.splits))}")
    if [c.label for c in manifest.classes] != list(range(len(manifest.classes))):
        found.problem(f"{MANIFEST}: the labels of its classes are not 0 to {len(manifest.classes) - 1}")
    for name, info in manifest.splits.items():
        in_shards = sum(shard.count for shard in info.shards)
        if info.count != in_shards:
            found.problem(f"{MANIFEST}: {name} has {info.count} images, its shards together {in_shards}")


def _check_index(split: Split, manifest: Manifest, found: Verification) -> None:
    """What neither its digest nor its counts tell: that the index fits the manifest."""
    name = split.info.index
    if len(split) and not (split.label.min() >= UNLABELLED and split.label.max() < len(manifest.classes)):
        found.problem(f"{name}: has labels that are no class of the manifest")
    listed = sum(o.split == split.name and o.what == UNDECODABLE for o in manifest.odd)
    kept = int((split.decodable == 0).sum())
    if kept and kept != listed:
        found.problem(f"{name}: has {kept} undecodable images, the manifest {listed}")


def _check_statistics(data_set: DataSet, found: Verification) -> None:
    name, crop = data_set.manifest.statistics, data_set.manifest.statistics_crop
    try:
        arrays = data_set.statistics()
    except FileNotFoundError:
        found.problem(f"{name} is missing")
        return
    except DigestError as error:
        found.problem(f"{name}: {error}")
        return
    except (ValueError, OSError):  # of the storage
        raise
    except Exception as error:  # safetensors raises exceptions of its own
        found.problem(f"{name} cannot be read ({error})")
        return
    shapes = dict(zip(_STATISTICS, [(3, crop, crop), (3,), (3, 3), (3,), (3, 3)], strict=True))
    for key, shape in shapes.items():
        if key not in arrays or arrays[key].shape != shape or not np.isfinite(arrays[key]).all():
            found.problem(f"{name}: {key} is not there, has not the shape {shape}, or is not finite")


# -- what the shards say ------------------------------------------------------------------------------------------


def _expected(manifest: Manifest, splits: Mapping[str, Split]) -> list[Expected]:
    shards, seen = [], list[SplitInfo]()
    for name, info in manifest.splits.items():
        if info in seen:  # a test set that stands in for val: once is enough, and its images are no leak
            continue
        seen.append(info)
        split = splits.get(name)
        for number, shard in enumerate(info.shards):
            rows, first = None, 0
            if split is not None:
                first, last = (int(np.searchsorted(split.shard, number, side)) for side in ("left", "right"))
                some = slice(first, last)
                rows = Rows(
                    offset=split.offset[some],
                    nbytes=split.nbytes[some],
                    width=split.width[some],
                    height=split.height[some],
                    label=split.label[some],
                    names=split.names[some].to_pylist(),
                )
            shards.append(Expected(shard, name, first, rows))
    return shards


# -- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.verify", description=__doc__)
    try:
        storage = Storage(arguments.url)
        figure = _figure_place(arguments.figure, storage)
        found = verify(storage, num_tasks=arguments.num_tasks, ray_address=arguments.ray_address)
        if found.manifest is not None and found.splits and figure is not None:
            figure[0].publish(figure[1], figure_of(found.manifest, found.splits))
    except (ValueError, OSError) as error:
        message = str(error) if isinstance(error, ValueError) else io_text(error)
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        stop_waiting()
        print("interrupted: the data set is as it was", file=sys.stderr)
        return 130
    if found.manifest is not None:
        if found.splits:
            # Never narrower than the table: a pipe has no width.
            console = Console()
            console = console if console.is_terminal else Console(width=120)
            console.print(table_of(found.manifest, found.splits))
        for line in odd_lines(found.manifest):
            if not line.startswith("  "):
                print(line)
        if figure is not None and found.splits:
            print(f"figure {arguments.figure}")
        print(f"digest {found.digest}")
    for line in found.warnings:
        print(f"warning: {line}")
    if not found.num_problems:
        print(f"all is well: 0 problems in {storage.url}")
        return 0
    for line in found.problems[:_MAX_NAMED]:
        print(f"damaged: {line}", file=sys.stderr)
    if found.num_problems > _MAX_NAMED:
        print(f"damaged: and {found.num_problems - _MAX_NAMED:,} more", file=sys.stderr)
    number = f"{found.num_problems:,} problem{'s' * (found.num_problems > 1)}"
    print(
        f"error: {number} in {storage.url}: copy the files named above again from where they are whole, or delete the "
        "data set and prepare it again",
        file=sys.stderr,
    )
    return 1


def _figure_place(figure: str | None, storage: Storage) -> tuple[Storage, str] | None:
    """Where the figure goes. Raises ValueError before anything is read."""
    if figure is None:
        return None
    path = Path(figure)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--figure {figure!r} must end in .png")
    folder = Storage(str(path.parent))
    if storage.is_local and f"{Path(folder.url).resolve()}/".startswith(f"{Path(storage.url).resolve()}/"):
        raise ValueError("--figure would lie inside the data set: give another file, or --figure None")
    folder.check_writable()
    return folder, path.name


if __name__ == "__main__":
    # By its importable name: what Ray sends to other processes must not live in __main__.
    from data_prep.verify import main as importable_main

    sys.exit(importable_main())
