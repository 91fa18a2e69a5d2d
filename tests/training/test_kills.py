"""Promise 3 under SIGKILL: killed anywhere, however often, a run ends with the bits of one that was left alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.config import BatchConfig, ModelConfig, TrainConfig
from tests.training.group import (
    EVERY_FAULT,
    Group,
    check_equal,
    check_samples,
    fault_seeds,
    last_snapshot,
    open_run,
    run_to_end,
    small_config,
)
from tests.training.traps import Moment, Trap

SIZES = (2, 3)
RUNS_A_SIZE = 3 if EVERY_FAULT else 1
# Two moments in each run are drawn beside those that every seed must hold.
_EXTRA = [Moment.COMPUTE, Moment.REDUCE, Moment.VALIDATE, Moment.FILE, Moment.FILES, Moment.RECORD]
_PUBLISHED_BY = 7  # by this step a checkpoint is published, however slow the disk: each waits for the one before


def config_of(data: Path, storage: Path, name: str) -> TrainConfig:
    """16 steps of three groups of 10: five epochs of 96 images, of which none but the last ends with a step."""
    config = small_config(data, storage, name, model=ModelConfig(factory="tests.training.networks:three_buckets"))
    return replace(
        config,
        batch=BatchConfig(global_batch_size=30, bn_group_size=10),
        schedule=replace(config.schedule, max_steps=16, lr=0.01, plateau_threshold_percent=20.0, lr_factor=0.7),
        rhythm=replace(config.rhythm, checkpoint_every_steps=3, validate_every_epochs=1.0, keep_last=100),
    )


@pytest.fixture(scope="module")
def clean(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a run that nobody disturbs, by number of workers."""
    folder = tmp_path_factory.mktemp("clean")
    return {size: run_to_end(config_of(prepared, folder, f"w{size}"), size) for size in SIZES}


@dataclass(frozen=True)
class Steps:
    """When a clean run does what: numbers of steps, from 1 on."""

    all: tuple[int, ...]
    validations: tuple[int, ...]
    decisions: tuple[int, ...]
    checkpoints: tuple[int, ...]

    @staticmethod
    def of(run_path: Path) -> Steps:
        journal = last_snapshot(run_path).journal
        found = {k: tuple(e["step"] for e in journal if e["kind"] == k) for k in ("train", "validation", "decision")}
        checkpoints = tuple(r.step for r in open_run(run_path).records())
        return Steps(found["train"], found["validation"], found["decision"], checkpoints)

    def where(self, moment: Moment) -> list[int]:
        """Steps in which ``moment`` comes, whatever checkpoint of an earlier step a run has gone on from."""
        first = self.checkpoints[0]
        match moment:
            case Moment.EARLY:
                return [s for s in self.all if s <= first]
            case Moment.COMPUTE | Moment.REDUCE:
                return [s for s in self.all if s > first]
            case Moment.VALIDATE:
                return list(self.validations)
            case Moment.DECISION:
                return list(self.decisions)
            case Moment.RESUME:
                return [s for s in self.all if s > _PUBLISHED_BY]
            case _:
                return list(self.checkpoints)


def plan(seed: int, steps: Steps) -> list[tuple[int, list[Trap]]]:
    """Runs as (number of workers, traps in the order in which they are set).

    Each size meets every moment; in the small form each moment is met by one size.
    """
    draw, runs = random.Random(seed), []
    for index, size in enumerate(SIZES):
        moments = list(Moment)[index :: len(SIZES)]
        if EVERY_FAULT:
            moments = list(Moment) + draw.choices(_EXTRA, k=RUNS_A_SIZE)
        while True:
            draw.shuffle(moments)
            for number in range(RUNS_A_SIZE):
                traps = _traps(draw, moments[number::RUNS_A_SIZE], steps, size)
                if traps is None:
                    break
                runs.append((size, traps))
            else:
                break
            del runs[len(runs) - number :]
    return runs


def _traps(draw: random.Random, moments: list[Moment], steps: Steps, size: int) -> list[Trap] | None:
    """Traps in rising steps, so that each is reached after the ones before; None where these moments have none."""
    for _ in range(100):
        at = sorted((draw.choice(steps.where(m)), m is Moment.RESUME, m.name) for m in moments)
        numbers = [step for step, *_ in at]
        # A restart that reads needs a kill before it that left something to read.
        if len(set(numbers)) == len(at) and (not at[0][1]) and (not any(a[1] for a in at) or _has_read(at)):
            return [_trap(draw, Moment[name], step, size) for step, _, name in at]
    return None


def _has_read(at: list[tuple[int, bool, str]]) -> bool:
    """Whether a kill comes before the resume late enough for a checkpoint to be there."""
    resume = next(i for i, a in enumerate(at) if a[1])
    return at[resume - 1][0] >= _PUBLISHED_BY


def _trap(draw: random.Random, moment: Moment, step: int, size: int) -> Trap:
    on_any = {Moment.EARLY, Moment.COMPUTE, Moment.REDUCE, Moment.VALIDATE, Moment.RESUME}
    return Trap(
        moment,
        step,
        rank=draw.randrange(size) if moment in on_any else 0,
        everyone=draw.random() < 0.5,
        nth=1,
        nbytes=draw.randrange(1, 20 << 20),
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", fault_seeds())
def test_killed_anywhere_a_run_ends_with_the_same_bits(
    seed: int, clean: dict[int, Path], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, hit = Steps.of(clean[2]), Counter[tuple[Moment, int]]()
    assert steps == Steps.of(clean[3])
    runs = plan(seed, steps)
    for number, (size, traps) in enumerate(runs):
        config = config_of(prepared, tmp_path, f"run{number}")
        for trap in traps:
            group = Group(config, size, trap)
            group.wait_for_trap()
            hit[trap.moment, size] += 1
            assert not (group.run_path / "finished.json").exists()
        run_path = run_to_end(config, size)
        check_equal(run_path, clean[size])
        check_samples(config, run_path)
    with capsys.disabled():
        print(_table(seed, len(runs), hit))
    assert all(any(hit[moment, size] for size in SIZES) for moment in Moment)
    if EVERY_FAULT:
        assert len(runs) >= 5
        assert hit.total() >= 20
        assert all(hit[moment, size] for moment in Moment for size in SIZES)


def _table(seed: int, num_runs: int, hit: Counter[tuple[Moment, int]]) -> str:
    lines = [f"\n{hit.total()} kills in {num_runs} runs (seed {seed}), by number of workers:"]
    lines += [f"  {moment.value:50}" + "".join(f"  {size}: {hit[moment, size]}" for size in SIZES) for moment in Moment]
    return "\n".join(lines)
