"""What the loop asks of a framework, and how it reaches one by name.

This package never imports torch or jax: an engine lives in `prmim_torch` or `prmim_jax`, and is imported when a run
starts.
"""

import importlib
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from prmim_core import Schedule
from prmim_train.budget import Budget
from prmim_train.classify_config import ClassifyConfig
from prmim_train.config import PretrainConfig
from prmim_train.processes import launched
from prmim_train.training_options import TrainingOptions

KNOWN_BACKENDS = ("torch", "jax")


class Reconstruction(Protocol):
    """What a method made of a batch of images, in plain NumPy."""

    @property
    def order(self) -> NDArray[Any]:
        """The plan, int (batch, N): visible, decoded, then the stages."""

    @property
    def schedule(self) -> Schedule:
        """The static boundaries inside `order`."""

    @property
    def patches(self) -> NDArray[np.float32]:
        """Pixel patches (batch, N, patch_dim) in raster order, in [0, 1], patch normalisation undone.

        Visible patches are the input's own; tokens without a prediction are NaN.
        """


class Comparison(Protocol):
    """The features that a method made for a batch of images beside those of its teacher, in plain NumPy."""

    @property
    def order(self) -> NDArray[Any]:
        """The plan, int (batch, N): visible, decoded, then the stages."""

    @property
    def schedule(self) -> Schedule:
        """The static boundaries inside `order`."""

    @property
    def student(self) -> NDArray[np.float32]:
        """What the student predicts of the teacher's last aligned layer (batch, N, dim), in raster order.

        Tokens without a prediction are NaN.
        """

    @property
    def teacher(self) -> NDArray[np.float32]:
        """The teacher's features (batch, N, dim) that were to be predicted, in raster order."""


class Trainer(Protocol):
    """Something that is trained, with its optimiser, on a device of some framework.

    Of several processes each has one, and all of them make the same calls in the same order.  They bring images of
    their own to `train_step`, and the same images to everything else.
    """

    @property
    def rank(self) -> int:
        """Number of this process, from 0, which is the main one."""

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""

    @property
    def step(self) -> int:
        """Optimiser steps completed, those before a resume among them."""

    @property
    def num_parameters(self) -> int:
        """Learned numbers; frozen ones are not among them."""

    @property
    def device(self) -> str:
        """The device, in words."""

    def read_metrics(self) -> dict[str, Any]:
        """Wait for the steps taken, and return what they measured since the last reading.

        Returns
        -------
        dict
            Means of `loss`, which is minimised, of its parts (`loss_decoded`, `loss_thrown`, ...: the method names
            them), of a classifier's `accuracy`, and of `grad_norm`, over the steps that were finite, NaN where none
            was; `learning_rate` of the last step; `nonfinite_step`, the first step of the whole run that was not
            finite, or None; `skipped`, how many were not finite since the last reading, and `skipped_in_a_row`, how
            many of the latest ones. The same in every process.
        """

    def async_save(self, directory: Path) -> Future[None]:
        """Begin to write `weights.safetensors` and the training state into an existing folder, the same everywhere.

        What is written is the state of now, whatever steps are taken meanwhile; what was measured since the last
        reading is part of it. The future is done when this process has written its share and, in the main one, all
        have; it fails in all processes if it does in one.
        """

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote, with however many processes; ValueError where the architecture differs."""

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked."""

    def close(self) -> None:
        """Leave the other processes; after an exception it waits for none of them."""


