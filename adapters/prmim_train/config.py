"""What a run is: one flat, frozen record of options, checked when it is made.

Every option of the command line is one field of `PretrainConfig`, is documented once, here, and may stand in a YAML
file under the same name.  Which options belong to which method is said in `prmim_train.methods`; how recipes, files and
the command line are laid over each other in `prmim_train.layers`.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmim_core import Grid, Schedule, TokenCounts, Transformer, count_tokens, vit_size
from prmim_core.cost import VIT_SIZES
from prmim_core.options import check_schedule
from prmim_train.checks import (
    check_flag,
    check_integer,
    check_multiple,
    check_name,
    check_number,
    check_range,
    check_text,
)
from prmim_train.methods import METHOD_OPTIONS, METHODS, SPECIAL_OPTIONS, MethodTraits
from prmim_train.training_options import TrainingOptions

FURTHEST_FROM = ("visible", "none")
VARIANTS = ("kernel", "interpolate", "conv", "none")
THROW_BY = ("token", "unit")
POSITIONS = ("relative", "absolute")
MASKING = ("attention", "random")
FUSIONS = ("linear", "sum")
DECAYS = ("cosine", "step")
DIGITS = "digits"

# The fields at which a new group of options begins in `--help`.
GROUP_STARTS = {
    "data": "Data",
    "method": "Method",
    "furthest_from": "Options that not every method has",
    "epochs": "Optimisation",
    "backend": "Run",
}

# Arguments of `create_method` that every method has, under the same name as here.
SHARED_OPTIONS = (
    *("model", "embed_dim", "depth", "num_heads", "channels", "mean", "std"),
    *("throwing", "stages", "variant", "thrown_weight", "recompute_blocks"),
)


@dataclass(frozen=True)
class PretrainConfig(TrainingOptions):
    """The options of a pre-training run.

    The defaults are the published MAE recipe for ViT-B/16 at 224 pixels, with half of all tokens thrown; those of the
    other methods are packaged recipes.  Where `data` is the embedded `digits`, the command line puts the recipe of that
    name above the defaults.

    An option that the method does not have may not be set to anything but its default (`prmim_train.methods` has the
    table).

    Parameters
    ----------
    data
        Where the images are: `digits` (1,797 real handwritten digits, embedded), a folder of images, or an `.npz` file.
    channels
        Colour channels of an image. Images with another number are converted where that has a meaning.
    image_size
        Height and width of the training images in pixels: one number, or `height,width`.
    crop_scale
        Smallest and largest share of an image's area that a random crop takes.
    crop_ratio
        Smallest and largest ratio of width to height of a random crop.
    flip
        Mirror half of the crops left to right.
    holdout
        Share of the images that is never trained on, and judges the run at its end.
    workers
        Processes that read and crop images. 0: threads of the main process, which is enough for most disks.
    method
        The masked image modelling method: `mae`, `simmim` or `maskalign`.
    model
        Size of the encoder: `vit_tiny`, `vit_small`, `vit_base`, `vit_large` or `vit_huge`.
    embed_dim
        Width of the encoder, in place of the model's own.
    depth
        Number of encoder blocks, in place of the model's own.
    num_heads
        Attention heads of the encoder, in place of the model's own.
    patch_size
        Height and width of a patch in pixels: one number, or `height,width`.
    mask_ratio
        Share of all tokens that is hidden. Null: the method's own, 0.75 for mae, 0.6 for simmim, 0.7 for maskalign.
    throw_ratio
        Share of all tokens (not of the masked ones) that is thrown: hidden, and not even decoded. Null: the method's
        own, 0.5 for mae, 0.25 for simmim; maskalign decodes nothing and throws all masked tokens.
    throwing
        How the thrown tokens are chosen: `furthest` (the decoded ones lie spread over the image), `random`, `cell` (a
        running cell), or `none` (throw nothing: the dense method). maskalign knows `furthest` and `none`: masked tokens
        are rebuilt, or nothing is done with them.
    stages
        Number of stages in which the thrown tokens are rebuilt, the nearest ones first.
    variant
        How a thrown token is rebuilt from its neighbours: `kernel` (learned weights over offsets), `interpolate`
        (inverse distance), `conv` (3x3 windows), or `none` (it is neither rebuilt nor supervised).
    thrown_weight
        Weight of a thrown token in the loss; that of any other supervised token is 1.
    mean
        Mean of each channel, for pixels in [0, 1]. Null: ImageNet's for three channels, else 0.5.
    std
        Standard deviation of each channel. Null: ImageNet's for three channels, else 0.5.
    furthest_from
        What furthest sampling keeps its distance from at the start: the `visible` tokens, or `none` (the decoded tokens
        keep their distance from each other only).
    norm_pix
        Predict patches that are normalised by their own mean and standard deviation.
    decoder_dim
        Width of the decoder.
    decoder_depth
        Number of decoder blocks.
    decoder_heads
        Attention heads of the decoder.
    mask_unit
        Tokens along each side of what is hidden as a whole: 2 with patches of 16 pixels hides squares of 32.
    throw_by
        What is thrown as a whole: a `token` or a `unit` (see mask_unit).
    position
        How the encoder knows places: `relative` (a learned bias on the attention) or `absolute` (a fixed sine-cosine
        table).
    layer_scale
        Initial value of LayerScale, the learned factor on every branch of a block.
    masking
        How the visible tokens are drawn: by the teacher's `attention`, so that salient ones tend to be visible, or at
        `random`.
    teacher
        The network whose features are aligned with: a folder that holds a CLIP, DINO or DINOv2 vision transformer as
        transformers saves it, or its name on the hub.
    teacher_layers
        How many of the teacher's last layers are aligned with.
    fusion
        How the student's layers are mixed for each of them: `linear` (learned weights that start at the layer of the
        same depth, so both must be equally deep) or `sum` (learned weights that start at the mean of all).
    drop_path
        Rate at which the branches of the last block are dropped for an image, rising linearly from 0 at the first
        block. Null: the method's own, 0.1.
    epochs
        How often the run goes through the training images.
    batch_size
        Images per optimiser step, whatever `accumulate` says.
    accumulate
        Parts a batch is cut into, one after the other, to save memory.
    base_learning_rate
        Peak learning rate for 256 images per step; the rate used is this times `batch_size` / 256.
    min_learning_rate
        Learning rate below which it does not fall after the warm-up.
    decay
        How the learning rate falls after the warm-up: `cosine` (half a cosine to min_learning_rate) or `step`
        (constant, and a tenth of it over the last eighth of the run, as in SimMIM).
    warmup_epochs
        Epochs of linear warm-up from zero. Null: a twentieth of the epochs (MAE's 40 of 800).
    weight_decay
        Weight decay of AdamW; none on biases and norms.
    betas
        The two decay rates of AdamW.
    clip_grad
        Largest norm of the gradient; longer ones are scaled down. Null: no clipping.
    nonfinite
        What becomes of a step whose loss or gradient is not finite, which never changes the weights: `stop` ends the
        run with a rescue checkpoint when the next line of the log is due, `skip` goes on and counts it.
    max_skipped
        With nonfinite=skip: the most such steps in a row; more of them end the run as `stop` does.
    precision
        Number format of the forward and backward pass: `float32` or `bfloat16`. Weights are float32 either way.
    compile
        Compile the training step first, where the backend leaves the choice: minutes once, faster steps after.
    recompute_blocks
        Keep only the inputs of blocks for the backward pass, and compute what is inside them anew then (activation
        checkpointing): less memory for a longer step.
    scan_blocks
        Compile one block of the encoder and loop over it: the first step comes sooner. For the backend `jax` only.
    device
        Where to compute: `auto` (a GPU where there is one), `cpu` or `cuda`.
    parallel
        How several processes or devices share the work: `ddp` (each holds all weights) or `fsdp` (each holds a part of
        weights, gradients and optimiser state).
    seed
        Seed of the weights, of the held-out split, of the order of the images, of the crops and of the masks.
    backend
        Framework that computes: `torch` or `jax`.
    out
        Folder of the run. Null: `runs/METHOD-DATA`.
    resume
        Go on with the run in that folder from its last checkpoint, or begin one where there is none; its own options
        hold unless given again.
    log_every
        Steps between two lines of `metrics.jsonl`.
    checkpoint_every
        Epochs between two checkpoints. One is always written at the end.
    checkpoint_minutes
        Minutes after which a checkpoint is written in any case. Null: by epochs alone.
    keep_checkpoints
        How many checkpoints to keep; older ones are deleted.
    tracker
        Where the numbers of metrics.jsonl go besides: `none`, `tensorboard`, `wandb` or `mlflow`.
    init_weights
        A `.safetensors` file of weights to begin with. Null: random weights.
    eval_limit
        Most images used for the evaluation of frozen features at the end of the run. 0: no evaluation.
    probe_every
        Epochs between two evaluations of the frozen features during the run, for which it needs labels; they go into
        metrics.jsonl and into the picture of the loss, and change nothing of the training. Null: none.
    pictures
        Number of held-out images in the pictures drawn at the end of the run. 0: no pictures.

    Raises
    ------
    ValueError, TypeError
        If an option is of the wrong kind, out of its range, or contradicts another one; the message is one line.

    Examples
    --------
    >>> config = PretrainConfig(image_size=(224, 448), model="vit_small")
    >>> config.grid.shape, config.counts
    ((14, 28), TokenCounts(visible=98, decoded=98, thrown=196))
    >>> PretrainConfig(throw_ratio=0.8)
    Traceback (most recent call last):
    ...
    ValueError: throw_ratio: expected at most mask_ratio (0.75), since only masked tokens can be thrown, got 0.8
    >>> PretrainConfig(method="simmim", decoder_dim=256)
    Traceback (most recent call last):
    ...
    ValueError: decoder_dim: method simmim has no such option
    """

    # Data
    data: str = DIGITS
    channels: int = 3
    image_size: int | tuple[int, ...] = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    holdout: float = 0.1
    workers: int = 0
    # Method
    method: str = "mae"
    model: str = "vit_base"
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | tuple[int, ...] = 16
    mask_ratio: float | None = None
    throw_ratio: float | None = None
    throwing: str = "furthest"
    stages: int = 2
    variant: str = "kernel"
    thrown_weight: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    # Options that not every method has: the table in methods.py says which has which.
    furthest_from: str = "visible"
    norm_pix: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_unit: int = 2
    throw_by: str = "token"
    position: str = "relative"
    layer_scale: float = 0.1
    masking: str = "attention"
    teacher: str | None = None
    teacher_layers: int = 5
    fusion: str = "linear"
    drop_path: float | None = None
    # Optimisation
    epochs: int = 800
    batch_size: int = 4096
    accumulate: int = 1
    base_learning_rate: float = 1.5e-4
    min_learning_rate: float = 0.0
    decay: str = "cosine"
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    nonfinite: str = "stop"
    max_skipped: int = 10
    precision: str = "bfloat16"
    compile: bool = False
    recompute_blocks: bool = False
    scan_blocks: bool = False
    device: str = "auto"
    parallel: str = "ddp"
    seed: int = 0
    # Run
    backend: str = "torch"
    out: str | None = None
    resume: bool = False
    log_every: int = 10
    checkpoint_every: int = 20
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 2
    tracker: str = "none"
    init_weights: str | None = None
    eval_limit: int = 5000
    probe_every: int | None = None
    pictures: int = 6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as YAML gives it
                object.__setattr__(self, field.name, tuple(value))
        self._check_data()
        self._check_method()
        self._check_training()
        self._check_own()

    def _check_data(self) -> None:
        check_text("data", self.data)
        check_integer("channels", self.channels, at_least=1)
        check_range("crop_scale", self.crop_scale, low_open=0.0, high=1.0)
        check_range("crop_ratio", self.crop_ratio, low_open=0.0, high=math.inf)
        check_flag("flip", self.flip)
        check_number("holdout", self.holdout, "in [0, 1)", lambda x: 0 <= x < 1)

    def _check_method(self) -> None:
        check_name("method", self.method, tuple(METHODS))
        self._check_foreign()
        check_name("model", self.model, tuple(VIT_SIZES))
        for name in ("embed_dim", "depth", "num_heads"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), at_least=1)
        check_integer("stages", self.stages, at_least=1)
        encoder = self.encoder_size
        check_multiple("embed_dim", encoder.dim, "num_heads", encoder.heads)
        check_name("throwing", self.throwing, self.traits.throwing)
        check_name("variant", self.variant, VARIANTS)
        check_number("thrown_weight", self.thrown_weight, "at least 0", lambda x: x >= 0)
        for name in ("mean", "std"):
            self._check_statistics(name)
        self._check_mae()
        self._check_sizes()
        self._check_simmim()
        self._check_maskalign()
        self._check_ratios()

    def _check_foreign(self) -> None:
        """Refuse options of other methods: whoever sets one expects it to do something."""
        for field in dataclasses.fields(self):
            if field.name in self.foreign_options and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: method {self.method} has no such option")

    def _check_mae(self) -> None:
        check_name("furthest_from", self.furthest_from, FURTHEST_FROM)
        check_flag("norm_pix", self.norm_pix)
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            check_integer(name, getattr(self, name), at_least=1)
        check_multiple("decoder_dim", self.decoder_dim, "decoder_heads", self.decoder_heads)

    def _check_simmim(self) -> None:
        check_integer("mask_unit", self.mask_unit, at_least=1)
        if self.method == "simmim" and any(length % self.mask_unit for length in self.grid.shape):
            raise ValueError(
                f"mask_unit: expected a divisor of the grid {_times(self.grid.shape)}, got {self.mask_unit}"
            )
        check_name("throw_by", self.throw_by, THROW_BY)
        check_name("position", self.position, POSITIONS)
        check_number("layer_scale", self.layer_scale, "in (0, 1)", lambda x: 0 < x < 1)
        if self.drop_path is not None:
            check_number("drop_path", self.drop_path, "in [0, 1)", lambda x: 0 <= x < 1)

    def _check_maskalign(self) -> None:
        check_name("masking", self.masking, MASKING)
        check_integer("teacher_layers", self.teacher_layers, at_least=1)
        check_name("fusion", self.fusion, FUSIONS)
        if self.teacher is not None:
            check_text("teacher", self.teacher)
        elif self.method == "maskalign":
            raise ValueError(
                "teacher: expected a folder with a vision transformer, or its name on the hub, got nothing"
            )

    def _check_statistics(self, name: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if not isinstance(values, tuple) or len(values) != self.channels:
            raise ValueError(f"{name}: expected one number for each of the {self.channels} channels, got {values!r}")
        for value in values:
            if name == "std":
                check_number(name, value, "above 0", lambda x: x > 0)
            else:
                check_number(name, value, "finite", lambda _: True)

    def _check_sizes(self) -> None:
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            for part in size if isinstance(size, tuple) else (size,):
                check_integer(name, part, at_least=1)
        image = self.image_shape
        if len(image) != 2:
            raise ValueError(f"image_size: expected one number or height,width, got {self.image_size!r}")
        if len(self.patch_shape) != len(image):
            raise ValueError(f"patch_size: expected one number or height,width, got {self.patch_size!r}")
        if any(size % patch for size, patch in zip(image, self.patch_shape, strict=True)):
            raise ValueError(
                f"image_size: expected a multiple of the patch size {_times(self.patch_shape)}, got {_times(image)}"
            )

    def _check_ratios(self) -> None:
        check_number("mask_ratio", self.mask_share, "in (0, 1)", lambda x: 0 < x < 1)
        if self.traits.throw_ratio is None and self.throw_ratio is not None:
            raise ValueError(
                f"throw_ratio: expected null, since method {self.method} throws all masked tokens, "
                f"got {self.throw_ratio!r}"
            )
        if self.throw_ratio is not None:
            check_number("throw_ratio", self.throw_ratio, "in [0, 1)", lambda x: 0 <= x < 1)
        if self.traits.throw_ratio is not None and self.throw_share > self.mask_share:
            raise ValueError(
                f"throw_ratio: expected at most mask_ratio ({self.mask_share}), since only masked tokens can be thrown"
                f", got {self.throw_share}"
            )
        counts = self.counts
        if counts.visible == 0 or counts.masked == 0:
            left = "visible" if counts.visible == 0 else "masked"
            raise ValueError(
                f"mask_ratio: {self.mask_share} leaves no {left} token of the {counts.num_tokens} of an image"
            )

    def _check_own(self) -> None:
        """Check what is neither data nor method, and what no other training has."""
        check_name("decay", self.decay, DECAYS)
        check_flag("recompute_blocks", self.recompute_blocks)
        check_flag("scan_blocks", self.scan_blocks)
        if self.scan_blocks and self.backend != "jax":
            raise ValueError(f"scan_blocks: backend {self.backend} has no such option, only jax")
        if self.init_weights is not None:
            check_text("init_weights", self.init_weights)
        for name in ("eval_limit", "pictures"):
            check_integer(name, getattr(self, name), at_least=0)
        if self.probe_every is not None:
            check_integer("probe_every", self.probe_every, at_least=1)
            if self.eval_limit == 0:
                raise ValueError("probe_every: expected null, since eval_limit is 0, got " + str(self.probe_every))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height and width of the training images."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def image_plane(self) -> tuple[int, int]:
        """`image_shape`, for those who only know planes."""
        height, width = self.image_shape
        return height, width

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Height and width of a patch."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,) * len(self.image_shape)

    @property
    def grid(self) -> Grid:
        """The grid of tokens of one image."""
        return Grid(tuple(size // patch for size, patch in zip(self.image_shape, self.patch_shape, strict=True)))

    @property
    def traits(self) -> MethodTraits:
        """What is special about the method."""
        return METHODS[self.method]

    @property
    def foreign_options(self) -> Collection[str]:
        """The options that the method does not have."""
        return set(SPECIAL_OPTIONS) - set(self.traits.options)

    @property
    def mask_share(self) -> float:
        """The share of masked tokens in effect: `mask_ratio`, or the method's own."""
        return self.traits.mask_ratio if self.mask_ratio is None else self.mask_ratio

    @property
    def throw_share(self) -> float:
        """The share of thrown tokens in effect, of all: `throw_ratio`, or the method's own; 1: all that are masked."""
        if self.traits.throw_ratio is None:
            return 1.0
        if self.throwing == "none":
            return 0.0
        return self.traits.throw_ratio if self.throw_ratio is None else self.throw_ratio

    @property
    def is_rebuilt(self) -> bool:
        """Whether there are thrown tokens, and they are rebuilt and supervised."""
        is_wanted = self.throwing != "none" and self.variant != "none" and self.thrown_weight > 0
        return is_wanted and self.counts.thrown > 0

    @property
    def drop_rate(self) -> float:
        """The rate of dropped branches in effect: `drop_path`, or the method's own."""
        return self.traits.drop_path if self.drop_path is None else self.drop_path

    @property
    def unit(self) -> tuple[int, ...]:
        """Tokens along each axis of what is hidden as a whole."""
        return (self.mask_unit if self.method == "simmim" else 1,) * self.grid.axes

    @property
    def counts(self) -> TokenCounts:
        """How many tokens of an image are visible, decoded and thrown."""
        unit = math.prod(self.unit)
        throw_unit = unit if self.throw_by == "unit" else 1
        shares = (self.mask_share, self.throw_share)
        return count_tokens(self.grid.num_tokens, *shares, mask_unit=unit, throw_unit=throw_unit)

    @property
    def schedule(self) -> Schedule:
        """The static part of the plan that the method draws for every image."""
        unit = self.unit if self.throw_by == "unit" else None
        return check_schedule(self.grid, self.counts, self.stages, self.throwing, self.furthest_from, unit=unit)

    @property
    def encoder_size(self) -> Transformer:
        """The size of the encoder."""
        return vit_size(self.model, self.embed_dim, self.depth, self.num_heads)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in effect: `warmup_epochs`, or a twentieth of all."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def run_path(self) -> Path:
        """The folder of the run: `out`, or one named after the method and the data."""
        if self.out is not None:
            return Path(self.out)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.data).resolve().stem if self.data != DIGITS else DIGITS)
        return Path("runs") / f"{self.method}-{name}"

    def method_options(self) -> dict[str, Any]:
        """Return the arguments of an adapter's `create_method`, the name among them: only those that the method has."""
        options = {name: getattr(self, name) for name in (*SHARED_OPTIONS, *METHOD_OPTIONS[self.method])}
        options.update(name=self.method, image_size=self.image_shape, patch_size=self.patch_shape, init_seed=self.seed)
        options["mask_ratio"] = self.mask_share
        options["throw_ratio"] = None if self.traits.throw_ratio is None else self.throw_share
        if "furthest_from" in options:
            options["seed"] = options.pop("furthest_from")
        if "drop_path" in options:
            options["drop_path"] = self.drop_rate
        if self.scan_blocks:
            options["scan_blocks"] = True
        return options


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
