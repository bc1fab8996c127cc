"""The PyTorch engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prmim_core import CostReport, Schedule
from prmim_torch.method import FeatureMethod, Method, PixelMethod, Predicts
from prmim_torch.methods import create_method
from prmim_torch.trainer import Trainer


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
    """A method with AdamW, on one device or, in every process that ``torchrun`` starts, on one each.

    Parameters
    ----------
    method_options
        Arguments of :func:`prmim_torch.create_method`, ``name`` among them. Without ``init_seed``, ``seed``
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
        AdamW's; see :func:`prmim_torch.trainer.parameter_groups` for what is spared.
    betas
        AdamW's.
    clip_grad
        Largest norm of the whole gradient; None: not clipped.
    accumulate
        Parts into which a batch is cut, one after the other, to save memory; divides the batch.
    precision
        ``"float32"``, or ``"bfloat16"``: matrix products in bfloat16 by autocast; weights, residual stream, norms, loss
        and optimiser in float32.
    compile
        Whether the forward pass goes through ``torch.compile``, as one graph.
    device
        ``"auto"`` (cuda if there is one), or any name that ``torch.device`` takes. Of several processes, each takes
        the device of its number on its machine, unless the name has a number.
    parallel
        How several processes share the work: ``"ddp"``, each holds all weights; ``"fsdp"``, each holds a part of
        weights, gradients and optimiser state. One process alone: either is the same.
    timeout
        Seconds that processes wait for each other in a training step before they give up.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; one line that names it.

    Notes
    -----
    Several processes make one run: each is to call the same methods in the same order. A step is that of one process on
    all their rows together, up to rounding: losses and gradients are means over all rows, and so is what is measured.

    A training step never waits for the device. Images go to it as uint8; noise, plan and normalisation are made there.
    A step whose loss or gradient norm is not finite changes neither weights nor optimiser state: AdamW's fused kernel
    reads the verdict on the device (the mechanism made for loss scaling). :attr:`step` and the learning rate move on
    all the same.
    """

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        return create_method(**{"init_seed": seed, **method_options})

    def _losses(self, pixels: Tensor, noise: Tensor, *more: Tensor) -> Sequence[Tensor]:
        output = self._forward(pixels, noise)
        return [getattr(output, name) for name in self.method.losses]

    @property
    def method(self) -> Method:
        """The method; with the parts of weights that are here, where processes share them."""
        return self.module

    @property
    def predicts(self) -> Predicts:
        """What the method predicts: ``"pixels"`` can be rebuilt, ``"features"`` compared."""
        return self.method.predicts

    def cost(self) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        return self.method.cost(2 if self._precision == "bfloat16" else 4)

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> None:
        """Take one optimiser step, without waiting for it to end.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels). Of several processes, each brings as many images of its own.
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give its mask.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or ``accumulate`` does not divide the batch.
        """
        self._take_step(images, sample)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature of whole images, nothing masked: float32 (batch, dim).

        Several processes are to bring the same images, here and to :meth:`reconstruct` and :meth:`compare`.
        """
        with self._evaluation():
            features = self.method.features(self._upload(images))
        return features.float().cpu().numpy()

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
        if not isinstance(self.method, PixelMethod):
            raise TypeError("method: expected one that predicts pixels to rebuild images, got one of features")
        pixels, noise = self._to_device(images, sample, 0)
        with self._evaluation():
            output = self.method(pixels, noise)
            patches = self.method.rebuilt_pixels(pixels, output)
        return Reconstruction(output.plan.order.cpu().numpy(), self.method.schedule, patches.float().cpu().numpy())

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
        if not isinstance(self.method, FeatureMethod):
            raise TypeError("method: expected one that predicts features to compare them, got one of pixels")
        pixels, noise = self._to_device(images, sample, 0)
        with self._evaluation():
            output = self.method(pixels, noise)
            student, teacher = (part.float().cpu().numpy() for part in self.method.compared_features(pixels, output))
        return Comparison(output.plan.order.cpu().numpy(), self.method.schedule, student, teacher)
