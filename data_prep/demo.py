"""A synthetic set of archives in ILSVRC2012's layout, to try everything without the data.

    python -m data_prep.demo --out /tmp/demo && python -m data_prep.ilsvrc /tmp/demo --out /tmp/demo_shards

A class is a shape with a texture; neither tells it alone, and both survive flips and scaling. Colours, background,
place, size, a distracting patch and noise are drawn. As in the original, the IDs are not in the order of the wnids,
meta.mat holds inner synsets too, and train has a PNG named .JPEG, a CMYK and a grayscale image. Equal arguments give
equal bytes.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from PIL import Image

from orchestrator.storage import Storage

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star", "bar", "crescent")
# A mirror image must stay in its class, or training with flips could not tell them apart: one diagonal only.
TEXTURES = ("upright", "level", "diagonal", "checks", "dots", "plain", "grid", "blotches")


@dataclass(frozen=True)
class Arguments:
    """Generate a small synthetic ILSVRC2012."""

    out: str
    """Folder or fsspec URL for the archives."""
    num_classes: int = 8
    """Up to 64."""
    train_per_class: int = 60
    val_per_class: int = 10
    test_images: int = 40
    seed: int = 0
    min_side: int = 160
    """Pixels."""
    max_side: int = 300
    """Pixels."""


@dataclass(frozen=True)
class DemoClass:
    """``ilsvrc_id`` is 1-based and not in the order of the wnids."""

    wnid: str
    ilsvrc_id: int
    shape: str
    texture: str

    @property
    def words(self) -> str:
        return f"{self.shape}, {self.texture}"


def demo_classes(num_classes: int, seed: int) -> list[DemoClass]:
    """The classes in the order of their wnids."""
    if not 2 <= num_classes <= len(SHAPES) * len(TEXTURES):
        raise ValueError(f"--num-classes must be 2 to {len(SHAPES) * len(TEXTURES)}, not {num_classes}")
    rng = np.random.default_rng([seed, 0])
    # A grid as square as can be, so that classes share shapes as well as textures.
    num_textures = min(len(TEXTURES), int(np.ceil(np.sqrt(num_classes))))
    num_textures = max(num_textures, -(-num_classes // len(SHAPES)))
    kinds = [(SHAPES[i // num_textures], TEXTURES[i % num_textures]) for i in range(num_classes)]
    numbers = np.sort(rng.choice(10**6, num_classes, replace=False))
    ids = rng.permutation(num_classes) + 1
    if (ids == np.arange(num_classes) + 1).all():
        ids = ids[::-1]
    order = rng.permutation(num_classes)
    return [DemoClass(f"n9{number:07d}", int(i), *kinds[k]) for number, i, k in zip(numbers, ids, order, strict=True)]


def render(kind: DemoClass, rng: np.random.Generator, min_side: int = 160, max_side: int = 300) -> np.ndarray:
    """One image of a class: [H, W, 3] uint8, H and W from ``min_side`` to ``max_side``."""
    height, width = (int(side) for side in rng.integers(min_side, max_side + 1, 2))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    side = min(height, width)

    def colour(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, 3).astype(np.float32)

    canvas = colour(40, 215) + (x / width - 0.5)[..., None] * colour(-40, 40)
    canvas += (y / height - 0.5)[..., None] * colour(-40, 40)

    # a patch with any texture, so that a texture somewhere says little
    cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.08, 0.16) * side
    patch = (np.abs(x - cx) < radius) & (np.abs(y - cy) < radius)
    canvas[patch & _texture(str(rng.choice(TEXTURES)), x, y, rng)] = colour(0, 255)

    radius = rng.uniform(0.25, 0.38) * side
    cx, cy = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    inside = _inside(kind.shape, (x - cx) / radius, (y - cy) / radius, rng.uniform(-0.35, 0.35))
    canvas[inside] = colour(0, 110)
    canvas[inside & _texture(kind.texture, x, y, rng)] = colour(130, 255)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(4, 18))
    return canvas.clip(0, 255).astype(np.uint8)


def _texture(texture: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the texture is bright, at pixels ``x``, ``y``; pitch, phase and a small turn are drawn."""
    pitch, angle = rng.uniform(9, 18), np.deg2rad(rng.uniform(-8, 8) + (45 if texture == "diagonal" else 0))
    u = ((x * np.cos(angle) + y * np.sin(angle)) / pitch + rng.uniform(0, 1)) % 1
    v = ((y * np.cos(angle) - x * np.sin(angle)) / pitch + rng.uniform(0, 1)) % 1
    if texture == "blotches":
        blocks = rng.random((int(y.max() / pitch) + 1, int(x.max() / pitch) + 1)) < 0.5
        return blocks[(y / pitch).astype(int), (x / pitch).astype(int)]
    match texture:
        case "upright" | "diagonal":
            return u < 0.5
        case "level":
            return v < 0.5
        case "checks":
            return (u < 0.5) ^ (v < 0.5)
        case "dots":
            return np.hypot(u - 0.5, v - 0.5) < 0.35
        case "grid":
            return (u < 0.25) | (v < 0.25)
    assert texture == "plain"
    return np.ones(x.shape, bool)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, angle: float) -> np.ndarray:
    """Where the shape is, in coordinates in which it fits the unit circle, turned by ``angle`` radians."""
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    match shape:
        case "disc":
            return np.hypot(u, v) < 0.85
        case "square":
            return np.maximum(abs(u), abs(v)) < 0.7
        case "triangle":
            return np.maximum(v - 0.5, 0.866 * abs(u) - 0.5 * v - 0.5) < 0
        case "ring":
            return abs(np.hypot(u, v) - 0.7) < 0.25
        case "cross":
            return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.9)
        case "star":
            return np.hypot(u, v) < 0.65 + 0.32 * np.cos(5 * np.arctan2(v, u))
        case "bar":
            return (abs(u) < 0.95) & (abs(v) < 0.35)
    assert shape == "crescent"
    return (np.hypot(u, v) < 0.95) & (np.hypot(u - 0.45, v) > 0.7)


