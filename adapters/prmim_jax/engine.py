"""The JAX engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prmim_core import CostReport, Schedule
from prmim_jax.method import FeatureMethod, Method, PixelMethod, Predicts, check_images
from prmim_jax.methods import create_method
from prmim_jax.trainer import Trainer


class Reconstruction(NamedTuple):
    """What a method made of a batch of images, in NumPy.

    Parameters
    ----------
    order
        The plan, int64 (batch, N): visible, decoded, then the stages.
    schedule
        The static boundaries inside ``order``.
    patches
        float32 (batch, N, prod(patch) * C), in raster order, pixels in [0, 1] (predictions may pass the ends): the
        input's own where visible, NaN where nothing is predicted.
    """

    order: NDArray[np.int64]
    schedule: Schedule
    patches: NDArray[np.float32]


class Comparison(NamedTuple):
    """Features of a student and of its teacher for a batch of images, in NumPy.

    Parameters
    ----------
    order
        The plan, int64 (batch, N): visible, decoded, then the stages.
    schedule
        The static boundaries inside ``order``.
    student, teacher
        float32 (batch, N, teacher_dim), in raster order, of the last aligned layer: what the student predicts, NaN
        where it predicts nothing, and the target.
    """

    order: NDArray[np.int64]
    schedule: Schedule
    student: NDArray[np.float32]
    teacher: NDArray[np.float32]


class Engine(Trainer):
    """A method with AdamW, on all devices of a platform, of one process or of several.

    Parameters
    ----------
    method_options
        Arguments of :func:`prmim_jax.create_method`, ``name`` among them. Without ``init_seed``, ``seed``
        seeds the initial weights too.
    seed
        Seed of the noise, in [0, 2**32).
    total_steps, warmup_steps
        Length of the run, and of the linear rise of the learning rate from 0, in optimiser steps.
    learning_rate, min_learning_rate
        Peak and end of the learning rate, as used (already scaled by the batch).
    decay
        How the learning rate falls after the warm-up: see :func:`prmim_core.training.learning_rate_at`.
    weight_decay
        AdamW's; see :func:`prmim_jax.trainer.decay_mask` for what is spared.
    betas
        AdamW's.
    clip_grad
        Largest norm of the whole gradient; None: not clipped.
    accumulate
        Parts into which a batch is cut, one after the other, to save memory; divides the batch.
    precision
        ``"float32"``, or ``"bfloat16"``: matrix products in bfloat16; weights, residual stream, norms, softmax, loss
        and optimiser in float32.
    compile
        Makes no difference: JAX compiles a step before it takes one, always.
    device
        ``"auto"`` (JAX's default platform), ``"cpu"`` or ``"cuda"``: all devices there are; ``"cuda:1"``: one alone.
    parallel
        How several devices share the work: ``"ddp"``, each holds all weights; ``"fsdp"``, each holds a part of weights
        and optimiser state, and gathers the weights in every step. One device alone: either is the same.
    timeout
        Seconds without a sign of life after which a process counts as dead, and the others end.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; one line that names it.

    Notes
    -----
    Several processes (see :class:`prmim_jax.distributed.Processes`) make one run: each is to call the same methods in
    the same order. A step is that of one device on all their rows together, up to rounding: losses and gradients are
    means over all rows, and so is what is measured. Devices talk once a step.

    A training step is one compiled program, from uint8 images and their numbers to the updated weights: noise, plan,
    normalisation, forward, backward, update. It never waits for the device (but several devices of a CPU take one step
    at a time), and works in the memory of the state it is given. It is compiled in the first step, and anew only if the
    batch changes its size. A step whose loss or gradient norm is not finite changes neither weights nor optimiser
    state. :attr:`step` and the learning rate move on all the same.
    """

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        method = create_method(**{"init_seed": seed, **method_options})
        self._predicts: Predicts = method.predicts
        self._schedule = method.schedule
        return method

    def _losses(self, module: Any, images: Array, noise: Array, *more: Array) -> Sequence[Array]:
        output = module(images, noise)
        return [getattr(output, name) for name in module.losses]

    @property
    def method(self) -> Method:
        """The method with the weights of now, on one device; the next training step takes its arrays away.

        All processes have to ask for it.
        """
        return self.module

    @property
    def predicts(self) -> Predicts:
        """What the method predicts: ``"pixels"`` can be rebuilt, ``"features"`` compared."""
        return self._predicts

    def cost(self) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        method = self._merge(self._state.parameters, self._state.statistics, self._buffers)
        return method.cost(2 if self._precision == "bfloat16" else 4)

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> None:
        """Take one optimiser step, without waiting for it to end.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels). Of several processes, each brings as many images of its own; they
            are shared out among its devices.
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give its mask.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or devices of the process times ``accumulate`` do not divide the batch.
        """
        self._take_step(images, sample)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature of whole images, nothing masked: float32 (batch, dim).

        Several processes are to bring the same images, here and to :meth:`reconstruct` and :meth:`compare`.
        """
        check_images(images, self._image_shape)
        return np.asarray(self._evaluate(_features, images))

    def reconstruct(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> Reconstruction:
        """Mask images as step 0 would, and rebuild them.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        sample
            int64 (batch,).

        Returns
        -------
        Reconstruction

        Raises
        ------
        TypeError
            If the method predicts features.
        """
        if self._predicts != "pixels":
            raise TypeError("method: expected one that predicts pixels to rebuild images, got one of features")
        order, patches = self._evaluate(self._rebuilt, *self._inputs(images, sample))
        return Reconstruction(np.asarray(order, np.int64), self._schedule, np.asarray(patches, np.float32))

    def _rebuilt(self, method: PixelMethod, images: Array, sample: Array) -> tuple[Array, Array]:
        output = method(images, self._noise(sample, 0))
        return output.plan.order, method.rebuilt_pixels(images, output)

    def compare(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> Comparison:
        """Mask images as step 0 would, and put the student's features beside the teacher's.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        sample
            int64 (batch,).

        Returns
        -------
        Comparison

        Raises
        ------
        TypeError
            If the method predicts pixels.
        """
        if self._predicts != "features":
            raise TypeError("method: expected one that predicts features to compare them, got one of pixels")
        order, *features = self._evaluate(self._compared, *self._inputs(images, sample))
        student, teacher = (np.asarray(part, np.float32) for part in features)
        return Comparison(np.asarray(order, np.int64), self._schedule, student, teacher)

    def _compared(self, method: FeatureMethod, images: Array, sample: Array) -> tuple[Array, Array, Array]:
        output = method(images, self._noise(sample, 0))
        return output.plan.order, *method.compared_features(images, output)


def _features(method: Method, images: Array) -> Array:
    return method.features(images).astype(jnp.float32)
