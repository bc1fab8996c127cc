"""The options of a pre-training run: the trainer's own, and the record of the method.

Files and the command line have all of them in one flat list: :func:`pretrain_config` reads it,
:meth:`PretrainConfig.flat` returns it.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prmim_core import counter_noise, make_plan
from prmim_methods import METHODS, MAEConfig, MethodConfig, create_config
from prmim_methods.messages import one_line, shown
from prmim_methods.methods import METHOD_OPTION
from prmim_methods.record import option, options, record
from prmim_train.config.training import DIGITS, TrainingOptions

OF_IMAGES = {"image_size", "patch_size"}
"""Options of methods that follow from the images, so that they outlast a change of the method."""

TRIED = 2
"""Images whose decoded tokens a function of one's own chooses, of NumPy arrays, before a run starts."""


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
        "Epochs after which throwing=weighted computes the attention to all training images for the first time. Until "
        "then, masks are drawn evenly.",
        default=41,
        at_least=1,
    )
    attention_every: int = option("Epochs between two such passes over the images.", default=40, at_least=1)
    init_weights: str | None = option(
        "Initial weights: a run, a file of prmim, a checkpoint of other code (see prmim import), or a name on the hub. "
        "Where decoders differ, the encoder alone is loaded. Null: random weights.",
        default=None,
    )
    eval_limit: int = option(
        "Most images for the evaluation of frozen features at the end. 0: no evaluation.", default=5000, at_least=0
    )
    probe_every: int | None = option(
        "Epochs between two evaluations of frozen features during training (needs labels). Null: none.",
        default=None,
        at_least=1,
    )
    pictures: int = option(
        "Held-out images in the pictures drawn at the end. 0: no pictures.", default=6, at_least=0, at_most=1000
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
        """Refuse functions without an import path, which a run cannot store, and try the one that throws."""
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
        """The peak learning rate, scaled by the batch size and, if wanted, by the share of supervised tokens."""
        supervised, masked = self.supervision
        return super().learning_rate * supervised / masked

    @property
    def supervision(self) -> tuple[int, int]:
        """Supervised and masked tokens, whose ratio scales the learning rate; (1, 1) if it is not scaled."""
        supervised = self.method.num_supervised if self.scale_learning_rate else None
        return (1, 1) if supervised is None else (supervised, self.method.counts.masked)

    @property
    def attention_passes(self) -> int:
        """Number of passes over the training images that compute attention maps."""
        if not self.method.needs_weights:
            return 0
        return len(range(self.attention_start, self.epochs, self.attention_every))

    def flat(self) -> dict[str, Any]:
        """Return all options by name, those of the method included; :func:`pretrain_config` reverses it.

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
    def frames(self) -> int | None:
        """Number of frames of the clips to train on; None for images."""
        return self.method.image_size[0] if len(self.method.image_size) == 3 else None

    @property
    def run_path(self) -> Path:
        """The folder of the run."""
        if self.out is not None:
            return Path(self.out)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.data).resolve().name if self.data != DIGITS else DIGITS)
        return Path("runs") / f"{self.method.name}-{name}"


def pretrain_config(**given: Any) -> PretrainConfig:
    """Return the configuration of a flat list of options, as files and the command line have them.

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
    config = PretrainConfig(**{name: value for name, value in given.items() if name in own})  # validates the seed
    of_method = {name: value for name, value in given.items() if name not in own}
    return replace(config, method=create_config(name, init_seed=config.seed, **of_method))


def change(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """Return a configuration with some of its flat options replaced."""
    return pretrain_config(**{**config.flat(), **changes})


def pretrain_option_names() -> set[str]:
    """Return the names of all flat options, of every method."""
    of_methods = {item.name for method in METHODS.values() for item in options(method)}
    return {"method", *of_methods, *(item.name for item in options(PretrainConfig))} - {"init_seed"}


def special_option_names() -> set[str]:
    """Return the names of the options that not all methods have, or not with the same default and choices."""
    records = [{item.name: item for item in options(method)} for method in METHODS.values()]
    defaults = [{name: (item.default, item.help) for name, item in known.items()} for known in records]
    shared = {name for name, value in defaults[0].items() if all(name in d and d[name] == value for d in defaults)}
    return {name for known in defaults for name in known} - shared - OF_IMAGES
