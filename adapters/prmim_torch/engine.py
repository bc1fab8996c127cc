"""The PyTorch engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import cos, pi
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prmim_core import (
    CostReport,
    Schedule,
    Transformer,
    cost,
    counter_noise,
)
from prmim_torch.interop import load_weights, read_weights, save_weights, write_atomically
from prmim_torch.mae import MAE, MAEOutput
from prmim_torch.methods import create_method
from prmim_torch.reconstruct import ProgressiveReconstruction

Precision = Literal["float32", "bfloat16"]

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "training_state.pt"
MEANS = ("loss", "loss_decoded", "loss_thrown", "grad_norm")


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


class Engine:
    """A method with AdamW on one device.

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
    weight_decay
        AdamW's; see :func:`parameter_groups` for what is spared.
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
        ``"auto"`` (cuda if there is one), or any name that ``torch.device`` takes.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; one line that names it.

    Notes
    -----
    A training step never waits for the device. Images go to it as uint8; noise, plan and normalisation are made there.
    A step whose loss or gradient norm is not finite changes neither weights nor optimiser state: AdamW's fused kernel
    reads the verdict on the device (the mechanism made for loss scaling). :attr:`step` and the learning rate move on
    all the same.
    """

    def __init__(
        self,
        method_options: Mapping[str, Any],
        *,
        seed: int,
        total_steps: int,
        warmup_steps: int,
        learning_rate: float,
        min_learning_rate: float = 0.0,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        clip_grad: float | None = None,
        accumulate: int = 1,
        precision: Precision = "float32",
        compile: bool = False,
        device: str = "auto",
    ) -> None:
        _check_options(seed, total_steps, warmup_steps, learning_rate, min_learning_rate, clip_grad, accumulate)
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        self._device = _choose_device(device)
        # A registry of methods returns modules; what the engine needs of one is what MAE has.
        self.method = cast(MAE, create_method(**{"init_seed": seed, **method_options}).to(self._device))
        self.method.train()
        self._forward = torch.compile(self.method, fullgraph=True, dynamic=False) if compile else self.method
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.method, weight_decay), lr=0.0, betas=betas, fused=True
        )
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._seed = seed
        self._rates = (total_steps, warmup_steps, learning_rate, min_learning_rate)
        self._clip_grad = clip_grad
        self._accumulate = accumulate
        self._precision = precision
        self._step = 0
        # Sums of MEANS over the finite steps since the last reading, then the number of those steps.
        self._sums = torch.zeros(len(MEANS) + 1, dtype=torch.float64, device=self._device)
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=self._device)

    @property
    def step(self) -> int:
        """Optimiser steps completed, those before a resume among them."""
        return self._step

    @property
    def num_parameters(self) -> int:
        """Learned numbers of the method."""
        return sum(parameter.numel() for parameter in self._parameters)

    @property
    def device(self) -> str:
        """The device, in words."""
        if self._device.type == "cuda":
            return f"{self._device} ({torch.cuda.get_device_name(self._device)})"
        return f"{self._device} ({torch.get_num_threads()} threads)"

    def cost(self) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        method = self.method
        return cost(
            method.schedule,
            patch_dim=method.patch_dim,
            encoder=Transformer(method.embed_dim, method.depth, method.num_heads),
            decoder=Transformer(method.decoder_dim, method.decoder_depth, method.decoder_heads),
            variant=method.variant,  # type: ignore[arg-type]  # checked by the method
            compute_bytes=2 if self._precision == "bfloat16" else 4,
        )

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> None:
        """Take one optimiser step, without waiting for it to end.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give its mask.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or ``accumulate`` does not divide the batch.
        """
        batch = len(images)
        if batch % self._accumulate:
            raise ValueError(f"images: expected a batch that accumulate={self._accumulate} divides, got {batch}")
        learning_rate = learning_rate_at(self._step, *self._rates)
        pixels, noise = self._to_device(images, sample, self._step)
        losses = torch.zeros(3, device=self._device)
        for part, part_noise in zip(pixels.chunk(self._accumulate), noise.chunk(self._accumulate), strict=True):
            with self._autocast():
                output: MAEOutput = self._forward(part, part_noise)
            (output.loss / self._accumulate).backward()  # type: ignore[no-untyped-call]
            terms = torch.stack([output.loss, output.loss_decoded, output.loss_thrown])
            losses += terms.detach() / self._accumulate
        self._update(losses, learning_rate)
        self._step += 1

    def _update(self, losses: Tensor, learning_rate: float) -> None:
        """Let the optimiser use the gradients, unless something is not finite; never reads a value off the device."""
        optimizer = self._optimizer
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~(losses[0].isfinite() & norm.isfinite())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # What a gradient scaler hands to fused optimisers: a verdict, and a number that gradients are divided by.
        handed_over = {"found_inf": is_bad.float()}
        if self._clip_grad is not None:
            handed_over["grad_scale"] = ((norm + 1e-6) / self._clip_grad).clamp(min=1.0).float()
        for name, value in handed_over.items():
            setattr(optimizer, name, value)
        optimizer.step()
        for name in handed_over:
            delattr(optimizer, name)
        optimizer.zero_grad(set_to_none=True)
        measured = torch.cat([losses, norm[None], torch.ones_like(norm)[None]]).to(self._sums.dtype)
        self._sums += measured.masked_fill(is_bad, 0.0)
        self._nonfinite_step.masked_fill_(is_bad & (self._nonfinite_step < 0), self._step + 1)

    def read_metrics(self) -> dict[str, Any]:
        """Wait for the steps taken, and return what they measured since the last reading.

        Returns
        -------
        dict
            ``loss``, ``loss_decoded``, ``loss_thrown`` and ``grad_norm`` (before clipping): means over the steps that
            were finite, NaN if there was none. ``learning_rate``: of the last step taken. ``nonfinite_step``: the first
            step (counted from 1) whose loss or gradient was not finite, of the whole run; None if there was none.
        """
        *sums, steps = self._sums.tolist()
        self._sums.zero_()
        nonfinite_step = int(self._nonfinite_step)
        return {
            **{name: total / steps if steps else float("nan") for name, total in zip(MEANS, sums, strict=True)},
            "learning_rate": learning_rate_at(max(self._step - 1, 0), *self._rates),
            "nonfinite_step": None if nonfinite_step < 0 else nonfinite_step,
        }

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature of whole images, nothing masked: float32 (batch, dim)."""
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
        """
        pixels, noise = self._to_device(images, sample, 0)
        with self._evaluation():
            output = self.method(pixels, noise)
            patches = self.method.rebuilt_pixels(pixels, output)
        return Reconstruction(output.plan.order.cpu().numpy(), self.method.schedule, patches.cpu().numpy())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and ``training_state.pt`` into an existing folder, each whole or not at all."""
        directory = Path(directory)
        state = {
            "step": self._step,
            "moments": self._optimizer.state_dict()["state"],
            "sums": self._sums,
            "nonfinite_step": self._nonfinite_step,
        }
        save_weights(self.method, directory / WEIGHTS_FILE)
        # By way of memory, since torch's writer hides what is wrong with a file, such as a full disk.
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(directory / STATE_FILE, lambda file: file.write(content.getbuffer()))

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote, of an engine of the same architecture.

        Learning rate, weight decay and the like stay those of this engine. With the same options it goes on as the
        saved one would have; bit for bit on one device, as far as its kernels are deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is damaged, or of another architecture. The engine is unchanged then.
        """
        directory = Path(directory)
        weights = read_weights(self.method, directory / WEIGHTS_FILE)
        state = _read_state(directory / STATE_FILE)
        _check_moments(state["moments"], self._parameters)
        self.method.load_state_dict(weights)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
        self._step = state["step"]
        self._sums.copy_(state["sums"])
        self._nonfinite_step.copy_(state["nonfinite_step"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file."""
        load_weights(self.method, path)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        self.method.eval()
        try:
            with torch.inference_mode(), self._autocast():
                yield
        finally:
            self.method.train()

    def _autocast(self) -> AbstractContextManager[None]:
        enabled = self._precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    def _to_device(self, images: NDArray[np.uint8], sample: NDArray[np.int64], step: int) -> tuple[Tensor, Tensor]:
        """Copy images and their numbers, and make the noise of a step from the latter."""
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        noise = counter_noise(self._seed, step, self._upload(sample), self.method.grid.num_tokens)
        return self._upload(images), noise

    def _upload(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            # Only a copy from pinned memory leaves the host free to go on.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into one group with and one without weight decay, for an optimiser of torch.

    Spared are parameters of one axis (biases, norms) as in MAE, whose cls and mask tokens are decayed; and those of
    :class:`prmim_torch.ProgressiveReconstruction`, since a table drawn towards 0 would weigh near and far tokens alike
    (this is ours).

    Examples
    --------
    >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.05)]
    [1, 1]
    """
    spared = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, ProgressiveReconstruction)
        for parameter in part.parameters()
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in spared]
    decayed_ids = {id(parameter) for parameter in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from 0, then half a cosine to ``minimum``.

    Examples
    --------
    >>> [learning_rate_at(step, 4, 2, 1.0, 0.0) for step in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1 + cos(pi * done))


def _check_options(
    seed: int,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    clip_grad: float | None,
    accumulate: int,
) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed}")
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps: expected 0 to total_steps {total_steps}, got {warmup_steps}")
    if not 0 <= min_learning_rate <= learning_rate < float("inf"):
        raise ValueError(
            f"learning_rate: expected a number of at least min_learning_rate {min_learning_rate}, got {learning_rate}"
        )
    if clip_grad is not None and not clip_grad > 0:
        raise ValueError(f"clip_grad: expected a positive number or None, got {clip_grad}")
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {name!r}, but torch finds no CUDA device")
    return device


def _read_state(path: Path) -> dict[str, Any]:
    """Read a training state, and check that it is one."""
    damaged = ValueError(f"directory: expected a training state, got {path}, which is damaged or something else")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # whatever torch and its unpickler make of bytes that are no training state
        raise damaged from None
    expected = {"step": int, "moments": dict, "sums": Tensor, "nonfinite_step": Tensor}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in expected.items()):
        raise damaged
    return state


def _check_moments(moments: dict[int, dict[str, Tensor]], parameters: list[nn.Parameter]) -> None:
    """Raise ValueError unless there are moments for every parameter, or for none, as before the first step."""
    shapes = [tuple(parameter.shape) for parameter in parameters]
    got = [tuple(moments[i]["exp_avg"].shape) for i in sorted(moments)]
    if got and got != shapes:
        raise ValueError(
            f"directory: expected a training state of {len(shapes)} parameters, got {len(got)}, or ones of other shapes"
        )
