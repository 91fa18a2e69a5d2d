"""Wrong things typed: one clear message, exit code 2, nothing taken or written."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from jobs import command_line, contact_sheet, imagenet
from tests.jobs.conftest import Run


def refused(typed: Run, tmp_path: Path, *arguments: str, saying: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, text = typed(*arguments)
    assert code == 2, text
    flat = " ".join(text.replace("│", " ").split())
    assert saying in flat, text
    assert "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, no database, no run
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_wrong_words(typed: Run, tmp_path: Path) -> None:
    refused(typed, tmp_path, "resnet51", saying="did you mean resnet50?")
    refused(typed, tmp_path, "--no-such-field", "3", saying="--no-such-field")
    refused(typed, tmp_path, "--schedule.lr", "fast", saying="fast")
    refused(typed, tmp_path, "--model.depth", "50.5", saying="50.5")
    refused(typed, tmp_path, "--schedule.policy", "polynomial", saying="polynomial")


def test_missing_and_unreadable_places(typed: Run, tmp_path: Path, prepared: Path) -> None:
    storage = ("--storage", str(tmp_path / "runs"))
    refused(typed, tmp_path, *storage, saying="--data is missing: give --data URL or set IMAGENET_DATA")
    refused(typed, tmp_path, "--data", str(prepared), saying="--storage is missing")
    refused(typed, tmp_path, "--data", str(tmp_path / "nothing"), *storage, saying="no prepared data set at")
    refused(typed, tmp_path, "--data", "gopher://host/data", *storage, saying="cannot be opened")
    refused(typed, tmp_path, "--data", "memory://data", *storage, saying="invisible to other processes")
    (tmp_path / "file").touch()
    under_a_file = ("--data", str(prepared), "--storage", str(tmp_path / "file" / "runs"))
    refused(typed, tmp_path, *under_a_file, saying="cannot be read (NotADirectoryError")
    refused(typed, tmp_path, "--data", str(prepared), *storage, "--tracking.uri", "sqlit:///x", saying="unknown scheme")


def test_configs_that_cannot_be(typed: Run, tmp_path: Path, prepared: Path) -> None:
    places = ("--data", str(prepared), "--storage", str(tmp_path / "runs"))
    for arguments, saying in (
        (("--batch.global-batch-size", "250"), "no whole number of groups"),
        (("--model.depth", "49"), "49"),
        (("--input.crop-px", "512"), "input.crop_px 512"),
        (("--schedule.policy", "steps"), "needs schedule.drop_steps"),
        (("--rhythm.log-every-steps", "0"), "rhythm.log_every_steps must be positive"),
        (("--model.family", "plain", "--model.shortcut", "A"), "no option shortcut"),
        (("--placement.num-workers", "3"), "3 workers cannot share 2 batch-norm groups"),
        (("--name", "a/b"), "plain folder name"),
        # 10⁹ checkpoints of 89 MB: a disk that would be full before the end
        (("--rhythm.keep-last", str(10**9)), "make room"),
    ):
        refused(typed, tmp_path, "resnet18_64px", *places, *arguments, saying=saying)


def test_damaged_data_sets(typed: Run, tmp_path: Path, prepared: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    places = ("resnet18_64px", "--data", str(damaged), "--storage", str(tmp_path / "runs"))
    shard = next((damaged / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(typed, tmp_path, *places, saying="prepare the data set again")
    shard.unlink()
    refused(typed, tmp_path, *places, saying="is missing")
    index = damaged / "val.arrow"
    index.write_bytes(index.read_bytes()[:-8])
    shutil.copy(prepared / shard.relative_to(damaged), shard)
    refused(typed, tmp_path, *places, saying="val.arrow is damaged")
    (damaged / "manifest.json").write_text("{}")
    refused(typed, tmp_path, *places, saying="manifest.json cannot be read")


def test_a_changed_config_under_an_old_name(typed: Run, tmp_path: Path, prepared: Path) -> None:
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    arguments = ("resnet18_64px", "--data", str(prepared), "--storage", str(tmp_path / "runs"), "--name", "old")
    from orchestrator.data.shards import DataSet
    from orchestrator.storage import Storage
    from orchestrator.training.run import fix_identity

    config = command_line.parse(list(arguments), imagenet.RECIPES, default="resnet50", program="").config
    fix_identity(Storage(str(run)), config, DataSet(Storage(str(prepared))))
    refused(typed, tmp_path, *arguments, "--schedule.lr", "0.3", saying="schedule.lr: 0.02 → 0.3")
    # Without a checkpoint nothing would be lost by writing it again.
    Storage(str(run)).publish("checkpoints/000000001-a000001.json", b"")
    (run / "config.json").write_text(json.dumps({"identity": {}})[:-3])
    refused(typed, tmp_path, *arguments, saying="config.json is damaged")


def test_wrong_archives(tmp_path: Path, archives: Path, typed: Run) -> None:
    from data_prep.ilsvrc import main

    def prepare(saying: str, *more: str) -> None:
        refused_by(lambda: main([str(broken), "--out", str(tmp_path / "out"), "--num-tasks", "0", *more]), saying)

    def refused_by(run: Callable[[], int], saying: str) -> None:
        code, text = typed(main=run)
        assert (code, saying in " ".join(text.split())) == (2, True), text
        assert not (tmp_path / "out" / "manifest.json").exists()

    broken = tmp_path / "broken"
    shutil.copytree(archives, broken)
    train = broken / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    prepare("truncated")
    train.unlink()
    prepare("ILSVRC2012_img_train.tar")
    train.write_bytes(whole)
    devkit = broken / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit) as old, tarfile.open(tmp_path / "new.tar.gz", "w:gz") as new:
        for member in old:
            stream = old.extractfile(member)
            data = stream.read() if stream else b""
            if member.name.endswith("ground_truth.txt"):
                data = b"\n".join(data.splitlines()[:-1]) + b"\n"
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    shutil.move(tmp_path / "new.tar.gz", devkit)
    prepare("ground truth")


def test_the_contact_sheet(typed: Run, tmp_path: Path, prepared: Path) -> None:
    code, text = typed("resnet18_64px", "--data", str(prepared), "--out", "sheet.png", main=contact_sheet.main)
    assert code == 0, text
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    code, text = typed("resnet51", "--data", str(prepared), main=contact_sheet.main)
    assert code == 2
    code, text = typed("--data", str(tmp_path), main=contact_sheet.main)
    assert (code, "no prepared data set" in text) == (2, True)


def test_help_names_every_recipe_and_every_field(typed: Run) -> None:
    code, text = typed("--help")
    assert code == 0
    assert "--dry-run" in text
    for name, recipe in imagenet.RECIPES.items():
        assert f"{name}:" in text or f"{name} (default):" in text
        assert recipe.__doc__
    import dataclasses

    from orchestrator.config import TrainConfig

    for field in dataclasses.fields(TrainConfig):
        part = getattr(TrainConfig(), field.name)
        names = [f"{field.name}.{f.name}" for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
        for name in names or [field.name]:
            assert f"--{name.replace('_', '-')}" in text, name
