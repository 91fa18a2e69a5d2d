"""One image on its way into a shard: looked at, decoded once, and re-encoded where the training pipeline needs it.

What DALI 2.4's decoder makes of odd files (CPU decoder, against Pillow):

=======================================  ==============================================================
grayscale, progressive, 16-bit tables,   decoded, equal to Pillow to the last bit: the bytes are kept
RGB-coded, bytes after the end,
damage inside the entropy-coded data
CMYK and YCCK JPEG                       decoded, within 1 of Pillow's conversion. Re-encoded all the same, since it
                                         was not tried on a GPU
PNG (8 bits, palette, alpha), BMP,       decoded. Re-encoded: a member named .jpg should be a JPEG
WebP, TIFF; 16-bit PNG
GIF                                      not decoded: re-encoded
junk between the segments before the     not decoded ("Invalid marker"), though Pillow does: re-encoded
first scan
12 bits, truncated (even by the last     not decoded, and by Pillow neither: undecodable
two bytes), empty, text
=======================================  ==============================================================

Of 4,000 photographs damaged at random (bits, bytes, headers, blocks of zeros, ends), DALI decoded all that are kept
here, and 99 of those that are refused: Pillow is the stricter of the two.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Formats that are worth trying; Pillow knows others that start programs (EPS) or that no photograph comes in.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
# Baseline, extended sequential and progressive Huffman coding; the decoders know no arithmetic or lossless JPEG.
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2}
_ALL_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

MAX_IMAGE_BYTES = 256 << 20  # the largest of ILSVRC has about 15 MB
_TINY_PIXELS = 16  # a shorter side below this shows next to nothing

_RE_ENCODED = "re-encoded as RGB JPEG, quality 95, 4:4:4"
# EXIF tags
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION = 0x0112, 0x011A, 0x011B


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """``data``: a JPEG that the pipeline decodes (a 1×1 gray one where ``decodable`` is False).

    ``width``, ``height``: pixels of ``data``, without regard to the EXIF orientation. ``what``, ``done``: the fields
    of OddImage, empty for an ordinary image. ``resized``: made smaller. ``pixels``: of ``data``, RGB, if asked for and
    decodable.
    """

    data: bytes
    width: int
    height: int
    decodable: bool
    what: str = ""
    done: str = ""
    resized: bool = False
    pixels: Image.Image | None = None


def prepare_image(
    data: bytes, *, with_pixels: bool, max_side: int | None = None, remarks: bool = False
) -> PreparedImage:
    """Decode ``data`` (with ``with_pixels`` False perhaps at an eighth of its size, which reads every byte too).

    ``max_side``: pixels; an image whose longer side is larger is made smaller, once, from all its pixels, aspect kept.
    ``remarks``: tell as well of what is kept as it is but might surprise (progressive, turned by EXIF, tiny, …).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like: what counts is whether the pixels decode
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            what, why = _oddity(data, image)
            if not what and remarks:
                what, why = _remark(data, image)
            size = _fitting(image.size, max_side)
            if why or not what:  # a JPEG that the decoders know
                if size == image.size:
                    if not with_pixels:
                        image.draft(None, (1, 1))
                    image.load()
                    pixels = image.convert("RGB") if with_pixels else None
                    return PreparedImage(data, *size, True, what, what and f"kept: {why}", pixels=pixels)
                smaller = image if image.mode == "L" else image.convert("RGB")
                done = what and f"resized to {size[0]} × {size[1]}: {why}"
            else:
                smaller = _rgb(image)
                done = _RE_ENCODED if size == image.size else f"{_RE_ENCODED}, resized to {size[0]} × {size[1]}"
            again = _jpeg(smaller if size == image.size else smaller.resize(size, Image.Resampling.BICUBIC))
        # Decoders meet damaged bytes with nearly any exception; all mean the same here.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            # Pillow's message names the stream's address, which differs from run to run.
            reason = "no image format" if isinstance(error, Image.UnidentifiedImageError) else reason
            reason = reason if data else "empty file"
            return PreparedImage(_GRAY_PIXEL, 1, 1, False, "undecodable", reason)
    # The statistics see what training will see.
    pixels = Image.open(io.BytesIO(again)).convert("RGB") if with_pixels else None
    return PreparedImage(again, *size, True, what, done, size != image.size, pixels)


def is_ready(data: bytes, width: int, height: int) -> bool:
    """Whether ``data`` is a JPEG of this size in pixels that the pipeline decodes, read to its end."""
    found = prepare_image(data, with_pixels=False)
    return found.decodable and found.data is data and (found.width, found.height) == (width, height)


def _fitting(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """``size`` made so small that the longer side is ``max_side``, aspect kept; or as it is."""
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longer)) for side in size)
    return width, height


def _oddity(data: bytes, image: Image.Image) -> tuple[str, str]:
    """What makes ``image`` odd, or "", and why it can be kept, or ""; its pixels are not decoded yet."""
    if image.format not in ("JPEG", "MPO"):
        return str(image.format).lower(), ""
    if image.mode == "CMYK":
        return "cmyk", ""
    if _header(data).frame not in _DECODED_FRAMES:
        return "irregular", ""
    return ("grayscale", "decodes to RGB") if image.mode == "L" else ("", "")


def _remark(data: bytes, image: Image.Image) -> tuple[str, str]:
    """What is worth knowing of a JPEG that decodes as it is, and what it means; or ("", "")."""
    if min(image.size) < _TINY_PIXELS:
        return "tiny", f"{image.width} × {image.height} pixels, views of it are enlarged"
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        for tag in (_X_RESOLUTION, _Y_RESOLUTION):
            float(exif.get(tag, 1))
    except Exception:  # as of damaged images
        return "damaged exif", "EXIF is not used"
    if orientation in range(2, 9):
        return "turned", f"EXIF orientation {orientation} is ignored, the pixels are used as stored"
    header = _header(data)
    if header.wide_tables:
        return "16-bit tables", "decodes like any other"
    return ("progressive", "decodes like any other") if header.frame == 0xC2 else ("", "")


@dataclass(frozen=True)
class _Header:
    """Marker of a JPEG's frame header (0xC0: baseline, …), and whether it has 16-bit quantization tables."""

    frame: int | None
    wide_tables: bool = False


def _header(data: bytes) -> _Header:
    """What stands before the first scan; ``frame`` is None where that is anything but segments."""
    position, frame, wide_tables = 2, None, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA:
            return _Header(frame, wide_tables)
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (0, 1) or 0xD0 <= marker <= 0xD9 or length < 2:  # no segment has these
            break
        if marker in _ALL_FRAMES:
            frame = marker
        elif marker == 0xDB:
            wide_tables |= data[position + 4 : position + 5] > b"\x0f"
        position += 2 + length
    return _Header(None)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's conversion of 16 bits clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


_GRAY_PIXEL = _jpeg(Image.new("RGB", (1, 1), (128, 128, 128)))
