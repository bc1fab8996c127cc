"""The JAX engine: a method with its optimizer and device."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_jax.foreign import read_start
from prmim_jax.method import FeatureMethod, Method, PixelMethod, check_images
from prmim_jax.methods import METHODS
from prmim_jax.trainer import Trainer, adamw
from prmim_methods import MethodConfig, TrainingConfig
from prmim_methods.outputs import Comparison, Reconstruction


class Engine(Trainer[Method]):
    """Pre-training of a method with AdamW; see :class:`prmim_jax.trainer.Trainer`.

    Parameters
    ----------
    config
        The method. ``config.init_seed`` is the seed of its initial weights.
    training
        The options of the training. ``training.seed`` is the seed of the noise.

    Raises
    ------
    ImportError
        If the method needs a package that is not installed.
    ValueError
        If the device is not available, or the teacher does not fit the method.

    Notes
    -----
    With ``precision="bfloat16"``, matrix products are computed in bfloat16; weights, residual stream, norms, softmax,
    loss and optimizer state are float32.

    With ``parallel="ddp"``, each device holds all weights; with ``"fsdp"``, each holds a part of weights and optimizer
    state, and gathers the weights in every step. The devices are all of the platform, or the one that ``device`` names
    by number.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> config = MAEConfig(image_size=(16, 16), patch_size=(4, 4), embed_dim=16, depth=1,
    ...     num_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    >>> engine = Engine(config, TrainingConfig(total_steps=2, device="cpu"))
    >>> engine.train_step(np.zeros((4, 16, 16, 3), np.uint8), np.arange(4))
    >>> sorted(engine.read_metrics())[:4]
    ['grad_norm', 'learning_rate', 'loss', 'loss_decoded']
    """

    def __init__(self, config: MethodConfig, training: TrainingConfig) -> None:
        self._config = config

        def make_module(dtype: DTypeLike | None) -> Method:
            return METHODS[config.name](config, dtype=dtype)

        super().__init__(make_module, training, _loss, partial(adamw, training=training))

    @property
    def method(self) -> Method:
        """The method with current weights, on one device; valid until the next step.

        All processes must ask for it.
        """
        return self.module

    def train_step(
        self, images: NDArray[Any], sample: NDArray[np.int64], weights: NDArray[np.float32] | None = None
    ) -> None:
        """Take one optimizer step, without waiting for the device.

        Parameters
        ----------
        images
            (batch, image_size..., channels): this process's share of the batch, the same size in all processes;
            its devices share it.
        sample
            int64 (batch,), below 2**32: index of each image in the data set. Seed, step and index determine its mask.
        weights
            float32 (batch, N): weight of each token, for ``throwing="weighted"`` only; see :meth:`attention`.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or devices of the process times ``accumulate`` do not divide the batch.
        """
        self._take_step(images, sample, *(() if weights is None else (weights,)))

    def init_weights(self, source: str | os.PathLike[str]) -> str:
        """Start from other weights; see :func:`prmim_jax.init_weights`.

        All processes must call it.
        """
        method = self.method
        start = self._processes.together(lambda: read_start(method, source))
        self._put_weights(start.weights)
        return start.line

    def features(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return mean patch features of unmasked images: float32 (batch, dim).

        All processes must pass the same images, here and in :meth:`reconstruct` and :meth:`compare`.
        """
        check_images(images, self._image_shape, self._image_dtypes)
        return np.asarray(self._evaluate(_features, images))

    def attention(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return attention to patches of unmasked images: float32 (batch, N) in [0, 1].

        All processes must call it, with a batch of the same size; the images may differ. The devices share the batch.
        """
        check_images(images, self._image_shape, self._image_dtypes)
        return self._evaluate_rows(_attention, images)

    def reconstruct(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Reconstruction:
        """Mask images as in step 0, and predict their pixels.

        With ``throwing="weighted"``, the attention of these images is computed first.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        sample
            int64 (batch,), below 2**32: index of each image in the data set.

        Raises
        ------
        TypeError
            If the method predicts features.
        """
        if self._config.predicts != "pixels":
            raise TypeError("method: expected one that predicts pixels, got one that predicts features")
        order, patches = self._evaluate(self._reconstructed, *self._inputs(images, sample))
        return Reconstruction(np.asarray(order, np.int64), self._config.schedule, np.asarray(patches, np.float32))

    def _reconstructed(self, method: PixelMethod, images: Array, sample: Array) -> tuple[Array, Array]:
        weights = (method.attention(images),) if method.config.needs_weights else ()
        output = method(images, self._noise(sample, 0), *weights)
        return output.plan.order, method.rebuilt_pixels(images, output)

    def compare(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Comparison:
        """Mask images as in step 0, and return predicted and target features.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        sample
            int64 (batch,), below 2**32: index of each image in the data set.

        Raises
        ------
        TypeError
            If the method predicts pixels.
        """
        if self._config.predicts != "features":
            raise TypeError("method: expected one that predicts features, got one that predicts pixels")
        order, *features = self._evaluate(self._compared, *self._inputs(images, sample))
        student, teacher = (np.asarray(part, np.float32) for part in features)
        return Comparison(np.asarray(order, np.int64), self._config.schedule, student, teacher)

    def _compared(self, method: FeatureMethod, images: Array, sample: Array) -> tuple[Array, Array, Array]:
        output = method(images, self._noise(sample, 0))
        return output.plan.order, *method.compared_features(images, output)


def _loss(method: Method, images: Array, noise: Array, *weights: Array) -> Sequence[Array]:
    return method.measured(method(images, noise, *weights))


def _attention(method: Method, images: Array) -> Array:
    return method.attention(images).astype(jnp.float32)


def _features(method: Method, images: Array) -> Array:
    return method.features(images).astype(jnp.float32)
