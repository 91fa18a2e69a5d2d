"""A user's own network, named by the function that makes it."""

import importlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.models.batch_norm import BatchNorm2d


def build_own(factory: str, *, num_classes: int, image_size: int) -> nn.Module:
    """What ``factory`` ("module:function") returns for these, on the current default device.

    It takes images [N, 3, image_size, image_size] and returns logits [N, num_classes]. Its ``nn.BatchNorm2d`` layers
    become ours, whose unit is the batch-norm group, with the same weights. Raises ValueError, saying what to do.
    """
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"model.factory {factory!r} is not of the form module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.factory {factory!r} cannot be imported ({error}): name a function of a module that every worker "
            "can import (its folder in PYTHONPATH, or in the working directory of a submitted job)"
        ) from None
    try:
        model = function(num_classes=num_classes, image_size=image_size)
    except TypeError as error:
        raise ValueError(
            f"model.factory {factory!r} cannot be called with num_classes and image_size: {error}"
        ) from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.factory {factory!r} returned a {type(model).__name__}: it must return an nn.Module")
    _group_batch_norm(model, factory)
    _check_logits(model, factory, num_classes, image_size)
    return model


def _group_batch_norm(model: nn.Module, factory: str) -> None:
    """Every nn.BatchNorm2d of ``model`` becomes a BatchNorm2d of ours, in place."""
    seen: set[int] = set()
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent._modules.items()):
            if not isinstance(layer, _BatchNorm):
                continue
            where = f"{parent_name}.{name}".lstrip(".")
            if id(layer) in seen:
                raise ValueError(
                    f"model.factory {factory!r}: the batch norm {where} is used at another place too, whose statistics "
                    "are others: give each place a layer of its own"
                )
            seen.add(id(layer))
            if isinstance(layer, BatchNorm2d):
                continue
            if type(layer) is not nn.BatchNorm2d or not layer.affine or layer.running_mean is None:
                raise ValueError(
                    f"model.factory {factory!r}: {where} is a {type(layer).__name__} that cannot follow batch-norm "
                    "groups: use nn.BatchNorm2d with its weights and running statistics"
                )
            if layer.momentum is None:
                raise ValueError(f"model.factory {factory!r}: {where} averages for ever: give it a momentum")
            ours = BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
            ours.load_state_dict(layer.state_dict())
            for parameter, theirs in zip(ours.parameters(), layer.parameters(), strict=True):
                parameter.requires_grad_(theirs.requires_grad)
            parent._modules[name] = ours
            seen.add(id(ours))


def _check_logits(model: nn.Module, factory: str, num_classes: int, image_size: int) -> None:
    """By shapes alone, on the meta device."""
    meta = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            images = torch.empty(2, 3, image_size, image_size, device="meta")
            logits = torch.func.functional_call(model, meta, (images,))
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error).split("\n")[0]
        raise ValueError(f"model.factory {factory!r}: images {list(images.shape)} are refused: {text}") from None
    finally:
        model.train(was_training)
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [2, num_classes]:
        raise ValueError(
            f"model.factory {factory!r}: images {list(images.shape)} give {shape}, not logits {[2, num_classes]}"
        )
