"""A run that tunes its input side trains to the same bits, says what it chose, and keeps the share that it has."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import ModelConfig, NumericsConfig, PlacementConfig, TrainConfig
from orchestrator.data import tuning
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Batch, TrainInput
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import decode_settings, fixed_share, open_settings
from orchestrator.training.checkpoint import Checkpoints, Snapshot
from orchestrator.training.run import fix_identity, run_storage
from orchestrator.training.trainer import train
from orchestrator.world import World
from tests.data.test_pipeline import NO_COLOUR, train_input
from tests.training.group import history, in_group, last_snapshot, open_run, small_config, take_number, weights_digest

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TUNED, UNTUNED = PlacementConfig(tune_input=True), PlacementConfig()


def config_of(data: Path, storage: Path, name: str, placement: PlacementConfig) -> TrainConfig:
    model = ModelConfig(factory="tests.training.networks:tiny")
    config = small_config(data, storage, name, placement=placement, model=model)
    return replace(config, schedule=replace(config.schedule, max_steps=3))


def start(config: TrainConfig) -> int:
    run = run_storage(config)
    Path(run.root).mkdir(exist_ok=True)
    fix_identity(run, config, DataSet(Storage(config.data)))
    return take_number(run)


def _train(world: World, config: TrainConfig, attempt: int) -> None:
    tuning._NO_TRIAL_AFTER_S, tuning._TIMED_S = 240.0, 0.1  # on a busy machine too everything is tried
    train(config, world, attempt=attempt, cpus=2)


def trained(config: TrainConfig, size: int, folder: Path) -> Snapshot:
    assert in_group(_train, size, folder, config, start(config)) == [0] * size
    return last_snapshot(Path(run_storage(config).root))


def test_two_workers_choose_the_same_and_train_to_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    plain = trained(config_of(prepared, tmp_path, "plain", UNTUNED), 2, tmp_path)
    tuned = trained(config_of(prepared, tmp_path, "tuned", TUNED), 2, tmp_path)
    assert weights_digest(tmp_path / "tuned") == weights_digest(tmp_path / "plain")
    assert all(torch.equal(t, plain.tensors[name]) for name, t in tuned.tensors.items())
    assert tuned.state == plain.state
    assert tuned.state["hw_decoder_share"] is None  # it has seen no GPU: what comes to one may choose
    assert history(tuned.journal) == history(plain.journal)

    assert not [e for e in plain.journal if e["kind"] == "tuned"]
    told = tuned.journal[0]
    assert (told["kind"], told["step"], told["epoch"]) == ("tuned", 0, 0)
    values = {name: [value for value, _ in tried] for name, tried in told["images_per_s"].items()}
    assert values == {"num_threads": [2, 1], "prefetch_batches": [2, 3, 4]}
    assert all(speed > 0 for tried in told["images_per_s"].values() for _, speed in tried)
    assert all(told["settings"][name] in tried for name, tried in values.items())


class _Lagging(TrainInput):
    """Each batch takes this worker longer than the one before it in rank."""

    lag_s = 0.0

    def __next__(self) -> Batch:
        time.sleep(self.lag_s)
        return super().__next__()


def _try_beside_a_slow_one(world: World, data: str) -> None:
    split = DataSet(Storage(data)).split("train")

    def opened(settings: DecodeSettings) -> TrainInput:
        source = train_input(split, NO_COLOUR, 2, settings=settings)
        source.__class__, _Lagging.lag_s = _Lagging, 0.05 + 0.1 * world.rank
        return source

    trials = tuning.Trials(opened, world)
    seconds = trials(DecodeSettings())
    assert seconds is not None
    assert seconds >= 0.15
    assert len(set(world.gather(seconds))) == 1
    if world.is_first:
        trials._until_s = 0.0
    assert trials(DecodeSettings()) is None  # for all, when it is for the first


def test_every_worker_hears_the_seconds_of_the_slowest(prepared: Path, tmp_path: Path) -> None:
    assert in_group(_try_beside_a_slow_one, 2, tmp_path, str(prepared)) == [0, 0]


def test_a_share_that_is_kept_goes_from_checkpoint_to_checkpoint(prepared: Path, tmp_path: Path) -> None:
    config = config_of(prepared, tmp_path, "moved", UNTUNED)
    config = replace(config, rhythm=replace(config.rhythm, checkpoint_every_steps=1))
    trained(config, 1, tmp_path)
    run = Path(run_storage(config).root)
    first, *later = open_run(run).records()
    assert later
    (run / "finished.json").unlink()
    for record in later:
        (run / record.name).unlink()
    forge(run, first.step, 0.35)
    assert trained(config, 1, tmp_path).hw_decoder_share == 0.35


def forge(run: Path, step: int, share: float) -> None:
    """Save the checkpoint of ``step`` again, as if it had been trained on a GPU with this share."""
    snapshot = open_run(run).newest()
    assert snapshot is not None
    assert (snapshot.step, snapshot.hw_decoder_share) == (step, None)
    number = take_number(Storage(str(run)))
    writer = Checkpoints(Storage(str(run)), attempt=number, keep_last=10, notice=lambda text: None)
    assert writer.newest() is not None
    writer.save(replace(snapshot, state=snapshot.state | {"hw_decoder_share": share}))
    writer.close()


def numerics(share: float | None = None, *, deterministic: bool = False) -> TrainConfig:
    return TrainConfig(numerics=NumericsConfig(hw_decoder_share=share, deterministic=deterministic))


@pytest.mark.parametrize(
    ("config", "kept", "share"),
    [
        (numerics(), None, None),
        (numerics(), 0.35, 0.35),
        (numerics(), 0.0, 0.0),
        (numerics(0.8), None, 0.8),
        (numerics(0.0), 0.35, 0.0),
        (numerics(deterministic=True), None, 0.0),
        (numerics(0.8, deterministic=True), 0.35, 0.0),
    ],
)
def test_who_has_the_say_over_the_share(config: TrainConfig, kept: float | None, share: float | None) -> None:
    assert fixed_share(config, kept) == share
    settings = decode_settings(config, CPU, 4, kept)
    assert settings.hw_decoder_share == (DecodeSettings.hw_decoder_share if share is None else share)
    assert ("hw_decoder_share" in open_settings(config, GPU, [4, 4], kept)) == (share is None)


def test_what_is_open_is_what_nobody_has_said() -> None:
    def names(placement: PlacementConfig, device: torch.device, cpus: tuple[int, ...] = (8, 8)) -> list[str]:
        return list(open_settings(TrainConfig(placement=placement), device, cpus, None))

    assert names(UNTUNED, CPU) == []
    assert names(TUNED, CPU) == ["num_threads", "prefetch_batches"]
    assert names(UNTUNED, GPU) == names(TUNED, GPU) == ["hw_decoder_share", "num_threads", "prefetch_batches"]
    assert names(PlacementConfig(tune_input=False), GPU) == []
    assert names(PlacementConfig(decode_threads=3), GPU) == ["hw_decoder_share", "prefetch_batches"]
    pinned = PlacementConfig(tune_input=True, decode_threads=3, prefetch_batches=5)
    assert names(pinned, CPU) == []
    settings = decode_settings(TrainConfig(placement=pinned), CPU, 8)
    assert (settings.num_threads, settings.prefetch_batches) == (3, 5)
    settings = decode_settings(TrainConfig(), CPU, 8)
    assert (settings.num_threads, settings.prefetch_batches) == (8, 2)
    assert names(TUNED, CPU, (1, 1)) == ["prefetch_batches"]
    for cpus, values in ((2, (1, 2)), (16, (4, 8, 12, 16))):
        assert open_settings(TrainConfig(placement=TUNED), CPU, [cpus, cpus], None)["num_threads"] == values
    assert names(TUNED, CPU, (8, 4)) == ["prefetch_batches"]  # they could not try the same
