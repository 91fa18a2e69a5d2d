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
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, _BatchNorm) or isinstance(layer, BatchNorm2d):
                continue
            where = f"{parent_name}.{name}".lstrip(".")
            if type(layer) is not nn.BatchNorm2d or not layer.affine or not layer.track_running_stats:
                raise ValueError(
                    f"model.factory {factory!r}: {where} is a {type(layer).__name__} that cannot follow batch-norm "
                    "groups: use nn.BatchNorm2d with its weights and running statistics"
                )
            ours = BatchNorm2d(layer.num_features, layer.eps, 0.1 if layer.momentum is None else layer.momentum)
            ours.load_state_dict(layer.state_dict())
            setattr(parent, name, ours)


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
