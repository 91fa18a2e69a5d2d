"""What preparing a data set costs, by its size, against copying the same images.

    python -m benchmarks.preparation [--archives FOLDER] [--times 1 4 16] [--quick] [--record FILE]

Without --archives small drawings are used (data_prep.demo). Larger inputs hold every JPEG several times, each with a
comment of its own, so that no two files are the same. Kinds take turns:

    ilsvrc  python -m data_prep.ilsvrc of the archives, in one process: every image is decoded, checked and digested
    folder  python -m data_prep.image_folder of the same images unpacked, likewise
    copy    tarfile reads the archives image by image and writes them to tar files, one a class or split

Linearity: the processor seconds for a byte more at the largest inputs, over those at the smallest (1: linear). Peak
memory is that of the command's process, imports included. The last line is machine-readable.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import tyro

from benchmarks.machine import about, line_of, record
from data_prep import demo
from data_prep.official import DEVKIT, TRAIN, VAL
from jobs import command_line
from orchestrator.storage import Storage


class Kind(Enum):
    """What is done with the images."""

    ILSVRC = "ilsvrc"
    FOLDER = "folder"
    COPY = "copy"


PREPARED = (Kind.ILSVRC, Kind.FOLDER)


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    archives: Path | None = None
    """folder with ILSVRC2012's archives, small ones; left out: 280 drawings"""
    times: tuple[int, ...] = (1, 4, 16)
    """how often the input holds each image"""
    repeats: int = 3
    scratch: Path = Path(tempfile.gettempdir())
    """where inputs and outputs are kept meanwhile"""
    quick: bool = False
    """28 drawings once and twice, one repetition"""
    record: str = ""
    """file of Markdown that a table is appended to"""


@dataclass(frozen=True)
class Cost:
    """Of one preparation or copy: seconds by the clock and of processors, peak memory of its process in MiB."""

    seconds: float
    cpu_s: float
    peak_mib: float


@dataclass(frozen=True)
class Input:
    """Archives, the same images as a folder, how many images, and MB (10^6 bytes) of them."""

    archives: Path
    folder: Path
    images: int
    megabytes: float


# -- inputs ---------------------------------------------------------------------------------------------------------


