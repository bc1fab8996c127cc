"""The trainer behind all engines: training steps, measurements and checkpoints."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prmim_core import counter_noise
from prmim_methods import TrainingConfig
from prmim_methods.hardware import Choice, choose_compile, choose_precision, is_slow
from prmim_methods.sizes import Transformer
from prmim_methods.weight_files import WEIGHTS_FILE, dump_architecture
from prmim_torch.cpu_kernels import linear
from prmim_torch.distributed import (
    Processes,
    gradients_shared,
    local,
    num_processes,
    read_state,
    replicate,
    shard,
    whole,
)
from prmim_torch.interop import named_weights, put_weights, read_weights, write_weights
from prmim_torch.method import ImageModule, check_not_empty
from prmim_torch.vit import spread

Module = TypeVar("Module", bound=ImageModule)
Loss = Callable[..., Sequence[Tensor]]
"""Signature ``loss(forward, images, noise, *more)``; returns the scalars named in ``losses`` of the module."""

STATE_FOLDER = "training_state"
TIMED_IMAGES, TIMED_TOKENS = 8, 16
"""Input shape of the layer that is timed in both number formats."""
HAVE_FLOAT64 = ("cpu", "cuda")
"""Types of devices with float64, which MPS lacks."""


class Trainer(Generic[Module]):
    """Trains a module on one device, or on one device per process of ``torchrun``.

    Parameters
    ----------
    module
        The module, on the CPU. It has ``losses``, ``architecture()`` and ``no_weight_decay()``.
    training
        The options; ``training.compile`` compiles the forward pass with ``torch.compile``, as one graph.
    loss
        See :data:`Loss`; the first scalar is minimized.
    make_optimizer
        Returns the optimizer of a module. The optimizer must support ``grad_scale`` and ``found_inf``, which a gradient
        scaler sets on fused optimizers.
    moments
        Names of the optimizer's tensors per parameter, except the number of updates.
    ema_decay
        Decay, per step, of an exponential moving average of the weights; None: no average.
    statistics
        Part of the module whose buffers change in training mode; None: no such part.

    Attributes
    ----------
    module
        The module. With FSDP, each process holds its part of the parameters.
    precision, compiled
        Number format, and whether the forward pass is compiled, each with the reason.

    Notes
    -----
    Processes of a run must call the same methods in the same order. Up to rounding, a step equals the step of a single
    process on the rows of all processes: losses, gradients and measurements are means over all rows.

    A training step never waits for the device. Images are uploaded as uint8; noise, plan and normalization are computed
    on the device. A step with a nonfinite loss or gradient norm changes no weights, optimizer state, average or
    statistics: the optimizer reads a flag on the device. :attr:`step` and the learning rate still advance.
    """

    def __init__(
        self,
        module: Module,
        training: TrainingConfig,
        loss: Loss,
        make_optimizer: Callable[[Module], torch.optim.Optimizer],
        *,
        moments: Sequence[str] = ("exp_avg", "exp_avg_sq"),
        ema_decay: float | None = None,
        statistics: nn.Module | None = None,
    ) -> None:
        self._training = training
        self._loss = loss
        self._moments = moments
        self._ema_decay = ema_decay
        self._device = choose_device(training.device)
        self.precision: Choice[str] = precision_on(training.precision, self._device)
        self.compiled: Choice[bool] = choose_compile(
            training.compile, self._device.type, has_compiler=find_spec("triton") is not None
        )
        self.module: Module = module.to(self._device).train()
        self._processes = Processes(self._device, training.timeout)
        self._is_sharded = training.parallel == "fsdp" and self.world_size > 1
        self._forward = self._share(self.compiled.value)
        self._has_started = self.world_size == 1
        self._optimizer = make_optimizer(self.module)
        self._learned = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        averaged = {} if ema_decay is None else self._learned
        self._average = {name: parameter.detach().clone() for name, parameter in averaged.items()}
        self._statistics = [] if statistics is None else list(statistics.buffers())
        self._step = 0
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        self._measured = (*self.module.losses, "grad_norm")
        # Their sums over finite steps since the last reading, then the number of these steps.
        wide = torch.float64 if self._device.type in HAVE_FLOAT64 else torch.float32
        self._sums = torch.zeros(len(self._measured) + 1, dtype=wide, device=self._device)
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=self._device)
        # Number of nonfinite steps: since the last reading, and consecutive up to now.
        self._skipped = torch.zeros(2, dtype=torch.int64, device=self._device)

    def _share(self, compile: bool) -> Callable[..., Any]:
        """Return the forward pass of a training step, distributed over processes."""
        compiled: Callable[..., Any] = partial(torch.compile, fullgraph=True, dynamic=False)
        if self._is_sharded:
            shard(self.module, self._device.type, compiled if compile else None)
            return self.module
        forward: nn.Module = compiled(self.module) if compile else self.module
        return forward if self.world_size == 1 else replicate(forward)

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self._processes.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._processes.world_size

    @property
    def num_devices(self) -> int:
        """Number of devices of all processes: one per process."""
        return self.world_size

    @property
    def step(self) -> int:
        """Completed optimizer steps, including those before a resume."""
        return self._step

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._learned.values())

    @property
    def device(self) -> str:
        """Description of the device."""
        others = f", one of {self.world_size} processes" if self.world_size > 1 else ""
        if self._device.type == "cuda":
            return f"{self._device} ({torch.cuda.get_device_name(self._device)}){others}"
        return f"{self._device} ({torch.get_num_threads()} threads){others}"

    def measure_slowdown(self, size: Transformer) -> float | None:
        """Return the time of a layer in bfloat16 relative to float32, if it may be slow.

        Otherwise returns None. Takes about a second at most, and no time on accelerators.
        """
        if not is_slow(self.precision.value, self._device.type, backend="torch"):
            return None
        x = torch.ones(TIMED_IMAGES, TIMED_TOKENS, size.dim)
        weight = torch.ones(size.mlp_ratio * size.dim, size.dim)
        bias = torch.ones(len(weight))
        seconds = dict.fromkeys((False, True), math.inf)
        for is_bfloat16 in (False, True) * 2:
            start = time.perf_counter()
            inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bfloat16):
                out = linear(*inputs)
            torch.autograd.grad(out.sum(), inputs)
            seconds[is_bfloat16] = min(seconds[is_bfloat16], time.perf_counter() - start)
        return seconds[True] / seconds[False]

    def _take_step(self, images: NDArray[Any], sample: NDArray[np.int64], *more: NDArray[Any]) -> None:
        """Take an optimizer step; ``more`` holds further inputs of the loss."""
        check_not_empty(images)
        batch, parts = len(images), self._training.accumulate
        if batch % parts:
            raise ValueError(f"images: expected a batch that accumulate={parts} divides, got {batch}")
        inputs = (*self._to_device(images, sample, self._step), *map(self._upload, more))
        chunks = list(zip(*(array.chunk(parts) for array in inputs), strict=True))
        if not self._has_started:
            self._start(*chunks[0])
        statistics = [values.clone() for values in self._statistics]
        losses = torch.zeros(len(self.module.losses), device=self._device)
        for number, chunk in enumerate(chunks, start=1):
            with gradients_shared(self._forward, number == parts):
                losses += self._backward(*chunk)
        is_bad = self._update(losses, self._training.learning_rate_at(self._step))
        for values, before in zip(self._statistics, statistics, strict=True):
            values.copy_(torch.where(is_bad, before, values))
        self._step += 1

    def _backward(self, *chunk: Tensor) -> Tensor:
        """Accumulate the gradients of a part of a batch; return its share of the losses."""
        with self._autocast():
            losses = self._loss(self._forward, *chunk)
        parts = self._training.accumulate
        torch.autograd.backward(losses[0] / parts)
        return torch.stack([loss.detach() for loss in losses]) / parts

    def _start(self, *chunk: Tensor) -> None:
        """Warm up before the first step; discards the gradients.

        Data loading and compilation can delay processes, so this waits longer than a step. Also,
        DistributedDataParallel rebuilds its buckets after its first pass, and sums over more than two processes depend
        on the buckets. Without this pass, a resumed run would not be bit-identical.
        """
        if self._is_sharded:
            self._processes.any(False)
        else:
            statistics = [values.clone() for values in self._statistics]
            for wanted in (False, True):
                with gradients_shared(self._forward, wanted):
                    self._backward(*chunk)
                self._processes.any(False)
            self._optimizer.zero_grad(set_to_none=True)
            for values, before in zip(self._statistics, statistics, strict=True):
                values.copy_(before)
        self._has_started = True

    def _update(self, losses: Tensor, learning_rate: float) -> Tensor:
        """Apply the gradients if they and the loss are finite.

        Returns whether they are not. Never reads a value from the device.
        """
        optimizer = self._optimizer
        gradients = [local(parameter.grad) for parameter in self._learned.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.world_size > 1:
            losses, norm = self._agree(losses, norm)
        is_bad = ~(losses[0].isfinite() & norm.isfinite())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)
        # The interface of gradient scalers and fused optimizers: a flag to skip the update, and a divisor of gradients.
        scaling = {"found_inf": is_bad.float()}
        if self._training.clip_grad is not None:
            scaling["grad_scale"] = ((norm + 1e-6) / self._training.clip_grad).clamp(min=1.0).float()
        for name, value in scaling.items():
            setattr(optimizer, name, value)
        optimizer.step()
        for name in scaling:
            delattr(optimizer, name)
        optimizer.zero_grad(set_to_none=True)
        self._update_average(is_bad)
        measured = torch.cat([losses, norm[None], torch.ones_like(norm)[None]]).to(self._sums.dtype)
        self._sums += measured.masked_fill(is_bad, 0.0)
        self._nonfinite_step.masked_fill_(is_bad & (self._nonfinite_step < 0), self._step + 1)
        self._skipped += is_bad
        self._skipped[1:].masked_fill_(~is_bad, 0)
        return is_bad

    @torch.no_grad()
    def _update_average(self, is_bad: Tensor) -> None:
        if self._ema_decay is not None:
            weight = torch.where(is_bad, 0.0, 1 - self._ema_decay)
            for name, average in self._average.items():
                local(average).lerp_(local(self._learned[name]).detach(), weight)

    def _agree(self, losses: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradient norm of the whole batch, equal in all processes."""
        sums = self._processes.total(torch.cat([losses / self.world_size, norm.square()[None]]))
        # If each process holds all gradients, their norms are equal already.
        return sums[:-1], sums[-1].sqrt() if self._is_sharded else norm

    def read_metrics(self) -> dict[str, Any]:
        """Wait for all steps; return measurements since the last reading.

        Returns
        -------
        dict
            Equal in all processes. The ``losses`` of the module and ``grad_norm`` (before clipping): means over the
            finite steps, NaN if there was none. ``learning_rate``: of the last step. ``nonfinite_step``: the first step
            of the run, counted from 1, with a nonfinite loss or gradient; None if there was none. ``skipped``: number
            of such steps since the last reading. ``skipped_in_a_row``: number of consecutive such steps up to now.
        """
        *sums, steps = self._sums.tolist()
        self._sums.zero_()
        skipped, skipped_in_a_row = self._skipped.tolist()
        self._skipped[0] = 0
        nonfinite_step = int(self._nonfinite_step)
        return {
            **{
                name: total / steps if steps else float("nan") for name, total in zip(self._measured, sums, strict=True)
            },
            "learning_rate": self._training.learning_rate_at(max(self._step - 1, 0)),
            "nonfinite_step": None if nonfinite_step < 0 else nonfinite_step,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and ``training_state/`` atomically into a folder.

        All processes must call it, with an existing folder on a shared file system. It returns when all have written.

        Raises
        ------
        OSError
            If a file cannot be written.
        """
        self.async_save(directory).result()

    def async_save(self, directory: str | os.PathLike[str]) -> Future[None]:
        """Start :meth:`save` in the background, with a copy of the current state.

        Returns
        -------
        Future
            Done when all processes have written. Its result raises the errors of :meth:`save`. The next save waits for
            it.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"directory: expected an existing folder, got {directory}")
        if self._saving is not None:
            wait([self._saving])
        metadata, weights = dump_architecture(self.module), {}
        for name, tensor in named_weights(self.module).items():
            tensor = whole(tensor)
            if self.rank == 0:
                weights[name] = tensor.detach().to("cpu", copy=True)
        finish = self._processes.async_write(self._state(), directory / STATE_FOLDER)

        def write() -> None:
            finish()
            self._processes.together(
                lambda: write_weights(weights, metadata, directory / WEIGHTS_FILE) if self.rank == 0 else None,
                in_background=True,
            )

        self._saving = self._background.submit(write)
        return self._saving

    def _state(self, *, new: bool = False) -> dict[str, Tensor]:
        """Return the training state without weights; ``new``: uninitialized tensors."""
        held: Mapping[Tensor, Mapping[str, Tensor]] = {} if new else self._optimizer.state
        updates = [moments["step"] for moments in held.values() if "step" in moments]
        return {
            "step": torch.tensor(self._step),
            "updates": updates[0].long() if updates else torch.tensor(0),
            "sums": self._sums.cpu().double().clone(),  # float64 on all devices
            "nonfinite_step": self._nonfinite_step.clone(),
            "skipped": self._skipped.clone(),
            **{
                f"{moment}.{name}": held[parameter][moment] if parameter in held else torch.zeros_like(parameter)
                for name, parameter in self._learned.items()
                for moment in self._moments
            },
            **{
                f"average.{name}": torch.zeros_like(average) if new else average
                for name, average in self._average.items()
            },
        }

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Restore a state written by :meth:`save`; all processes must call it.

        The number of processes and ``parallel`` may differ from the saved run. Learning rate, weight decay and other
        options are those of this engine. With equal options and an equal number of devices, the run continues
        bit-identically if all kernels are deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is corrupt or of another architecture. The engine is unchanged then.
        """
        directory = Path(directory)
        weights = self._processes.together(lambda: read_weights(self.module, directory / WEIGHTS_FILE))
        state = self._state(new=True)
        self._processes.together(lambda: read_state(state, directory / STATE_FOLDER))
        self._put_weights(weights)
        for name, parameter in self._learned.items():
            self._optimizer.state[parameter] = {
                "step": state["updates"].to(self._device, torch.float32, copy=True),
                **{moment: state[f"{moment}.{name}"] for moment in self._moments},
            }
        for name, average in self._average.items():
            average.copy_(state[f"average.{name}"])
        self._step = int(state["step"])
        self._sums.copy_(state["sums"].to(self._sums.dtype))
        self._nonfinite_step.copy_(state["nonfinite_step"])
        self._skipped.copy_(state["skipped"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Load weights from a ``.safetensors`` file; all processes must call it.

        For methods, the image size of the file may differ; see :func:`prmim_torch.load_weights`.
        """
        self._put_weights(self._processes.together(lambda: read_weights(self.module, path, resize=True)))

    def _put_weights(self, weights: dict[str, Tensor]) -> None:
        held = named_weights(self.module)
        put_weights(self.module, {name: spread(tensor, held[name]) for name, tensor in weights.items()})
        for name, average in self._average.items():
            average.copy_(self._learned[name].detach())

    def any(self, flag: bool) -> bool:
        """Return whether any process has a True flag; waits for all, without the device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the process group; call it last, also after an exception."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Set evaluation mode inside: no gradients, averaged weights if available."""
        self.module.eval()
        # Weights gathered by FSDP in inference mode cannot be trained afterwards.
        no_gradients = torch.no_grad() if self._is_sharded else torch.inference_mode()
        self._swap_average()
        try:
            with no_gradients, self._autocast():
                yield
        finally:
            self._swap_average()
            self.module.train()

    @torch.no_grad()
    def _swap_average(self) -> None:
        """Swap the weights and their average, if available."""
        for name, average in self._average.items():
            held, mean = local(self._learned[name]), local(average)
            before = held.clone()
            held.copy_(mean)
            mean.copy_(before)
        if self._average and isinstance(self.module, FSDPModule):
            self.module.reshard()  # discards weights gathered before the swap

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.precision.value == "bfloat16")

    def _to_device(self, images: NDArray[Any], sample: NDArray[np.int64], step: int) -> tuple[Tensor, Tensor]:
        """Upload images, and compute the noise of a step from sample numbers."""
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        noise = counter_noise(self._training.seed, step, self._upload(sample), self.module.num_tokens)
        return self._upload(images), noise

    def _upload(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            # Only copies from pinned memory are asynchronous.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters into groups with and without weight decay.

    Exempt from weight decay are parameters of one axis (biases, norms), and those that the module or a part of it names
    by a method ``no_weight_decay()``, such as :class:`prmim_torch.ProgressiveReconstruction` (our choice). The module
    may be wrapped, for instance by ``torch.compile`` or ``DistributedDataParallel``.

    Examples
    --------
    >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.05)]
    [1, 1]
    """
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in getattr(part, "no_weight_decay", frozenset)()
    }
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name in named
            (exempt if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def choose_device(name: str) -> torch.device:
    """Return this process's device by an option's value; ValueError if unavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps":
        _check_mps()
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected an available device, got {name!r}, but torch finds no CUDA device")
    if num_processes() == 1:
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a device for each process, got '{device}', but there are {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(device)  # NCCL and FSDP use the current device
    return device


def precision_on(asked: str, device: torch.device) -> Choice[str]:
    """Return the number format on a device, with the reason."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_precision(asked, device.type, backend="torch", capability=capability)


def _check_mps() -> None:
    if not torch.backends.mps.is_available():
        raise ValueError("device: expected an available device, got 'mps', but torch finds no Metal device")
    if num_processes() > 1:
        raise ValueError(f"device: expected cpu or cuda for {num_processes()} processes, got 'mps'")
