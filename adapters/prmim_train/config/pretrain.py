"""The options of a pre-training run: the trainer's, and the method's record.

Files and the command line hold all options in one flat list: :func:`pretrain_config` reads it,
:meth:`PretrainConfig.flat` returns it.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prmim_core import counter_noise, make_plan
from prmim_methods import METHODS, MAEConfig, MethodConfig, create_config
from prmim_methods.files import expanded
from prmim_methods.messages import one_line, shown
from prmim_methods.methods import METHOD_OPTION
from prmim_methods.record import find_option, option, options, record
from prmim_train.config.axes import ThreeAxes
from prmim_train.config.training import DIGITS, VOLUME_EXAMPLE, TrainingOptions

OF_IMAGES = {"image_size", "patch_size"}
"""Options of methods that describe the images, so a change of the method keeps them."""

TRIED = 2
"""Images on which a custom throwing function is tried with NumPy arrays, before a run starts."""


@record
class PretrainConfig(TrainingOptions):
    """The options of a pre-training run.

    The defaults are the published recipe of MAE for ViT-B/16 at 224 pixels. ``method`` is the record of the method.
    """

    group: ClassVar[str] = "Run"

    method: MethodConfig = MAEConfig()  # frozen

    scale_learning_rate: bool = option(
        "Multiply the learning rate by supervised / masked tokens, as CrossMAE does. The ratio is less than 1 with "
        "reconstruction none or thrown_weight 0.",
        default=False,
    )
    attention_start: int = option(
        "Epochs before throwing=weighted first computes the attention to all training images. Until then, masks are "
        "drawn uniformly.",
        default=41,
        at_least=1,
    )
    attention_every: int = option("Epochs between two passes that compute attention.", default=40, at_least=1)
    init_weights: str | None = option(
        "Initial weights: a run, a file of prmim, a checkpoint of other code (see prmim import), or a name on the hub. "
        "If the decoders differ, only the encoder is loaded. Null: random weights.",
        default=None,
    )
    eval_limit: int = option(
        "Maximum number of images for the final evaluation of frozen features. 0: no evaluation.",
        default=5000,
        at_least=0,
    )
    probe_every: int | None = option(
        "Epochs between two evaluations of frozen features during training (needs labels). Null: none.",
        default=None,
        at_least=1,
    )
    pictures: int = option(
        "Number of held-out images in the final pictures. 0: no pictures.", default=6, at_least=0, at_most=1000
    )

    def check(self) -> None:
        """Validate options that depend on one another."""
        if self.scale_learning_rate and self.method.num_supervised is None:
            raise ValueError(f"scale_learning_rate: method {self.method.name} has no such option")
        super().check()
        self._check_axes()
        self._check_functions()
        if self.method.scan_blocks and self.backend != "jax":
            raise ValueError(f"scan_blocks: backend {self.backend} has no such option, only jax")
        if self.method.needs_weights and self.attention_start >= self.epochs:
            raise ValueError(
                f"attention_start: expected fewer than the {self.epochs} epochs, got {self.attention_start}"
            )
        if self.method.needs_weights and self.crop_padding is not None:
            raise ValueError(f"crop_padding: expected null with throwing weighted, got {self.crop_padding}")
        if self.probe_every is not None and self.eval_limit == 0:
            raise ValueError(f"probe_every: expected null, since eval_limit is 0, got {self.probe_every}")

    def _check_functions(self) -> None:
        """Validate custom functions.

        They must be import paths, since runs store paths. The throwing function is tried.
        """
        for item in options(type(self.method)):
            value = getattr(self.method, item.name)
            if item.takes_function and not isinstance(value, str):
                raise TypeError(f"{item.name}: expected an import path, package.module:function, got {shown(value)}")
        schedule = self.method.schedule
        if not callable(schedule.throwing):
            return
        noise = counter_noise(0, 0, np.arange(TRIED), schedule.counts.num_tokens)
        try:
            make_plan(schedule, noise)
        except Exception as error:  # whatever the function raises
            path = self.method.in_words("throwing")
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(one_line(f"throwing: expected {path} to choose decoded tokens, got {reason}")) from error

    def _check_axes(self) -> None:
        axes = len(self.method.image_size)
        if self.volumes and axes != 3:
            raise ValueError(
                f"image_size: expected depth,height,width with volumes, as in {VOLUME_EXAMPLE}, got "
                f"{self.method.image_size}"
            )
        if self.frame_stride > 1 and axes != 3:
            raise ValueError(f"frame_stride: expected 1 for images of {axes} axes, got {self.frame_stride}")
        if axes != 2 and self.method.needs_weights:
            raise ValueError(f"throwing: expected another choice than weighted for images of {axes} axes, got weighted")
        if axes == 2 or (axes == 3 and self.method.predicts == "pixels"):
            return
        expected = {
            "pixels": "one number, height,width or frames,height,width",
            "features": "one number or height,width",
        }
        raise ValueError(f"image_size: expected {expected[self.method.predicts]}, got {self.method.image_size}")

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, scaled by the batch size.

        Optionally also scaled by the fraction of supervised tokens.
        """
        supervised, masked = self.supervision
        return super().learning_rate * supervised / masked

    @property
    def supervision(self) -> tuple[int, int]:
        """Supervised and masked tokens; their ratio scales the learning rate.

        (1, 1) if the rate is not scaled.
        """
        supervised = self.method.num_supervised if self.scale_learning_rate else None
        return (1, 1) if supervised is None else (supervised, self.method.counts.masked)

    @property
    def attention_passes(self) -> int:
        """Number of passes over the training images that compute attention maps."""
        if not self.method.needs_weights:
            return 0
        return len(range(self.attention_start, self.epochs, self.attention_every))

    def flat(self) -> dict[str, Any]:
        """Return all options by name; the inverse of :func:`pretrain_config`.

        Includes the options of the method.

        Examples
        --------
        >>> config = pretrain_config(image_size=(32, 64), warmup_epochs=2)
        >>> pretrain_config(**config.flat()) == config
        True
        """
        method = {item.name: getattr(self.method, item.name) for item in options(type(self.method))}
        del method["init_seed"]  # follows from the seed
        return {"method": self.method.name, **method, **super().flat()}

    @property
    def three_axes(self) -> ThreeAxes | None:
        """How clips or volumes are sampled along their first axis; None for images."""
        return self.sampled_axes(self.method.image_size)

    @property
    def run_path(self) -> Path:
        """The folder of the run."""
        return run_folder(self.out, self.method.name, self.data)


