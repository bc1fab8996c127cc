"""Distributed training: synchronization, sharding of weights, and checkpoints.

``torchrun`` starts the processes. PyTorch's DistributedDataParallel or FSDP2 distributes the weights. In a single
process, all functions work without a process group.
"""

import inspect
import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # it is public
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prmim_methods.messages import ERRORS
from prmim_torch.cross_decoder import CrossBlock
from prmim_torch.vit import Block

Result = TypeVar("Result")

LAUNCH_TIMEOUT = timedelta(minutes=5)
"""Timeout for other processes to join."""
HOST_TIMEOUT = timedelta(minutes=10)
"""Timeout between training steps, for example while one process writes files."""

ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""Warning of torch.distributed.checkpoint in a single process."""

_NUMBERS = itertools.count()
"""Counter of created process groups, equal in all processes."""


class Processes:
    """The processes of a run, started by ``torchrun``, or a single one.

    Parameters
    ----------
    device
        The device of this process. Processes communicate through NCCL on ``cuda``, else through gloo.
    timeout
        Seconds that a process waits for others in a training step before it fails.

    Attributes
    ----------
    rank, world_size
        Rank of this process, from 0, and number of processes.

    Raises
    ------
    ValueError
        If the environment variables of ``torchrun`` are incomplete or invalid.
    ConnectionError
        If the other processes do not join.

    Notes
    -----
    An existing process group is used, and left open by :meth:`close`.

    A second group, on the host and with a longer timeout, synchronizes slow work of single processes: a first batch,
    compilation, reading files. A third group belongs to the thread that writes files in the background, so that its
    messages do not mix with those of the main thread. A dead process is noticed at once, a hanging one after the
    timeout.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self._host: dist.ProcessGroup | None = None
        self._files: dist.ProcessGroup | None = None
        self._is_ours = False
        self.rank, self.world_size = 0, 1
        if num_processes() > 1 and not is_connected():
            on_gpu = device.type == "cuda"
            store, rank, world_size = _meet()
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                # A group must not find the addresses of an earlier group.
                store=PrefixStore(f"prmim/{next(_NUMBERS)}", store),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device if on_gpu else None,
            )
            self._is_ours = True
        if is_connected() and dist.get_world_size() > 1:
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            patience = max(HOST_TIMEOUT, timedelta(seconds=timeout))
            self._host = dist.new_group(backend="gloo", timeout=patience)
            self._files = dist.new_group(backend="gloo", timeout=patience)

    def any(self, flag: bool) -> bool:
        """Return whether any process has a True flag; waits for all, without the device."""
        if self._host is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._host)
        return bool(flags)

    def together(self, call: Callable[[], Result], *, in_background: bool = False) -> Result:
        """Call a function in every process; if it fails in one, raise in all.

        Parameters
        ----------
        call
            The function.
        in_background
            Whether the caller is the thread that writes files.

        Raises
        ------
        Exception
            The error of the call in this process, or else of the first process in which it failed.
        """
        if self._host is None:
            return call()
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:
            failure = error
        reports: list[Any] = [None] * self.world_size
        group = self._files if in_background else self._host
        dist.all_gather_object(reports, failure and (type(failure).__name__, str(failure)), group=group)
        if failure is not None:
            raise failure
        for kind, text in filter(None, reports):
            raise ERRORS.get(kind, RuntimeError)(text)
        return result

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over processes, in-place on its device, without blocking the host."""
        if self._host is not None:
            dist.all_reduce(values)
        return values

    def async_write(self, state: dict[str, Tensor], folder: Path) -> Callable[[], None]:
        """Start an atomic write of tensors into a folder; each process writes a part.

        Parameters
        ----------
        state
            Tensors by name, equal names in all processes: sharded (DTensor), or whole with equal values in all
            processes.
        folder
            The folder, on a shared file system; replaced if it exists. It will hold a ``.safetensors`` file per
            process, in the layout of ``torch.distributed.checkpoint``.

        Returns
        -------
        callable
            Finishes the write; the writing thread must call it in every process. If one process cannot write, it raises
            OSError in all.
        """
        beside = folder.with_name(f".{folder.name}")
        self.together(lambda: self._remove(beside))
        # The warning comes from another thread, where a context manager does not catch it.
        warnings.filterwarnings("ignore", ALONE, UserWarning)
        writing = cast(
            Future[Any],
            async_save(
                state,
                storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True),
                process_group=self._files,
                no_dist=self._files is None,
            ),
        )

        def finish() -> None:
            try:
                writing.result()
            except CheckpointException as error:
                self.together(lambda: self._remove(beside), in_background=True)
                raise _cause(error) from None
            self.together(lambda: self._remove(folder), in_background=True)
            self.together(lambda: beside.rename(folder) if self.rank == 0 else None, in_background=True)

        return finish

    def _remove(self, folder: Path) -> None:
        if self.rank == 0 and folder.exists():
            shutil.rmtree(folder)

    def close(self) -> None:
        """Leave the process group; after an exception, without waiting for the others."""
        if self._host is None or not is_connected():
            return
        if not self._is_ours:
            dist.destroy_process_group(self._host)
            dist.destroy_process_group(self._files)
        elif sys.exc_info()[0] is not None and dist.get_backend() == "nccl":
            # destroy_process_group would wait for pending communication, possibly with a dead process.
            dist.group.WORLD.abort()  # type: ignore[union-attr]  # connected
        else:
            dist.destroy_process_group()
        self._host = self._files = None


def _meet() -> tuple[Any, int, int]:
    """Return the shared store, the rank of this process, and the number of processes."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=LAUNCH_TIMEOUT))
        return store, rank, world_size
    except dist.DistError:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        seconds = LAUNCH_TIMEOUT.total_seconds()
        raise ConnectionError(
            f"MASTER_ADDR: expected {num_processes()} processes to join at {place}, but not all did in {seconds:.0f} s"
        ) from None


