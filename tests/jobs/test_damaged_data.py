"""Images that turn bad inside finished shards: training puts others in their place, validation counts them as wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.run import finished
from tests.conftest import run_module
from tests.training.group import Group, options, run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[2]


def spoil(data: DataSet, split_name: str, index: int, content: bytes) -> str:
    """Overwrite the beginning of an image in its shard; its name."""
    split = data.split(split_name)
    path = data.storage.local_path(split.info.shards[split.shard[index]].name)
    assert path
    with path.open("r+b") as shard:
        shard.seek(int(split.offset[index]))
        shard.write(content[: int(split.nbytes[index])])
    return str(split.names[index].as_py())


def train(data: Path, storage: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The job as one process, without Ray."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = (*options(small_config(data, storage, name)), *words, "--tracking.uri", f"sqlite:///{storage}/mlflow.db")
    command = [sys.executable, str(ROOT / "jobs" / "imagenet.py"), "resnet18", *words]
    where = os.environ | group
    return subprocess.run(command, cwd=storage, env=where, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def spoiled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A data set with two bad images in train and one in val, and their names."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("spoiled") / "data"))
    data = DataSet(Storage(str(folder)))
    bad = [spoil(data, "train", 5, b"no JPEG at all" * 10_000), spoil(data, "train", 60, bytes(2000))]
    return folder, bad, [spoil(data, "val", 7, b"\xff\xd8\xff\xe0 cut")]


def test_bad_images_are_replaced_in_training_and_wrong_in_validation(
    spoiled: tuple[Path, list[str], list[str]], tmp_path: Path
) -> None:
    folder, bad, bad_in_val = spoiled
    weights = set()
    for name in ("one", "other"):
        group = Group(small_config(folder, tmp_path, name), 1)
        assert group.wait() == [0]
        said = [event["text"] for event in group.events() if event["kind"] == "notice"]
        assert all(any(f"image {b} cannot be decoded" in text for text in said) for b in bad), said
        assert all(f"validation image {b} cannot be decoded: it counts as wrong" in said for b in bad_in_val)
        weights.add(weights_digest(tmp_path / name))
    assert len(weights) == 1  # the same images in their place
    records = sorted((tmp_path / "one" / "checkpoints").glob("*/journal.jsonl"))
    journal = [json.loads(line) for line in records[-1].read_text().splitlines()]
    replaced = sum(e["metrics"]["replaced_images"] for e in journal if e["kind"] == "train")
    assert 2 <= replaced <= 8  # two images, two epochs
    assert all(e["metrics"]["validation_top5_error"] >= 100 / 30 for e in journal if e["kind"] == "validation")
    # `verify` finds what training puts up with.
    verified = run_module("data_prep.verify", str(folder), "--figure", "None", "--num-tasks", "0")
    assert verified.returncode == 1
    assert all(b in verified.stdout + verified.stderr for b in [*bad, *bad_in_val])


def test_past_the_limit_the_run_stops_with_the_list(spoiled: tuple[Path, list[str], list[str]], tmp_path: Path) -> None:
    folder, bad, _ = spoiled
    refused = train(folder, tmp_path, "strict", "--input.max-undecodable", "1")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "2 images of the train set cannot be decoded, more than input.max_undecodable 1" in refused.stderr
    assert all(b in refused.stderr for b in bad)
    assert "Traceback" not in refused.stderr
    assert finished(Storage(str(tmp_path / "strict"))) is None
    # Where the user puts up with more, the same run goes on.
    config = small_config(folder, tmp_path, "strict")
    run_to_end(replace(config, input=replace(config.input, max_undecodable=3)), 1)
