"""Learning-rate policies as pure functions, and SGD against the update written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from orchestrator.config import PlateauError, PolicyKind, ScheduleConfig, WarmupKind
from orchestrator.training.optimization import (
    SGD,
    Decision,
    PolicyState,
    after_measurement,
    after_validation,
    learning_rate,
    total_steps,
)

PLATEAU = ScheduleConfig(lr=0.1, plateau_window=3, plateau_threshold_percent=0.5, plateau_max_drops=2)


def run(schedule: ScheduleConfig, errors: list[float], every: int = 10) -> tuple[PolicyState, list[Decision]]:
    state, decisions = PolicyState(), []
    for number, error in enumerate(errors, 1):
        state, decision = after_validation(schedule, state, number * every, error, error + 5)
        decisions += [decision] if decision else []
    return state, decisions


def test_the_learning_rate_drops_at_a_plateau() -> None:
    state, decisions = run(PLATEAU, [50, 40, 39.8, 39.9, 39.7])  # no gain of 0.5 for three validations
    assert [(d.action, d.step) for d in decisions] == [("drop", 50)]
    assert decisions[0].learning_rate_before == pytest.approx(0.1)
    assert decisions[0].learning_rate == pytest.approx(0.01)
    assert learning_rate(PLATEAU, state, 51, 1000) == pytest.approx(0.01)
    # slow but steady improvement is no plateau: each beats the best by the threshold
    assert run(PLATEAU, [50 - 0.5 * i for i in range(20)])[1] == []


def test_a_flat_error_is_a_plateau_at_any_threshold() -> None:
    assert [d.step for d in run(replace(PLATEAU, plateau_threshold_percent=0.0), [40.0] * 5)[1]] == [40]


def test_drops_are_limited_and_spaced() -> None:
    flat = [40.0] * 30
    assert [d.step for d in run(PLATEAU, flat)[1]] == [40, 70]
    spaced = replace(PLATEAU, plateau_min_steps=100)
    assert [d.step for d in run(spaced, flat)[1]] == [100, 200]
    state, decisions = run(replace(PLATEAU, plateau_stop=True), flat[:10])
    assert [d.action for d in decisions] == ["drop", "drop", "stop"]
    assert state.stop


def test_the_training_error_can_be_watched() -> None:
    watched = replace(PLATEAU, plateau_error=PlateauError.TRAINING)
    state = PolicyState()
    for number, training in enumerate([50.0, 40.0, 40.0, 40.0, 40.0], 1):
        state, decision = after_validation(watched, state, number, 100 - number * 10.0, training)
    assert decision is not None
    assert decision.error_percent == 40.0
    # a validation without a new measurement of the training error is no evidence of a plateau
    assert after_validation(watched, state, 6, 10.0, None) == (state, None)


def test_a_decision_can_be_replayed_from_its_inputs() -> None:
    _, decisions = run(PLATEAU, [50, 40, 40, 40, 40])
    for d in decisions:
        state, again = after_validation(PLATEAU, d.before, d.step, d.error_percent, 0.0)
        assert (state, again) == (d.after, d)


def test_other_policies() -> None:
    steps = replace(PLATEAU, policy=PolicyKind.STEPS, drop_steps=(100, 150))
    assert [round(learning_rate(steps, PolicyState(), s, 200), 6) for s in (0, 99, 100, 149, 150)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
    ]
    cosine = replace(PLATEAU, policy=PolicyKind.COSINE, warmup=WarmupKind.LINEAR, warmup_lr=0.0, warmup_steps=10)
    assert learning_rate(cosine, PolicyState(), 5, 110) == pytest.approx(0.05)
    assert learning_rate(cosine, PolicyState(), 10, 110) == pytest.approx(0.1)
    assert learning_rate(cosine, PolicyState(), 60, 110) == pytest.approx(0.05)
    assert learning_rate(cosine, PolicyState(), 110, 110) == pytest.approx(0.0)
    assert run(steps, [40.0] * 20)[1] == []


def test_resnet_110_warms_up_until_its_error_is_below_the_bound() -> None:
    schedule = replace(PLATEAU, warmup=WarmupKind.UNTIL_ERROR, warmup_lr=0.01, warmup_error_percent=80)
    state, decision = after_measurement(schedule, PolicyState(), 100, 85.0)
    assert decision is None
    assert learning_rate(schedule, state, 100, 1000) == pytest.approx(0.01)
    assert after_validation(schedule, state, 100, 90.0, 85.0) == (state, None)  # no plateau while warming up
    state, decision = after_measurement(schedule, state, 400, 79.0)
    assert decision is not None
    assert decision.action == "warm"
    assert learning_rate(schedule, state, 400, 1000) == pytest.approx(0.1)
    assert after_measurement(schedule, state, 500, 85.0) == (state, None)


def test_the_length_of_a_run() -> None:
    assert total_steps(PLATEAU, 1_281_167, 256) == 600_000
    assert total_steps(replace(PLATEAU, max_epochs=2), 100, 32) == 7
    assert total_steps(replace(PLATEAU, max_epochs=1.1), 50_000, 100) == 550  # not 551: 1.1 is a decimal
    assert total_steps(replace(PLATEAU, max_epochs=2, max_steps=5), 100, 32) == 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5]))


@pytest.mark.parametrize("caffe", [False, True])
@pytest.mark.parametrize("decay_batch_norm", [False, True])
def test_sgd_is_the_update_written_out(caffe: bool, decay_batch_norm: bool) -> None:
    net = Net()
    sgd = SGD(net, momentum=0.9, weight_decay=0.01, decay_batch_norm=decay_batch_norm, caffe_momentum=caffe)
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    gradients = torch.arange(15, dtype=torch.float32).reshape(5, 3) / 10
    w, v = torch.tensor([1.0, -2.0, 0.5]).double(), torch.zeros(3).double()
    for lr, g in zip(rates, gradients, strict=True):
        net.weight.grad, net.bias.grad = g[:2].reshape(1, 2).clone(), g[2:].clone()
        sgd.step(lr)
        decay = 0.01 * w * torch.tensor([1, 1, float(decay_batch_norm)])
        if caffe:  # solvers/sgd_solver.cpp: v = m·v + lr·g; w -= v
            v = 0.9 * v + lr * (g + decay)
            w = w - v
        else:  # torch.optim.SGD: v = m·v + g; w -= lr·v
            v = 0.9 * v + (g + decay)
            w = w - lr * v
    assert torch.allclose(torch.cat([net.weight[0], net.bias]).double(), w, atol=1e-6)


def test_sgd_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    def steps(sgd: SGD, net: Net, numbers: range) -> None:
        for i in numbers:
            net.weight.grad, net.bias.grad = torch.full((1, 2), 0.1 * i), torch.full((1,), 0.3)
            sgd.step(0.1 if i < 3 else 0.01)

    def new() -> tuple[SGD, Net]:
        net = Net()
        return SGD(net, momentum=0.9, weight_decay=1e-4, decay_batch_norm=True, caffe_momentum=True), net

    whole, whole_net = new()
    steps(whole, whole_net, range(6))
    first, first_net = new()
    steps(first, first_net, range(3))
    second, second_net = new()
    second_net.load_state_dict(first_net.state_dict())
    second.load(first.momentum(), first.lr)
    steps(second, second_net, range(3, 6))
    for a, b in zip(whole_net.parameters(), second_net.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another model"):
        second.load({"other": torch.zeros(1)}, 0.1)


def test_a_loaded_momentum_lies_in_memory_as_its_parameter() -> None:
    """CUDA's fused kernel refuses a momentum of other strides: channels-last weights met it after a resume."""
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = SGD(conv, momentum=0.9, weight_decay=0.0, decay_batch_norm=True, caffe_momentum=True)
    saved = {name: torch.rand(p.shape) for name, p in conv.named_parameters()}
    sgd.load(saved, 0.1)
    for name, p in conv.named_parameters():
        assert sgd.momentum()[name].stride() == p.stride()
        assert torch.equal(sgd.momentum()[name], saved[name])
