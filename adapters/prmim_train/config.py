"""What a run is: one flat, frozen record of options, checked when it is made.

Every option of the command line is one field of `PretrainConfig`, is documented once, here, and may stand in a YAML
file under the same name.  Options come in layers, each above the one before: the defaults of the class (the published
MAE recipe), a packaged recipe, the user's file, the command line.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from prmim_core import Grid, Schedule, TokenCounts, Transformer, count_tokens, vit_size
from prmim_core.cost import VIT_SIZES

METHODS = ("mae",)
THROWING = ("furthest", "random", "cell", "none")
FURTHEST_FROM = ("visible", "none")
VARIANTS = ("kernel", "interpolate", "conv", "none")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
DIGITS = "digits"

# The fields at which a new group of options begins in `--help`.
GROUP_STARTS = {"data": "Data", "method": "Method", "epochs": "Optimisation", "backend": "Run"}

# Fields that only make sense together with another one: a layer that sets the key drops what lower layers said of
# the others.  (A recipe's width must not survive `--model vit_small` on the command line.)
DEPENDENT_FIELDS = {"model": ("embed_dim", "depth", "num_heads"), "channels": ("mean", "std")}


@dataclass(frozen=True)
class PretrainConfig:
    """The options of a pre-training run.

    The defaults are the published MAE recipe for ViT-B/16 at 224 pixels, with half of all tokens thrown.  Where `data`
    is the embedded `digits`, the command line puts the packaged recipe of that name above them.

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
        The masked image modelling method: `mae`.
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
        Share of all tokens that the encoder does not see.
    throw_ratio
        Share of all tokens (not of the masked ones) that the decoder does not see either.
    throwing
        How the thrown tokens are chosen: `furthest` (the decoded ones lie spread over the image), `random`, `cell` (a
        running cell), or `none` (throw nothing: the dense method).
    furthest_from
        What furthest sampling keeps its distance from at the start: the `visible` tokens, or `none` (the decoded tokens
        keep their distance from each other only).
    stages
        Number of stages in which the thrown tokens are rebuilt, the nearest ones first.
    variant
        How a thrown token is rebuilt from its neighbours: `kernel` (learned weights over offsets), `interpolate`
        (inverse distance), `conv` (3x3 windows), or `none` (it is neither rebuilt nor supervised).
    thrown_weight
        Weight of a thrown token in the loss; that of a decoded token is 1.
    norm_pix
        Predict patches that are normalised by their own mean and standard deviation.
    decoder_dim
        Width of the decoder.
    decoder_depth
        Number of decoder blocks.
    decoder_heads
        Attention heads of the decoder.
    mean
        Mean of each channel, for pixels in [0, 1]. Null: ImageNet's for three channels, else 0.5.
    std
        Standard deviation of each channel. Null: ImageNet's for three channels, else 0.5.
    epochs
        How often the run goes through the training images.
    batch_size
        Images per optimiser step, whatever `accumulate` says.
    accumulate
        Parts a batch is cut into, one after the other, to save memory.
    base_learning_rate
        Peak learning rate for 256 images per step; the rate used is this times `batch_size` / 256.
    min_learning_rate
        Learning rate at the end of the half-cosine.
    warmup_epochs
        Epochs of linear warm-up from zero. Null: a twentieth of the epochs (MAE's 40 of 800).
    weight_decay
        Weight decay of AdamW; none on biases and norms.
    betas
        The two decay rates of AdamW.
    clip_grad
        Largest norm of the gradient; longer ones are scaled down. Null: no clipping.
    precision
        Number format of the forward and backward pass: `float32` or `bfloat16`. Weights are float32 either way.
    compile
        Compile the training step first, where the backend leaves the choice: minutes once, faster steps after.
    device
        Where to compute: `auto` (a GPU where there is one), `cpu` or `cuda`.
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
    keep_checkpoints
        How many checkpoints to keep; older ones are deleted.
    init_weights
        A `.safetensors` file of weights to begin with. Null: random weights.
    eval_limit
        Most images used for the evaluation of frozen features at the end of the run. 0: no evaluation.
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
    mask_ratio: float = 0.75
    throw_ratio: float = 0.5
    throwing: str = "furthest"
    furthest_from: str = "visible"
    stages: int = 2
    variant: str = "kernel"
    thrown_weight: float = 1.0
    norm_pix: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    # Optimisation
    epochs: int = 800
    batch_size: int = 4096
    accumulate: int = 1
    base_learning_rate: float = 1.5e-4
    min_learning_rate: float = 0.0
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    precision: str = "bfloat16"
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    # Run
    backend: str = "torch"
    out: str | None = None
    resume: bool = False
    log_every: int = 10
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    init_weights: str | None = None
    eval_limit: int = 5000
    pictures: int = 6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as YAML gives it
                object.__setattr__(self, field.name, tuple(value))
        self._check_data()
        self._check_method()
        self._check_optimisation()
        self._check_run()

    def _check_data(self) -> None:
        _check_text("data", self.data)
        _check_integer("channels", self.channels, at_least=1)
        _check_range("crop_scale", self.crop_scale, low_open=0.0, high=1.0)
        _check_range("crop_ratio", self.crop_ratio, low_open=0.0, high=math.inf)
        _check_flag("flip", self.flip)
        _check_number("holdout", self.holdout, "in [0, 1)", lambda x: 0 <= x < 1)
        _check_integer("workers", self.workers, at_least=0)

    def _check_method(self) -> None:
        _check_name("method", self.method, METHODS)
        _check_name("model", self.model, tuple(VIT_SIZES))
        for name in ("embed_dim", "depth", "num_heads"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), at_least=1)
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "stages"):
            _check_integer(name, getattr(self, name), at_least=1)
        _check_multiple("decoder_dim", self.decoder_dim, "decoder_heads", self.decoder_heads)
        encoder = self.encoder_size
        _check_multiple("embed_dim", encoder.dim, "num_heads", encoder.heads)
        _check_name("throwing", self.throwing, THROWING)
        _check_name("furthest_from", self.furthest_from, FURTHEST_FROM)
        _check_name("variant", self.variant, VARIANTS)
        _check_number("thrown_weight", self.thrown_weight, "at least 0", lambda x: x >= 0)
        _check_flag("norm_pix", self.norm_pix)
        for name in ("mean", "std"):
            self._check_statistics(name)
        self._check_sizes()
        self._check_ratios()

    def _check_statistics(self, name: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if not isinstance(values, tuple) or len(values) != self.channels:
            raise ValueError(f"{name}: expected one number for each of the {self.channels} channels, got {values!r}")
        for value in values:
            if name == "std":
                _check_number(name, value, "above 0", lambda x: x > 0)
            else:
                _check_number(name, value, "finite", lambda _: True)

    def _check_sizes(self) -> None:
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            for part in size if isinstance(size, tuple) else (size,):
                _check_integer(name, part, at_least=1)
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
        _check_number("mask_ratio", self.mask_ratio, "in (0, 1)", lambda x: 0 < x < 1)
        _check_number("throw_ratio", self.throw_ratio, "in [0, 1)", lambda x: 0 <= x < 1)
        if self.throwing != "none" and self.throw_ratio > self.mask_ratio:
            raise ValueError(
                f"throw_ratio: expected at most mask_ratio ({self.mask_ratio}), since only masked tokens can be thrown"
                f", got {self.throw_ratio}"
            )
        counts = self.counts
        if counts.visible == 0 or counts.masked == 0:
            left = "visible" if counts.visible == 0 else "masked"
            raise ValueError(
                f"mask_ratio: {self.mask_ratio} leaves no {left} token of the {counts.num_tokens} of an image"
            )

    def _check_optimisation(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _check_integer(name, getattr(self, name), at_least=1)
        _check_multiple("batch_size", self.batch_size, "accumulate", self.accumulate)
        _check_number("base_learning_rate", self.base_learning_rate, "above 0", lambda x: x > 0)
        _check_number("min_learning_rate", self.min_learning_rate, "at least 0", lambda x: x >= 0)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected at most the peak learning rate {self.learning_rate:g}, "
                f"got {self.min_learning_rate:g}"
            )
        if self.warmup_epochs is not None:
            _check_number("warmup_epochs", self.warmup_epochs, "at least 0", lambda x: x >= 0)
            if self.warmup_epochs >= self.epochs:
                raise ValueError(
                    f"warmup_epochs: expected fewer than the {self.epochs} epochs, got {self.warmup_epochs:g}"
                )
        _check_number("weight_decay", self.weight_decay, "at least 0", lambda x: x >= 0)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            _check_number("betas", beta, "in [0, 1)", lambda x: 0 <= x < 1)
        if self.clip_grad is not None:
            _check_number("clip_grad", self.clip_grad, "above 0", lambda x: x > 0)
        _check_name("precision", self.precision, PRECISIONS)
        _check_flag("compile", self.compile)
        _check_name("device", self.device, DEVICES)
        _check_integer("seed", self.seed, at_least=0, at_most=2**31 - 1)

    def _check_run(self) -> None:
        _check_text("backend", self.backend)
        for name in ("out", "init_weights"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        _check_flag("resume", self.resume)
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            _check_integer(name, getattr(self, name), at_least=1)
        for name in ("eval_limit", "pictures"):
            _check_integer(name, getattr(self, name), at_least=0)

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
    def counts(self) -> TokenCounts:
        """How many tokens of an image are visible, decoded and thrown."""
        throw_ratio = 0.0 if self.throwing == "none" else self.throw_ratio
        return count_tokens(self.grid.num_tokens, self.mask_ratio, throw_ratio)

    @property
    def schedule(self) -> Schedule:
        """The static part of the plan that the method draws for every image."""
        throwing = "furthest" if self.throwing == "none" else self.throwing
        # Only furthest sampling has a starting point; the other ways know no such choice.
        seed = self.furthest_from if throwing == "furthest" else "visible"
        rules = {"throwing": throwing, "seed": seed}
        return Schedule(self.grid, self.counts, stages=self.stages, **rules)  # type: ignore[arg-type]  # it checks them

    @property
    def encoder_size(self) -> Transformer:
        """The size of the encoder."""
        return vit_size(self.model, self.embed_dim, self.depth, self.num_heads)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, scaled by the number of images per step."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def micro_batch(self) -> int:
        """Images that go through the network at a time."""
        return self.batch_size // self.accumulate

    @property
    def run_path(self) -> Path:
        """The folder of the run: `out`, or one named after the method and the data."""
        if self.out is not None:
            return Path(self.out)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.data).resolve().stem if self.data != DIGITS else DIGITS)
        return Path("runs") / f"{self.method}-{name}"

    def method_options(self) -> dict[str, Any]:
        """Return the arguments of an adapter's `create_method`, the name among them."""
        options: dict[str, Any] = {"name": self.method, "image_size": self.image_shape, "patch_size": self.patch_shape}
        same: tuple[str, ...] = (
            "model",
            "channels",
            "mask_ratio",
            "throw_ratio",
            "throwing",
            "stages",
            "variant",
            "thrown_weight",
        )
        same += ("norm_pix", "mean", "std", "embed_dim", "depth", "num_heads")
        same += ("decoder_dim", "decoder_depth", "decoder_heads")
        options.update({name: getattr(self, name) for name in same})
        options["seed"] = self.furthest_from
        options["init_seed"] = self.seed
        return options


