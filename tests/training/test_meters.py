"""Sums that are the same in any order."""

from __future__ import annotations

import math

import torch

from orchestrator.training.meters import Meter, Totals, cross_entropy

CPU = torch.device("cpu")


def total(logits: torch.Tensor, labels: torch.Tensor, cuts: list[int]) -> Totals:
    meter = Meter(CPU)
    for part, label in zip(logits.split(cuts), labels.split(cuts), strict=True):
        meter.add(part, label, cross_entropy(part, label))
    return meter.take(lambda t: t)


def test_errors_and_loss_are_those_of_a_plain_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 20), torch.randint(20, (500,))
    totals = total(logits, labels, [500])
    top5 = logits.topk(5).indices
    assert totals.images == 500
    assert totals.wrong_top1 == sum(top5[:, 0] != labels)
    assert totals.wrong_top5 == 500 - (top5 == labels[:, None]).sum()
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert math.isclose(totals.loss, loss, rel_tol=1e-6)


def test_any_order_and_any_cut_give_the_same_bits() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(90, 7), torch.randint(7, (90,))
    whole = total(logits, labels, [90])
    assert total(logits, labels, [30, 1, 59]) == whole
    order = torch.randperm(90)
    assert total(logits[order], labels[order], [45, 45]) == whole
    assert total(logits[:40], labels[:40], [40]) + total(logits[40:], labels[40:], [50]) == whole


def test_ties_count_for_the_smaller_label_and_nan_as_wrong() -> None:
    flat = torch.zeros(7, 7)
    totals = total(flat, torch.arange(7), [7])
    assert (totals.wrong_top1, totals.wrong_top5) == (6, 2)
    bad = torch.full((3, 7), math.nan)
    totals = total(bad, torch.tensor([0, 1, 2]), [3])
    assert (totals.wrong_top1, totals.wrong_top5, totals.not_finite) == (3, 3, 3)
    assert math.isnan(totals.loss)  # not 0: that would look like a perfect network


def test_what_is_left_out_counts_nowhere_and_what_is_unreadable_counts_as_wrong() -> None:
    meter = Meter(CPU)
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    meter.add(logits, labels, cross_entropy(logits, labels), torch.tensor([1, 1, 0, 0]))
    meter.add_unreadable(3)
    totals = meter.take(lambda t: t)
    assert (totals.images, totals.wrong_top1, totals.wrong_top5, totals.unreadable) == (5, 3, 3, 3)
    assert totals.loss == cross_entropy(logits[:2], labels[:2]).mean().item()
    assert meter.take(lambda t: t) == Totals()  # from zero again


def test_few_classes_have_no_top5_error() -> None:
    for classes in (2, 4, 5):
        totals = total(torch.randn(50, classes), torch.randint(classes, (50,)), [50])
        assert (totals.wrong_top5, totals.top5_error) == (0, 0.0)
        assert 0 < totals.wrong_top1 < 50
