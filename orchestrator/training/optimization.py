"""Stochastic gradient descent and learning-rate policies. The policies are pure: state in, learning rate out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from orchestrator.config import PlateauError, PolicyKind, ScheduleConfig, WarmupKind


@dataclass(frozen=True)
class PolicyState:
    """What a policy remembers. All of it is in the checkpoint."""

    drops: int = 0
    last_drop_step: int = 0
    best_error_percent: float | None = None
    stale_validations: int = 0
    warm_since_step: int | None = None  # until_error only: None while it still warms up
    stop: bool = False


@dataclass(frozen=True)
class Decision:
    """What a policy decided, with everything it decided on, so that it can be replayed."""

    action: str  # "drop", "stop", "warm"
    step: int
    error_percent: float
    before: PolicyState
    after: PolicyState
    learning_rate_before: float
    learning_rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def total_steps(schedule: ScheduleConfig, num_images: int, global_batch_size: int) -> int:
    """Optimizer steps of the whole run: ``max_steps`` or ``max_epochs``, whichever ends first."""
    if not schedule.max_epochs:
        return schedule.max_steps
    return min(
        schedule.max_steps, max(1, math.ceil(Fraction(str(schedule.max_epochs)) * num_images / global_batch_size))
    )


def learning_rate(schedule: ScheduleConfig, state: PolicyState, step: int, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) in a run of ``steps``."""
    s = schedule
    start = 0
    if s.warmup is WarmupKind.LINEAR:
        start = s.warmup_steps
        if step < start:
            return s.warmup_lr + (s.lr - s.warmup_lr) * step / s.warmup_steps
    elif s.warmup is WarmupKind.UNTIL_ERROR:
        if state.warm_since_step is None:
            return s.warmup_lr
        start = state.warm_since_step
    match s.policy:
        case PolicyKind.PLATEAU:
            return s.lr * s.lr_factor**state.drops
        case PolicyKind.STEPS:
            return s.lr * s.lr_factor ** sum(step >= at for at in s.drop_steps)
        case PolicyKind.COSINE:
            return s.lr * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))
        case PolicyKind.CONSTANT:
            return s.lr


def after_validation(
    schedule: ScheduleConfig,
    state: PolicyState,
    step: int,
    validation_error_percent: float,
    training_error_percent: float | None,
) -> tuple[PolicyState, Decision | None]:
    """The paper's rule: divide the learning rate when the error plateaus. Called once after every validation.

    A validation that beats the best one before by ``plateau_threshold_percent`` is an improvement;
    ``plateau_window`` validations in a row without one are a plateau. training_error_percent: None where there is no
    measurement since the validation before; then a plateau of the training error waits for one.
    """
    if schedule.policy is not PolicyKind.PLATEAU or _warming(schedule, state, step):
        return state, None
    watches_validation = schedule.plateau_error is PlateauError.VALIDATION
    error = validation_error_percent if watches_validation else training_error_percent
    if error is None:
        return state, None
    best = state.best_error_percent
    if best is None or (error < best and error <= best - schedule.plateau_threshold_percent):
        return replace(state, best_error_percent=error, stale_validations=0), None
    new = replace(state, stale_validations=state.stale_validations + 1)
    if new.stale_validations < schedule.plateau_window or step - state.last_drop_step < schedule.plateau_min_steps:
        return new, None
    if state.drops < schedule.plateau_max_drops:
        action, new = "drop", replace(new, drops=state.drops + 1, last_drop_step=step, stale_validations=0)
    elif schedule.plateau_stop:
        action, new = "stop", replace(new, stop=True)
    else:
        return new, None
    lr = [schedule.lr * schedule.lr_factor**s.drops for s in (state, new)]
    return new, Decision(action, step, error, state, new, *lr)


