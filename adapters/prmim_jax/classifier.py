"""Classifiers on the encoder of a method: fine-tuning and linear probe."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_jax.distributed import AXIS
from prmim_jax.interop import check_fit, named_weights, put_weights, read_file
from prmim_jax.method import ImageModule, build_encoder, check_images, check_not_empty
from prmim_jax.methods import METHODS
from prmim_jax.trainer import Trainer, adamw
from prmim_jax.vit import LayerNorm, Linear, Statistic, constant, freeze, normal, wide
from prmim_methods import ClassifierConfig, MethodConfig, TrainingConfig
from prmim_methods.architecture import fit_encoder
from prmim_methods.classifier import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, check_targets, copy_table
from prmim_methods.weight_files import read_architecture


class BatchNorm(nnx.Module):
    """Batch norm of vectors without learned factors or gradient, eps 1e-6.

    Parameters
    ----------
    dim
        Length of the vectors.
    over
        Rows for the statistics in training mode, if devices share the batch inside ``jax.shard_map``: ``"device"``,
        those of this device; ``"all"``, those of all devices.

    Notes
    -----
    In training mode, the running statistics are the mean over the first ten batches, then an exponential moving average
    with momentum 0.1. (PyTorch's average starts at 0 and 1, which biases short trainings.) In evaluation mode, the
    running statistics are used.

    All devices hold the same running statistics. With ``"device"``, they are updated by the averages over devices of
    means and of unbiased variances.
    """

    def __init__(self, dim: int, over: str = "device") -> None:
        self.over = over
        self.running_mean = Statistic(constant(0.0, dim))
        self.running_var = Statistic(constant(1.0, dim))
        self.num_batches_tracked = Statistic(constant(0.0, 1))
        self.deterministic = False

    def __call__(self, x: Array) -> Array:
        """Map (batch, dim) to the same shape, in float32 or wider."""
        x = x.astype(wide(x.dtype))
        running = (self.running_mean[...], self.running_var[...])
        mean, variance = running if self.deterministic else self._learn(lax.stop_gradient(x))
        return (x - mean) * lax.rsqrt(variance + BATCH_NORM_EPS)

    def _learn(self, x: Array) -> tuple[Array, Array]:
        """Return mean and variance of a batch; update the running, unbiased statistics."""
        rows, mean = len(x), x.mean(0)
        if self.over == "all":
            rows, mean = rows * _num_devices(), _mean_of_all(mean)
        variance = jnp.square(x - mean).mean(0)
        if self.over == "all":
            variance = _mean_of_all(variance)
        latest = jnp.stack([mean, variance * rows / max(rows - 1, 1)])
        if self.over == "device":
            latest = _mean_of_all(latest)
        batches = self.num_batches_tracked[...] + 1
        share = jnp.maximum(1 / batches, BATCH_NORM_MOMENTUM)
        self.num_batches_tracked.set_value(batches)
        for running, value in zip((self.running_mean, self.running_var), latest, strict=True):
            running.set_value(running[...] + share * (value - running[...]))
        return mean, variance


def _is_shared() -> bool:
    """Return whether several devices share the batch."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def _num_devices() -> int:
    return lax.axis_size(AXIS) if _is_shared() else 1


def _mean_of_all(values: Array) -> Array:
    """Return the mean over devices with equal numbers of rows."""
    return lax.pmean(values, AXIS) if _is_shared() else values  # type: ignore[no-untyped-call]


class Classifier(ImageModule):
    """An encoder with a linear head; see :class:`prmim_methods.ClassifierConfig`.

    Parameters
    ----------
    method_config
        The method of the encoder. :func:`load_pretrained` loads trained weights.
    config
        The options. With ``protocol="linear"``, all but the head is frozen. Otherwise everything is trained, including
        the position table; relative positions then have a table in each block, see :meth:`ClassifierConfig.position`.
    num_classes
        Number of classes.
    init_seed
        Seed of the head's initial weights; the encoder's is ``method_config.init_seed``.
    dtype
        Dtype of the matrix products, for example ``jax.numpy.bfloat16``; None: float32.

    Notes
    -----
    Names of weights are timm's: ``encoder.`` and those of a ViT, ``fc_norm``, ``head``. For a frozen encoder,
    ``fc_norm`` is a batch norm without learned factors, as in MAE's linear probe. For fine-tuning on the mean of the
    patch tokens, it is a layer norm that replaces the encoder's final norm, as in MAE. For fine-tuning on the class
    token, it is absent.

    Trained variables are of type ``nnx.Param``; the running statistics of the batch norm, which a call in training mode
    changes, are of type :class:`prmim_jax.vit.Statistic`.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> method = MAEConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1,
    ...     num_heads=2)
    >>> classifier = Classifier(method, ClassifierConfig(), 10)
    >>> classifier.eval()
    >>> classifier(jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
    (2, 10)
    """

    losses = ClassifierConfig.losses

    def __init__(
        self,
        method_config: MethodConfig,
        config: ClassifierConfig,
        num_classes: int,
        init_seed: int = 0,
        *,
        dtype: DTypeLike | None = None,
    ) -> None:
        encoder_config = config.encoder(method_config)
        super().__init__(encoder_config)
        method_config.check_pool(config.pool)
        self.method_config, self.config, self.num_classes = method_config, config, num_classes
        self.encoder_config = encoder_config
        dim = method_config.encoder_size.dim
        has_layer_norm = config.pool == "mean" and not config.is_frozen
        self.encoder = build_encoder(
            encoder_config,
            position=config.position(method_config),
            learned_positions=not config.is_frozen,
            final_norm=not has_layer_norm,
            dtype=dtype,
            rngs=nnx.Rngs(method_config.init_seed),
        )
        if config.is_frozen:
            freeze(self.encoder)
            self.fc_norm: BatchNorm | LayerNorm | None = BatchNorm(dim, config.batch_norm)
        else:
            self.fc_norm = LayerNorm(dim) if has_layer_norm else None
        rngs = nnx.Rngs(init_seed)
        self.head = Linear(dim, num_classes, dtype=dtype, rngs=rngs)
        # No truncation at +-2 as in the published recipes, since it has no effect.
        self.head.weight.set_value(normal(rngs, self.head.weight.shape, config.head_std))

    def __call__(self, images: Array, noise: Array | None = None) -> Array:
        """Classify whole images.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        noise
            int (batch, N), for example from ``prmim_core.counter_noise``: determines the branches that drop path drops.
            Required in training mode with drop path.

        Returns
        -------
        jax.Array
            Logits (batch, num_classes), float32 or wider.

        Raises
        ------
        TypeError
            If ``images`` are of another dtype or ``noise`` is not of an integer dtype.
        ValueError
            If a shape does not fit, ``noise`` is needed and missing, or there are no images in training mode.
        """
        scales = self._scales(noise, images)
        encoded = self.encoder(self._normalize(self._patches(images)), None, scales)
        pooled = self._pool(encoded, self.config.pool)
        logits = self.head(pooled if self.fc_norm is None else self.fc_norm(pooled))
        return logits.astype(wide(logits.dtype))

    def _scales(self, noise: Array | None, images: Array) -> Array | None:
        if self.deterministic:
            return None
        check_not_empty(images)
        if self.config.drop_rate == 0:
            return None
        if noise is None:
            raise ValueError("noise: expected integers for drop path in training mode, got None")
        self._check_noise(noise, images)
        return self._drop_path(noise, self.config.drop_rate)

    def no_weight_decay(self) -> frozenset[str]:
        """Return the multi-axis parameters that fine-tuning exempts from weight decay."""
        return self.config.not_decayed()

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :class:`prmim_methods.ClassifierConfig`."""
        return self.config.architecture(self.method_config, self.num_classes)


def load_pretrained(classifier: Classifier, path: str | os.PathLike[str]) -> None:
    """Load the encoder of a classifier from a weight file of a method or an encoder.

    The image size of the file may differ: position tables are then fitted to the classifier's. If the classifier has a
    table of relative position bias in each block, each is a copy of the method's.

    Parameters
    ----------
    classifier
        The classifier.
    path
        A ``.safetensors`` file that ``save_weights`` of either adapter wrote for a method with the record
        ``classifier.method_config``, or with one of the same architecture.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is not a safetensors file, or holds the weights of another architecture; the message names the first
        field that differs. The classifier is unchanged then.
    """
    metadata, tensors = read_file(path)
    tensors = fit_encoder(classifier.encoder_config, read_architecture(metadata, path), tensors)
    expected = {f"encoder.{name}": array for name, array in named_weights(classifier.encoder).items()}
    copied = copy_table(tensors, classifier.method_config.encoder_size.depth)
    found = {name: array for name, array in copied.items() if name in expected}
    check_fit(expected, found, path)
    put_weights(classifier, found)


def lars(momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """SGD with momentum and layer-wise trust ratios (LARS), for learning rate 1.

    Parameters
    ----------
    momentum
        Factor of the previous update, added to the next one.
    trust
        Norm of the update of a multi-axis parameter at learning rate 1, relative to the norm of the parameter.
    weight_decay
        Factor of a multi-axis parameter, added to its gradient.

    Returns
    -------
    optax.GradientTransformation
        Its updates must be multiplied by the learning rate and subtracted.

    Notes
    -----
    Parameters of one axis are neither scaled nor decayed. The learning rate is applied after the momentum, as in MAE's
    probe; ``optax.lars`` applies it before, so steps differ if it changes.

    References
    ----------
    You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888.

    Examples
    --------
    >>> optimizer = lars(trust=0.5)
    >>> weights = {"weight": jnp.full((1, 1), 8.0), "bias": jnp.ones(1)}
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


class ClassifierEngine(Trainer[Classifier]):
    """Training of a classifier; see :class:`prmim_jax.trainer.Trainer`.

    Fine-tuning uses AdamW with layer-wise learning-rate decay; the linear protocol uses :func:`lars`.

    Parameters
    ----------
    method_config
        The method whose encoder the classifier has.
    config
        The options of the classifier.
    num_classes
        Number of classes.
    training
        The options of the training. ``training.seed`` is the seed of drop path and of the head's initial weights. A
        frozen encoder is never sharded: with ``parallel="fsdp"``, each device holds all weights.
    weights
        The method's ``weights.safetensors``; None: the initial weights of a new method.

    Raises
    ------
    FileNotFoundError
        If the weight file does not exist.
    ValueError
        If the weights are of another architecture, or the device is not available.

    Notes
    -----
    ``config.batch_norm`` selects the rows for batch norm: those of each device, or of all. If ``accumulate`` splits the
    batch, each part has its own statistics. Only batch norm of each device makes a step depend on the number of
    devices. Weights and running statistics are equal on all devices.
    """

    def __init__(
        self,
        method_config: MethodConfig,
        config: ClassifierConfig,
        num_classes: int,
        training: TrainingConfig,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self._num_classes = num_classes

        def make_module(dtype: DTypeLike | None) -> Classifier:
            classifier = Classifier(method_config, config, num_classes, init_seed=training.seed, dtype=dtype)
            if weights is None:
                put_weights(classifier.encoder, named_weights(METHODS[method_config.name](method_config).encoder))
            else:
                load_pretrained(classifier, weights)
            return classifier

        def make_optimizer(classifier: Classifier) -> optax.GradientTransformation:
            if config.is_frozen:
                return lars(config.momentum, config.trust, training.weight_decay)
            return adamw(classifier, training)

        super().__init__(
            make_module,
            replace(training, parallel="ddp") if config.is_frozen else training,
            _loss,
            make_optimizer,
            rate_scale=None if config.is_frozen else partial(config.rate_scale, depth=method_config.encoder_size.depth),
            ema_decay=config.ema_decay,
        )

    def train_step(self, images: NDArray[Any], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Take one optimizer step on the cross-entropy, without waiting for the device.

        Measures ``loss`` and ``accuracy``, the fraction of images whose largest logit is at their largest target.

        Parameters
        ----------
        images
            (batch, image_size..., channels): this process's share of the batch, the same size in all processes;
            its devices share it.
        sample
            int64 (batch,), below 2**32: index of each image in the data set. Seed, step and index determine drop path.
        targets
            float32 (batch, num_classes): class probabilities of each image; they sum to 1.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or devices of the process times ``accumulate`` do not divide the batch.
        """
        check_targets(targets, len(images), self._num_classes)
        self._take_step(images, sample, targets)

    def predict(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return logits float32 (batch, num_classes), in evaluation mode.

        All processes must pass the same images.
        """
        check_images(images, self._image_shape, self._image_dtypes)
        return np.asarray(self._evaluate(_logits, images))


def _loss(classifier: Classifier, images: Array, noise: Array, targets: Array) -> Sequence[Array]:
    """Return the cross-entropy and the accuracy."""
    logits = classifier(images, noise)
    is_right = logits.argmax(1) == targets.argmax(1)
    return optax.softmax_cross_entropy(logits, targets).mean(), is_right.mean(dtype=logits.dtype)


def _logits(classifier: Classifier, images: Array) -> Array:
    return classifier(images).astype(jnp.float32)
