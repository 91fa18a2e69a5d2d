"""Layer responses (Figure 7 of the paper) and gradients (section 4.1) of a trained network: images → numbers.

A layer is a 3×3 convolution and the batch norm that follows it; its response is the batch norm's output, before any
addition or rectifier. Legend: L layers, N images in a batch, C channels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.models import BatchNorm2d
from orchestrator.training.meters import cross_entropy, smoothed


@dataclass(frozen=True)
class Layer:
    """A 3×3 convolution and the batch norm that takes its output; ``name`` is the convolution's in the state dict."""

    name: str
    convolution: nn.Conv2d
    norm: BatchNorm2d


@dataclass(frozen=True)
class LayerNumbers:
    """What is measured of a layer.

    response_std: standard deviation of the response, over all images, channels and positions; gradient_norm and
    response_gradient_norm: L2 norms of the loss's gradient with respect to the convolution's weights and to the
    response, means over batches.
    """

    name: str
    response_std: float
    gradient_norm: float
    response_gradient_norm: float

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.response_std, self.gradient_norm, self.response_gradient_norm)))


def layers_of(model: nn.Module, image_size: int) -> list[Layer]:
    """The layers of ``model`` in the order in which it applies them. ``model`` may be on the meta device.

    Which batch norm follows which convolution is seen in a pass of one image: it is the one that is given the very
    tensor. Convolutions of other sizes, and those without a batch norm, are left out.
    """
    names = {module: name for name, module in model.named_modules()}
    outputs: list[tuple[nn.Conv2d, Tensor]] = []  # the tensors too: what lives has an identity of its own
    found: dict[nn.Conv2d, Layer] = {}

    def of_convolution(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs.append((module, output))

    def of_norm(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, BatchNorm2d)
        for convolution, output in outputs:
            if output is inputs[0]:
                found[convolution] = Layer(names[convolution], convolution, module)

    hooks: list[RemovableHandle] = []
    for module in names:
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            hooks.append(module.register_forward_hook(of_convolution))
        elif isinstance(module, BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(of_norm))
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with _mode(model, training=False), _removing(hooks), torch.no_grad():
        model(image)
    return list(found.values())


@torch.no_grad()
def response_stds(model: nn.Module, layers: list[Layer], batches: Iterable[Tensor]) -> list[float]:
    """The standard deviation of each layer's response over all of ``batches`` of images [N, 3, S, S]: L numbers.

    In evaluation mode. One number a layer: over images, channels and positions alike (divided by their number).
    """
    device = next(model.parameters()).device
    # Kept in float64 on the device, which nobody waits for: a layer of ImageNet has 10^9 responses to 2,000 images.
    sums, squares = torch.zeros(2, len(layers), dtype=torch.float64, device=device)
    counts = [0] * len(layers)

    def add(number: int, response: Tensor) -> None:
        sums[number] += response.sum(dtype=torch.float64)
        squares[number] += torch.linalg.vector_norm(response, dtype=torch.float64).square()
        counts[number] += response.numel()

    with _mode(model, training=False), _watched(layers, add):
        for images in batches:
            model(images)
    count = torch.tensor(counts, dtype=torch.float64, device=device)
    variances = (squares / count - (sums / count).square()).clamp_min(0)
    return variances.sqrt().tolist()


def gradient_norms(
    model: nn.Module,
    layers: list[Layer],
    batches: Iterable[tuple[Tensor, Tensor]],
    bn_group_size: int,
    label_smoothing: float = 0.0,
) -> tuple[list[float], list[float]]:
    """L2 norms of the loss's gradient, means over ``batches``: with respect to each layer's weights, and to its
    response. L numbers each.

    batches: images [N, 3, S, S] and labels [N] int64, each a global batch of whole batch-norm groups, which go through
    the network one after another, in training mode, as in a step of training; the loss is the mean over a batch,
    without weight decay. Weights, gradients and running statistics of ``model`` stay as they are.
    """
    device = next(model.parameters()).device
    weights = [layer.convolution.weight for layer in layers]
    of_weights, of_responses = torch.zeros(2, len(layers), dtype=torch.float64, device=device)
    squares = torch.zeros(len(layers), dtype=torch.float64, device=device)
    count = 0

    def follow(number: int, response: Tensor) -> None:
        # Before the rectifier, which works in place: autograd gives the gradient of what the response was here.
        response.register_hook(lambda gradient: add(number, gradient))

    def add(number: int, gradient: Tensor) -> None:
        squares[number] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()

    # A network that draws (dropout) draws the same every time.
    devices = [device] if device.type == "cuda" else []
    with _mode(model, training=True), _watched(layers, follow), torch.random.fork_rng(devices):
        for number, (images, labels) in enumerate(batches):
            torch.manual_seed(number)
            squares.zero_()
            sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
            for first in range(0, len(images), bn_group_size):
                group = slice(first, first + bn_group_size)
                logits = model(images[group])
                losses = (
                    smoothed(logits, labels[group], label_smoothing)
                    if label_smoothing
                    else cross_entropy(logits, labels[group])
                )
                gradients = torch.autograd.grad(losses.sum() / len(images), weights)
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient
            of_weights += torch.stack([torch.linalg.vector_norm(total) for total in sums])
            of_responses += squares.sqrt()
            count += 1
    return (of_weights / count).tolist(), (of_responses / count).tolist()


@contextmanager
def _watched(layers: list[Layer], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within it, ``see`` is given the number and the response [N, C, H, W] of each layer, right when that is there."""

    def hook_of(number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, inputs, response: see(number, response)

    with _removing([layer.norm.register_forward_hook(hook_of(n)) for n, layer in enumerate(layers)]):
        yield


@contextmanager
def _removing(hooks: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    was_training = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
