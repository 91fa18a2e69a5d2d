"""Frozen dataclasses of a training job: strict, with a canonical JSON form and a digest that is the identity of a run.

Field comments are the command line's help. A field whose name ends in a unit is in that unit.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.plain import from_plain, to_plain


class Family(Enum):
    """The paper's networks, as a job names them."""

    RESNET = "resnet"
    PLAIN = "plain"
    VGG = "vgg"
    CIFAR_RESNET = "cifar_resnet"
    CIFAR_PLAIN = "cifar_plain"


class Shortcut(Enum):
    """What carries the input past a residual block (section 3.3 of the paper, Table 3)."""

    A = "A"  # identity; zero channels are appended where the size changes: no parameters
    B = "B"  # identity; projection where the size changes
    C = "C"  # projection everywhere


class StrideOn(Enum):
    """The convolution of a bottleneck that halves the resolution. Basic blocks: always the first 3×3."""

    CONV1X1 = "conv1x1"  # as res3a_branch2a of the released prototxt
    CONV3X3 = "conv3x3"  # fb.resnet.torch, torchvision ("v1.5"): about 0.5 % better in top-1, about 5 % slower


class Pool(Enum):
    """The 3×3 maximum with stride 2 after conv1."""

    CAFFE = "caffe"  # no padding, size rounded up: pool1 of the released prototxt
    PADDED = "padded"  # one pixel of padding, size rounded down: fb.resnet.torch, torchvision


class Order(Enum):
    """How an epoch visits the images."""

    FULL = "full"  # a keyed permutation of the whole set
    WINDOWED = "windowed"  # shards permuted, then the images within a window of shards: for sets that no node holds
    SEQUENTIAL = "sequential"  # as they lie in the shards: to look at data, not to train


class CropStyle(Enum):
    """How a training view is chosen."""

    SCALE_JITTER = "scale_jitter"  # shorter side drawn in [scale_min, scale_max], random crop (the paper, VGG)
    RANDOM_AREA = "random_area"  # random area and aspect (Inception; today's usual recipe)
    PADDED = "padded"  # the image padded by padding_px on each side, random crop of its own size (CIFAR in the paper)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    family: Family = Family.RESNET
    """resnet or plain (ImageNet), cifar_resnet or cifar_plain (6n+2 layers), vgg"""
    depth: int = 50
    """layers: 18, 34, 50, 101, 152; CIFAR 6n+2; VGG 16 or 19"""
    shortcut: Shortcut | None = None
    """where the size changes: A zero padding, B projection (the default); C projections everywhere"""
    stride_on: StrideOn | None = None
    """which convolution of a bottleneck has stride 2: the paper's 1x1 (the default), or the 3x3 (v1.5)"""
    pool: Pool | None = None
    """the first pooling: caffe (no padding, ceil), as the paper, is the default; or padded"""
    zero_gamma: bool = False
    """start the last batch norm of every block at zero (Goyal et al. 2017)"""
    factory: str = ""
    """module:function of your own, called with num_classes and image_size; family and depth then mean nothing"""


class MeanKind(Enum):
    """What is subtracted from an image."""

    PIXEL = "pixel"  # the mean image (the paper)
    CHANNEL = "channel"  # one number a channel


