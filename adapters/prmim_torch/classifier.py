"""Classifiers on the encoder of a method: fine-tuned whole, or a head alone on features that stay as they are."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

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
from prmim_torch.distributed import Parallel, is_connected
from prmim_torch.interop import load_weights
from prmim_torch.method import Method, Pool, initial_weights
from prmim_torch.methods import create_method
from prmim_torch.trainer import Precision, Trainer, parameter_groups
from prmim_torch.vit import LayerNorm, Linear


class BatchNorm(nn.Module):
    """Batch norm of vectors without learned factors, eps 1e-6, for features through which no gradient goes.

    In training mode it takes the statistics of the batch, of several processes those of all their rows, and the running
    ones follow: they are the mean of the first ten batches', and go a tenth of the way to those of each later one. (In
    PyTorch they go so from the start, from 0 and 1, which short trainings do not forget.) In evaluation mode it takes
    the running ones, each row for itself.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim) to the same shape, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self._learn(x.detach()) if self.training else (self.running_mean, self.running_var)
        return (x - mean) * (variance + BATCH_NORM_EPS).rsqrt()

    def _learn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of a batch, and remember them; the latter unbiased, as PyTorch does."""
        mean, processes = _mean_of_all(x.mean(0))
        variance, _ = _mean_of_all((x - mean).square().mean(0))
        rows = len(x) * processes
        self.num_batches_tracked += 1
        share = self.num_batches_tracked.reciprocal().clamp(min=BATCH_NORM_MOMENTUM)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * rows / max(rows - 1, 1), share)
        return mean, variance


def _mean_of_all(values: Tensor) -> tuple[Tensor, int]:
    """Return the mean over the processes, which have as many rows each, and their number."""
    if not is_connected():
        return values, 1
    dist.all_reduce(values)
    return values / dist.get_world_size(), dist.get_world_size()


class Classifier(Method):
    """The encoder of a method with a linear head, which maps images to logits.

    Parameters
    ----------
    method
        Where the encoder comes from. It is copied; the method stays as it is.
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
        Seed of the head's weights, which are a function of it; torch's global random state is left as it was.

    Raises
    ------
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.

    Notes
    -----
    Names of weights are timm's: ``encoder.`` and those of a ViT, ``fc_norm``, ``head``.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.

    Examples
    --------
    >>> method = create_method("mae", image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1, num_heads=2)
    >>> classifier = Classifier(method, 10).eval()
    >>> classifier(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape
    torch.Size([2, 10])
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
        )
        check_classifier(num_classes, pool, frozen, drop_path, norm)
        self.num_classes, self.pool, self.norm = num_classes, pool, norm
        self.frozen, self.drop_path = frozen, float(drop_path)
        with initial_weights(init_seed):
            self._build(method)

    def _build(self, method: Method) -> None:
        self.encoder = copy.deepcopy(method.encoder).requires_grad_(not self.frozen)
        self.fc_norm: nn.Module = nn.Identity()
        if self.norm == "batch":
            self.fc_norm = BatchNorm(self.embed_dim)
        elif self.pool == "mean":
            self.encoder.norm = nn.Identity()  # type: ignore[assignment]  # fc_norm takes its place
            self.fc_norm = LayerNorm(self.embed_dim)
        if hasattr(self.encoder, "mask_token"):
            del self.encoder.mask_token  # nothing is masked
        if self.encoder.position == "absolute" and not self.frozen:
            table = self.encoder.pos_embed
            del self.encoder.pos_embed
            self.encoder.pos_embed = nn.Parameter(table)
        self.head = Linear(self.embed_dim, self.num_classes)
        # The truncation of the published recipes is at 2, far outside.
        nn.init.normal_(self.head.weight, std=head_std(self.frozen))

    def train(self, mode: bool = True) -> "Classifier":
        """Set training or evaluation mode; a frozen encoder is always in the latter."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
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
        Tensor
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
        logits: Tensor = self.head(self.fc_norm(pooled))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _scales(self, noise: Tensor | None, batch: int) -> Tensor | None:
        if not self.training or self.drop_path == 0:
            return None
        if noise is None:
            raise ValueError("noise: expected integers for drop path in training mode, got None")
        self._check_noise(noise, batch)
        scales: Tensor = drop_path_scales(noise, self.depth, self.drop_path)
        return scales

    def not_decayed(self) -> frozenset[str]:
        """Name cls token and position tables, which the recipes of fine-tuning spare from weight decay."""
        return NOT_DECAYED

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`Method.architecture`."""
        return {
            "kind": "classifier",
            **super().architecture(),
            "position": self.encoder.position,
            "num_classes": self.num_classes,
            "pool": self.pool,
            "norm": self.norm,
        }


