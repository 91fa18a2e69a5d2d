"""The networks against the paper's Table 1, its section 4.2, and parameter counts known from elsewhere."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from orchestrator.models import (
    VGG,
    CifarResNet,
    Family,
    Pool,
    ResNet,
    Shortcut,
    StrideOn,
    build,
    count_flops,
    count_layers,
    count_parameters,
)
from orchestrator.models.resnet import BasicBlock, Bottleneck, Projection, ZeroPadding

DEPTHS = (18, 34, 50, 101, 152)


def on_meta(family: Family, depth: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build(family, depth, **{"num_classes": 1000, **options})


def num_convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


# FLOPs of the paper are in 1e9 multiply-adds, rounded to a tenth; convolutions (projections included) from the
# released prototxt for 50 and deeper; parameters from torchvision (option B, as the stride's place changes none).
@pytest.mark.parametrize(
    ("depth", "paper_flops", "convolutions", "parameters"),
    [
        (18, 1.8e9, 20, 11_689_512),
        (34, 3.6e9, 36, 21_797_672),
        (50, 3.8e9, 53, 25_557_032),
        (101, 7.6e9, 104, 44_549_160),
        (152, 11.3e9, 155, 60_192_808),
    ],
)
def test_imagenet_resnets_have_the_papers_size(
    depth: int, paper_flops: float, convolutions: int, parameters: int
) -> None:
    model = on_meta(Family.RESNET, depth)
    assert count_layers(model) == depth
    assert num_convolutions(model) == convolutions
    assert count_parameters(model) == parameters
    assert count_flops(model, 224) == pytest.approx(paper_flops, rel=0.02)


@pytest.mark.parametrize("depth", DEPTHS)
def test_plain_nets_are_residual_nets_without_shortcuts(depth: int) -> None:
    plain = on_meta(Family.PLAIN, depth)
    option_a = on_meta(Family.RESNET, depth, shortcut=Shortcut.A)
    assert count_layers(plain) == depth
    assert num_convolutions(plain) == depth - 1
    assert all(b.downsample is None for b in plain.modules() if isinstance(b, BasicBlock | Bottleneck))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in option_a.state_dict().items()}


@pytest.mark.parametrize("depth", DEPTHS)
def test_options_differ_in_their_projections_alone(depth: int) -> None:
    parameters, projections = [], []
    for shortcut in Shortcut:
        model = on_meta(Family.RESNET, depth, shortcut=shortcut)
        of_model = [m for m in model.modules() if isinstance(m, Projection)]
        projections.append(len(of_model))
        parameters.append(count_parameters(model) - sum(map(count_parameters, of_model)))
        assert count_layers(model) == depth
    # Basic blocks change size in three stages; a bottleneck's first stage also goes from 64 to 256 channels.
    num_blocks = (depth - 2) // (2 if depth < 50 else 3)
    assert projections == [0, 3 if depth < 50 else 4, num_blocks]
    assert len(set(parameters)) == 1


@pytest.mark.parametrize(
    ("depth", "parameters", "paper_flops"), [(16, 138_357_544, 15.47e9), (19, 143_667_240, 19.6e9)]
)
def test_vgg_has_the_papers_size(depth: int, parameters: int, paper_flops: float) -> None:
    model = on_meta(Family.VGG, depth)
    assert count_layers(model) == depth
    assert count_parameters(model) == parameters
    assert count_flops(model, 224) == pytest.approx(paper_flops, rel=0.003)


@pytest.mark.parametrize(
    ("depth", "paper_parameters"),
    [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6), (1202, 19.4e6)],
)
def test_cifar_nets_have_the_papers_size(depth: int, paper_parameters: float) -> None:
    model = on_meta(Family.CIFAR_RESNET, depth, num_classes=10)
    assert count_layers(model) == depth
    assert count_parameters(model) == pytest.approx(paper_parameters, rel=0.02)
    if depth < 200:
        plain = on_meta(Family.CIFAR_PLAIN, depth, num_classes=10)
        assert count_parameters(plain) == count_parameters(model)


def test_smallest_cifar_net_by_hand() -> None:
    assert count_parameters(CifarResNet(20)) == 269_722


def test_flops_are_counted_by_hand_and_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, groups=1), nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.Flatten())
    model.append(nn.Linear(8 * 4 * 4, 5))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert count_flops(model, 8) == 16 * 8 * 27 + 16 * 8 * 18 + 128 * 5
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("pool", Pool)
@pytest.mark.parametrize(("image_size", "side"), [(224, 7), (64, 2), (192, 6), (640, 20)])
def test_features_of_any_image_size(pool: Pool, image_size: int, side: int) -> None:
    model = on_meta(Family.RESNET, 50, pool=pool)
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    features = model.forward_features(images)
    assert features.shape == (2, 2048, side, side)
    assert model.classify(features).shape == model(images).shape == (2, 1000)


def test_pooling_is_caffes_by_default() -> None:
    pool = ResNet(18, width=4).maxpool
    # Caffe rounds (112 - 3)/2 up and pads nothing: window 0 sees columns 0 to 2, the last one 110 and 111 alone.
    row = torch.arange(112.0).expand(1, 1, 112, 112)
    assert pool(row)[0, 0, 0].tolist() == [*range(2, 112, 2), 111]


@pytest.mark.parametrize(("stride_on", "expected"), [(StrideOn.CONV1X1, (2, 1)), (StrideOn.CONV3X3, (1, 2))])
def test_place_of_the_stride(stride_on: StrideOn, expected: tuple[int, int]) -> None:
    model = on_meta(Family.RESNET, 50, stride_on=stride_on)
    for stage in (model.layer2, model.layer3, model.layer4):
        assert (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) == expected
        assert stage[0].downsample[0].stride == (2, 2)
    assert (model.layer1[0].conv1.stride[0], model.layer1[0].conv2.stride[0]) == (1, 1)


def test_option_a_subsamples_and_appends_zeros() -> None:
    features = torch.randn(2, 3, 5, 5)
    out = ZeroPadding(3, 7, stride=2)(features)
    assert out.shape == (2, 7, 3, 3)
    assert torch.equal(out[:, :3], features[:, :, ::2, ::2])
    assert not out[:, 3:].any()


def test_he_initialization() -> None:
    torch.manual_seed(0)
    for model in (ResNet(18), CifarResNet(20), ResNet(50, residual=False, width=32)):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is None
                expected = math.sqrt(2 / module.weight[0].numel())
                # The deviation of n samples is known to 1/√(2n): five of these.
                tolerance = 5 / math.sqrt(2 * module.weight.numel())
                assert module.weight.std().item() == pytest.approx(expected, rel=tolerance), name
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
                assert (module.momentum, module.eps) == (0.1, 1e-5)
        assert not model.fc.bias.any()
    assert ResNet(18).fc.weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_vgg_initialization_keeps_the_scale() -> None:
    torch.manual_seed(0)
    model = VGG(16, num_classes=10, image_size=32).eval()
    assert model.features[0].weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.1)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert 0.1 < features.square().mean().sqrt() < 10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_zero_gamma_makes_residual_blocks_the_identity(depth: int, training: bool) -> None:
    torch.manual_seed(0)
    model = ResNet(depth, zero_gamma=True, width=4).train(training)
    block = model.layer1[1]
    features = torch.rand(4, 4 * block.expansion, 8, 8)  # positive, as after the rectifier
    assert torch.equal(block(features.clone()), features)
    first = model.layer2[0]
    assert torch.equal(first(features.clone()), first.downsample(features).relu())


def test_zero_gamma_still_learns() -> None:
    torch.manual_seed(0)
    model = ResNet(18, num_classes=3, zero_gamma=True, width=4)
    model(torch.randn(4, 3, 64, 64)).logsumexp(1).sum().backward()
    assert model.layer3[1].bn2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: ResNet(18, num_classes=7, width=4), id="resnet-18"),
        pytest.param(lambda: ResNet(34, num_classes=7, width=4, shortcut=Shortcut.A), id="resnet-34-a"),
        pytest.param(lambda: ResNet(50, num_classes=7, width=4, shortcut=Shortcut.A), id="resnet-50-a"),
        pytest.param(lambda: ResNet(50, num_classes=7, width=4, shortcut=Shortcut.C), id="resnet-50-c"),
        pytest.param(lambda: ResNet(50, num_classes=7, width=4, residual=False), id="plain-50"),
        pytest.param(lambda: CifarResNet(20, 7), id="cifar-20"),
        pytest.param(lambda: CifarResNet(20, 7, residual=False), id="cifar-plain-20"),
        pytest.param(lambda: VGG(16, num_classes=7, image_size=64), id="vgg-16"),
    ],
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_parameter_gets_a_gradient(model, bfloat16: bool) -> None:
    torch.manual_seed(0)
    net = model()
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        logits = net(images)
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_vgg_is_deterministic_in_evaluation_and_tied_to_its_image_size() -> None:
    model = VGG(16, num_classes=7, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    with pytest.raises(ValueError, match="images of 32 pixels"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: ResNet(20), "18, 34, 50, 101, 152"),
        (lambda: VGG(11), "16, 19"),
        (lambda: VGG(16, image_size=31), "at least 32"),
        (lambda: CifarResNet(21), "20, 32, 44, 56, 110"),
        (lambda: CifarResNet(2), "20, 32, 44, 56, 110"),
        (lambda: ResNet(18, residual=False, zero_gamma=True), "residual=True"),
        (lambda: build(Family.PLAIN, 18, num_classes=10, shortcut=Shortcut.A), "no option shortcut"),
        (lambda: build(Family.VGG, 16, num_classes=10, pool=Pool.CAFFE), "no option pool"),
        (lambda: build(Family.CIFAR_RESNET, 20, num_classes=10, zero_gamma=True), "no option zero_gamma"),
    ],
)
def test_mistakes_are_refused_with_advice(make, advice: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=advice):
        make()


def test_every_family_is_built_with_its_options() -> None:
    assert on_meta(Family.VGG, 16, image_size=64).image_size == 64
    assert on_meta(Family.RESNET, 18, num_classes=10).fc.out_features == 10
    model = on_meta(Family.RESNET, 50, stride_on=StrideOn.CONV3X3, pool=Pool.PADDED, shortcut=Shortcut.C)
    assert model.layer2[0].conv2.stride == (2, 2)
    assert model.maxpool.padding == 1
    assert model.layer1[1].downsample is not None
    assert on_meta(Family.CIFAR_PLAIN, 20).layer1[0].downsample is None
    assert on_meta(Family.CIFAR_RESNET, 20).layer1[0].downsample is not None


def test_the_same_seed_gives_the_same_weights() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(ResNet(18, width=4).state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_importing_the_models_needs_torch_alone() -> None:
    code = (
        "import sys, orchestrator.models; "
        "heavy = {'ray', 'mlflow', 'nvidia.dali', 'fsspec', 'scipy', 'pyarrow', 'submitit', 'matplotlib'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
