"""What every training has in common: one step, its measurements and what is saved, whatever is trained."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prmim_core import counter_noise
from prmim_core.files import dump_architecture
from prmim_core.training import Decay, check_training, learning_rate_at
from prmim_torch.distributed import (
    Parallel,
    Processes,
    gradients_shared,
    local,
    num_processes,
    read_state,
    replicate,
    shard,
    spread,
    whole,
)
from prmim_torch.interop import named_weights, put_weights, read_weights, write_weights
from prmim_torch.method import Method
from prmim_torch.reconstruct import ProgressiveReconstruction

Precision = Literal["float32", "bfloat16"]

WEIGHTS_FILE = "weights.safetensors"
STATE_FOLDER = "training_state"


class Trainer:
    """A module with its optimiser, on one device or, in every process that ``torchrun`` starts, on one each.

    A subclass says what is trained and what is minimised. The arguments, and what holds of every step, are those of
    :class:`prmim_torch.Engine`.

    Attributes
    ----------
    module
        What is trained; with the parts of weights that are here, where processes share them.
    """

    _moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """What the optimiser keeps for each parameter, besides the number of updates, which is the same for all."""
    _ema_decay: float | None = None
    """Decay, per step, of a running mean of the weights; None: there is none."""

    def __init__(
        self,
        method_options: Mapping[str, Any],
        *,
        seed: int,
        total_steps: int,
        warmup_steps: int,
        learning_rate: float,
        min_learning_rate: float = 0.0,
        decay: Decay = "cosine",
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        clip_grad: float | None = None,
        accumulate: int = 1,
        precision: Precision = "float32",
        compile: bool = False,
        device: str = "auto",
        parallel: Parallel = "ddp",
        timeout: float = 45.0,
    ) -> None:
        check_training(seed, total_steps, warmup_steps, learning_rate, min_learning_rate, clip_grad, accumulate, decay)
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        if parallel not in get_args(Parallel):
            raise ValueError(f"parallel: expected 'ddp' or 'fsdp', got {parallel!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        self._device = _choose_device(device)
        self.module: Method = self._create(method_options, seed).to(self._device)
        self.module.train()
        self._processes = Processes(self._device, timeout)
        self._is_sharded = parallel == "fsdp" and self.world_size > 1
        self._forward = self._share(compile)
        self._has_started = self.world_size == 1
        self._optimizer = self._create_optimizer(weight_decay, betas)
        self._learned = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        averaged = {} if self._ema_decay is None else self._learned
        self._average = {name: parameter.detach().clone() for name, parameter in averaged.items()}
        # Buffers that forward passes in training mode change.
        self._statistics: list[Tensor] = []
        self._seed = seed
        self._rates = (total_steps, warmup_steps, learning_rate, min_learning_rate, decay)
        self._clip_grad = clip_grad
        self._accumulate = accumulate
        self._precision = precision
        self._step = 0
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        self._measured = (*self.module.losses, "grad_norm")
        # Their sums over the finite steps since the last reading, then the number of those steps.
        self._sums = torch.zeros(len(self._measured) + 1, dtype=torch.float64, device=self._device)
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=self._device)
        # Steps that were not finite: since the last reading, and the latest ones in a row.
        self._skipped = torch.zeros(2, dtype=torch.int64, device=self._device)

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        """Build what is trained, on the host."""
        raise NotImplementedError

    def _create_optimizer(self, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        """Return an optimiser that honours what a gradient scaler hands over: see :meth:`_update`."""
        return torch.optim.AdamW(parameter_groups(self.module, weight_decay), lr=0.0, betas=betas, fused=True)

    def _losses(self, pixels: Tensor, noise: Tensor, *more: Tensor) -> Sequence[Tensor]:
        """Return the scalars of a part of a batch that the module names as its losses; the first is minimised."""
        raise NotImplementedError

    def _share(self, compile: bool) -> Callable[..., Any]:
        """Return what to call for the forward pass of a training step, the work shared with the other processes."""
        compiled: Callable[..., Any] = partial(torch.compile, fullgraph=True, dynamic=False)
        if self._is_sharded:
            shard(self.module, self._device.type, compiled if compile else None)
            return self.module
        forward: nn.Module = compiled(self.module) if compile else self.module
        return forward if self.world_size == 1 else replicate(forward)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self._processes.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._processes.world_size

    @property
    def step(self) -> int:
        """Optimiser steps completed, those before a resume among them."""
        return self._step

    @property
    def num_parameters(self) -> int:
        """Learned numbers."""
        return sum(parameter.numel() for parameter in self._learned.values())

    @property
    def device(self) -> str:
        """The device, in words."""
        others = f", one of {self.world_size} processes" if self.world_size > 1 else ""
        if self._device.type == "cuda":
            return f"{self._device} ({torch.cuda.get_device_name(self._device)}){others}"
        return f"{self._device} ({torch.get_num_threads()} threads){others}"

    def _take_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64], *more: NDArray[Any]) -> None:
        """Take one optimiser step on images, their numbers, and what else the losses are of."""
        batch = len(images)
        if batch % self._accumulate:
            raise ValueError(f"images: expected a batch that accumulate={self._accumulate} divides, got {batch}")
        learning_rate = learning_rate_at(self._step, *self._rates)
        inputs = (*self._to_device(images, sample, self._step), *map(self._upload, more))
        parts = list(zip(*(array.chunk(self._accumulate) for array in inputs), strict=True))
        if not self._has_started:
            self._start(*parts[0])
        statistics = [values.clone() for values in self._statistics]
        losses = torch.zeros(len(self.module.losses), device=self._device)
        for number, part in enumerate(parts, start=1):
            with gradients_shared(self._forward, number == len(parts)):
                losses += self._backward(*part)
        is_bad = self._update(losses, learning_rate)
        for values, before in zip(self._statistics, statistics, strict=True):
            values.copy_(torch.where(is_bad, before, values))
        self._step += 1

    def _backward(self, *part: Tensor) -> Tensor:
        """Add a part of a batch to the gradients; return what it adds to the losses."""
        with self._autocast():
            losses = self._losses(*part)
        torch.autograd.backward(losses[0] / self._accumulate)
        return torch.stack([loss.detach() for loss in losses]) / self._accumulate

    def _start(self, *part: Tensor) -> None:
        """Go through what only a first step does, whose gradients are not used.

        Data and compiled code may come to some processes late, so they wait for each other, with more patience than in
        a step. And DistributedDataParallel lays out its buffers anew after its first pass: sums over more than two
        processes depend on the layout, so that a resumed run would not be the same bit for bit.
        """
        if self._is_sharded:
            self._processes.any(False)
        else:
            statistics = [values.clone() for values in self._statistics]
            for wanted in (False, True):
                with gradients_shared(self._forward, wanted):
                    self._backward(*part)
                self._processes.any(False)
            self._optimizer.zero_grad(set_to_none=True)
            for values, before in zip(self._statistics, statistics, strict=True):
                values.copy_(before)
        self._has_started = True

    def _update(self, losses: Tensor, learning_rate: float) -> Tensor:
        """Let the optimiser use the gradients, unless something is not finite; return whether that is so.

        Never reads a value off the device.
        """
        optimizer = self._optimizer
        gradients = [local(parameter.grad) for parameter in self._learned.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.world_size > 1:
            losses, norm = self._agree(losses, norm)
        is_bad = ~(losses[0].isfinite() & norm.isfinite())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)
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
        """Turn losses and gradient norm of this process into those of the whole batch, the same everywhere."""
        sums = self._processes.total(torch.cat([losses / self.world_size, norm.square()[None]]))
        # Where each process has all gradients, they are equal, and so are their norms.
        return sums[:-1], sums[-1].sqrt() if self._is_sharded else norm

    def read_metrics(self) -> dict[str, Any]:
        """Wait for the steps taken, and return what they measured since the last reading.

        Returns
        -------
        dict
            The ``losses`` of what is trained and ``grad_norm`` (before clipping): means over the steps that were
            finite, NaN if there was none. ``learning_rate``: of the last step taken. ``nonfinite_step``: the first step
            (counted from 1) whose loss or gradient was not finite, of the whole run; None if there was none.
            ``skipped``: the number of such steps since the last reading; ``skipped_in_a_row``: that of the latest ones,
            0 if the last step was finite. The same in all processes.
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
            "learning_rate": learning_rate_at(max(self._step - 1, 0), *self._rates),
            "nonfinite_step": None if nonfinite_step < 0 else nonfinite_step,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and a folder ``training_state`` into an existing one, each whole or not at all.

        All processes have to call it, with a folder that all of them see; it returns when all have written.

        Raises
        ------
        OSError
            If something could not be written.
        """
        self.async_save(directory).result()

    def async_save(self, directory: str | os.PathLike[str]) -> Future[None]:
        """Begin what :meth:`save` does, and return while a copy of the state is written in the background.

        Returns
        -------
        Future
            Done when all processes have written; its result raises what :meth:`save` raises. A further save waits for
            it.

        Raises
        ------
        FileNotFoundError
            If there is no such folder.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"directory: expected a folder that is there, got {directory}")
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
        """Return what a resumed run needs besides the weights, by name; ``new``: tensors of that kind, to be filled."""
        held: Mapping[Tensor, Mapping[str, Tensor]] = {} if new else self._optimizer.state
        updates = [moments["step"] for moments in held.values() if "step" in moments]
        return {
            "step": torch.tensor(self._step),
            "updates": updates[0].long() if updates else torch.tensor(0),
            "sums": self._sums.clone(),
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
        """Read what :meth:`save` wrote, of an engine of the same architecture.

        It may have been saved by another number of processes, and shared among them in another way. All processes have
        to call it. Learning rate, weight decay and the like stay those of this engine. With the same options it goes on
        as the saved one would have; bit for bit on as many devices, as far as kernels are deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is damaged, or of another architecture. The engine is unchanged then.
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
        self._sums.copy_(state["sums"])
        self._nonfinite_step.copy_(state["nonfinite_step"])
        self._skipped.copy_(state["skipped"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file; all processes have to."""
        self._put_weights(self._processes.together(lambda: read_weights(self.module, path)))

    def _put_weights(self, weights: dict[str, Tensor]) -> None:
        held = named_weights(self.module)
        put_weights(self.module, {name: spread(tensor, held[name]) for name, tensor in weights.items()})
        for name, average in self._average.items():
            average.copy_(self._learned[name].detach())

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked, and needs no device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the other processes, if there are any; the last thing to do, and to do after an exception too."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Look at what is trained: with the running mean of the weights, where there is one, and without gradients."""
        self.module.eval()
        # Weights that FSDP gathers in inference mode could not be trained any more.
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
        """Let weights and their running mean, if there is one, change places."""
        for name, average in self._average.items():
            held, mean = local(self._learned[name]), local(average)
            before = held.clone()
            held.copy_(mean)
            mean.copy_(before)
        if self._average and isinstance(self.module, FSDPModule):
            self.module.reshard()  # or what was gathered before would be used

    def _autocast(self) -> AbstractContextManager[None]:
        enabled = self._precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    def _to_device(self, images: NDArray[np.uint8], sample: NDArray[np.int64], step: int) -> tuple[Tensor, Tensor]:
        """Copy images and their numbers, and make the noise of a step from the latter."""
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        noise = counter_noise(self._seed, step, self._upload(sample), self.module.grid.num_tokens)
        return self._upload(images), noise

    def _upload(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            # Only a copy from pinned memory leaves the host free to go on.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the learned parameters into one group with and one without weight decay, for an optimiser of torch.

    Spared are parameters of one axis (biases, norms), those that a :class:`Method` names in ``not_decayed``, and those
    of :class:`prmim_torch.ProgressiveReconstruction`, since a table drawn towards 0 would weigh near and far tokens
    alike (this is ours).

    Examples
    --------
    >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.05)]
    [1, 1]
    """
    named = module.not_decayed() if isinstance(module, Method) else frozenset()
    rebuilding = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, ProgressiveReconstruction)
        for parameter in part.parameters()
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_spared = parameter.ndim <= 1 or name in named or id(parameter) in rebuilding
            (spared if is_spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {name!r}, but torch finds no CUDA device")
    if num_processes() == 1:
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one for each process, got '{device}' where {torch.cuda.device_count()} are")
    torch.cuda.set_device(device)  # where NCCL and FSDP look for it
    return device
