"""From a config to the parts of a run: model, views, arithmetic."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator import models
from orchestrator.config import Compile, CropStyle, Family, MeanKind, Precision, TrainConfig
from orchestrator.data.cache import ShardCache, default_folder
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Mean
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet, Encoding, Split
from orchestrator.data.views import ColourAxes, TestView, TrainView

_log = logging.getLogger(__name__)


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The config's model for ``num_classes`` classes, initialized from the current random state. Raises ValueError."""
    m = config.model
    if m.factory:
        options = {"shortcut": m.shortcut, "stride_on": m.stride_on, "pool": m.pool, "zero_gamma": m.zero_gamma or None}
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"model.factory has no option {', '.join(given)}: leave it out")
        return models.build_own(m.factory, num_classes=num_classes, image_size=config.input.crop_px)
    return models.build(
        m.family,
        m.depth,
        num_classes=num_classes,
        image_size=config.input.crop_px,
        shortcut=m.shortcut,
        stride_on=m.stride_on,
        pool=m.pool,
        zero_gamma=m.zero_gamma,
    )


def views_of(config: TrainConfig, data: DataSet) -> tuple[TrainView, TestView, Mean, ColourAxes]:
    """Training view, test view, mean and colour axes that the config asks for. Raises ValueError."""
    i = config.input
    view = TrainView(
        crop=i.crop_px,
        style=i.crop_style,
        scale_min=i.scale_min_px,
        scale_max=i.scale_max_px,
        area_min=i.area_min,
        flip=i.flip,
        colour_std=i.colour_std,
        padding=i.padding_px,
    )
    is_padded, is_in_memory = i.crop_style is CropStyle.PADDED, data.manifest.encoding is Encoding.PLANES
    if is_padded != is_in_memory:
        kind = "small images of one size" if is_in_memory else "images of any size"
        raise ValueError(
            f"input.crop_style {i.crop_style.value} does not fit the data set {data.storage.url!r} of {kind}: take "
            + ("a recipe of jobs/cifar10.py" if is_in_memory else "scale_jitter or random_area")
        )
    side = data.manifest.statistics_crop  # of images in memory it is that of the images
    if is_in_memory and i.crop_px != side:
        raise ValueError(
            f"input.crop_px {i.crop_px}: the images have {side} × {side} pixels, and are trained on at that size"
        )
    statistics = data.statistics()
    match i.mean:
        case MeanKind.PIXEL:
            image = torch.from_numpy(statistics["mean_image"]).unsqueeze(0)
            size = (i.crop_px, i.crop_px)
            if image.shape[-2:] != size:
                # The mean of resized views is the resized mean of the views, up to rounding.
                image = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
            mean = Mean(image.squeeze(0).numpy())
        case MeanKind.CHANNEL:
            mean = Mean(statistics["channel_mean"].astype(np.float32))
    axes = ColourAxes(statistics["eigenvalues"], statistics["eigenvectors"])
    return view, TestView(i.crop_px, i.test_shorter_side_px), mean, axes


def sample_stream(config: TrainConfig, train_split: Split) -> SampleStream:
    """The order in which the images of ``train_split`` are seen, and their random numbers."""
    i = config.input
    return SampleStream(len(train_split), config.seed, i.order, train_split.shard_counts, i.window_shards)


