"""A user's own network: its batch norm follows the groups, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.models import BatchNorm2d, build_own

MODULE = """
import torch
from torch import nn

def net(num_classes, image_size):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
    block[1].weight.data.uniform_()
    return nn.Sequential(block, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def shared(num_classes, image_size):
    layer = nn.BatchNorm2d(3)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

def synced(num_classes, image_size):
    return nn.Sequential(nn.SyncBatchNorm(3), nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

def statistics_free(num_classes, image_size):
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

def endless(num_classes, image_size):
    norm = nn.BatchNorm2d(3, momentum=None)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

def ten_classes(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 10))

def other_size(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224**2, num_classes))

def nothing(num_classes, image_size):
    return None

def without_size(num_classes):
    return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    (tmp_path / "a_users_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: build_own(f"a_users_nets:{name}", num_classes=7, image_size=32)


def test_batch_norm_becomes_ours_with_its_weights(module: Callable[[str], nn.Module]) -> None:
    ours = module("net")
    import a_users_nets  # type: ignore[import-not-found]

    theirs = a_users_nets.net(7, 32)
    layer = ours[0][1]  # type: ignore[index]
    assert isinstance(layer, BatchNorm2d)
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    images = torch.randn(5, 3, 32, 32)
    for training in (True, False):
        assert torch.equal(ours.train(training)(images), theirs.train(training)(images)) or not training
    assert torch.equal(layer.weight, theirs[0][1].weight)


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("synced", "SyncBatchNorm that cannot follow batch-norm groups"),
        ("shared", "is used at another place too"),
        ("endless", "give it a momentum"),
        ("statistics_free", "cannot follow batch-norm groups"),
        ("ten_classes", r"give \[2, 10\], not logits \[2, 7\]"),
        ("other_size", "are refused"),
        ("nothing", "returned a NoneType: it must return an nn.Module"),
        ("without_size", "cannot be called with num_classes and image_size"),
        ("no_such_net", "cannot be imported"),
    ],
)
def test_what_cannot_work_is_refused(module: Callable[[str], nn.Module], name: str, saying: str) -> None:
    with pytest.raises(ValueError, match=saying):
        module(name)


@pytest.mark.parametrize("factory", ["net", ":net", "a_module_that_is_not_there:net"])
def test_a_name_that_names_nothing_is_refused(factory: str) -> None:
    with pytest.raises(ValueError, match=r"model\.factory"):
        build_own(factory, num_classes=2, image_size=8)