class Engine(Trainer, Protocol):
    """A method of masked image modelling that is trained."""

    @property
    def predicts(self) -> str:
        """What the method predicts for masked tokens: `pixels` or `features`."""

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> None:
        """Take one optimiser step, without waiting for it to end.

        A step whose loss or gradient is not finite leaves the weights as they were, and is remembered.

        Parameters
        ----------
        images
            uint8 (batch, axes..., channels): this process's share of the batch.
        sample
            int64 (batch,): the number of each image in its source, which with seed and step gives its mask.
        """

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature (batch, dim) of whole images, nothing masked."""

    def reconstruct(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> Reconstruction:
        """Mask images as step 0 would, and rebuild them; only where pixels are predicted."""

    def compare(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> Comparison:
        """Mask images as step 0 would, and set the student beside its teacher; only where features are predicted."""

    def load_weights(self, path: Path) -> None:
        """Take weights alone from a `.safetensors` file."""


class ClassifierEngine(Trainer, Protocol):
    """A classifier on the encoder of a method that is trained, whole or its head alone."""

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Take one optimiser step on the cross-entropy, without waiting for it to end; see `Engine.train_step`.

        Parameters
        ----------
        images
            uint8 (batch, axes..., channels): this process's share of the batch.
        sample
            int64 (batch,): the number of each image in its source, which with seed and step gives what drop path drops.
        targets
            float32 (batch, classes): a distribution for each image.
        """

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits (batch, classes) of images, in evaluation mode: each for itself."""


def create_engine(config: PretrainConfig, budget: Budget) -> Engine:
    """Import the backend of a configuration and build its engine, with random weights, at step 0.

    Parameters
    ----------
    config
        The options of the run.
    budget
        Its length in steps.

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        If the backend is unknown, or refuses an option.
    ImportError
        If the backend's packages are not installed; the message says what to install.
    """
    module = _import_backend(config.backend)
    options = _training_options(config, budget)
    return cast(Engine, module.Engine(config.method_options(), decay=config.decay, **options))


def create_classifier_engine(
    config: ClassifyConfig, base: PretrainConfig, budget: Budget, *, num_classes: int, weights: Path | None
) -> ClassifierEngine:
    """Import the backend of a configuration and build a classifier on the encoder of a run, at step 0.

    Parameters
    ----------
    config
        The options of the classifier.
    base
        The options of the run that trained the encoder.
    budget
        The length of the classifier's training in steps.
    num_classes
        How many classes there are.
    weights
        The run's `weights.safetensors`; None: random weights, where a checkpoint is to be restored.

    Returns
    -------
    ClassifierEngine

    Raises
    ------
    ValueError
        If the backend is unknown or refuses an option, or the weights are of another encoder.
    ImportError
        If the backend's packages are not installed; the message says what to install.
    """
    module = _import_backend(config.backend)
    engine = module.ClassifierEngine(
        base.method_options(),
        num_classes,
        weights=weights,
        **config.classifier_options(),
        **_training_options(config, budget),
    )
    return cast(ClassifierEngine, engine)


def _training_options(config: TrainingOptions, budget: Budget) -> dict[str, Any]:
    """Return the arguments that the engines of every training have."""
    return {
        "seed": config.seed,
        "total_steps": budget.total_steps,
        "warmup_steps": budget.warmup_steps,
        "learning_rate": config.learning_rate,
        "min_learning_rate": config.min_learning_rate,
        "weight_decay": config.weight_decay,
        "betas": config.betas,
        "clip_grad": config.clip_grad,
        "accumulate": config.accumulate,
        "precision": config.precision,
        "compile": config.compile,
        "device": config.device,
        "parallel": config.parallel,
    }


def check_launcher(backend: str, engine: Trainer) -> None:
    """Raise ValueError where processes that were started together know nothing of each other."""
    if engine.world_size != launched().world_size:
        raise ValueError(
            f"backend: expected one that joins the {launched().world_size} processes that were started, got "
            f"{backend}, which sees {engine.world_size}; torch takes them from torchrun, jax from "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )


def _import_backend(backend: str) -> Any:
    package = f"prmim_{backend}"
    if not re.fullmatch(r"[a-z0-9_]+", backend):
        raise ValueError(f"backend: expected {' or '.join(KNOWN_BACKENDS)}, got {backend!r}")
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package and backend not in KNOWN_BACKENDS:
            raise ValueError(f"backend: expected {' or '.join(KNOWN_BACKENDS)}, got {backend!r}") from error
        if error.name == package:
            raise ImportError(f"backend: {backend} is not part of this installation of prmim") from error
        raise ImportError(
            f"backend: {backend} needs {error.name}, which is not installed; pip install 'prmim[{backend}]'"
        ) from error