@dataclass(frozen=True)
class Budget:
    """The length of a run in optimiser steps.

    Parameters
    ----------
    num_images
        Training images of one epoch.
    steps_per_epoch
        Steps in which as many images pass as an epoch has; a fraction, as batches go on across epochs.
    total_steps
        Optimiser steps of the whole run.
    warmup_steps
        Steps of linear warm-up.
    checkpoint_steps
        Steps between two checkpoints.
    """

    num_images: int
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int


def training_budget(config: PretrainConfig, num_images: int) -> Budget:
    """Turn the epochs of a configuration into optimiser steps, here and nowhere else.

    Batches go on across epochs, so no image is left out and a batch may be larger than the data set.

    Parameters
    ----------
    config
        The options of the run.
    num_images
        Training images, after the held-out ones are taken away.

    Returns
    -------
    Budget

    Examples
    --------
    >>> budget = training_budget(PretrainConfig(), 1_281_167)  # ImageNet
    >>> budget.total_steps, budget.warmup_steps
    (250228, 12511)
    """
    if num_images < 1:
        raise ValueError(
            f"holdout: expected to leave at least one training image of {config.data}, got {config.holdout}"
        )
    steps_per_epoch = num_images / config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    warmup_epochs = config.epochs / 20 if config.warmup_epochs is None else config.warmup_epochs
    return Budget(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=min(total_steps - 1, round(warmup_epochs * steps_per_epoch)),
        checkpoint_steps=max(1, round(config.checkpoint_every * steps_per_epoch)),
    )


def merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dictionaries of options over each other, the later ones on top.

    A layer that sets an option drops what lower layers said of the options that depend on it (`DEPENDENT_FIELDS`).

    Examples
    --------
    >>> merge_layers({"model": "vit_tiny", "depth": 4, "epochs": 10}, {"model": "vit_small"})
    {'model': 'vit_small', 'epochs': 10}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, dependents in DEPENDENT_FIELDS.items():
            if name in layer:
                for dependent in dependents:
                    merged.pop(dependent, None)
        merged.update(layer)
    return merged


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    folder = resources.files("prmim_train") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_options(name_or_path: str | Path) -> dict[str, Any]:
    """Read the options of a packaged recipe or of a YAML file.

    Parameters
    ----------
    name_or_path
        The name of a packaged recipe (`recipe_names`), else the path of a file.

    Returns
    -------
    dict
        Option name to value, as YAML gave it; names and values are not checked here.

    Raises
    ------
    FileNotFoundError
        If there is neither a recipe nor a file of that name.
    ValueError
        If the file is not YAML, or not a list of `name: value`.
    """
    text = str(name_or_path)
    if text in recipe_names():
        content = (resources.files("prmim_train") / "recipes" / f"{text}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            known = ", ".join(recipe_names())
            raise FileNotFoundError(f"config: expected a YAML file or one of the recipes {known}, got {text!r}")
        content = path.read_text(encoding="utf-8")
    return parse_options(content, text)


def parse_options(content: str, name: str) -> dict[str, Any]:
    """Parse the text of a YAML file of options; see `read_options`."""
    try:
        options = yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ValueError(
            f"config: expected YAML, got an error in {name}{where}: {getattr(error, 'problem', '')}"
        ) from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"config: expected lines of the form 'option: value' in {name}, got {type(options).__name__}")
    return options


def dump_options(config: PretrainConfig) -> str:
    """Return the options of a run as YAML, in their order, without `out` and `resume`, which are no property of it.

    Examples
    --------
    >>> config = PretrainConfig(image_size=(32, 64), warmup_epochs=2)
    >>> PretrainConfig(**parse_options(dump_options(config), "copy")) == config
    True
    """
    options = dataclasses.asdict(config)
    del options["out"], options["resume"]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}: expected text, got {value!r}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r}")


def _check_name(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")


def _check_integer(name: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number {limits}, got {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")


def _check_number(name: str, value: object, expected: str, is_valid: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number {expected}, got {value!r}")
    if not math.isfinite(value) or not is_valid(value):
        raise ValueError(f"{name}: expected a number {expected}, got {value!r}")


def _check_range(name: str, value: object, *, low_open: float, high: float) -> None:
    expected = f"two rising numbers above {low_open:g}" + (f", at most {high:g}" if math.isfinite(high) else "")
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(x, int | float) for x in value):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    low, top = value
    if not low_open < low <= top <= high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_multiple(name: str, value: int, other: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {other} ({divisor}), got {value}")