def num_processes() -> int:
    """Return the number of processes: ``WORLD_SIZE``, which ``torchrun`` sets, or 1."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE: expected a positive integer in the environment, got {text!r}")
    if int(text) > 1 and not dist.is_available():
        raise ValueError(f"WORLD_SIZE: expected 1, since PyTorch was built without torch.distributed, got {text}")
    return int(text)


def is_connected() -> bool:
    """Return whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def replicate(module: nn.Module) -> DistributedDataParallel:
    """Wrap a module in DistributedDataParallel.

    Every process holds all weights and gets the mean of all gradients. Frozen parameters and buffers are not
    synchronized.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # its older name
    return DistributedDataParallel(module, **{option: False})  # type: ignore[arg-type]  # a flag


def shard(
    method: nn.Module, device_type: str, compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> None:
    """Shard the trained parameters of a method with FSDP2, one group per block.

    Each process gets its part of the mean of all gradients. Frozen parameters stay whole. ``compiled``, unless None,
    compiles the computation of each block; communication cannot be compiled.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    frozen = {parameter for parameter in method.parameters() if not parameter.requires_grad}
    blocks = [part for part in method.modules() if isinstance(part, Block | CrossBlock)]
    if compiled is not None:
        for block in blocks:
            block.forward = compiled(block.forward)  # type: ignore[method-assign]
    # FSDP hooks all outputs of a forward pass, and warns about views, such as predictions.
    method.register_forward_hook(_detach_predictions)
    for part in (*blocks, method):
        fully_shard(part, mesh=mesh, ignored_params=frozen)
    for part in (*blocks, method):
        for name in ("first_query", "features", "attention"):
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)


def _detach_predictions(method: nn.Module, arguments: Any, output: Any) -> None:
    if isinstance(output, Tensor):  # logits, from which the loss is computed
        return
    for name in ("predicted", "predicted_cells"):
        predicted = getattr(output, name, None)
        if predicted is not None:
            setattr(output, name, predicted.detach())


@contextmanager
def gradients_shared(module: Any, wanted: bool) -> Iterator[None]:
    """Synchronize gradients inside if ``wanted``; else accumulate them per process."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    if isinstance(module, DistributedDataParallel) and not wanted:
        with module.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_state(state: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors from a folder that :meth:`Processes.async_write` wrote.

    Number of processes and sharding may differ from those of the write.

    Parameters
    ----------
    state
        Tensors by name, whole or sharded.
    folder
        The folder.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    ValueError
        If the folder is corrupt or of another kind, or the tensors have other names, shapes or dtypes. Some tensors may
        be filled then. The message is one line.
    """
    corrupt = ValueError(f"directory: expected a training state, got {folder}, which is corrupt or of another kind")
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise
    except Exception:  # of any type, since bytes are arbitrary
        raise corrupt from None
    for name, tensor in state.items():
        _check_pieces(name, tensor, found.get(name), folder)
    for name in found:
        if name not in state:
            raise ValueError(f"directory: expected no tensor {name!r}, got one in {folder}")
    try:
        with _quiet():
            load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException:
        raise corrupt from None


def _check_pieces(name: str, tensor: Tensor, found: Any, folder: Path) -> None:
    """Raise ValueError unless the files hold the whole tensor."""
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"directory: expected a tensor {name!r}, got none in {folder}")
    if found.properties.dtype != tensor.dtype:
        raise ValueError(f"directory: {name}: expected {tensor.dtype}, got {found.properties.dtype} in {folder}")
    if not _covers(found.chunks, tuple(tensor.shape)):
        raise ValueError(
            f"directory: {name}: expected shape {tuple(tensor.shape)}, got another one or only parts in {folder}"
        )


def _covers(pieces: list[ChunkStorageMetadata], shape: tuple[int, ...]) -> bool:
    """Return whether pieces along the first axis cover a shape, each row once."""
    if not shape:
        return [tuple(piece.sizes) for piece in pieces] == [()]
    rows = 0
    for piece in sorted(pieces, key=lambda piece: tuple(piece.offsets)):
        if 0 in piece.sizes:  # of a process without rows
            continue
        if tuple(piece.offsets) != (rows, *(0 for _ in shape[1:])) or tuple(piece.sizes[1:]) != shape[1:]:
            return False
        rows += piece.sizes[0]
    return rows == shape[0]


def _cause(error: CheckpointException) -> BaseException:
    """Return the error of a process that could not write, preferably an OSError."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE, UserWarning)
        yield
