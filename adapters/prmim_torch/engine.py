"""The PyTorch engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prmim_core import CostReport, Schedule, counter_noise
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
from prmim_torch.method import FeatureMethod, Method, PixelMethod, Predicts
from prmim_torch.methods import create_method
from prmim_torch.reconstruct import ProgressiveReconstruction

Precision = Literal["float32", "bfloat16"]

WEIGHTS_FILE = "weights.safetensors"
STATE_FOLDER = "training_state"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, besides the number of updates, which is the same for all."""


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


class Engine:
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
        self.method: Method = create_method(**{"init_seed": seed, **method_options}).to(self._device)
        self.method.train()
        self._processes = Processes(self._device, timeout)
        self._is_sharded = parallel == "fsdp" and self.world_size > 1
        self._forward = self._share(compile)
        self._has_started = self.world_size == 1
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.method, weight_decay), lr=0.0, betas=betas, fused=True
        )
        self._learned = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        self._seed = seed
        self._rates = (total_steps, warmup_steps, learning_rate, min_learning_rate, decay)
        self._clip_grad = clip_grad
        self._accumulate = accumulate
        self._precision = precision
        self._step = 0
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        self._measured = (*self.method.losses, "grad_norm")
        # Their sums over the finite steps since the last reading, then the number of those steps.
        self._sums = torch.zeros(len(self._measured) + 1, dtype=torch.float64, device=self._device)
        self._nonfinite_step = torch.full((), -1, dtype=torch.int64, device=self._device)
        # Steps that were not finite: since the last reading, and the latest ones in a row.
        self._skipped = torch.zeros(2, dtype=torch.int64, device=self._device)

    def _share(self, compile: bool) -> Callable[[Tensor, Tensor], Any]:
        """Return what to call for the forward pass of a training step, the work shared with the other processes."""
        compiled: Callable[..., Any] = partial(torch.compile, fullgraph=True, dynamic=False)
        if self._is_sharded:
            shard(self.method, self._device.type, compiled if compile else None)
            return self.method
        forward: nn.Module = compiled(self.method) if compile else self.method
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
        """Learned numbers of the method."""
        return sum(parameter.numel() for parameter in self._learned.values())

    @property
    def device(self) -> str:
        """The device, in words."""
        others = f", one of {self.world_size} processes" if self.world_size > 1 else ""
        if self._device.type == "cuda":
            return f"{self._device} ({torch.cuda.get_device_name(self._device)}){others}"
        return f"{self._device} ({torch.get_num_threads()} threads){others}"

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
        batch = len(images)
        if batch % self._accumulate:
            raise ValueError(f"images: expected a batch that accumulate={self._accumulate} divides, got {batch}")
        learning_rate = learning_rate_at(self._step, *self._rates)
        pixels, noise = self._to_device(images, sample, self._step)
        parts = list(zip(pixels.chunk(self._accumulate), noise.chunk(self._accumulate), strict=True))
        if not self._has_started:
            self._start(*parts[0])
        losses = torch.zeros(len(self.method.losses), device=self._device)
        for number, part in enumerate(parts, start=1):
            with gradients_shared(self._forward, number == len(parts)):
                losses += self._backward(*part)
        self._update(losses, learning_rate)
        self._step += 1

    def _backward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Add a part of a batch to the gradients; return what it adds to the losses."""
        with self._autocast():
            output = self._forward(pixels, noise)
        (output.loss / self._accumulate).backward()
        terms = torch.stack([getattr(output, name) for name in self.method.losses])
        return terms.detach() / self._accumulate

    def _start(self, pixels: Tensor, noise: Tensor) -> None:
        """Go through what only a first step does, whose gradients are not used.

        Data and compiled code may come to some processes late, so they wait for each other, with more patience than in
        a step. And DistributedDataParallel lays out its buffers anew after its first pass: sums over more than two
        processes depend on the layout, so that a resumed run would not be the same bit for bit.
        """
        if self._is_sharded:
            self._processes.any(False)
        else:
            for wanted in (False, True):
                with gradients_shared(self._forward, wanted):
                    self._backward(pixels, noise)
                self._processes.any(False)
            self._optimizer.zero_grad(set_to_none=True)
        self._has_started = True

    def _update(self, losses: Tensor, learning_rate: float) -> None:
        """Let the optimiser use the gradients, unless something is not finite; never reads a value off the device."""
        optimizer = self._optimizer
        gradients = [local(parameter.grad) for parameter in self._learned.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.world_size > 1:
            losses, norm = self._agree(losses, norm)
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
        self._skipped += is_bad
        self._skipped[1:].masked_fill_(~is_bad, 0)

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
            The method's ``losses`` and ``grad_norm`` (before clipping): means over the steps that were finite, NaN if
            there was none. ``learning_rate``: of the last step taken. ``nonfinite_step``: the first
            step (counted from 1) whose loss or gradient was not finite, of the whole run; None if there was none.
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
        metadata, weights = dump_architecture(self.method), {}
        for name, tensor in named_weights(self.method).items():
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
        updates = [moments["step"] for moments in held.values()]
        return {
            "step": torch.tensor(self._step),
            "updates": updates[0].long() if updates else torch.tensor(0),
            "sums": self._sums.clone(),
            "nonfinite_step": self._nonfinite_step.clone(),
            "skipped": self._skipped.clone(),
            **{
                f"{moment}.{name}": held[parameter][moment] if parameter in held else torch.zeros_like(parameter)
                for name, parameter in self._learned.items()
                for moment in MOMENTS
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
        weights = self._processes.together(lambda: read_weights(self.method, directory / WEIGHTS_FILE))
        state = self._state(new=True)
        self._processes.together(lambda: read_state(state, directory / STATE_FOLDER))
        self._put_weights(weights)
        for name, parameter in self._learned.items():
            self._optimizer.state[parameter] = {
                "step": state["updates"].to(self._device, torch.float32, copy=True),
                **{moment: state[f"{moment}.{name}"] for moment in MOMENTS},
            }
        self._step = int(state["step"])
        self._sums.copy_(state["sums"])
        self._nonfinite_step.copy_(state["nonfinite_step"])
        self._skipped.copy_(state["skipped"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file; all processes have to."""
        self._put_weights(self._processes.together(lambda: read_weights(self.method, path)))

    def _put_weights(self, weights: dict[str, Tensor]) -> None:
        held = named_weights(self.method)
        put_weights(self.method, {name: spread(tensor, held[name]) for name, tensor in weights.items()})

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked, and needs no device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the other processes, if there are any; the last thing to do, and to do after an exception too."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        self.method.eval()
        # Weights that FSDP gathers in inference mode could not be trained any more.
        no_gradients = torch.no_grad() if self._is_sharded else torch.inference_mode()
        try:
            with no_gradients, self._autocast():
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
