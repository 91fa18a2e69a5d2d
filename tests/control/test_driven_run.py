"""A run watched from outside: its command line, and images that it has lost or repeated."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from jobs import command_line, imagenet
from orchestrator.config import GuardConfig, PlacementConfig, TrackingConfig
from orchestrator.control.driven_run import options, wrong_images
from orchestrator.storage import Storage, sha256_hex
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.commit_record import FileRecord
from tests.training.group import small_config


def test_the_words_make_the_config(tmp_path: Path) -> None:
    config = replace(
        small_config(tmp_path, tmp_path, "x"),
        seed=3,
        placement=PlacementConfig(num_workers=2, ray_address="1.2.3.4:5"),
        guard=GuardConfig(hang_timeout_s=7.5, max_skipped_steps=0),
        tracking=TrackingConfig(uri="http://127.0.0.1:1"),
    )
    words = ["resnet50", *options(config)]
    typed = command_line.parse(words, {"resnet50": imagenet.resnet50}, default="resnet50", program="x")
    assert typed.config == replace(config, recipe="resnet50")


def test_lost_and_repeated_images_are_found(prepared: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed[2], tmp_path / "run"))
    config = small_config(prepared, tmp_path, "run")
    assert wrong_images(Storage(str(run)), config, 8) == 0
    assert wrong_images(Storage(str(run)), replace(config, seed=1), 8) == 8 * 24
    assert wrong_images(Storage(str(run)), config, 9) == 24  # a step that nobody has done

    def rewrite(change: str) -> None:
        """Another journal in the newest checkpoint, under a digest that is right."""
        storage = Storage(str(run))
        record = Checkpoints(storage, attempt=0, keep_last=1, notice=print).records()[-1]
        name = f"{record.folder}/journal.jsonl"
        events = [json.loads(line) for line in storage.read(name).splitlines()]
        train = [event for event in events if event["kind"] == "train"]
        if change == "exchanged":
            train[1]["samples"], train[2]["samples"] = train[2]["samples"], train[1]["samples"]
        else:
            events.append(train[1])
        data = "".join(json.dumps(event) + "\n" for event in events).encode()
        storage.publish(name, data)
        files = record.files | {"journal.jsonl": FileRecord(len(data), sha256_hex(data))}
        storage.publish(record.name, replace(record, files=files).to_bytes())

    rewrite("exchanged")
    assert wrong_images(Storage(str(run)), config, 8) == 2 * 24
    shutil.rmtree(run)
    shutil.copytree(undisturbed[2], run)
    rewrite("repeated")
    assert wrong_images(Storage(str(run)), config, 8) == 24
