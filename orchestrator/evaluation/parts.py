"""The parts of an evaluation in storage: each published whole as it is done, so that an interruption loses little.

``<score file, without .arrow>.parts-<how>/000007`` holds the 64 digits of the SHA-256 of all that follows, then one
byte an image (0: it cannot be decoded), then the scores [n, C] float32, little-endian, row by row.
"""

from __future__ import annotations

import numpy as np

from orchestrator.storage import Storage, sha256_hex

_DIGITS = 64


class Parts:
    """Results of the parts of the score file ``name``; ``how`` names all that makes results differ beside its key."""

    def __init__(self, run: Storage, name: str, how: str) -> None:
        self._run, self._folder, self._stem = run, *name.removesuffix(".arrow").rsplit("/", 1)
        self._home = f"{self._folder}/{self._stem}.parts-{how}"

    def done(self) -> set[int]:
        """Numbers of the parts that are there, whole or not: one listing."""
        return {int(number) for file in self._run.files(self._home) if (number := file.rpartition("/")[2]).isdigit()}

    def publish(self, number: int, decoded: np.ndarray, scores: np.ndarray) -> None:
        """Store part ``number``: decoded [n] bool, scores [n, C] float32. Raises OSError."""
        content = decoded.astype(np.uint8).tobytes() + np.ascontiguousarray(scores, "<f4").tobytes()
        self._run.publish(f"{self._home}/{number:06d}", sha256_hex(content).encode() + content)

    def read(self, number: int, num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Part ``number`` as it was published; None where it is torn, or not there. Raises OSError."""
        try:
            data = memoryview(self._run.read(f"{self._home}/{number:06d}"))
        except FileNotFoundError:
            return None
        content = data[_DIGITS:]
        if len(content) != num_images * (1 + 4 * num_classes) or bytes(data[:_DIGITS]) != sha256_hex(content).encode():
            return None
        scores = np.frombuffer(content[num_images:], "<f4").reshape(num_images, num_classes)
        return np.frombuffer(content[:num_images], np.uint8).astype(bool), scores

    def delete(self) -> None:
        """Remove all parts of this score file, those made in another way too."""
        for folder in self._run.folders(self._folder):
            if folder.rpartition("/")[2].startswith(f"{self._stem}.parts-"):
                self._run.delete(folder)