@dataclass(frozen=True)
class InputConfig:
    """How images become batches."""

    crop_px: int = 224
    """side of the square the network sees, pixels"""
    crop_style: CropStyle = CropStyle.SCALE_JITTER
    """scale_jitter: shorter side drawn, then a random crop (the paper); random_area: random area and aspect; padded:
    padding, then a random crop (the paper, for CIFAR)"""
    scale_min_px: int = 256
    """smallest shorter side of a training image, pixels (scale_jitter)"""
    scale_max_px: int = 480
    """largest shorter side of a training image, pixels (scale_jitter)"""
    area_min: float = 0.08
    """smallest part of the image's area in a crop (random_area)"""
    padding_px: int = 4
    """pixels of padding on each side of an image (padded)"""
    flip: bool = True
    """mirror half of the training images"""
    colour_std: float = 0.1
    """standard deviation of AlexNet's colour augmentation; 0: none"""
    mean: MeanKind = MeanKind.PIXEL
    """what is subtracted: the mean image (pixel), or one number a channel"""
    test_shorter_side_px: int = 256
    """shorter side of a validation image before its centre crop, pixels"""
    order: Order = Order.FULL
    """order of the images in an epoch: full; windowed, for a remote set that no node can hold"""
    window_shards: int = 16
    """shards whose images are mixed (windowed): more mix better, and need more room in the cache"""
    max_undecodable: int = 50
    """undecodable images, not known from the preparation, that one worker, or a test, puts up with; more stop it"""


@dataclass(frozen=True)
class BatchConfig:
    """The batch and its batch-norm groups."""

    global_batch_size: int = 256
    """images in one optimizer step, over all workers"""
    bn_group_size: int = 32
    """images whose statistics batch norm shares; the global batch is a whole number of groups"""


class PolicyKind(Enum):
    """How the learning rate falls."""

    PLATEAU = "plateau"
    STEPS = "steps"
    COSINE = "cosine"
    CONSTANT = "constant"


class PlateauError(Enum):
    """Which error is watched for a plateau (top-1, percent)."""

    VALIDATION = "validation"
    TRAINING = "training"


class WarmupKind(Enum):
    """How training starts."""

    NONE = "none"
    LINEAR = "linear"  # from warmup_lr to lr in warmup_steps
    UNTIL_ERROR = "until_error"  # warmup_lr until the training error is below warmup_error_percent


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and its learning rate."""

    max_steps: int = 600_000
    """optimizer steps after which training ends (the paper: 60e4)"""
    max_epochs: float = 0.0
    """epochs after which training ends, if sooner; 0: no limit"""
    lr: float = 0.1
    """learning rate for the whole global batch"""
    policy: PolicyKind = PolicyKind.PLATEAU
    """plateau: divide when the error stalls (the paper); steps; cosine; constant"""
    lr_factor: float = 0.1
    """the learning rate is multiplied by this at every drop (plateau, steps)"""
    plateau_error: PlateauError = PlateauError.VALIDATION
    """which top-1 error is watched; it is looked at after every validation"""
    plateau_window: int = 5
    """validations without improvement after which the learning rate drops"""
    plateau_threshold_percent: float = 0.1
    """points of error by which a validation must beat the best one before to count as an improvement"""
    plateau_min_steps: int = 0
    """least optimizer steps between two drops, and before the first"""
    plateau_max_drops: int = 3
    """number of drops"""
    plateau_stop: bool = False
    """end training at the plateau that follows the last drop"""
    drop_steps: tuple[int, ...] = ()
    """optimizer steps at which the learning rate drops (steps)"""
    warmup: WarmupKind = WarmupKind.NONE
    """none; linear; until_error: warmup_lr until the training error is below a bound"""
    warmup_lr: float = 0.01
    """learning rate at the start of the warm-up"""
    warmup_steps: int = 0
    """length of a linear warm-up, optimizer steps"""
    warmup_error_percent: float = 80.0
    """training top-1 error, over log_every_steps, that ends an until_error warm-up, percent"""


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent."""

    momentum: float = 0.9
    """momentum"""
    weight_decay: float = 1e-4
    """weight decay (L2), in the gradient"""
    decay_batch_norm: bool = True
    """weight decay on batch norm's scale and shift and on biases too (the paper's Caffe)"""
    caffe_momentum: bool = True
    """the momentum keeps its length when the learning rate changes (Caffe) instead of shrinking with it (PyTorch)"""


