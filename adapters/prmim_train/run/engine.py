"""Engine protocols, and the import of a backend by name.

An engine lives in `prmim_torch` or `prmim_jax`, which are imported when a run starts. This package never imports torch
or jax.
"""

import importlib
import re
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from prmim_methods import MethodConfig, TrainingConfig
from prmim_methods.encoder import EncoderConfig
from prmim_methods.hardware import Choice
from prmim_methods.messages import shown
from prmim_methods.outputs import Comparison, Reconstruction
from prmim_methods.record import options
from prmim_methods.sizes import Transformer
from prmim_methods.training import EngineOptions
from prmim_train.config.classify import ClassifyConfig
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.config.training import TrainingOptions
from prmim_train.run.budget import Budget
from prmim_train.run.processes import Agrees, launched
from prmim_train.run.size import check_batch, check_numbers, check_size

BACKENDS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch", "safetensors"),
    "jax": ("jax", "flax", "optax", "orbax", "safetensors"),
}
"""Packages that a backend needs."""


class Trainer(Agrees, Protocol):
    """A model with its optimizer on a device.

    Images are uint8, or, if the method has a `pixel_range`, uint8, uint16 or float32 with the values of their files.
    They are uploaded unchanged; the device maps the range to [0, 1], clips, and normalizes.

    In a distributed run, every process has one and makes the same calls in the same order. `train_step` gets different
    images in each process; all other methods get the same images.
    """

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def num_devices(self) -> int:
        """Number of devices of all processes, which share a batch."""

    @property
    def step(self) -> int:
        """Optimizer steps completed, including those before a resume."""

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""

    @property
    def device(self) -> str:
        """Description of the device."""

    @property
    def precision(self) -> Choice[str]:
        """Number format of the training step in effect."""

    @property
    def compiled(self) -> Choice[bool]:
        """Whether the training step is compiled."""

    def measure_slowdown(self, size: Transformer) -> float | None:
        """Return the time of a transformer layer in bfloat16 relative to float32.

        Takes about a second. None if the step is in float32 or bfloat16 suits the device.
        """

    def read_metrics(self) -> dict[str, Any]:
        """Wait for pending steps, and return the metrics since the last call.

        Returns
        -------
        dict
            The same in every process:

            - `loss`, its parts (`loss_decoded`, `loss_thrown`, ..., named by the method), `accuracy` of a classifier,
              and `grad_norm`: means over the finite steps, NaN if there were none;
            - `learning_rate` of the last step;
            - `nonfinite_step`: the first non-finite step of the whole run, or None;
            - `skipped`: number of non-finite steps since the last call;
            - `skipped_in_a_row`: number of consecutive non-finite steps up to now.
        """

    def async_save(self, directory: Path) -> Future[None]:
        """Start writing `weights.safetensors` and the training state into a folder.

        The folder must exist. Writes a snapshot of the current state, including the metrics since the last
        `read_metrics`; later steps do not change it. The future is done when this process has written its share; in the
        main process, when all processes have. If one process fails, the futures of all processes fail.
        """

    def restore(self, directory: Path) -> None:
        """Load a saved state, written by any number of processes.

        Raises ValueError if the architecture differs.
        """

    def close(self) -> None:
        """Leave the process group.

        After an exception, does not wait for the other processes.
        """