def shard_cache(config: TrainConfig, data: DataSet) -> ShardCache | None:
    """This node's copies of a remote data set; None for one that is local or read into memory whole, and
    where no cache is wanted or can be had."""
    p = config.placement
    if data.storage.is_local or p.cache_gb == 0 or data.manifest.encoding is Encoding.PLANES:
        return None
    folder = Path(p.cache_dir) if p.cache_dir else default_folder()
    try:
        return ShardCache(data.storage, data.digest, folder, None if p.cache_gb is None else int(p.cache_gb * 1e9))
    except OSError as error:  # this node's affair: the run goes on without
        _log.warning("no shards are staged on this machine, every image is read from the store: %s: %s", folder, error)
        return None


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What convolutions and products compute in; None: float32 throughout."""
    on_gpu = device.type == "cuda"
    match precision:
        case Precision.FP32 | Precision.TF32:
            return None
        case Precision.BF16:
            return torch.bfloat16
        case Precision.AUTO:
            return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else None


def draws(config: TrainConfig) -> bool:
    """Whether the network draws random numbers in training: VGG's dropout; a user's own network may."""
    return bool(config.model.factory) or config.model.family is Family.VGG


def groups_at_once(config: TrainConfig, device: torch.device) -> int:
    """Batch-norm groups that go through the network together on a worker; 0: all. Raises ValueError."""
    wanted = config.numerics.groups_at_once
    if draws(config):  # a group's draws are its own
        if wanted > 1:
            raise ValueError("numerics.groups_at_once: this network draws random numbers for each group: leave it out")
        return 1
    return wanted or (0 if device.type == "cuda" else 1)


def compile_mode(config: TrainConfig) -> str | None:
    """torch.compile's; None: the network is not compiled."""
    mode = config.numerics.compile
    return None if mode is Compile.OFF else mode.value.replace("_", "-")


def fixed_share(config: TrainConfig, kept: float | None) -> float | None:
    """The part of a batch for the GPU's JPEG engine; None: it may be tuned.

    kept: what the run has been trained with so far, of its checkpoint; None: nothing on a GPU yet.
    """
    if config.numerics.deterministic:
        return 0.0  # the share moves images between two decoders with the batch: not where bits matter
    return kept if config.numerics.hw_decoder_share is None else config.numerics.hw_decoder_share


def decode_settings(
    config: TrainConfig, device: torch.device, cpus: int, kept_share: float | None = None
) -> DecodeSettings:
    """How DALI decodes for a worker on ``device`` with ``cpus`` processors, before anything is tuned.

    kept_share: as in ``fixed_share``; None too where pixels need not be those of the training.
    """
    share, p = fixed_share(config, kept_share), config.placement
    return DecodeSettings(
        device=device.type,
        device_id=device.index or 0,
        num_threads=p.decode_threads or max(1, cpus),
        prefetch_batches=p.prefetch_batches or DecodeSettings.prefetch_batches,
        hw_decoder_share=DecodeSettings.hw_decoder_share if share is None else share,
        half=autocast_dtype(config.numerics.precision, device) is not None,
    )


def open_settings(
    config: TrainConfig, device: torch.device, cpus_of_workers: Sequence[float], kept_share: float | None
) -> dict[str, tuple[float, ...]]:
    """The fields of DecodeSettings that are to be tuned, in that order, with what they may become.

    What the config says, and the share that a checkpoint has kept, is not among them. Equal on all workers.
    """
    on_gpu, p, candidates = device.type == "cuda", config.placement, dict[str, tuple[float, ...]]()
    if not (on_gpu if p.tune_input is None else p.tune_input):
        return candidates
    if on_gpu and fixed_share(config, kept_share) is None:
        candidates["hw_decoder_share"] = (0.0, 0.35, 0.5, 0.65, 0.8, 1.0)
    # Workers that have not the same number of processors could not try the same.
    cpus = int(min(cpus_of_workers))
    if not p.decode_threads and cpus == max(cpus_of_workers) and cpus > 1:
        candidates["num_threads"] = tuple(sorted({max(1, cpus * quarters // 4) for quarters in (1, 2, 3, 4)}))
    if not p.prefetch_batches:
        candidates["prefetch_batches"] = (2, 3, 4)
    return candidates


def set_arithmetic(device: torch.device, *, num_threads: int, deterministic: bool, precision: Precision) -> None:
    """Process-wide settings of torch. A CPU repeats itself in any case, at one number of threads."""
    torch.set_num_threads(num_threads)
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True)
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # read when the compiler is imported, with the first optimizer
    # TF32 is no float32: convolutions use it unless told not to, products where they are told to.
    torch.backends.cudnn.allow_tf32 = precision is not Precision.FP32
    torch.set_float32_matmul_precision("high" if precision is Precision.TF32 else "highest")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
