"""Batch normalization by groups: one group, the mean over groups, a group shared by processes, and what NaN leaves."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce

from orchestrator.models import VGG, BatchNorm2d, CifarResNet, ResNet, RunningStatistics, group_images, share_groups

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def make_images(num_images: int, channels: int = 6, seed: int = 0) -> Tensor:
    images = torch.randn(num_images, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return images * torch.linspace(0.1, 3, channels)[:, None, None] + torch.linspace(-50, 4, channels)[:, None, None]


def randomize(layer: nn.BatchNorm2d) -> None:
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_equals_torch_and_leaves_the_running_statistics(device: str, memory_format) -> None:
    torch.manual_seed(0)
    ours, torchs = BatchNorm2d(6).to(device), nn.BatchNorm2d(6, momentum=1.0).to(device)
    randomize(ours)
    torchs.load_state_dict(ours.state_dict(), strict=False)
    images = make_images(4).to(device, memory_format=memory_format)
    for _ in range(2):
        assert torch.equal(ours(images), torchs(images))
    assert torch.equal(ours.group_mean, torchs.running_mean)
    assert torch.equal(ours.group_var, torchs.running_var)
    torch.testing.assert_close(ours.group_var, images.var((0, 2, 3), unbiased=True))
    assert not ours.running_mean.any()
    assert (ours.running_var == 1).all()


def test_evaluation_equals_torch() -> None:
    ours, torchs = BatchNorm2d(6), nn.BatchNorm2d(6)
    randomize(ours)
    ours.running_mean.normal_()
    ours.running_var.uniform_(0.5, 2)
    torchs.load_state_dict(ours.state_dict(), strict=False)
    assert torch.equal(ours.eval()(make_images(4)), torchs.eval()(make_images(4)))


def test_state_holds_the_running_statistics_alone() -> None:
    layer = BatchNorm2d(6)
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    layer.load_state_dict(nn.BatchNorm2d(6).state_dict())
    # A plain dict has lost the version that torch stores beside the state.
    layer.load_state_dict(dict(layer.state_dict()))
    with pytest.raises(RuntimeError, match="running_var"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "running_var"})


@pytest.mark.parametrize("bound", [False, True])
def test_nan_in_one_step_does_not_survive(bound: bool) -> None:
    layer = BatchNorm2d(6)
    statistics = RunningStatistics(layer) if bound else None
    layer(make_images(4) * torch.nan)
    assert layer.group_mean.isnan().all()
    if statistics is not None:
        statistics.discard()
    layer(make_images(4))
    torch.testing.assert_close(layer.group_mean, make_images(4).mean((0, 2, 3)))
    assert layer.group_var.isfinite().all()
    if statistics is not None:
        statistics.accumulate()
        layer(make_images(4) * torch.inf)
        statistics.accumulate()
        statistics.discard()
        layer(make_images(4))
        statistics.accumulate()
        statistics.advance(num_groups=1)
        torch.testing.assert_close(layer.running_mean, 0.1 * make_images(4).mean((0, 2, 3)))


@given(num_groups=st.integers(1, 4), num_steps=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_running_statistics_advance_once_per_step_from_the_mean_over_groups(num_groups: int, num_steps: int) -> None:
    model = nn.Sequential(BatchNorm2d(6), nn.Conv2d(6, 4, 1), BatchNorm2d(4))
    statistics = RunningStatistics(model)
    mean, var = torch.zeros(6), torch.ones(6)
    for step in range(num_steps):
        groups = [make_images(3, seed=10 * step + i) for i in range(num_groups)]
        for group in groups:
            before = model[0].running_mean.clone()
            model(group)
            statistics.accumulate()
            assert torch.equal(model[0].running_mean, before)
        statistics.advance(num_groups)
        mean = 0.9 * mean + 0.1 * torch.stack([g.mean((0, 2, 3)) for g in groups]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([g.var((0, 2, 3)) for g in groups]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[2].running_mean.any()


def test_one_group_advances_as_torch_does() -> None:
    torch.manual_seed(0)
    model = CifarResNet(20)
    statistics = RunningStatistics(model)
    layer, seen = model.layer2[1].bn2, []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    model(torch.randn(4, 3, 16, 16))
    statistics.accumulate()
    statistics.advance(num_groups=1)
    torchs = nn.BatchNorm2d(32)
    torchs(seen[0])
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    torch.testing.assert_close(layer.running_var, torchs.running_var)


def test_ranks_are_summed_however_the_groups_are_dealt_out() -> None:
    groups = [make_images(3, seed=i) for i in range(3)]
    ranks = [BatchNorm2d(6), BatchNorm2d(6)]
    statistics = [RunningStatistics(layer) for layer in ranks]
    for rank, group in zip((0, 0, 1), groups, strict=True):
        ranks[rank](group)
        statistics[rank].accumulate()
    total = statistics[0]._sum + statistics[1]._sum
    for of_rank in statistics:
        of_rank.reduce(lambda tensor: tensor.copy_(total))
        of_rank.advance(num_groups=3)
    whole = BatchNorm2d(6)
    of_whole = RunningStatistics(whole)
    for group in groups:
        whole(group)
        of_whole.accumulate()
    of_whole.advance(num_groups=3)
    assert torch.equal(ranks[0].running_var, ranks[1].running_var)
    torch.testing.assert_close(ranks[0].running_mean, whole.running_mean)
    torch.testing.assert_close(ranks[0].running_var, whole.running_var)


@pytest.mark.parametrize("device", DEVICES)
def test_groups_may_be_accumulated_before_any_backward(device: str) -> None:
    # All layers share one flat tensor: autograd must not take the next layer's or group's write for a change.
    torch.manual_seed(0)
    model = ResNet(18, num_classes=3, width=4).to(device)
    reference = copy.deepcopy(model)
    statistics = RunningStatistics(model)
    groups = [torch.randn(4, 3, 64, 64, device=device) for _ in range(2)]
    losses = []
    for group in groups:
        losses.append(model(group).logsumexp(1).sum())
        statistics.accumulate()
    statistics.advance(num_groups=2)
    torch.stack(losses).sum().backward()
    for group in groups:
        reference(group).logsumexp(1).sum().backward()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_unbound_layers_too() -> None:
    layer = BatchNorm2d(6)
    (layer(make_images(4)).square().sum() + layer(make_images(4, seed=1)).square().sum()).backward()
    assert layer.weight.grad.isfinite().all()


def test_binding_survives_load_state_dict_and_copies() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8)
    statistics = RunningStatistics(model)
    other = {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(other)
    images = torch.randn(4, 3, 8, 8)
    model(images)
    statistics.accumulate()
    statistics.advance(num_groups=1)
    copied = CifarResNet(8)
    copied.load_state_dict(other)
    of_copy = RunningStatistics(copied)  # binding keeps the values that it finds
    copied(images)
    of_copy.accumulate()
    of_copy.advance(num_groups=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copied.state_dict()[name]), name
    assert not torch.equal(model.bn1.running_mean, other["bn1.running_mean"])
    clone = copy.deepcopy(model)
    assert torch.equal(clone.bn1.running_mean, model.bn1.running_mean)
    assert clone.bn1.running_mean.data_ptr() != model.bn1.running_mean.data_ptr()


def test_bound_models_are_written_and_read_by_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = CifarResNet(8)
    RunningStatistics(model)
    model.bn1.running_mean.fill_(3)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = CifarResNet(8)
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert (other.bn1.running_mean == 3).all()


def test_moving_a_bound_model_is_noticed() -> None:
    model = CifarResNet(8)
    statistics = RunningStatistics(model)
    model.double()
    with pytest.raises(AssertionError, match="replaced"):
        statistics.advance(num_groups=1)


def test_a_model_without_batch_norm_is_fine() -> None:
    with torch.device("meta"):
        model = VGG(16)
    statistics = RunningStatistics(model)
    statistics.accumulate()
    statistics.reduce(lambda tensor: pytest.fail("nothing to reduce"))
    statistics.advance(num_groups=4)
    statistics.discard()


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RunningStatistics(BatchNorm2d(2)).advance(num_groups=0)
    with pytest.raises(ValueError, match="one momentum"):
        RunningStatistics(nn.Sequential(BatchNorm2d(2), BatchNorm2d(2, momentum=0.5)))
    with pytest.raises(ValueError, match="need an all_reduce"):
        share_groups(BatchNorm2d(2), None, 2)
    with pytest.raises(ValueError, match="need no all_reduce"):
        share_groups(BatchNorm2d(2), lambda tensor: tensor, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shared_path_of_one_process_equals_torch(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, torchs = BatchNorm2d(6).to(device), nn.BatchNorm2d(6, momentum=1.0).to(device)
    randomize(ours)
    torchs.load_state_dict(ours.state_dict(), strict=False)
    ours.all_reduce = lambda tensor: tensor.clone()
    inputs = [make_images(4).to(device, dtype).requires_grad_() for _ in range(2)]
    with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
        outputs = [layer(x) for layer, x in zip((ours, torchs), inputs, strict=True)]
    assert outputs[0].dtype == outputs[1].dtype == dtype
    weights = torch.randn(outputs[0].shape).to(device)
    for output in outputs:
        (output.float() * weights).sum().backward()
    near = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=near, atol=near)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=near, atol=near * 10)
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=near, atol=near)
    assert ours.group_var.dtype == torch.float32
    torch.testing.assert_close(ours.group_mean, torchs.running_mean)
    torch.testing.assert_close(ours.group_var, torchs.running_var, rtol=1e-4, atol=1e-5)


SHARES = (slice(0, 4), slice(4, 6))  # uneven: a group of six images over two processes
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def take_step(dtype: torch.dtype, share: slice, processes: int) -> dict[str, Tensor]:
    """What one process sees of a step on one group, its gradients summed over the processes."""
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm2d(6), nn.Conv2d(6, 8, 3), nn.ReLU(), BatchNorm2d(8)).to(dtype)
    for layer in (model[0], model[3]):
        randomize(layer)
    statistics = RunningStatistics(model)
    if processes > 1:
        share_groups(model, lambda tensor: functional_all_reduce(tensor, "sum", dist.group.WORLD), processes)
    images = torch.randn(6, 6, 5, 5, dtype=dtype)[share].requires_grad_()
    weights = torch.randn(6, 8, 3, 3, dtype=dtype)[share]
    output = model(images)
    statistics.accumulate()
    if processes > 1:
        statistics.reduce(dist.all_reduce)
    statistics.advance(num_groups=1)
    (output * weights).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    if processes > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {"images": images.grad, "output": output.detach(), **gradients, **model.state_dict()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    steps = [take_step(dtype, SHARES[rank], processes=2) for dtype in TOLERANCES]
    torch.save(steps, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_sharing_a_group_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (dtype, tolerance), *of_ranks in zip(TOLERANCES.items(), *ranks, strict=True):
        for name, expected in take_step(dtype, slice(0, 6), processes=1).items():
            per_image = name in ("images", "output")
            both = [torch.cat([step[name] for step in of_ranks])] if per_image else [step[name] for step in of_ranks]
            for actual in both:
                # A sum that cancels (the bias before a BN has gradient 0) is exact to its terms, which are of order 1.
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=f"{name} in {dtype}")
            if "running" in name:
                assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@settings(max_examples=15, deadline=None)
@given(num_groups=st.integers(2, 5), group_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_groups_at_once_are_groups_one_after_another_to_the_last_bit(
    dtype: torch.dtype, layout: torch.memory_format, num_groups: int, group_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    alone, together = BatchNorm2d(5), BatchNorm2d(5)
    for parameter in (alone.weight, alone.bias):
        torch.nn.init.normal_(parameter)
    together.load_state_dict(alone.state_dict())
    group_images(together, group_size)
    images, gradient = (
        torch.randn(num_groups * group_size, 5, 6, 7).to(dtype).contiguous(memory_format=layout) for _ in range(2)
    )
    ones, all_ = images.clone().requires_grad_(), images.clone().requires_grad_()
    outs, mean, var = [], torch.zeros(5), torch.zeros(5)
    for group, out_gradient in zip(ones.split(group_size), gradient.split(group_size), strict=True):
        out = alone(group)
        out.backward(out_gradient, retain_graph=True)
        outs.append(out.detach())
        mean, var = mean + alone.group_mean, var + alone.group_var
    out = together(all_)
    out.backward(gradient)
    assert torch.equal(out, torch.cat(outs))
    assert torch.equal(all_.grad, ones.grad)
    assert torch.equal(together.weight.grad, alone.weight.grad)
    assert torch.equal(together.bias.grad, alone.bias.grad)
    torch.testing.assert_close(together.group_mean, mean)
    torch.testing.assert_close(together.group_var, var)
    group_images(together, len(images) + 1)
    with pytest.raises(ValueError, match="no whole number of batch-norm groups"):
        together(images)


def test_a_group_that_is_not_finite_spoils_no_other_and_no_later_one() -> None:
    layer, images = BatchNorm2d(2), torch.randn(6, 2, 3, 3)
    group_images(layer, 3)
    images[0, 0, 0, 0] = torch.nan
    out = layer(images)
    assert out[:3, 0].isnan().all()
    assert out[3:].isfinite().all()
    assert layer(torch.randn(6, 2, 3, 3)).isfinite().all()
    assert layer.group_mean.isfinite().all()


def test_a_compiled_network_normalizes_by_group() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
    model = nn.Sequential(first, BatchNorm2d(4), nn.ReLU(), second, BatchNorm2d(4))
    compiled, plain = copy.deepcopy(model), model
    images, target = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.randn(8, 4, 12, 12)
    statistics = [RunningStatistics(each) for each in (compiled, plain)]
    for each in (compiled, plain):
        group_images(each, 4)
    forward = torch.compile(compiled, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        losses = [(f(images + step) * target).square().sum() for f in (forward, plain)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
        for loss, each in zip(losses, statistics, strict=True):
            loss.backward()
            each.accumulate()
            each.advance(num_groups=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (name, a), b in zip(compiled.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()), msg=name)


def test_a_network_of_which_only_some_layers_are_compiled() -> None:
    torch.manual_seed(0)
    stem = torch.compiler.disable(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNorm2d(4)))
    model = nn.Sequential(stem, nn.Conv2d(4, 4, 3, bias=False), BatchNorm2d(4))
    plain = copy.deepcopy(model)
    statistics, forwards = [RunningStatistics(each) for each in (model, plain)], (torch.compile(model), plain)
    images = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        for forward, each in zip(forwards, statistics, strict=True):
            forward(images)
            each.accumulate()
            each.advance(num_groups=1)
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
