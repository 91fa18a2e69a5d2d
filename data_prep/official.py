"""ILSVRC2012's archives as image-net.org gives them: which files they are, and whether a copy is a good one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from data_prep.parts import PARTS
from orchestrator.data.shards import Source
from orchestrator.storage import Storage, sha256_hex

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
TEST = "ILSVRC2012_img_test*.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class Official:
    """``nbytes`` is exact where ``exact``; else from the rounded size on the download page."""

    nbytes: int
    exact: bool
    md5: str


# Sums: the download page of image-net.org, as quoted by many. The exact sizes of the test archives and of the devkit
# could not be confirmed.
OFFICIAL = {
    TRAIN: Official(147_897_477_120, True, "1d675b47d978889d74fa0da5fadfb00e"),
    VAL: Official(6_744_924_160, True, "29b22e2961454d5413ddabcf34fc5622"),
    "ILSVRC2012_img_test.tar": Official(13_000_000_000, False, "fe64ceb247e473635708aed23ab6d839"),
    "ILSVRC2012_img_test_v10102019.tar": Official(13_000_000_000, False, "e1b8681fff3d63731c599df9b4b6fc02"),
    DEVKIT: Official(2_500_000, False, "fa75699e90414af021442c21a62c3abf"),
}


@dataclass(frozen=True)
class Md5:
    """The MD5 sum of a whole archive, as an item of work."""

    archive: str
    nbytes: int
    version: str  # digest of when it was modified

    @property
    def record(self) -> str:
        return f"{PARTS}/md5-{sha256_hex(f'{self.archive} {self.nbytes} {self.version}'.encode())[:32]}.json"

    def write(self, source: Storage, out: Storage) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        with source.reading(self.archive) as stream:
            while chunk := stream.read(8 << 20):
                digest.update(chunk)
        out.publish(self.record, (json.dumps({**asdict(self), "md5": digest.hexdigest()}) + "\n").encode())


def checked_source(item: Md5, out: Storage, notes: list[str]) -> Source:
    """What the manifest says of the archive of ``item``, which is done; adds to ``notes``.

    Raises ValueError for an archive that must be a damaged copy of the official one.
    """
    md5 = json.loads(out.read(item.record))["md5"]
    official = OFFICIAL.get(item.archive)
    genuine = official is not None and md5 == official.md5
    if official is not None and not genuine:
        if official.exact and item.nbytes == official.nbytes:
            raise ValueError(
                f"{item.archive} is damaged: its MD5 is {md5}, not {official.md5}: download it again and delete "
                "the unfinished output"
            )
        if item.nbytes >= 0.9 * official.nbytes:
            # Anything else than an error would be a guess: people merge the test set's patch themselves.
            notes.append(f"warning: {item.archive} has the MD5 {md5}; image-net.org's has {official.md5}")
        else:
            notes.append(f"note: {item.archive} is not the official archive ({item.nbytes} bytes)")
    return Source(item.archive, item.nbytes, md5, genuine)
