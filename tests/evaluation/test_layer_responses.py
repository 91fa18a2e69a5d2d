"""Layer responses and gradients against a transcription that keeps every response of one plain forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.evaluation.layer_figure import Curve, draw, png
from orchestrator.evaluation.layer_responses import LayerNumbers, gradient_norms, layers_of, response_stds
from orchestrator.models import VGG, BatchNorm2d, CifarResNet, ResNet
from tests.training.networks import tiny

GROUP, CLASSES = 4, 5
CIFAR_8 = ["conv1", *(f"layer{stage}.0.conv{n}" for stage in (1, 2, 3) for n in (1, 2))]


def a_net(residual: bool = True) -> CifarResNet:
    """A CIFAR network of 8 layers whose batch norm is not as it was initialized."""
    torch.manual_seed(0)
    model = CifarResNet(8, CLASSES, residual=residual)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.5, 0.3)
            nn.init.normal_(module.running_mean, 2.0, 1.0)
            nn.init.uniform_(module.running_var, 1.0, 4.0)
    return model


def images_of(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 50


def forward(state: dict[str, Tensor], images: Tensor, *, training: bool, residual: bool) -> tuple[list[Tensor], Tensor]:
    """Responses of all layers, and logits, written down layer by layer."""
    responses: list[Tensor] = []

    def layer(x: Tensor, convolution: str, norm: str, stride: int) -> Tensor:
        x = F.conv2d(x, state[f"{convolution}.weight"], stride=stride, padding=1)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        of_channels = mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"]
        mean, var, scale, shift = (t[:, None, None] for t in of_channels)
        responses.append((x - mean) / (var + 1e-5).sqrt() * scale + shift)
        return responses[-1]

    x = layer(images, "conv1", "bn1", 1).relu()
    for stage in (1, 2, 3):
        name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        out = layer(layer(x, f"{name}.conv1", f"{name}.bn1", stride).relu(), f"{name}.conv2", f"{name}.bn2", 1)
        carried = x[:, :, ::stride, ::stride]
        carried = torch.cat([carried, torch.zeros_like(carried)], 1) if stride == 2 else carried
        x = (out + carried).relu() if residual else out.relu()
    return responses, x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("residual", [True, False])
def test_responses_are_those_of_a_plain_forward_pass(residual: bool) -> None:
    model, images = a_net(residual), images_of(10)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.layer1.eval()
    layers = layers_of(model, 16)
    assert [layer.name for layer in layers] == CIFAR_8

    found = response_stds(model, layers, [images[:4], images[4:8], images[8:]])

    responses, _ = forward(before, images, training=False, residual=residual)
    expected = [response.double().std(correction=0).item() for response in responses]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 1.5 * min(expected)  # no layer could be taken for another
    assert model.training
    assert not model.layer1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_standard_deviation_survives_a_large_mean() -> None:
    model = a_net()
    nn.init.constant_(model.bn1.bias, 3e4)
    layers, images = layers_of(model, 16)[:1], images_of(200)
    (found,) = response_stds(model, layers, images.split(20))
    responses, _ = forward(model.state_dict(), images, training=False, residual=True)
    assert found == pytest.approx(responses[0].double().std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_norms_are_autograds_in_batch_norm_groups(residual: bool, smoothing: float) -> None:
    model = a_net(residual).eval()
    batches = [(images_of(3 * GROUP, seed), torch.arange(3 * GROUP) * seed % CLASSES) for seed in (1, 2)]
    before = copy.deepcopy(model.state_dict())
    layers = layers_of(model, 16)

    of_weights, of_responses = gradient_norms(model, layers, batches, GROUP, smoothing)

    state = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    weights = [state[f"{name}.weight"] for name in CIFAR_8]
    expected = torch.zeros(2, len(CIFAR_8))
    for images, labels in batches:
        loss, responses = torch.zeros(()), list[list[Tensor]]()
        for group in torch.arange(len(images)).split(GROUP):
            its, logits = forward(state, images[group], training=True, residual=residual)
            targets = F.one_hot(labels[group], CLASSES) * (1 - smoothing) + smoothing / CLASSES
            loss = loss - (logits.log_softmax(1) * targets).sum() / len(images)
            responses.append(its)
        gradients = torch.autograd.grad(loss, [*weights, *(r for its in responses for r in its)])
        expected[0] += torch.stack([g.norm() for g in gradients[: len(weights)]]) / len(batches)
        groups = [gradients[i : i + len(weights)] for i in range(len(weights), len(gradients), len(weights))]
        whole = [torch.cat(its) for its in zip(*groups, strict=True)]
        expected[1] += torch.stack([g.norm() for g in whole]) / len(batches)
    assert of_weights == pytest.approx(expected[0].tolist(), rel=1e-3)
    assert of_responses == pytest.approx(expected[1].tolist(), rel=1e-3)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_draws_draws_the_same_every_time() -> None:
    torch.manual_seed(0)
    model = tiny(num_classes=CLASSES, image_size=16)
    for parent in (model.stem, model.block):
        old = parent[1]
        parent[1] = BatchNorm2d(old.num_features)
    layers = layers_of(model, 16)
    assert [layer.name for layer in layers] == ["stem.0", "block.0"]  # not as they are named: as they are applied

    def measured() -> tuple[list[float], list[float]]:
        return gradient_norms(model, layers, [(images_of(8), torch.arange(8) % CLASSES)], GROUP)

    first = measured()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert measured() == first
    assert torch.equal(torch.get_rng_state(), state)


def test_which_layers_there_are() -> None:
    """Only 3×3 convolutions, in the order of the network; of shapes alone, as of numbers."""
    with torch.device("meta"):
        assert [layer.name for layer in layers_of(CifarResNet(8), 32)] == CIFAR_8
        assert len(layers_of(CifarResNet(56, residual=False), 32)) == 55
        basic = layers_of(ResNet(18), 32)
        bottlenecks = layers_of(ResNet(50), 32)
        assert layers_of(VGG(16, image_size=32), 32) == []
    assert [layer.name for layer in basic] == [
        f"layer{stage}.{block}.conv{n}" for stage in (1, 2, 3, 4) for block in (0, 1) for n in (1, 2)
    ]
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    assert [layer.name for layer in bottlenecks] == [f"layer{s}.{b}.conv2" for s in blocks for b in range(blocks[s])]


# -- the figure -----------------------------------------------------------------------------------------------------


def curve(name: str, stds: list[float], *, is_plain: bool = False) -> Curve:
    return Curve(name, is_plain, [LayerNumbers(str(i), std, 10.0**-i, 1.0) for i, std in enumerate(stds)])


def test_the_figure_shows_both_orders_and_the_gradients() -> None:
    curves = [curve("$resnet$", [0.3, 0.9, 0.1]), curve("_plain", [1.0, 0.2, 0.7, 0.4], is_plain=True)]
    figure = draw(curves)
    original, ranked, gradients = figure.axes
    lines = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert lines[0] == [[0.3, 0.9, 0.1], [1.0, 0.2, 0.7, 0.4]]
    assert lines[1] == [[0.9, 0.3, 0.1], [1.0, 0.7, 0.4, 0.2]]
    assert lines[2] == [[1.0, 0.1, 0.01], [1.0, 0.1, 0.01, pytest.approx(1e-3)]]
    assert [line.get_xdata().tolist() for line in original.lines] == [[1, 2, 3], [1, 2, 3, 4]]
    assert gradients.get_yscale() == "log"
    for axes in figure.axes:  # told apart without colour
        residual, plain = axes.lines
        assert residual.get_linestyle() == "-"
        assert plain.get_linestyle() == "--"
        assert residual.get_marker() != plain.get_marker()
    legend = original.get_legend()
    assert [text.get_text().strip("\u200b") for text in legend.get_texts()] == ["$resnet$", "_plain"]
    assert legend.get_title().get_text() == "dashed: plain networks"
    assert ranked.get_legend() is None
    assert png(curves) == png(curves)
    assert png(curves).startswith(b"\x89PNG")
