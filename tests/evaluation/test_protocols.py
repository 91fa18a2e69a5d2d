"""What a protocol asks for, and the batches and parts that follow from a data set alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import Average, EvaluationConfig, InputConfig, Protocol, TrainConfig
from orchestrator.evaluation.protocols import (
    Plan,
    Procedure,
    images_per_pass,
    plan,
    probabilities,
    procedure_of,
    said_of_view,
)

PAPER = TrainConfig()
MULTI_SCALE = procedure_of(Protocol.MULTI_SCALE, PAPER)


@dataclass
class Sizes:
    """What a plan looks at of a split."""

    width: np.ndarray
    height: np.ndarray
    decodable: np.ndarray


def photographs(count: int, seed: int = 0) -> Sizes:
    """Sizes as ILSVRC has them: mostly 500 on the longer side, some large, some odd, some broken."""
    rng = np.random.default_rng(seed)
    width = rng.choice([500, 500, 500, 375, 333, 640, 2000, 99], count).astype(np.int32)
    height = rng.choice([375, 375, 333, 500, 480, 1500, 3000], count).astype(np.int32)
    return Sizes(width, height, (rng.random(count) > 0.01).astype(np.uint8))


def plan_of(sizes: Sizes, procedure: Procedure = MULTI_SCALE, batch_megapixels: float = 4.0) -> Plan:
    return plan(procedure, sizes, batch_megapixels)  # type: ignore[arg-type]


def test_the_papers_procedures() -> None:
    assert procedure_of(Protocol.ONE_CROP, PAPER).to_json() == {
        "kind": "one_crop",
        "crop_px": 224,
        "shorter_sides_px": [256],
        "average": "softmax",
        "mirrored": False,
        "longest_side": 0,
    }
    assert procedure_of(Protocol.TEN_CROP, PAPER).to_json() == {
        "kind": "ten_crop",
        "crop_px": 224,
        "shorter_sides_px": [256],
        "average": "softmax",
        "mirrored": True,
        "longest_side": 0,
    }
    assert MULTI_SCALE.shorter_sides_px == (224, 256, 384, 480, 640)
    small = replace(PAPER, input=InputConfig(crop_px=64, scale_min_px=73, scale_max_px=137, test_shorter_side_px=73))
    assert procedure_of(Protocol.MULTI_SCALE, small).shorter_sides_px == (64, 73, 110, 137, 183)
    logits = replace(PAPER, evaluation=EvaluationConfig(average=Average.LOGITS, scales_px=(300, 224)))
    assert procedure_of(Protocol.MULTI_SCALE, logits).shorter_sides_px == (224, 300)
    assert procedure_of(Protocol.TEN_CROP, logits).average is Average.LOGITS
    # One crop has nothing to average: one name for one thing.
    assert procedure_of(Protocol.ONE_CROP, logits) == procedure_of(Protocol.ONE_CROP, PAPER)


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_every_image_is_in_one_batch_of_one_size(protocol: Protocol, count: int) -> None:
    sizes, procedure = photographs(count), procedure_of(protocol, PAPER)
    found = plan_of(sizes, procedure)
    batches = [batch for part in found.parts for batch in part]
    assert sorted(np.concatenate(batches).tolist()) == np.flatnonzero(sizes.decodable).tolist()
    for batch in batches:
        views = procedure.view.sizes(sizes.width[batch], sizes.height[batch])
        assert (views == views[0]).all()
    assert found.largest_batch == max(map(len, batches))
    assert np.array_equal(found.images(0), np.concatenate(found.parts[0]))


def test_parts_are_many_and_not_too_large() -> None:
    for count, least, most in ((30, 3, 4), (1000, 60, 96), (50_000, 90, 100), (100_000, 180, 200)):
        parts = plan_of(photographs(count)).parts
        assert least <= len(parts) <= most
        assert max(len(np.concatenate(part)) for part in parts) <= 512


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("batch_megapixels", [0.5, 4.0, 30.0])
def test_memory_is_bounded(protocol: Protocol, batch_megapixels: float) -> None:
    """What goes through the network at a time, what is decoded at a time, and all views of a batch."""
    sizes, procedure = photographs(3000), procedure_of(protocol, PAPER)
    sizes.width[:3], sizes.height[:3] = (10_000, 3, 60_000), (10_000, 500, 20)
    sizes.decodable[:3] = 1
    for batch in (batch for part in plan_of(sizes, procedure, batch_megapixels).parts for batch in part):
        views = procedure.view.sizes(sizes.width[batch], sizes.height[batch])
        stored = (sizes.width[batch].astype(np.int64) * sizes.height[batch]).sum()
        assert len(batch) == 1 or stored <= 32e6
        assert len(batch) == 1 or views.prod(2).sum() <= 8e6 * batch_megapixels
        for height, width in views[0].tolist():
            assert max(height, width) <= 4 * 640 + 1
            each = images_per_pass(procedure, height, width, batch_megapixels)
            assert each == 1 or each * height * width * (1 + procedure.mirrored) <= 1e6 * batch_megapixels
    large = [batch for part in plan_of(sizes, procedure).parts for batch in part if 0 in batch]
    assert [len(batch) for batch in large] == [1]


def test_batches_are_deep_where_sizes_agree() -> None:
    alike = Sizes(np.full(5000, 500), np.full(5000, 375), np.ones(5000, np.uint8))
    deep = {p: plan_of(alike, procedure_of(p, PAPER)).largest_batch for p in Protocol}
    assert deep[Protocol.ONE_CROP] == 53  # a whole part
    assert deep[Protocol.TEN_CROP] == 39  # 39 × 2 × 224² = 3.9 megapixels
    assert deep[Protocol.MULTI_SCALE] == 26  # all scales together: eight times what goes through at a time


def test_averages() -> None:
    """Positions, then the two sides, then views; of logits, softmax comes last."""
    rng = np.random.default_rng(0)
    views = [rng.normal(0, 3, (6, 4, 2, k)).astype(np.float32) for k in (1, 5)]  # 3 images and their mirror images

    def softmax(x: np.ndarray, axis: int) -> np.ndarray:
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    for average in Average:
        procedure = replace(MULTI_SCALE, average=average)
        found = probabilities(procedure, [said_of_view(procedure, torch.from_numpy(v)) for v in views])
        expected = []
        for view in views:
            said = softmax(view, 1) if average is Average.SOFTMAX else view
            said = said.mean((2, 3))
            expected.append((said[:3] + said[3:]) / 2)
        both = (expected[0] + expected[1]) / 2
        both = both if average is Average.SOFTMAX else softmax(both, 1)
        np.testing.assert_allclose(found.numpy(), both, rtol=1e-5)
        assert found.dtype == torch.float32
    half = [torch.from_numpy(v).bfloat16() for v in views]
    assert said_of_view(MULTI_SCALE, half[0]).dtype == torch.float32


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = replace(PAPER, input=InputConfig(test_shorter_side_px=200))
    with pytest.raises(ValueError, match=r"input.crop_px 224 is larger than input.test_shorter_side_px 200"):
        procedure_of(Protocol.TEN_CROP, config)
    with pytest.raises(ValueError, match=r"evaluation.scales_px \[100\] are smaller than input.crop_px 224"):
        replace(PAPER, evaluation=EvaluationConfig(scales_px=(100, 300)))
