"""Parameters, multiply-adds and layers of a model, counted as the paper counts them."""

import torch
from torch import Tensor, nn

from orchestrator.models.resnet import Projection


def count_parameters(model: nn.Module) -> int:
    """Number of trained numbers, BN gamma and beta included (running statistics are not)."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of all convolutions and linear layers for one image of image_size × image_size pixels.

    Table 1 of the paper calls these FLOPs. Nothing is computed: shapes are followed on the meta device, the model
    stays where and as it is."""
    flops = 0

    def add(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal flops
        if isinstance(module, nn.Conv2d):
            flops += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            flops += output.numel() * module.in_features

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            meta = {name: tensor.to("meta") for name, tensor in tensors}
            dtype = next(iter(meta.values())).dtype
            images = torch.empty(1, 3, image_size, image_size, device="meta", dtype=dtype)
            torch.func.functional_call(model, meta, (images,))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return flops


def count_layers(model: nn.Module) -> int:
    """Weighted layers as in the paper's names (ResNet-50): convolutions and linear layers, except the projections on
    shortcuts, which lie beside the depth and do not add to it."""
    beside = {id(m) for p in model.modules() if isinstance(p, Projection) for m in p.modules()}
    return sum(isinstance(m, nn.Conv2d | nn.Linear) and id(m) not in beside for m in model.modules())
