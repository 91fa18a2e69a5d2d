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
junk between the header's segments       not decoded ("Invalid marker"), though Pillow does: re-encoded
12 bits, truncated (even by the last     not decoded, and by Pillow neither: undecodable
two bytes), empty, text
=======================================  ==============================================================
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


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """``data``: a JPEG that the pipeline decodes (a 1×1 gray one where ``decodable`` is False).

    ``width``, ``height``: pixels as stored, without regard to the EXIF orientation. ``what``, ``done``: the fields of
    OddImage, empty for an ordinary image. ``pixels``: decoded, RGB, if asked for and decodable.
    """

    data: bytes
    width: int
    height: int
    decodable: bool
    what: str = ""
    done: str = ""
    pixels: Image.Image | None = None


def prepare_image(data: bytes, *, with_pixels: bool) -> PreparedImage:
    """Decode ``data`` (with ``with_pixels`` False perhaps at an eighth of its size, which reads every byte too)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like: what counts is whether the pixels decode
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            what = _oddity(data, image)
            if what in ("", "grayscale"):
                width, height = image.size
                if not with_pixels:
                    image.draft(None, (1, 1))
                image.load()
                done = "kept: decodes to RGB" if what else ""
                pixels = image.convert("RGB") if with_pixels else None
                return PreparedImage(data, width, height, True, what, done, pixels)
            again = _jpeg(_rgb(image))
        # Decoders meet damaged bytes with nearly any exception; all mean the same here.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            # Pillow's message names the stream's address, which differs from run to run.
            reason = "no image format" if isinstance(error, Image.UnidentifiedImageError) else reason
            return PreparedImage(_GRAY_PIXEL, 1, 1, False, "undecodable", reason)
    # The statistics see what training will see.
    pixels = Image.open(io.BytesIO(again)).convert("RGB") if with_pixels else None
    return PreparedImage(again, *image.size, True, what, "re-encoded as RGB JPEG, quality 95, 4:4:4", pixels)


def _oddity(data: bytes, image: Image.Image) -> str:
    """What makes ``image`` odd, or ""; the size and mode are known, the pixels not yet decoded."""
    if image.format not in ("JPEG", "MPO"):
        return str(image.format).lower()
    if image.mode == "CMYK":
        return "cmyk"
    if _frame(data) not in _DECODED_FRAMES:
        return "irregular"
    return "grayscale" if image.mode == "L" else ""


def _frame(data: bytes) -> int | None:
    """Marker of the JPEG's frame header (0xC0: baseline, …); None where anything but segments precedes it."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _ALL_FRAMES:
            return marker
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xDA:  # no segment has these before the frame header
            return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


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
