"""Classifiers on the encoder of a method: fine-tuning and linear probe."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from prmim_methods import ClassifierConfig, MethodConfig, TrainingConfig
from prmim_methods.architecture import fit_encoder
from prmim_methods.classifier import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, check_targets, copy_table
from prmim_methods.weight_files import read_architecture
from prmim_torch.distributed import is_connected
from prmim_torch.interop import check_fit, read_file
from prmim_torch.method import ImageModule, build_encoder, check_not_empty, initial_weights
from prmim_torch.methods import METHODS
from prmim_torch.trainer import Trainer, parameter_groups
from prmim_torch.vit import LayerNorm, Linear


class BatchNorm(nn.Module):
    """Batch norm of vectors without learned factors or gradient, eps 1e-6.

    Parameters
    ----------
    dim
        Length of the vectors.
    over
        Rows for the statistics in training mode, if processes share the batch: ``"device"``, those of this process;
        ``"all"``, those of all processes.

    Notes
    -----
    In training mode, the running statistics are the mean over the first ten batches, then an exponential moving average
    with momentum 0.1. (PyTorch's average starts at 0 and 1, which biases short trainings.) In evaluation mode, the
    running statistics are used.

    All processes hold the same running statistics. With ``"device"``, they are updated by the averages over processes
    of means and of unbiased variances.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, over: str = "device") -> None:
        super().__init__()
        self.over = over
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))
        self.register_buffer("num_batches_tracked", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the running statistics to their initial values."""
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        nn.init.zeros_(self.num_batches_tracked)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim) to the same shape, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self._learn(x.detach()) if self.training else (self.running_mean, self.running_var)
        return (x - mean) * (variance + BATCH_NORM_EPS).rsqrt()

    def _learn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of a batch; update the running, unbiased statistics."""
        rows, mean = x.shape[0], x.mean(0)
        if self.over == "all":
            rows, mean = rows * _num_processes(), _mean_of_all(mean)
        variance = (x - mean).square().mean(0)
        if self.over == "all":
            variance = _mean_of_all(variance)
        latest = torch.stack([mean, variance * rows / max(rows - 1, 1)])
        if self.over == "device":
            latest = _mean_of_all(latest)
        self.num_batches_tracked += 1
        share = self.num_batches_tracked.reciprocal().clamp(min=BATCH_NORM_MOMENTUM)
        self.running_mean.lerp_(latest[0], share)
        self.running_var.lerp_(latest[1], share)
        return mean, variance


def _num_processes() -> int:
    return dist.get_world_size() if is_connected() else 1


def _mean_of_all(values: Tensor) -> Tensor:
    """Average over processes with equal numbers of rows; overwrites ``values``."""
    if not is_connected():
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


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

    Notes
    -----
    Names of weights are timm's: ``encoder.`` and those of a ViT, ``fc_norm``, ``head``. For a frozen encoder,
    ``fc_norm`` is a batch norm without learned factors, as in MAE's linear probe. For fine-tuning on the mean of the
    patch tokens, it is a layer norm that replaces the encoder's final norm, as in MAE. For fine-tuning on the class
    token, it is absent.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> method = MAEConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1,
    ...     num_heads=2)
    >>> classifier = Classifier(method, ClassifierConfig(), 10).eval()
    >>> classifier(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape
    torch.Size([2, 10])
    """

    losses = ClassifierConfig.losses

    def __init__(
        self, method_config: MethodConfig, config: ClassifierConfig, num_classes: int, init_seed: int = 0
    ) -> None:
        encoder_config = config.encoder(method_config)
        super().__init__(encoder_config)
        method_config.check_pool(config.pool)
        self.method_config, self.config, self.num_classes = method_config, config, num_classes
        self.encoder_config = encoder_config
        self._init_seed = init_seed
        dim = method_config.encoder_size.dim
        has_layer_norm = config.pool == "mean" and not config.is_frozen
        with initial_weights(method_config.init_seed):
            self.encoder = build_encoder(
                encoder_config,
                position=config.position(method_config),
                learned_positions=not config.is_frozen,
                final_norm=not has_layer_norm,
            )
        self.encoder.requires_grad_(not config.is_frozen)
        self.fc_norm: nn.Module = nn.Identity()
        if config.is_frozen:
            self.fc_norm = BatchNorm(dim, config.batch_norm)
        elif has_layer_norm:
            self.fc_norm = LayerNorm(dim)
        with initial_weights(init_seed):
            self.head = Linear(dim, num_classes)
            # No truncation at +-2 as in the published recipes, since it has no effect.
            nn.init.normal_(self.head.weight, std=config.head_std)

    def _new(self) -> nn.Module:
        return Classifier(self.method_config, self.config, self.num_classes, self._init_seed)

    def train(self, mode: bool = True) -> "Classifier":
        """Set training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.config.is_frozen)
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
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
        Tensor
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
        logits = self.head(self.fc_norm(self._pool(encoded, self.config.pool)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _scales(self, noise: Tensor | None, images: Tensor) -> Tensor | None:
        if not self.training:
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
        A ``.safetensors`` file that :func:`prmim_torch.save_weights` wrote for a method with the record
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
    expected = {f"encoder.{name}": tensor for name, tensor in classifier.encoder.state_dict().items()}
    copied = copy_table(tensors, classifier.method_config.encoder_size.depth)
    found = {name: tensor for name, tensor in copied.items() if name in expected}
    check_fit(expected, found, path)
    classifier.load_state_dict(found, strict=False)


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise trust ratios (LARS).

    Parameters
    ----------
    params
        Parameters or parameter groups.
    lr
        Learning rate.
    momentum
        Factor of the previous update, added to the next one.
    trust
        Norm of the update of a multi-axis parameter at learning rate 1, relative to the norm of the parameter.
    weight_decay
        Factor of a multi-axis parameter, added to its gradient.

    Notes
    -----
    Parameters of one axis are neither scaled nor decayed. Like PyTorch's fused optimizers, this one supports gradient
    scalers: gradients are divided by the attribute ``grad_scale``, and a step with nonzero ``found_inf`` is a no-op. It
    never waits for the device.

    References
    ----------
    You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        *,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient if self.grad_scale is None else gradient / self.grad_scale
        if parameter.ndim > 1:
            update = update + group["weight_decay"] * parameter
            ratio = group["trust"] * parameter.norm() / update.norm()
            # For a norm of 0, the ratio is undefined.
            update = update * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"]
        moved = group["momentum"] * velocity + update
        step = group["lr"] * moved
        if self.found_inf is not None:
            is_bad = self.found_inf > 0
            moved, step = torch.where(is_bad, velocity, moved), torch.where(is_bad, 0.0, step)
        velocity.copy_(moved)
        parameter.sub_(step)


class ClassifierEngine(Trainer[Classifier]):
    """Training of a classifier; see :class:`prmim_torch.trainer.Trainer`.

    Fine-tuning uses AdamW with layer-wise learning-rate decay; the linear protocol uses :class:`LARS`.

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
        frozen encoder is never sharded: with ``parallel="fsdp"``, each process holds all weights.
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
    ``config.batch_norm`` selects the rows for batch norm: those of each process, or of all. If ``accumulate`` splits
    the batch, each part has its own statistics. Only batch norm of each process makes a step depend on the number of
    processes. Weights and running statistics are equal in all processes.
    """

    def __init__(
        self,
        method_config: MethodConfig,
        config: ClassifierConfig,
        num_classes: int,
        training: TrainingConfig,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        def make_optimizer(classifier: Classifier) -> torch.optim.Optimizer:
            groups = parameter_groups(classifier, training.weight_decay)
            if config.is_frozen:
                return LARS(groups, momentum=config.momentum, trust=config.trust)
            return torch.optim.AdamW(_with_rates(classifier, groups), lr=0.0, betas=training.betas, fused=True)

        classifier = Classifier(method_config, config, num_classes, init_seed=training.seed)
        if weights is None:
            initial = METHODS[method_config.name](method_config).encoder.state_dict()
            classifier.encoder.load_state_dict(initial, strict=False)
        else:
            load_pretrained(classifier, weights)
        super().__init__(
            classifier,
            replace(training, parallel="ddp") if config.is_frozen else training,
            _loss,
            make_optimizer,
            moments=("momentum_buffer",) if config.is_frozen else ("exp_avg", "exp_avg_sq"),
            ema_decay=config.ema_decay,
            statistics=classifier.fc_norm,
        )

    def train_step(self, images: NDArray[Any], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Take one optimizer step on the cross-entropy, without waiting for the device.

        Measures ``loss`` and ``accuracy``, the fraction of images whose largest logit is at their largest target.

        Parameters
        ----------
        images
            (batch, image_size..., channels): this process's share of the batch, the same size in all processes.
        sample
            int64 (batch,): index of each image in the data set. Seed, step and index determine drop path.
        targets
            float32 (batch, num_classes): class probabilities of each image; they sum to 1.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or ``accumulate`` does not divide the batch.
        """
        check_targets(targets, len(images), self.module.num_classes)
        self._take_step(images, sample, targets)

    def predict(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return logits float32 (batch, num_classes), in evaluation mode.

        All processes must pass the same images.
        """
        with self._evaluation():
            logits = self.module(self._upload(images))
        return logits.float().cpu().numpy()


def _loss(forward: Callable[..., Tensor], images: Tensor, noise: Tensor, targets: Tensor) -> Sequence[Tensor]:
    """Return the cross-entropy and the accuracy."""
    logits = forward(images, noise)
    is_right = logits.argmax(1) == targets.argmax(1)
    return F.cross_entropy(logits, targets), is_right.to(logits.dtype).mean()


def _with_rates(classifier: Classifier, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups by ``rate_scale``, a factor of the learning rate."""
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    depth = len(classifier.encoder.blocks)
    split: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            scale = classifier.config.rate_scale(names[parameter], depth)
            split.setdefault((scale, group["weight_decay"]), []).append(parameter)
    return [
        {"params": parameters, "rate_scale": scale, "weight_decay": weight_decay}
        for (scale, weight_decay), parameters in split.items()
    ]