def generate(arguments: Arguments) -> list[DemoClass]:
    """Write the four archives; returns the classes in the order of their wnids. Raises ValueError."""
    if min(arguments.train_per_class, arguments.val_per_class, arguments.test_images) < 1:
        raise ValueError("every split needs images: --train-per-class, --val-per-class, --test-images are at least 1")
    if not 16 <= arguments.min_side <= arguments.max_side:
        raise ValueError("--min-side is at least 16 and at most --max-side")
    classes = demo_classes(arguments.num_classes, arguments.seed)
    out = Storage(arguments.out)

    def image(kind: DemoClass, split: int, number: int, oddity: str = "") -> bytes:
        rng = np.random.default_rng([arguments.seed, split, kind.ilsvrc_id, number])
        picture = Image.fromarray(render(kind, rng, arguments.min_side, arguments.max_side))
        stream = io.BytesIO()
        if oddity == "PNG":
            picture.save(stream, "PNG")
        else:
            picture.convert(oddity or "RGB").save(stream, "JPEG", quality=int(rng.integers(70, 96)))
        return stream.getvalue()

    # -- train: a tar of one tar a class --------------------------------------------------------------------------
    last = arguments.train_per_class - 1
    odd = {(0, 0): "PNG", (1, 0): "CMYK", (1, last): "L"} if last else {(0, 0): "PNG", (1, 0): "CMYK"}
    with out.publishing("ILSVRC2012_img_train.tar") as stream, tarfile.open(fileobj=stream, mode="w|") as train:
        for position, kind in enumerate(classes):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(arguments.train_per_class):
                    data = image(kind, 1, number, odd.get((position, number), ""))
                    _add(tar, f"{kind.wnid}_{number + 1}.JPEG", data)
            _add(train, f"{kind.wnid}.tar", inner.getvalue())

    # -- val and test: flat ---------------------------------------------------------------------------------------
    rng = np.random.default_rng([arguments.seed, 2])
    truth = rng.permutation(np.repeat(np.arange(len(classes)), arguments.val_per_class))
    with out.publishing("ILSVRC2012_img_val.tar") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for number, position in enumerate(truth):
            _add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", image(classes[position], 2, number))
    with out.publishing("ILSVRC2012_img_test.tar") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for number in range(arguments.test_images):
            kind = classes[int(rng.integers(len(classes)))]
            _add(tar, f"test/ILSVRC2012_test_{number + 1:08d}.JPEG", image(kind, 3, number))

    # -- devkit ---------------------------------------------------------------------------------------------------
    ground_truth = "".join(f"{classes[position].ilsvrc_id}\n" for position in truth)
    devkit = io.BytesIO()
    with gzip.GzipFile(fileobj=devkit, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", _meta_mat(classes, arguments.train_per_class))
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", ground_truth.encode())
        _add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"Synthetic: python -m data_prep.demo\n")
    out.publish("ILSVRC2012_devkit_t12.tar.gz", devkit.getvalue())
    return classes


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _meta_mat(classes: Sequence[DemoClass], num_train_images: int) -> bytes:
    """The struct array ``synsets`` as the devkit has it: leaves by ILSVRC2012_ID, then two inner synsets."""
    from scipy.io import savemat

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows: list[tuple[object, ...]] = [
        (c.ilsvrc_id, c.wnid, c.words, "a drawing", 0, np.zeros((1, 0)), 0, num_train_images)
        for c in sorted(classes, key=lambda c: c.ilsvrc_id)
    ]
    ids = [c.ilsvrc_id for c in classes]
    for number, children in enumerate((ids[::2], ids[1::2])):
        words = ("drawing", "sketch")[number]
        rows.append((len(classes) + 1 + number, f"n0000000{number + 1}", words, "", len(children), children, 1, 0))
    synsets = np.zeros((len(rows), 1), dtype=[(f, object) for f in (*fields, "num_train_images")])
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    # The first 116 bytes are a text that holds the time of writing.
    return b"MATLAB 5.0 MAT-file".ljust(116) + stream.getvalue()[116:]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.demo", description=__doc__)
    try:
        classes = generate(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    for kind in classes:
        print(f"{kind.wnid}  ILSVRC ID {kind.ilsvrc_id:2}  {kind.words}")
    print(f"archives  {Storage(arguments.out).url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