@dataclass(frozen=True)
class RegularizationConfig:
    """What the paper does without."""

    label_smoothing: float = 0.0
    """part of every label that is dealt out over all classes evenly (Szegedy et al. 2015: 0.1)"""
    average_decay: float = 0.0
    """the weights that are tested are an exponential moving average over steps, of this decay; 0: those trained"""


class Precision(Enum):
    """Arithmetic of the forward and backward pass."""

    AUTO = "auto"  # bf16 on a GPU that has it, else fp32
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"


class Compile(Enum):
    """How torch.compile treats the network in training; values are its modes, with _ for -."""

    OFF = "off"  # kernel by kernel: starts at once
    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce_overhead"  # whole passes as CUDA graphs
    MAX_AUTOTUNE = "max_autotune"  # the same, and convolutions are tried out: minutes at every start


@dataclass(frozen=True)
class NumericsConfig:
    """Arithmetic."""

    precision: Precision = Precision.AUTO
    """auto: bf16 autocast on a GPU, fp32 on CPU; tf32: fp32 with convolutions and products in TF32"""
    groups_at_once: int = 0
    """batch-norm groups that go through the network together; 0: all of a worker's on a GPU, one on a CPU"""
    compile: Compile = Compile.OFF
    """torch.compile of the network: off, default, reduce_overhead (CUDA graphs), max_autotune"""
    reduce_in_bf16: bool = False
    """workers add up their gradients in bfloat16: half the bytes, rounded to 8 bits"""
    deterministic: bool = False
    """on a GPU: kernels that give the same bits every time, and no hardware decoder (slower); a CPU always does"""
    hw_decoder_share: float | None = None
    """part of a batch that the GPU's JPEG engine decodes; it alters pixels slightly, so it is part of the run; None:
    tuned at the first start on a GPU and kept in the checkpoints"""


@dataclass(frozen=True)
class RhythmConfig:
    """When things are measured and saved."""

    log_every_steps: int = 100
    """steps between two training measurements"""
    validate_every_epochs: float = 1.0
    """epochs between two validations; one follows the last step in any case"""
    validation_batch_size: int = 100
    """images in a validation batch on one worker"""
    checkpoint_every_steps: int = 1000
    """steps between two checkpoints; every validation makes one too"""
    keep_last: int = 2
    """newest checkpoints that are kept (the best one is kept beside them)"""


@dataclass(frozen=True)
class PlacementConfig:
    """Where the run computes. None of this is part of the run's identity: it may change at every restart."""

    num_workers: int = 0
    """worker processes, one a GPU or some CPUs each; 0: all GPUs of the cluster, or all its CPUs"""
    min_workers: int = 0
    """elastic: goes on with any number from this to num_workers, as nodes come and go; 0: num_workers exactly"""
    cpus_per_worker: int = 0
    """CPU threads of a worker; 0: the node's CPUs shared among its GPUs, or all CPUs among the workers"""
    runs_per_gpu: int = 1
    """runs that share a GPU, of one worker each, for networks that leave most of it idle (CIFAR-10)"""
    use_gpu: bool | None = None
    """None: where the cluster has one; to be said of a cluster that may still grow and has none yet"""
    autoscaling: bool = False
    """the cluster starts machines when they are asked for: wait for them (guard.wait_for_workers_s); of a run, not of a
    campaign"""
    ray_address: str = ""
    """Ray cluster to join; empty: RAY_ADDRESS, else a local one is started"""
    tune_input: bool | None = None
    """at every start the input side is tried with other settings for some seconds, where these are left open: the part
    for the JPEG engine, decoding threads, batches ahead; None: on a GPU"""
    decode_threads: int = 0
    """threads of a worker that decode; 0: tuned; the worker's CPUs where nothing is"""
    prefetch_batches: int = 0
    """batches that the input side works ahead; 0: tuned; 2 where nothing is"""
    cache_dir: str = ""
    """where a node keeps shards of a remote data set; empty: a folder of this user's in TMPDIR"""
    cache_gb: float | None = None
    """GB (10^9 bytes) that this folder may hold on a node; None: half of what is free; 0: no cache"""


