"""An object store inside one process: objects become visible, whole, when their upload completes."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Bucket(AbstractFileSystem):
    """``bucket://name/key``; folders are only a way of speaking of keys."""

    protocol = "bucket"
    objects: ClassVar[dict[str, bytes]] = {}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        for key, data in self.objects.items():
            if key == path:
                found[key] = {"name": key, "size": len(data), "type": "file"}
            elif key.startswith(f"{path}/"):
                head, slash, _ = key[len(path) + 1 :].partition("/")
                name = f"{path}/{head}"
                found[name] = {
                    "name": name,
                    "size": 0 if slash else len(data),
                    "type": "directory" if slash else "file",
                }
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> BucketFile:
        if mode == "xb" and path in self.objects:
            raise FileExistsError(path)
        return BucketFile(self, path, mode, **kwargs)

    def rm_file(self, path: str) -> None:
        self.objects.pop(self._strip_protocol(path), None)


class BucketFile(AbstractBufferedFile):
    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.parts)
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.objects[self.path][start:end]

    def discard(self) -> None:
        self.parts = []


fsspec.register_implementation("bucket", Bucket, clobber=True)
