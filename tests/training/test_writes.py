"""Promise 6: a run is killed at each change to its folder in turn; the same command then ends it with the same bits."""

from __future__ import annotations

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import BatchConfig, GuardConfig, ModelConfig, TrainConfig
from orchestrator.storage import Storage
from orchestrator.training.run import finished
from tests.training.group import CONTEXT, EVERY_FAULT, check_equal, open_run, small_config
from tests.training.writes import Change, start


def config_of(data: Path, storage: Path, name: str) -> TrainConfig:
    """Two steps of a tiny network with a checkpoint after each, of which one is kept."""
    config = small_config(data, storage, name, model=ModelConfig(factory="tests.training.networks:tiny"))
    return replace(
        config,
        batch=BatchConfig(global_batch_size=4, bn_group_size=2),
        schedule=replace(config.schedule, max_steps=2),
        rhythm=replace(config.rhythm, checkpoint_every_steps=1, validate_every_epochs=100.0, keep_last=1),
        guard=GuardConfig(lease_s=600.0),  # one life sign in a run, however slow this machine is
    )


def command(config: TrainConfig, at: Change | None = None, *, torn: bool = False) -> list[Change] | None:
    """One start; the changes it made, or None where it was killed."""
    told = Path(config.storage) / f"{config.name}-changes.json"
    process = CONTEXT.Process(target=start, args=(config, at, torn, told))
    process.start()
    process.join(120)
    if process.exitcode == 0:
        return [Change(*each) for each in json.loads(told.read_text())]
    assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ), f"{at}: exit code {process.exitcode}"
    return None


def check_what_readers_trust(run_path: Path, clean: dict[int, dict[str, torch.Tensor]]) -> None:
    """What is there after a kill is whole, and of the clean run."""
    finished(Storage(str(run_path)))
    snapshot = open_run(run_path).newest()  # raises where a record or a file is not whole
    if snapshot is not None:
        assert all(torch.equal(tensor, clean[snapshot.step][name]) for name, tensor in snapshot.tensors.items())


Kill = tuple[Change, bool]  # right before the change, or within the write that follows


@pytest.mark.timeout(900)
def test_killed_at_each_change_of_storage_a_run_recovers(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(prepared, tmp_path, "clean")
    every_step = replace(config, name="every step", rhythm=replace(config.rhythm, keep_last=10))
    changes = command(config)
    assert changes is not None
    assert command(every_step) is not None
    kept = open_run(tmp_path / "every step")
    clean = {r.step: kept.load(r).tensors for r in kept.records()}
    assert sorted(clean) == [1, 2]

    def recover(name: str, *kills: Kill) -> list[Change]:
        """Killed once or more, looked at each time, started again to the end: the changes of this last start."""
        again = replace(config, name=name)
        for at, torn in kills:
            assert command(again, at, torn=torn) is None, f"{at} was not met"
            check_what_readers_trust(tmp_path / name, clean)
        last = command(again)
        assert last is not None
        check_equal(tmp_path / name, tmp_path / "clean")
        return last

    # The small form leaves out what no reader sees: files that are opened under names of their own, folders. Of what
    # comes with each checkpoint it takes the last; and of all that every other.
    seen = [c for c in changes if EVERY_FAULT or c.event not in ("open", "os.mkdir")]
    if not EVERY_FAULT:
        seen = list({(c.event, re.sub(r"\d+", "0", c.name)): c for c in seen}.values())
    once: list[tuple[Kill, ...]] = [((change, False),) for change in seen]
    if EVERY_FAULT:
        once += [((change, True),) for change in changes if change.event == "open"]
    # What an interrupted upload has left is deleted by the next start, which is killed there too.
    upload = next(c for c in changes if c.event == "os.rename" and re.fullmatch(r"checkpoints/[^/]*\.json", c.name))
    cleaning = [c for c in recover("cleaned", (upload, False)) if c.event in ("os.remove", "os.rmdir")]
    twice = [((upload, False), (c, False)) for c in cleaning if re.match(r"checkpoints/\d+-a000001/?", c.name)]
    assert len(twice) >= 4
    if not EVERY_FAULT:
        once, twice = once[::2], twice[::2]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda case: recover(f"{case[0]}", *case[1]), enumerate(once + twice)))
    told = [f"{len(once)} starts killed right before, or within, each of {len(changes)} changes of storage"]
    told += [f"{len(twice)} killed while they cleared up after a killed one"]
    with capsys.disabled():
        print("\n" + "; ".join(told))
    made = {(c.event, re.sub(r"\d+", "0", c.name)) for c in changes}
    for event, name in [
        ("os.link", "config.json"),
        ("os.link", "attempts/0.json"),
        ("os.rename", "attempts/0.lease"),
        ("os.rename", "checkpoints/0-a0/tensors.safetensors"),
        ("os.remove", "checkpoints/0-a0/tensors.safetensors"),
        ("os.rename", "checkpoints/0-a0.json"),
        ("os.remove", "checkpoints/0-a0.json"),
        ("os.rename", "finished.json"),
    ]:
        assert (event, name) in made, f"nobody {event}s {name}: {sorted(made)}"