@dataclass(frozen=True)
class GuardConfig:
    """What is done when something fails. None of this is part of the run's identity."""

    hang_timeout_s: float = 120.0
    """seconds without a step (or a validation batch) after which the worker that holds the others up is killed"""
    max_failures: int = 20
    """failures of workers that are put up with; every checkpoint gives one back"""
    max_stalled_restarts: int = 5
    """restarts without a new checkpoint in between before the run gives up"""
    max_skipped_steps: int = 5
    """steps left out because a loss or gradient was not finite; more send the run back to the newest checkpoint"""
    storage_patience_s: float = 600.0
    """seconds for which a checkpoint that cannot be stored (disk full, store away) is tried again"""
    wait_for_workers_s: float = 600.0
    """seconds for which a run that has lost its machines, or an elastic one that has too few yet, waits for others"""
    lease_s: float = 30.0
    """seconds of silence after which another driver of the run is taken for dead"""
    take_over: bool = False
    """take the run from another driver whose end cannot be known: only where you know that it is dead"""


class Protocol(Enum):
    """How a trained network is tested."""

    ONE_CROP = "one_crop"  # the centre of the image, its shorter side at test_shorter_side_px
    TEN_CROP = "ten_crop"  # four corners and the centre of that, and mirrored (section 4.1 of the paper)
    MULTI_SCALE = "multi_scale"  # the network over whole images of several sizes, and mirrored


class Average(Enum):
    """What is averaged over views, positions and scales."""

    SOFTMAX = "softmax"  # probabilities (the paper's authors)
    LOGITS = "logits"  # what softmax is taken of (fb.resnet.torch)


class Tested(Enum):
    """Which checkpoint of a run is tested."""

    LAST = "last"
    BEST = "best"  # the lowest validation error: the figure that comes out is a little optimistic