def run_folder(out: str | None = None, method: str = METHOD_OPTION.default, data: str = DIGITS, **others: Any) -> Path:
    """Return the folder of a run with these options; the others do not matter.

    Examples
    --------
    >>> print(run_folder(data="photos/birds", epochs=3))
    runs/mae-birds
    """
    if out is not None:
        return expanded(out)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(data).resolve().name if data != DIGITS else DIGITS)
    return Path("runs") / f"{method}-{name}"


def pretrain_config(**given: Any) -> PretrainConfig:
    """Create a configuration from a flat list of options.

    Files and the command line hold such lists.

    Parameters
    ----------
    **given
        ``method``, the name of the method, its options, and those of :class:`PretrainConfig`. ``seed`` also seeds the
        initial weights.

    Raises
    ------
    ValueError, TypeError
        If an option is unknown, not allowed, or contradicts another one.

    Examples
    --------
    >>> config = pretrain_config(method="simmim", throw_ratio=0.5, epochs=100)
    >>> config.method.counts, config.epochs
    (TokenCounts(visible=76, decoded=22, thrown=98), 100)
    >>> pretrain_config(throw_ratio=0.8)
    Traceback (most recent call last):
    ...
    ValueError: throw_ratio: expected at most mask_ratio 0.75, got 0.8
    """
    name = given.pop("method", METHOD_OPTION.default)
    own = {item.name for item in options(PretrainConfig)}
    seed = find_option(PretrainConfig, "seed")
    of_method = {name: value for name, value in given.items() if name not in own}
    method = create_config(name, init_seed=seed.check(given.get("seed", seed.default)), **of_method)
    return PretrainConfig(method=method, **{name: value for name, value in given.items() if name in own})


def change(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """Return a copy of a configuration with some flat options replaced."""
    return pretrain_config(**{**config.flat(), **changes})


def pretrain_option_names() -> set[str]:
    """Return the names of all flat options, of every method."""
    of_methods = {item.name for method in METHODS.values() for item in options(method)}
    return {"method", *of_methods, *(item.name for item in options(PretrainConfig))} - {"init_seed"}


def special_option_names() -> set[str]:
    """Return the names of the options that differ between methods.

    Some methods lack them, or have other defaults or choices.
    """
    records = [{item.name: item for item in options(method)} for method in METHODS.values()]
    defaults = [{name: (item.default, item.help) for name, item in known.items()} for known in records]
    shared = {name for name, value in defaults[0].items() if all(name in d and d[name] == value for d in defaults)}
    return {name for known in defaults for name in known} - shared - OF_IMAGES