def images_of(archives: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Split, class ("" where unlabelled), file name and content of every image."""
    for archive in sorted(archives.glob("ILSVRC2012_img_*.tar")):
        split = archive.name.removeprefix("ILSVRC2012_img_").partition("_")[0].removesuffix(".tar")
        with tarfile.open(archive) as outer:
            for member in outer:
                if not member.isfile():
                    continue
                content = _content(outer, member)
                if split != "train":
                    yield split, "", PurePosixPath(member.name).name, content
                    continue
                with tarfile.open(fileobj=io.BytesIO(content)) as inner:
                    for image in inner:
                        yield split, member.name.removesuffix(".tar"), image.name, _content(inner, image)


def multiply(archives: Path, out: Path, times: int) -> Input:
    """An input of every image of ``archives`` ``times`` times, in the folder ``out``."""
    (out / "archives").mkdir(parents=True)
    count, nbytes, per_split = 0, 0, dict[str, int]()
    classes: dict[str, list[tuple[str, bytes]]] = {}
    flat: dict[str, list[tuple[str, bytes]]] = {"val": [], "test": []}
    for split, wnid, name, content in images_of(archives):
        (classes.setdefault(wnid, []) if split == "train" else flat[split]).append((name, content))
        per_split[split] = per_split.get(split, 0) + 1
    truth, devkit = _repeated_truth(archives / DEVKIT, times)
    (out / "archives" / DEVKIT).write_bytes(devkit)
    with tarfile.open(out / "archives" / TRAIN, "w") as train:
        for wnid, images in sorted(classes.items()):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for copy in range(times):
                    for number, (name, content) in enumerate(images):
                        marked = _marked(content, copy)
                        _add(inner, f"{wnid}_{copy * len(images) + number + 1}.JPEG", marked)
                        _write(out / "folder" / "train" / wnid / f"{copy}_{name}", marked)
                        count, nbytes = count + 1, nbytes + len(marked)
            _add(train, f"{wnid}.tar", stream.getvalue())
    for split, archive in (("val", VAL), ("test", "ILSVRC2012_img_test.tar")):
        with tarfile.open(out / "archives" / archive, "w") as tar:
            images = sorted(flat[split])
            for copy in range(times):
                for number, (_, content) in enumerate(images):
                    marked, place = _marked(content, copy), copy * len(images) + number
                    name = f"ILSVRC2012_{split}_{place + 1:08d}.JPEG"
                    _add(tar, name, marked)
                    _write(out / "folder" / split / (f"class{truth[place]}" if split == "val" else "") / name, marked)
                    count, nbytes = count + 1, nbytes + len(marked)
    wnids = sorted(classes)
    for number in range(1, len(wnids) + 1):  # a class is called the same in both
        there = out / "folder" / "val" / f"class{number}"
        there.mkdir(parents=True, exist_ok=True)
        there.rename(out / "folder" / "val" / wnids[number - 1])
    return Input(out / "archives", out / "folder", count, nbytes / 1e6)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _marked(content: bytes, copy: int) -> bytes:
    """A JPEG with the number as a comment; what is none stays as it is."""
    if content[:2] != b"\xff\xd8":
        return content
    return content[:2] + b"\xff\xfe\x00\x06" + copy.to_bytes(4, "big") + content[2:]


def _repeated_truth(devkit: Path, times: int) -> tuple[list[int], bytes]:
    """Labels of the validation images, and the devkit of them."""
    truth, packed = list[int](), io.BytesIO()
    with tarfile.open(devkit) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in old:
            if not member.isfile():
                continue
            content = _content(old, member)
            if member.name.endswith("ILSVRC2012_validation_ground_truth.txt"):
                truth = [int(line) for line in content.split()] * times
                content = "".join(f"{label}\n" for label in truth).encode()
            _add(new, member.name, content)
    return truth, gzip.compress(packed.getvalue())


# -- kinds ----------------------------------------------------------------------------------------------------------


def copied(archives: Path, out: Path) -> Cost:
    """The images, read and written again: a tar file for each class, one for each other split."""
    began_s, worked_s = time.perf_counter(), time.process_time()
    out.mkdir()
    with contextlib.ExitStack() as stack:
        tars: dict[str, tarfile.TarFile] = {}
        for split, wnid, name, content in images_of(archives):
            key = wnid or split
            if key not in tars:
                tars[key] = stack.enter_context(tarfile.open(out / f"{key}.tar", "w"))
            _add(tars[key], name, content)
    for path in out.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return Cost(time.perf_counter() - began_s, time.process_time() - worked_s, math.nan)


def prepared(kind: Kind, source: Input, out: Path) -> Cost:
    """The command, as a user gives it. Its own last line tells seconds and memory, imports not in the seconds."""
    module, given = ("ilsvrc", source.archives) if kind is Kind.ILSVRC else ("image_folder", source.folder)
    command = [sys.executable, "-m", f"data_prep.{module}", str(given), "--out", str(out), "--num-tasks", "0"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--max-undecodable", "0.01"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = re.search(r"^time +([0-9.]+) s; largest process (\d+) MiB", done.stdout, re.MULTILINE)
    if done.returncode or told is None:
        raise ValueError(f"{' '.join(command)} has failed: {done.stderr or done.stdout}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(float(told[1]), cpu_s, float(told[2]))


Costs: TypeAlias = dict[tuple[Kind, int], list[Cost]]  # by kind and how often the input holds each image


def measure(inputs: dict[int, Input], repeats: int, scratch: Path) -> Costs:
    found: Costs = {(kind, times): [] for kind in Kind for times in inputs}
    for repeat in range(repeats):
        for kind, times in list(found)[:: -1 if repeat % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=scratch) as name:
                out, source = Path(name) / "set", inputs[times]
                is_copy = kind is Kind.COPY
                found[kind, times].append(copied(source.archives, out) if is_copy else prepared(kind, source, out))
    return found


def median_of(costs: list[Cost]) -> Cost:
    return Cost(**{name: statistics.median(getattr(one, name) for one in costs) for name in asdict(costs[0])})


def linearity(inputs: dict[int, Input], medians: dict[tuple[Kind, int], Cost], kind: Kind) -> float:
    """Processor seconds for a byte more between the two largest inputs, over those between the two smallest."""
    slopes, ordered = [], sorted(inputs)
    for less, more in ((ordered[0], ordered[1]), (ordered[-2], ordered[-1])):
        seconds = medians[kind, more].cpu_s - medians[kind, less].cpu_s
        slopes.append(seconds / (inputs[more].megabytes - inputs[less].megabytes))
    return slopes[1] / slopes[0]


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        a = replace(a, times=(1, 2), repeats=1)
    if len(set(a.times)) < 2:
        raise ValueError("--times needs two different numbers at least, as 1 4 16")
    with tempfile.TemporaryDirectory(prefix="preparation-", dir=a.scratch) as name:
        scratch, archives = Path(name), a.archives or Path(name) / "drawings"
        if a.archives is None:
            per_class = (2, 1, 4) if a.quick else (25, 5, 40)
            demo.generate(demo.Arguments(Storage(str(archives)).url, 8, *per_class))
        inputs = {times: multiply(archives, scratch / f"times{times}", times) for times in a.times}
        found = measure(inputs, a.repeats, scratch)
    medians = {key: median_of(costs) for key, costs in found.items()}
    rows, figures = [], dict[str, float]()
    for (kind, times), one in medians.items():
        source, copies = inputs[times], [cost.seconds for cost in found[Kind.COPY, times]]
        ratio = statistics.median(c.seconds / p for c, p in zip(found[kind, times], copies, strict=True))
        cells = [f"{source.images:,}", f"{source.megabytes:.1f}", f"{one.seconds:.1f}"]
        cells += [f"{source.images / one.seconds:.0f}", f"{source.megabytes / one.seconds:.1f}", f"{one.cpu_s:.1f}"]
        cells += ["" if math.isnan(one.peak_mib) else f"{one.peak_mib:.0f}", f"{ratio:.1f}"]
        rows.append([kind.value, *cells])
        figures[f"{kind.value}_images_per_s_{times}"] = source.images / one.seconds
        figures[f"{kind.value}_ratio_to_copy_{times}"] = ratio
    for kind in PREPARED:
        figures[f"{kind.value}_peak_mib"] = medians[kind, max(inputs)].peak_mib
        figures[f"{kind.value}_peak_ratio"] = figures[f"{kind.value}_peak_mib"] / medians[kind, min(inputs)].peak_mib
        figures[f"{kind.value}_linearity"] = linearity(inputs, medians, kind)
    header = ("kind", "images", "MB", "s", "images/s", "MB/s", "processor, s", "peak, MiB", "times the copy's s")
    print(about())
    for row in (header, *rows):
        print(" | ".join(f"{cell:>18}" for cell in row))
    if a.record:
        told = "drawings" if a.archives is None else "photographs"
        linear = ", ".join(f"{kind.value} {figures[f'{kind.value}_linearity']:.2f}" for kind in PREPARED)
        note = (
            f"Medians of {a.repeats}; {told}, in one process. Processor seconds include imports; "
            f"those for a byte more, largest inputs against smallest: {linear}."
        )
        record(Path(a.record), "Preparation, by the size of its input", header, rows, note)
    print(line_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
