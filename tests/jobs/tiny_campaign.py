"""A campaign of three networks of a few thousand weights, and the same without Ray and driver."""

from __future__ import annotations

from pathlib import Path

from jobs import campaign as job
from orchestrator.campaign import opening, products
from orchestrator.campaign.opening import Opened
from orchestrator.config import TrainConfig
from orchestrator.control import supervisor
from tests.training.group import CONTEXT

MEMBERS = ("r18-a", "r18-b", "r34")


def words(data: Path, storage: Path, name: str, *more: str) -> list[str]:
    """The demo's three members as networks of a few thousand weights, 6 steps each."""
    changes = {
        "model.factory": "tests.training.networks:tiny",
        "batch.global_batch_size": "24",
        "batch.bn_group_size": "8",
        "schedule.max_steps": "6",
        "schedule.lr": "0.01",
        "rhythm.log_every_steps": "1",
        "rhythm.checkpoint_every_steps": "2",
        "rhythm.validation_batch_size": "30",
    }
    return [
        *("demo", "--data", str(data), "--storage", str(storage), "--name", name, "--workers-per-member", "1"),
        *("--evaluation.protocols", "one_crop", "ten_crop", "--evaluation.precise-bn-images", "16"),
        *("--placement.cpus-per-worker", "1", "--guard.lease-s", "5"),
        # Nobody answers there: nothing waits for it.
        *("--tracking.uri", "http://127.0.0.1:9", "--tracking.wait-s", "0"),
        *(word for field, value in changes.items() for word in ("--change", f"{field}={value}")),
        *more,
    ]


def opened(arguments: list[str]) -> Opened:
    """The campaign of a command line, as its driver sees it."""
    return opening.check(opening.resolve(job.parse(arguments).campaign))


def _train(config: dict[str, object]) -> None:
    import torch

    torch.set_num_threads(1)
    supervisor.run_in_process_group(TrainConfig.from_json(config), lambda event: None)


def make_plainly(arguments: list[str]) -> None:
    """Each member in a plain process, then their ensemble and submission."""
    what = opened(arguments)
    configs = what.plan.campaign.run_configs()
    processes = [CONTEXT.Process(target=_train, args=(config.to_json(),)) for config in configs.values()]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    campaign = what.plan.campaign
    products.build_ensembles(what.folder, campaign, MEMBERS, what.data_sha256)
    assert campaign.submitted
    products.write_submission(what.folder, campaign.submitted, what.data)


def submission(folder: Path) -> bytes:
    (path,) = (folder / "submission").glob("*.txt")
    return path.read_bytes()