def after_measurement(
    schedule: ScheduleConfig, state: PolicyState, step: int, training_error_percent: float
) -> tuple[PolicyState, Decision | None]:
    """End an until_error warm-up (the paper's ResNet-110). Called at every training measurement."""
    if schedule.warmup is not WarmupKind.UNTIL_ERROR or state.warm_since_step is not None:
        return state, None
    if training_error_percent >= schedule.warmup_error_percent:
        return state, None
    new = replace(state, warm_since_step=step, last_drop_step=step)
    return new, Decision("warm", step, training_error_percent, state, new, schedule.warmup_lr, schedule.lr)


def _warming(schedule: ScheduleConfig, state: PolicyState, step: int) -> bool:
    match schedule.warmup:
        case WarmupKind.NONE:
            return False
        case WarmupKind.LINEAR:
            return step < schedule.warmup_steps
        case WarmupKind.UNTIL_ERROR:
            return state.warm_since_step is None


class SGD:
    """Momentum SGD over a model's named parameters.

    decay_batch_norm: whether parameters of one dimension (batch norm's scale and shift, biases) decay too.
    caffe_momentum: Caffe keeps v = m·v + lr·g and w −= v; PyTorch keeps v/lr. The two differ where the learning rate
    changes: there the momentum is rescaled by old/new, so that the length of the next step does not jump.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float,
        weight_decay: float,
        decay_batch_norm: bool,
        caffe_momentum: bool,
        fused: bool | None = None,
    ) -> None:
        """fused: one kernel for all of it; None: on a GPU."""
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decays = [p for p in self._names.values() if decay_batch_norm or p.ndim > 1]
        rest = [p for p in self._names.values() if not (decay_batch_norm or p.ndim > 1)]
        groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        on_gpu = next(iter(self._names.values())).is_cuda
        self._fused = on_gpu if fused is None else fused
        self._optimizer = torch.optim.SGD(
            [g for g in groups if g["params"]],
            lr=0.0,
            momentum=momentum,
            fused=self._fused or None,
            foreach=None if self._fused else True,
        )
        if self._fused and momentum > 0:
            # The kernel leaves a new momentum as it finds it where it skips the first step.
            for p in self._names.values():
                self._optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._caffe_momentum = caffe_momentum and momentum > 0
        self.lr = 0.0

    def not_finite(self) -> torch.Tensor:
        """[] bool on the parameters' device: whether any gradient in ``.grad`` is NaN, infinite, or past squaring."""
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        return ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()

    def step(self, lr: float, unless: torch.Tensor | None = None) -> None:
        """One update at learning rate ``lr`` from the gradients in ``.grad``; none where ``unless`` ([] bool) is true.

        A fused update does not wait for ``unless``.
        """
        if lr != self.lr:
            if self._caffe_momentum and self.lr > 0 and lr > 0:
                buffers = list(self.momentum().values())
                if buffers:
                    torch._foreach_mul_(buffers, self.lr / lr)
            self.lr = lr
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        if self._fused:
            found_inf = None if unless is None else unless.float()
            self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by its fused kernel
            self._optimizer.step()
        elif unless is None or not bool(unless):
            self._optimizer.step()

    def forget_gradients(self, *, in_place: bool) -> None:
        """``in_place``: zeros, where somebody holds their memory (DDP's buckets); else none: a backward then writes
        them, instead of adding to them."""
        self._optimizer.zero_grad(set_to_none=not in_place)

    def momentum(self) -> dict[str, torch.Tensor]:
        """Momentum by parameter name; {} before the first step."""
        state = self._optimizer.state
        return {n: state[p]["momentum_buffer"] for n, p in self._names.items() if "momentum_buffer" in state.get(p, {})}

    def load(self, momentum: dict[str, torch.Tensor], lr: float) -> None:
        """Go on from a saved momentum and the learning rate it was made at. Raises ValueError on other names."""
        if momentum and momentum.keys() != self._names.keys():
            raise ValueError("the checkpoint's momentum is of another model: give a changed network another --name")
        for name, p in self._names.items():
            if momentum:
                # In the parameter's memory format: the fused kernel refuses any other.
                self._optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[name])
            elif not self._fused:
                self._optimizer.state.pop(p, None)
        self.lr = lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr
