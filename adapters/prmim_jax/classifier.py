"""Classifiers on the encoder of a method: fine-tuned whole, or a head alone on features that stay as they are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from prmim_core import drop_path_scales
from prmim_core.classifier import (
    BATCH_NORM_EPS,
    BATCH_NORM_MOMENTUM,
    NOT_DECAYED,
    Norm,
    Optimizer,
    check_classifier,
    check_optimizer,
    check_targets,
    head_std,
    rate_scale,
)
from prmim_core.training import Decay
from prmim_jax.distributed import AXIS, Parallel
from prmim_jax.interop import load_weights
from prmim_jax.method import Method, Pool, check_images, initial_rngs
from prmim_jax.methods import create_method
from prmim_jax.trainer import Precision, Trainer
from prmim_jax.vit import Buffer, LayerNorm, Linear, Statistic, constant, normal, wide


class Identity(nnx.Module):
    """What stands where there is no norm."""

    def __call__(self, x: Array) -> Array:
        """Return the same."""
        return x


class BatchNorm(nnx.Module):
    """Batch norm of vectors without learned factors, eps 1e-6, for features through which no gradient goes.

    In training mode it takes the statistics of the batch, of several devices those of all their rows, and the running
    ones follow: they are the mean of the first ten batches', and go a tenth of the way to those of each later one. (In
    PyTorch they go so from the start, from 0 and 1, which short trainings do not forget.) In evaluation mode it takes
    the running ones, each row for itself.

    Attributes
    ----------
    axis_name
        Axis of a mesh whose devices have rows of one batch, inside of ``jax.shard_map``; None: all rows are here.
    """

    def __init__(self, dim: int) -> None:
        self.running_mean = Statistic(constant(0.0, dim))
        self.running_var = Statistic(constant(1.0, dim))
        self.num_batches_tracked = Statistic(constant(0.0, 1))
        self.deterministic = False
        self.axis_name: str | None = None

    def __call__(self, x: Array) -> Array:
        """Map (batch, dim) to the same shape, in float32 or wider."""
        x = x.astype(wide(x.dtype))
        learned = (self.running_mean[...], self.running_var[...])
        mean, variance = learned if self.deterministic else self._learn(lax.stop_gradient(x))
        return (x - mean) * lax.rsqrt(variance + BATCH_NORM_EPS)

    def _learn(self, x: Array) -> tuple[Array, Array]:
        """Return mean and variance of a batch, and remember them; the latter unbiased, as PyTorch does."""
        mean, devices = self._mean_of_all(x.mean(0))
        variance, _ = self._mean_of_all(jnp.square(x - mean).mean(0))
        rows = len(x) * devices
        batches = self.num_batches_tracked[...] + 1
        share = jnp.maximum(1 / batches, BATCH_NORM_MOMENTUM)
        self.num_batches_tracked.set_value(batches)
        for running, value in ((self.running_mean, mean), (self.running_var, variance * rows / max(rows - 1, 1))):
            running.set_value(running[...] + share * (value - running[...]))
        return mean, variance

    def _mean_of_all(self, values: Array) -> tuple[Array, int]:
        """Return the mean over the devices, which have as many rows each, and their number."""
        if self.axis_name is None:
            return values, 1
        return lax.pmean(values, self.axis_name), lax.axis_size(self.axis_name)  # type: ignore[no-untyped-call]


class Classifier(Method):
    """The encoder of a method with a linear head, which maps images to logits.

    Parameters
    ----------
    method
        Where the encoder comes from. The two have variables of their own, which hold the same arrays at first.
    num_classes
        Classes to tell apart.
    pool
        What the head sees: ``"mean"``, the mean of the patch tokens, or ``"cls"``, the cls token.
    frozen
        Whether the encoder stays as it is (a linear probe). Else all of it learns, the absolute position table too.
    drop_path
        Rate at which a branch of the last block is skipped for an image, in training mode, in [0, 1); it rises linearly
        from 0 at the first block. What is skipped is a function of the noise. 0 for a frozen encoder.
    norm
        ``"layer"``: the mean is of tokens that are not normalised, and goes through a new layer norm, ``fc_norm``, as
        in MAE's fine-tuning; the cls token has gone through the encoder's own norm. ``"batch"``, for a frozen encoder:
        features as :meth:`Method.features` gives them go through a batch norm without learned factors, as in MAE's
        linear probe.
    init_seed
        Seed of the head's weights, which are a function of it (another one than in PyTorch).

    Raises
    ------
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.

    Notes
    -----
    Names of weights are timm's: ``encoder.`` and those of a ViT, ``fc_norm``, ``head``. What learns is of type
    ``nnx.Param``; a batch norm's running statistics, which a call in training mode changes, of type
    :class:`prmim_jax.vit.Statistic`.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.

    Examples
    --------
    >>> method = create_method("mae", image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1, num_heads=2)
    >>> classifier = Classifier(method, 10)
    >>> classifier.eval()
    >>> classifier(jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
    (2, 10)
    """

    losses = ("loss", "accuracy")

    def __init__(
        self,
        method: Method,
        num_classes: int,
        *,
        pool: Pool = "mean",
        frozen: bool = False,
        drop_path: float = 0.0,
        norm: Norm = "layer",
        init_seed: int = 0,
    ) -> None:
        super().__init__(
            model="vit_base",  # of which no size is left
            image_size=method.image_size,
            patch_size=method.patch_size,
            channels=method.channels,
            mean=method.mean,
            std=method.std,
            embed_dim=method.embed_dim,
            depth=method.depth,
            num_heads=method.num_heads,
            recompute_blocks=method.recompute_blocks,
            scan_blocks=method.scan_blocks,
        )
        check_classifier(num_classes, pool, frozen, drop_path, norm)
        self.num_classes, self.pool, self.norm = num_classes, pool, norm
        self.frozen, self.drop_path = frozen, float(drop_path)
        self._build(method, initial_rngs(init_seed, None))

    def _build(self, method: Method, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.clone(method.encoder)
        self.fc_norm: Identity | BatchNorm | LayerNorm = Identity()
        if self.norm == "batch":
            self.fc_norm = BatchNorm(self.embed_dim)
        elif self.pool == "mean":
            self.encoder.norm = Identity()  # type: ignore[assignment]  # fc_norm takes its place
            self.fc_norm = LayerNorm(self.embed_dim)
        if hasattr(self.encoder, "mask_token"):
            del self.encoder.mask_token  # nothing is masked
        if self.frozen:
            _freeze(self.encoder)
        elif self.encoder.pos_embed is not None:
            self.encoder.pos_embed = nnx.Param(self.encoder.pos_embed[...])  # type: ignore[assignment]  # it learns
        self.head = Linear(self.embed_dim, self.num_classes, rngs=rngs)
        # The truncation of the published recipes is at 2, far outside.
        self.head.weight.set_value(normal(rngs, self.head.weight.shape, head_std(self.frozen)))

    def __call__(self, images: Array, noise: Array | None = None) -> Array:
        """Classify whole images.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        noise
            int (batch, N), for instance from ``prmim_core.counter_noise``: what is skipped by drop path. None where
            there is no drop path, or in evaluation mode.

        Returns
        -------
        jax.Array
            Logits (batch, num_classes), float32 or wider.

        Raises
        ------
        TypeError
            If ``images`` are not uint8 or ``noise`` does not hold integers.
        ValueError
            If a shape does not fit, or there is no noise where there has to be.
        """
        encoder, scales = self.encoder, self._scales(noise, len(images))
        tokens = encoder.place(encoder.patch_embed(self._normalize(self._patches(images))))
        encoded = encoder.encode(tokens, None, scales)
        pooled = encoded[:, 0] if self.pool == "cls" else encoded[:, 1:].mean(1)
        logits = self.head(self.fc_norm(pooled))
        return logits.astype(wide(logits.dtype))

    def _scales(self, noise: Array | None, batch: int) -> Array | None:
        if self.deterministic or self.drop_path == 0:
            return None
        if noise is None:
            raise ValueError("noise: expected integers for drop path in training mode, got None")
        self._check_noise(noise, batch)
        scales: Array = drop_path_scales(noise, self.depth, self.drop_path)
        return scales

    def not_decayed(self) -> frozenset[str]:
        """Name cls token and position tables, which the recipes of fine-tuning spare from weight decay."""
        return NOT_DECAYED

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`Method.architecture`."""
        return {
            "kind": "classifier",
            **super().architecture(),
            "position": "relative" if self.encoder.pos_embed is None else "absolute",
            "num_classes": self.num_classes,
            "pool": self.pool,
            "norm": self.norm,
        }


def _freeze(module: nnx.Module) -> None:
    """Let parameters be buffers."""
    for _, part in nnx.iter_modules(module):
        for name, variable in list(vars(part).items()):
            if isinstance(variable, nnx.Param):
                setattr(part, name, Buffer(variable[...]))


def lars(momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return momentum whose steps are as long as the trust coefficient says, relative to each weight matrix.

    Parameters
    ----------
    momentum
        Share of the last step that is added to the next one.
    trust
        Length of an update of a weight of several axes, relative to the weight, at learning rate 1.
    weight_decay
        Added to the gradient of a weight of several axes, times the weight.

    Returns
    -------
    optax.GradientTransformation
        What it makes of gradients is to be multiplied with the learning rate and subtracted.

    Notes
    -----
    Weights of one axis are neither scaled nor decayed. The learning rate comes after the momentum, as in MAE's probe:
    in ``optax.lars`` it comes before, so that steps differ where it changes.

    References
    ----------
    You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888.

    Examples
    --------
    >>> optimizer, weights = lars(trust=0.5), {"weight": jnp.full((1, 1), 8.0), "bias": jnp.ones(1)}
    >>> gradients = jax.tree.map(jnp.ones_like, weights)
    >>> updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    >>> {name: update.item() for name, update in updates.items()}
    {'bias': 1.0, 'weight': 4.0}
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_has_several_axes),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), _has_several_axes),
        optax.trace(momentum),
    )


def _has_several_axes(weights: Any) -> Any:
    return jax.tree.map(lambda weight: weight.ndim > 1, weights)


class ClassifierEngine(Trainer):
    """A classifier with its optimiser, on all devices of a platform, of one process or of several.

    Parameters
    ----------
    method_options
        Arguments of :func:`prmim_jax.create_method`, ``name`` among them: the method whose encoder is taken.
    num_classes, pool, frozen, norm, drop_path
        See :class:`Classifier`.
    weights
        The method's ``weights.safetensors``, of the same architecture; None: the encoder starts from random weights.
    optimizer
        ``"adamw"``, or ``"lars"`` for a frozen encoder: see :func:`lars`.
    layer_decay
        AdamW's learning rate is times this for each block that is in between: see
        :func:`prmim_core.classifier.rate_scale`.
    momentum, trust
        Those of :func:`lars`.
    ema_decay
        Decay, per step, of a running mean of the weights, with which :meth:`predict` works; None: there is none.
    seed
        Seed of drop path, of the head's weights, and of the encoder's where there is no ``init_seed``; in [0, 2**32).
    total_steps, warmup_steps, learning_rate, min_learning_rate, decay, weight_decay, betas, clip_grad, accumulate, \
precision, compile, device, parallel, timeout
        Those of :class:`prmim_jax.Engine`. With a frozen encoder ``parallel`` makes no difference: each device holds
        all of it, and all of the head.

    Raises
    ------
    FileNotFoundError
        If there are no such weights.
    TypeError, ValueError
        If an option is wrong, or the weights are of another architecture; one line that names it.

    Notes
    -----
    What holds of a step of :class:`prmim_jax.Engine` holds here too: a step that is not finite changes nothing, a
    running mean and the statistics of a batch norm neither. Batch norm takes the statistics of all devices' rows, but
    of each of the parts into which ``accumulate`` cuts a batch for itself.
    """

    _num_inputs = 3

    def __init__(
        self,
        method_options: Mapping[str, Any],
        num_classes: int,
        *,
        weights: str | os.PathLike[str] | None = None,
        pool: Pool = "mean",
        frozen: bool = False,
        norm: Norm = "layer",
        drop_path: float = 0.0,
        optimizer: Optimizer = "adamw",
        layer_decay: float = 1.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        ema_decay: float | None = None,
        seed: int,
        total_steps: int,
        warmup_steps: int,
        learning_rate: float,
        min_learning_rate: float = 0.0,
        decay: Decay = "cosine",
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        clip_grad: float | None = None,
        accumulate: int = 1,
        precision: Precision = "float32",
        compile: bool = False,
        device: str = "auto",
        parallel: Parallel = "ddp",
        timeout: float = 45.0,
    ) -> None:
        check_optimizer(optimizer, frozen, layer_decay, momentum, trust, ema_decay)
        self._num_classes, self._weights = num_classes, weights
        self._head_options: dict[str, Any] = {"pool": pool, "frozen": frozen, "norm": norm, "drop_path": drop_path}
        self._layer_decay, self._ema_decay = layer_decay, ema_decay
        self._lars = {"momentum": momentum, "trust": trust} if optimizer == "lars" else None
        super().__init__(
            method_options,
            seed=seed,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            decay=decay,
            weight_decay=weight_decay,
            betas=betas,
            clip_grad=clip_grad,
            accumulate=accumulate,
            precision=precision,
            compile=compile,
            device=device,
            parallel="ddp" if frozen and parallel == "fsdp" else parallel,
            timeout=timeout,
        )

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        method = create_method(**{"init_seed": seed, **method_options})
        if self._weights is not None:
            load_weights(method, self._weights)
        self._depth = method.depth
        classifier = Classifier(method, self._num_classes, init_seed=seed, **self._head_options)
        if isinstance(classifier.fc_norm, BatchNorm) and self._layout.num_devices > 1:
            classifier.fc_norm.axis_name = AXIS
        return classifier

    def _create_optimizer(
        self, weight_decay: float, betas: tuple[float, float], is_decayed: dict[str, bool]
    ) -> optax.GradientTransformation:
        if self._lars is not None:
            return lars(**self._lars, weight_decay=weight_decay)
        return super()._create_optimizer(weight_decay, betas, is_decayed)

    def _rate_scale(self, name: str) -> float:
        return rate_scale(name, self._depth, self._layer_decay)

    def _losses(self, module: Any, images: Array, noise: Array, *more: Array) -> Sequence[Array]:
        (targets,) = more
        logits = module(images, noise)
        is_right = logits.argmax(1) == targets.argmax(1)
        return optax.softmax_cross_entropy(logits, targets).mean(), is_right.mean(dtype=logits.dtype)

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Take one optimiser step on the cross-entropy, without waiting for it to end.

        It measures ``loss`` and ``accuracy``: the share of images for which the largest logit is where the largest
        target is.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels). Of several processes, each brings as many images of its own; they
            are shared out among its devices.
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give what drop path
            skips.
        targets
            float32 (batch, num_classes): for each image, how much it is of each class; they add up to 1.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or devices of the process times ``accumulate`` do not divide the batch.
        """
        check_targets(targets, len(images), self._num_classes)
        self._take_step(images, sample, targets)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 (batch, num_classes), each image for itself; several processes bring the same ones."""
        check_images(images, self._image_shape)
        return np.asarray(self._evaluate(_logits, images))


def _logits(classifier: Classifier, images: Array) -> Array:
    return classifier(images).astype(jnp.float32)