@dataclass(frozen=True)
class EvaluationConfig:
    """What is done with a trained network, by the workers that trained it. Not part of the run's identity."""

    protocols: tuple[Protocol, ...] = ()
    """tests after training: one_crop, ten_crop, multi_scale; empty: none"""
    splits: tuple[str, ...] = ("val",)
    """splits of the data set that are scored: val, test"""
    checkpoint: Tested = Tested.LAST
    """which checkpoint is tested: last, or the best one on the validation set"""
    precise_bn_images: int = 0
    """training images over which batch norm's mean and variance are averaged before the tests; 0: as trained"""
    scales_px: tuple[int, ...] = ()
    """shorter sides of multi_scale, pixels; empty: the paper's 224, 256, 384, 480, 640 in proportion to crop_px"""
    average: Average = Average.SOFTMAX
    """what is averaged over views, positions and scales: softmax, or logits"""
    batch_megapixels: float = 4.0
    """10^6 pixels of views that go through the network at a time on one worker: bounds the memory of multi_scale"""


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow and Prometheus. None of this is part of the run's identity."""

    uri: str = ""
    """tracking store; empty: MLFLOW_TRACKING_URI, else SQLite in the current folder"""
    experiment: str = "imagenet"
    """MLflow experiment"""
    wait_s: float = 60.0
    """seconds that a finished run waits for a slow store before it leaves the rest to the next start"""
    metrics_port: int = 0
    """where a driver serves its numbers for Prometheus; 0: nowhere; a campaign's members: this and those after it"""
    metrics_host: str = "127.0.0.1"
    """address that it listens at; 0.0.0.0: all of the machine's"""
    profile_steps: int = 0
    """steps of a start, after its first ten, that torch's profiler looks at (the same as --profile)"""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str = ""
    """URL of the prepared data set (python -m data_prep.ilsvrc …); empty: IMAGENET_DATA, for CIFAR-10 CIFAR10_DATA"""
    storage: str = ""
    """URL of the folder that holds all runs; empty: IMAGENET_STORAGE"""
    name: str = ""
    """name of the run, a folder inside storage; empty: the recipe's"""
    recipe: str = ""
    """name of the recipe this was derived from: a label"""
    seed: int = 0
    """of the weights, the order and the augmentation"""
    model: ModelConfig = field(default_factory=ModelConfig)
    input: InputConfig = field(default_factory=InputConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    rhythm: RhythmConfig = field(default_factory=RhythmConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data, enums by value."""
        return typing.cast(dict[str, Any], to_plain(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> TrainConfig:
        """Inverse of ``to_json``. Raises ValueError for an unknown, missing or ill-typed field."""
        return typing.cast(TrainConfig, from_plain(TrainConfig, data, "config"))

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but where it computes, where it is stored and recorded.

        The data set enters with its digest, when the run starts.
        """
        plain = self.to_json()
        for key in ("data", "storage", "name", "recipe", "placement", "guard", "evaluation", "tracking"):
            del plain[key]
        # What is kept, and how much is put up with, may change while a run goes on.
        del plain["rhythm"]["keep_last"], plain["input"]["max_undecodable"]
        return plain


def _check(config: TrainConfig) -> None:
    """What can be known to be wrong without looking at data or cluster. Raises ValueError."""
    b, s, r, i, o = config.batch, config.schedule, config.rhythm, config.input, config.optimizer
    wrong = []
    if b.bn_group_size < 1 or b.global_batch_size < 1 or b.global_batch_size % b.bn_group_size:
        wrong.append(
            f"batch.global_batch_size {b.global_batch_size} is no whole number of groups of "
            f"batch.bn_group_size {b.bn_group_size}"
        )
    positive = {
        "model.depth": config.model.depth,
        "schedule.max_steps": s.max_steps,
        "schedule.lr": s.lr,
        "schedule.plateau_window": s.plateau_window,
        "input.window_shards": i.window_shards,
        "rhythm.log_every_steps": r.log_every_steps,
        "rhythm.validate_every_epochs": r.validate_every_epochs,
        "rhythm.validation_batch_size": r.validation_batch_size,
        "rhythm.checkpoint_every_steps": r.checkpoint_every_steps,
        "rhythm.keep_last": r.keep_last,
        "placement.runs_per_gpu": config.placement.runs_per_gpu,
        "guard.hang_timeout_s": config.guard.hang_timeout_s,
        "evaluation.batch_megapixels": config.evaluation.batch_megapixels,
        "guard.lease_s": config.guard.lease_s,
    }
    wrong += [f"{name} must be positive, not {value}" for name, value in positive.items() if not value > 0]
    not_negative = {
        "schedule.max_epochs": s.max_epochs,
        "schedule.plateau_max_drops": s.plateau_max_drops,
        "schedule.warmup_steps": s.warmup_steps,
        "schedule.plateau_threshold_percent": s.plateau_threshold_percent,
        "schedule.plateau_min_steps": s.plateau_min_steps,
        "optimizer.weight_decay": o.weight_decay,
        "input.colour_std": i.colour_std,
        "input.max_undecodable": i.max_undecodable,
        "placement.num_workers": config.placement.num_workers,
        "placement.cpus_per_worker": config.placement.cpus_per_worker,
        "placement.min_workers": config.placement.min_workers,
        "placement.decode_threads": config.placement.decode_threads,
        "placement.prefetch_batches": config.placement.prefetch_batches,
        "tracking.profile_steps": config.tracking.profile_steps,
        "guard.max_failures": config.guard.max_failures,
        "evaluation.precise_bn_images": config.evaluation.precise_bn_images,
        "guard.max_stalled_restarts": config.guard.max_stalled_restarts,
        "guard.max_skipped_steps": config.guard.max_skipped_steps,
        "guard.storage_patience_s": config.guard.storage_patience_s,
        "guard.wait_for_workers_s": config.guard.wait_for_workers_s,
        "placement.cache_gb": config.placement.cache_gb or 0.0,
        "numerics.groups_at_once": config.numerics.groups_at_once,
    }
    wrong += [f"{name} must not be negative, not {value}" for name, value in not_negative.items() if value < 0]
    if not 0 <= config.tracking.metrics_port <= 65_535:
        wrong.append(f"tracking.metrics_port must be in [0, 65535], not {config.tracking.metrics_port}")
    floats = {"schedule.lr": s.lr, "schedule.warmup_lr": s.warmup_lr, "optimizer.weight_decay": o.weight_decay}
    floats |= {"schedule.max_epochs": s.max_epochs, "input.colour_std": i.colour_std}
    floats |= {"schedule.plateau_threshold_percent": s.plateau_threshold_percent}
    floats |= {f"guard.{name}": value for name, value in vars(config.guard).items() if name.endswith("_s")}
    wrong += [f"{name} must be a number, not {value}" for name, value in floats.items() if not math.isfinite(value)]
    if s.warmup is not WarmupKind.NONE and s.warmup_lr <= 0:
        wrong.append(f"schedule.warmup_lr must be positive, not {s.warmup_lr}")
    if not 0 <= config.seed < 2**63:
        wrong.append(f"seed must be in [0, 2**63), not {config.seed}")
    if not 0 <= o.momentum < 1:
        wrong.append(f"optimizer.momentum must be in [0, 1), not {o.momentum}")
    for name, value in vars(config.regularization).items():
        if not 0 <= value < 1:
            wrong.append(f"regularization.{name} must be in [0, 1), not {value}")
    if not 0 < s.lr_factor < 1:
        wrong.append(f"schedule.lr_factor must be in (0, 1), not {s.lr_factor}")
    share = config.numerics.hw_decoder_share
    if share is not None and not 0 <= share <= 1:
        wrong.append(f"numerics.hw_decoder_share must be in [0, 1], not {share}")
    if s.policy is PolicyKind.STEPS and list(s.drop_steps) != sorted(set(s.drop_steps)):
        wrong.append(f"schedule.drop_steps must rise, not {s.drop_steps}")
    if s.policy is PolicyKind.STEPS and not s.drop_steps:
        wrong.append("schedule.policy steps needs schedule.drop_steps")
    if s.warmup is WarmupKind.LINEAR and s.warmup_steps < 1:
        wrong.append("schedule.warmup linear needs schedule.warmup_steps")
    e = config.evaluation
    if small := [px for px in e.scales_px if px < i.crop_px]:
        wrong.append(f"evaluation.scales_px {small} are smaller than input.crop_px {i.crop_px}")
    for each, values in (("protocols", e.protocols), ("splits", e.splits), ("scales_px", e.scales_px)):
        if len(set(values)) < len(values):
            wrong.append(f"evaluation.{each} names one twice")
    if config.placement.min_workers > config.placement.num_workers > 0:
        wrong.append(
            f"placement.min_workers {config.placement.min_workers} is more than placement.num_workers "
            f"{config.placement.num_workers}"
        )
    if config.placement.runs_per_gpu > 1 and max(config.placement.num_workers, config.placement.min_workers) > 1:
        wrong.append(
            "placement.runs_per_gpu: runs that share a GPU have one worker each: leave placement.num_workers out"
        )
    if config.placement.autoscaling and not (config.placement.num_workers or config.placement.min_workers):
        wrong.append(
            "placement.autoscaling without a number of workers asks for no machine: give placement.num_workers, or "
            "placement.min_workers for an elastic run"
        )
    if config.name and (config.name.startswith(".") or "/" in config.name or "\\" in config.name):
        wrong.append(f"name {config.name!r} must be a plain folder name")
    if wrong:
        raise ValueError("; ".join(wrong))