class LARS(torch.optim.Optimizer):
    """Momentum whose steps are as long as the trust coefficient says, relative to each weight matrix.

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        Learning rate.
    momentum
        Share of the last step that is added to the next one.
    trust
        Length of an update of a weight of several axes, relative to the weight, at learning rate 1.
    weight_decay
        Added to the gradient of a weight of several axes, times the weight.

    Notes
    -----
    Parameters of one axis are neither scaled nor decayed. As PyTorch's fused optimisers do, it obeys a gradient scaler:
    gradients are divided by an attribute ``grad_scale``, and nothing changes where ``found_inf`` is not 0. It never
    waits for the device.

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
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no use for one
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
            # Where either is 0, there is nothing to be relative to.
            update = update * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        held = self.state[parameter]
        if "momentum_buffer" not in held:
            held["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = held["momentum_buffer"]
        moved = group["momentum"] * velocity + update
        step = group["lr"] * moved
        if self.found_inf is not None:
            is_bad = self.found_inf > 0
            moved, step = torch.where(is_bad, velocity, moved), torch.where(is_bad, 0.0, step)
        velocity.copy_(moved)
        parameter.sub_(step)


class ClassifierEngine(Trainer):
    """A classifier with its optimiser, on one device or, in every process that ``torchrun`` starts, on one each.

    Parameters
    ----------
    method_options
        Arguments of :func:`prmim_torch.create_method`, ``name`` among them: the method whose encoder is taken.
    num_classes, pool, frozen, norm, drop_path
        See :class:`Classifier`.
    weights
        The method's ``weights.safetensors``, of the same architecture; None: the encoder starts from random weights.
    optimizer
        ``"adamw"``, or ``"lars"`` for a frozen encoder: see :class:`LARS`.
    layer_decay
        AdamW's learning rate is times this for each block that is in between: see
        :func:`prmim_core.classifier.rate_scale`.
    momentum, trust
        Those of :class:`LARS`.
    ema_decay
        Decay, per step, of a running mean of the weights, with which :meth:`predict` works; None: there is none.
    seed
        Seed of drop path, of the head's weights, and of the encoder's where there is no ``init_seed``; in [0, 2**32).
    total_steps, warmup_steps, learning_rate, min_learning_rate, decay, weight_decay, betas, clip_grad, accumulate, \
precision, compile, device, parallel, timeout
        Those of :class:`prmim_torch.Engine`. With a frozen encoder ``parallel`` makes no difference: each process
        holds all of it, and all of the head.

    Raises
    ------
    FileNotFoundError
        If there are no such weights.
    TypeError, ValueError
        If an option is wrong, or the weights are of another architecture; one line that names it.

    Notes
    -----
    What holds of a step of :class:`prmim_torch.Engine` holds here too: a step that is not finite changes nothing, a
    running mean and the statistics of a batch norm neither. Batch norm takes the statistics of all processes' rows, but
    of each of the parts into which ``accumulate`` cuts a batch for itself.
    """

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
        if self._lars is not None:
            self._moments = ("momentum_buffer",)
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
        if norm == "batch":
            self._statistics = list(self.module.get_submodule("fc_norm").buffers())

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        method = create_method(**{"init_seed": seed, **method_options})
        if self._weights is not None:
            load_weights(method, self._weights)
        return Classifier(method, self._num_classes, init_seed=seed, **self._head_options)

    def _create_optimizer(self, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        if self._lars is not None:
            return LARS(parameter_groups(self.module, weight_decay), **self._lars)
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for group in parameter_groups(self.module, weight_decay):
            for parameter in group["params"]:
                scale = rate_scale(names[parameter], self.module.depth, self._layer_decay)
                groups.setdefault((scale, group["weight_decay"]), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "rate_scale": scale, "weight_decay": decay}
                for (scale, decay), parameters in groups.items()
            ],
            lr=0.0,
            betas=betas,
            fused=True,
        )

    def _losses(self, pixels: Tensor, noise: Tensor, *more: Tensor) -> Sequence[Tensor]:
        (targets,) = more
        logits = self._forward(pixels, noise)
        is_right = logits.argmax(1) == targets.argmax(1)
        return F.cross_entropy(logits, targets), is_right.to(logits.dtype).mean()

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64], targets: NDArray[np.float32]) -> None:
        """Take one optimiser step on the cross-entropy, without waiting for it to end.

        It measures ``loss`` and ``accuracy``: the share of images for which the largest logit is where the largest
        target is.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels). Of several processes, each brings as many images of its own.
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give what drop path
            skips.
        targets
            float32 (batch, num_classes): for each image, how much it is of each class; they add up to 1.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or ``accumulate`` does not divide the batch.
        """
        check_targets(targets, len(images), self._num_classes)
        self._take_step(images, sample, targets)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 (batch, num_classes), each image for itself; several processes bring the same ones."""
        with self._evaluation():
            logits = self.module(self._upload(images))
        return logits.float().cpu().numpy()  # type: ignore[no-any-return]
