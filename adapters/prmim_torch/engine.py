"""The PyTorch engine: a method with its optimizer and device."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prmim_methods import MethodConfig, TrainingConfig
from prmim_methods.outputs import Comparison, Reconstruction
from prmim_torch.foreign import read_start
from prmim_torch.method import FeatureMethod, Method, PixelMethod
from prmim_torch.methods import METHODS
from prmim_torch.trainer import Trainer, parameter_groups


class Engine(Trainer[Method]):
    """Pre-training of a method with AdamW; see :class:`prmim_torch.trainer.Trainer`.

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
    With ``precision="bfloat16"``, matrix products are computed in bfloat16 by autocast; weights, residual stream,
    norms, loss and optimizer state are float32.

    With ``parallel="ddp"``, each process holds all weights; with ``"fsdp"``, a part of weights, gradients and optimizer
    state. With several processes, each uses the CUDA device of its local rank, unless ``device`` has a number.

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
        def make_optimizer(method: Method) -> torch.optim.Optimizer:
            groups = parameter_groups(method, training.weight_decay)
            return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, fused=True)

        method = METHODS[config.name](config)

        def loss(forward: Callable[..., Any], images: Tensor, noise: Tensor, *weights: Tensor) -> Sequence[Tensor]:
            return method.measured(forward(images, noise, *weights))

        super().__init__(method, training, loss, make_optimizer)

    @property
    def method(self) -> Method:
        """The method; with FSDP, each process holds a part of the parameters."""
        return self.module

    def train_step(
        self, images: NDArray[Any], sample: NDArray[np.int64], weights: NDArray[np.float32] | None = None
    ) -> None:
        """Take one optimizer step, without waiting for the device.

        Parameters
        ----------
        images
            (batch, image_size..., channels): this process's share of the batch, the same size in all processes.
        sample
            int64 (batch,): index of each image in the data set. Seed, step and index determine its mask.
        weights
            float32 (batch, N): weight of each token, for ``throwing="weighted"`` only; see :meth:`attention`.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or ``accumulate`` does not divide the batch.
        """
        self._take_step(images, sample, *(() if weights is None else (weights,)))

    def init_weights(self, source: str | os.PathLike[str]) -> str:
        """Start from other weights; see :func:`prmim_torch.init_weights`.

        All processes must call it.
        """
        start = self._processes.together(lambda: read_start(self.method, source))
        self._put_weights({name: torch.from_numpy(array) for name, array in start.weights.items()})
        return start.line

    def features(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return mean patch features of unmasked images: float32 (batch, dim).

        All processes must pass the same images, here and in :meth:`reconstruct` and :meth:`compare`.
        """
        with self._evaluation():
            features = self.method.features(self._upload(images))
        return features.float().cpu().numpy()

    def attention(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return attention to patches of unmasked images: float32 (batch, N) in [0, 1].

        All processes must call it, with a batch of the same size; the images may differ.
        """
        with self._evaluation():
            attention = self.method.attention(self._upload(images))
        return attention.float().cpu().numpy()

    def reconstruct(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Reconstruction:
        """Mask images as in step 0, and predict their pixels.

        With ``throwing="weighted"``, the attention of these images is computed first.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        sample
            int64 (batch,): index of each image in the data set.

        Raises
        ------
        TypeError
            If the method predicts features.
        """
        method = self.method
        if not isinstance(method, PixelMethod):
            raise TypeError("method: expected one that predicts pixels, got one that predicts features")
        pixels, noise = self._to_device(images, sample, 0)
        with self._evaluation():
            weights = (method.attention(pixels).float(),) if method.config.needs_weights else ()
            output = method(pixels, noise, *weights)
            patches = method.rebuilt_pixels(pixels, output)
        return Reconstruction(output.plan.order.cpu().numpy(), output.plan.schedule, patches.float().cpu().numpy())

    def compare(self, images: NDArray[Any], sample: NDArray[np.int64]) -> Comparison:
        """Mask images as in step 0, and return predicted and target features.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        sample
            int64 (batch,): index of each image in the data set.

        Raises
        ------
        TypeError
            If the method predicts pixels.
        """
        method = self.method
        if not isinstance(method, FeatureMethod):
            raise TypeError("method: expected one that predicts features, got one that predicts pixels")
        pixels, noise = self._to_device(images, sample, 0)
        with self._evaluation():
            output = method(pixels, noise)
            student, teacher = (part.float().cpu().numpy() for part in method.compared_features(pixels, output))
        return Comparison(output.plan.order.cpu().numpy(), output.plan.schedule, student, teacher)