class Engine(Trainer, Protocol):
    """Trainer of a masked image modelling method."""

    def train_step(
        self, images: NDArray[Any], sample: NDArray[np.int64], weights: NDArray[np.float32] | None = None
    ) -> None:
        """Start one optimizer step (non-blocking).

        A step with a non-finite loss or gradient leaves the weights unchanged, and is counted in the metrics.

        Parameters
        ----------
        images
            (batch, axes..., channels): this process's share of the batch.
        sample
            int64 (batch,): index of each image in its source. With seed and step, it determines the mask.
        weights
            float32 (batch, N): weight of each token. Only for methods that need weights.
        """

    def attention(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Attention to the patches of unmasked images, in [0, 1]: (batch, N).

        Collective: every process passes the same number of images, but different ones.
        """

    def features(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Mean patch feature (batch, dim) of unmasked images."""

    def reconstruct(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Reconstruction:
        """Mask images as in step 0, and reconstruct their pixels.

        For methods that predict pixels.
        """

    def compare(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Comparison:
        """Mask images as in step 0, and return predicted and target features.

        For methods that predict features.
        """

    def init_weights(self, source: Path) -> str:
        """Load weights of other code or of another method.

        Returns a line that names the loaded parts.
        """


class EncoderEngine(Agrees, Protocol):
    """A frozen encoder on the device of a process.

    Processes may pass different images, in different numbers.
    """

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def precision(self) -> Choice[str]:
        """Number format in effect."""

    def features(
        self, images: NDArray[np.uint8], pool: str | None = "mean", layer: int | None = None
    ) -> NDArray[np.float32]:
        """Features (batch, dim) of uint8 images (batch, axes..., channels).

        Parameters
        ----------
        images
            The images.
        pool
            `mean`: the mean of the patch tokens; `cls`: the class token.
        layer
            None: the output of the encoder. A number: the output of this block, before the final norm.
        """

    def close(self) -> None:
        """Leave the process group."""


class ClassifierEngine(Trainer, Protocol):
    """Trainer of a classifier on a pre-trained encoder, as a whole or only its head."""

    def train_step(self, images: NDArray[Any], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Start one optimizer step on the cross-entropy; see `Engine.train_step`.

        The call does not block.

        Parameters
        ----------
        images
            (batch, axes..., channels): this process's share of the batch.
        sample
            int64 (batch,): index of each image in its source. With seed and step, it determines drop path.
        targets
            float32 (batch, classes): class probabilities of each image.
        """

    def predict(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (batch, classes) in evaluation mode.

        They do not depend on the other images of the batch.
        """


def check_backend(backend: str) -> None:
    """Check that a backend exists and that its packages are installed.

    Does not import torch or jax.

    Raises
    ------
    ValueError
        If the backend is unknown.
    ImportError
        If a package of the backend is not installed. The message says how to install it.
    """
    if backend not in BACKENDS:
        import_backend(backend)
        return
    missing = [name for name in (f"prmim_{backend}", *BACKENDS[backend]) if find_spec(name) is None]
    if missing:
        raise _import_error(backend, missing[0])


def create_engine(config: PretrainConfig, budget: Budget) -> Engine:
    """Import the backend and build an engine with random weights, at step 0.

    Parameters
    ----------
    config
        Options of the run.
    budget
        Length of the run.

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        If the backend is unknown or rejects an option, or the model is too large to be built.
    ImportError
        If packages of the backend are not installed. The message says how to install them.
    """
    check_size(config)
    module = import_backend(config.backend)
    return cast(Engine, module.Engine(config.method, _training(config, budget)))


def create_encoder_engine(
    record: MethodConfig | EncoderConfig,
    *,
    backend: str,
    device: str,
    precision: str,
    weights: Path | None = None,
    image_size: tuple[int, ...] | None = None,
) -> EncoderEngine:
    """Import the backend and build a frozen encoder.

    Parameters
    ----------
    record
        The method, or the encoder alone.
    backend, device, precision
        Options of a run.
    weights
        File of the weights. None: those of a new method.
    image_size
        Size of the images in pixels, to which tables of positions are fitted. None: that of `record`.

    Raises
    ------
    ValueError
        If the backend is unknown, the device is not available, the weights belong to another encoder, or the patches do
        not divide the images.
    ImportError
        If packages of the backend are not installed. The message says how to install them.
    """
    check_numbers(record.encoder_config(image_size))
    module = import_backend(backend)
    training = TrainingConfig(device=device, precision=precision)
    return cast(EncoderEngine, module.EncoderEngine(record, training, weights, image_size))


def create_classifier_engine(
    config: ClassifyConfig, base: PretrainConfig, budget: Budget, *, num_classes: int, weights: Path | None
) -> ClassifierEngine:
    """Import the backend and build a classifier on the encoder of a run, at step 0.

    Parameters
    ----------
    config
        Options of the classifier.
    base
        Options of the pre-training run.
    budget
        Length of the classifier's training.
    num_classes
        Number of classes.
    weights
        `weights.safetensors` of the pre-training run. None: random weights, to be replaced by a checkpoint.

    Returns
    -------
    ClassifierEngine

    Raises
    ------
    ValueError
        If the backend is unknown or rejects an option, the model or a batch is too large, or the weights belong to
        another encoder.
    ImportError
        If packages of the backend are not installed. The message says how to install them.
    """
    check_size(base)
    encoder = config.encoder(base.method)
    check_numbers(encoder)
    check_batch(config, encoder)
    module = import_backend(config.backend)
    engine = module.ClassifierEngine(base.method, config, num_classes, _training(config, budget), weights=weights)
    return cast(ClassifierEngine, engine)


def _training(config: TrainingOptions, budget: Budget) -> TrainingConfig:
    """Return the part of the options that an engine needs."""
    return TrainingConfig(
        **{item.name: getattr(config, item.name) for item in options(EngineOptions)},
        total_steps=budget.total_steps,
        warmup_steps=budget.warmup_steps,
        learning_rate=config.learning_rate,
    )


def check_launcher(backend: str, engine: Trainer | EncoderEngine) -> None:
    """Check that the engine has joined all launched processes."""
    if engine.world_size != launched().world_size:
        raise ValueError(
            f"backend: expected one that joins the {launched().world_size} launched processes, got {backend}, which "
            f"sees {engine.world_size}; torch needs torchrun, jax needs JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID"
        )


def import_backend(backend: str) -> Any:
    """Import the package of a backend.

    Raises
    ------
    ValueError
        If the backend is unknown.
    ImportError
        If a package of the backend is not installed. The message says how to install it.
    """
    package = f"prmim_{backend}"
    unknown = ValueError(f"backend: expected {' or '.join(BACKENDS)}, got {shown(backend)}")
    if not re.fullmatch(r"[a-z0-9_]{1,30}", backend):
        raise unknown
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package and backend not in BACKENDS:
            raise unknown from error
        raise _import_error(backend, str(error.name)) from error
    if not hasattr(module, "Engine"):  # another package of prmim, such as the core
        raise unknown
    return module


def _import_error(backend: str, missing: str) -> ImportError:
    if missing == f"prmim_{backend}":
        return ImportError(f"backend: {backend} is not part of this installation of prmim")
    return ImportError(f"backend: {backend} needs {missing}, which is not installed; pip install 'prmim[{backend}]'")
