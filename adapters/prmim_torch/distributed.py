"""Several processes that train one method: how they agree, what each of them holds, and what they write together.

``torchrun`` starts them, and the sharing is PyTorch's own: DistributedDataParallel or FSDP2. One process alone needs
none of it.
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
from typing import Any, Literal, TypeVar, cast

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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from prmim_torch.vit import Block

Parallel = Literal["ddp", "fsdp"]
Result = TypeVar("Result")

LAUNCH_TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others to appear."""
HOST_TIMEOUT = timedelta(minutes=10)
"""How long processes wait for each other between training steps, when one of them may have files to write."""

ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""What torch.distributed.checkpoint warns of where there is one process alone."""

_NUMBERS = itertools.count()
"""Of the process groups that are made here, one after the other; the same in all processes."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, OSError, FileNotFoundError, NotADirectoryError, PermissionError)
}
"""What an error of one process becomes in the others, by name; all else becomes a RuntimeError."""


class Processes:
    """The processes that train together: those that ``torchrun`` started, or this one alone.

    Parameters
    ----------
    device
        The device of this one. They talk through NCCL on ``cuda``, else through gloo.
    timeout
        Seconds that one waits for the others in a training step before it gives up.

    Attributes
    ----------
    rank, world_size
        Number of this process, from 0, and of all of them.

    Raises
    ------
    ValueError
        If the environment is not such as ``torchrun`` makes.
    ConnectionError
        If the other processes do not appear.

    Notes
    -----
    A process group that is there already is used, and left open by :meth:`close`.

    There is a second group, on the host and with more patience, for what one process may keep the others waiting for: a
    first batch, compilation, files to read. And a third one for files that a thread writes in the background, so that
    what it says to the others is not mixed up. That a process died is noticed at once by each, that it hangs is not.
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
                # A group must not find the addresses that an earlier one left, where there was one.
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
        """Return whether any process says True. It returns when all have asked, and needs no device."""
        if self._host is None:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._host)
        return bool(said)

    def together(self, call: Callable[[], Result], *, in_background: bool = False) -> Result:
        """Call something in every process; if it fails in one, raise in all, so that none waits for one that left.

        Parameters
        ----------
        call
            What to call.
        in_background
            Whether it is the thread that writes files which asks.

        Raises
        ------
        Exception
            What the call raised here, or else in the first process where it did.
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
        """Add up a tensor over the processes, in place and on its device; the host does not wait."""
        if self._host is not None:
            dist.all_reduce(values)
        return values

    def async_write(self, state: dict[str, Tensor], folder: Path) -> Callable[[], None]:
        """Begin to write tensors, each process a part of them, into a folder, which appears when all is in it.

        What is written are their values of now.

        Parameters
        ----------
        state
            Tensors by name, the same names everywhere: sharded ones (DTensor), and whole ones of the same values
            everywhere.
        folder
            What to write, in a place that all processes see; replaced if it is there. It will hold a
            ``.safetensors`` file per process, in the layout of ``torch.distributed.checkpoint``.

        Returns
        -------
        callable
            What ends it, for the thread that writes files to call in every process. It raises OSError, in all of them,
            if one could not write.
        """
        beside = folder.with_name(f".{folder.name}")
        self.together(lambda: self._remove(beside))
        # It is said in a thread, where nothing can be done about it.
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
        """Leave the others; nothing is waited for while an exception is on its way."""
        if self._host is None or not is_connected():
            return
        if not self._is_ours:
            dist.destroy_process_group(self._host)
            dist.destroy_process_group(self._files)
        elif sys.exc_info()[0] is not None and dist.get_backend() == "nccl":
            # A regular end waits for what is in flight, perhaps with one who is gone.
            dist.group.WORLD.abort()  # type: ignore[union-attr]  # it is connected
        else:
            dist.destroy_process_group()
        self._host = self._files = None


def _meet() -> tuple[Any, int, int]:
    """Return a store that all processes share, the number of this one, and how many there are."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=LAUNCH_TIMEOUT))
        return store, rank, world_size
    except dist.DistError:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        seconds = LAUNCH_TIMEOUT.total_seconds()
        raise ConnectionError(
            f"MASTER_ADDR: expected {num_processes()} processes to meet at {place}, but not all came in {seconds:.0f} s"
        ) from None


def num_processes() -> int:
    """Return how many processes the environment speaks of: ``WORLD_SIZE``, which ``torchrun`` sets, or 1."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE: expected a positive integer in the environment, got {text!r}")
    if int(text) > 1 and not dist.is_available():
        raise ValueError(f"WORLD_SIZE: expected 1, as this PyTorch was built without torch.distributed, got {text}")
    return int(text)


def is_connected() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def replicate(module: nn.Module) -> DistributedDataParallel:
    """Wrap a module that every process holds whole, so that a backward pass leaves the mean of all gradients.

    Parameters without gradients are left alone, and so are buffers, which are constants.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # its older name
    return DistributedDataParallel(module, **{option: False})  # type: ignore[arg-type]  # it is a flag


def shard(
    method: nn.Module, device_type: str, compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> None:
    """Leave each process a part of every learned parameter of a method; all of a block's are fetched when it runs.

    A backward pass leaves each process its part of the mean of all gradients. Parameters without gradients stay whole.
    The computation of each block goes through ``compiled``, unless it is None; communication cannot.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    frozen = {parameter for parameter in method.parameters() if not parameter.requires_grad}
    blocks = [part for part in method.modules() if isinstance(part, Block)]
    if compiled is not None:
        for block in blocks:
            block.forward = compiled(block.forward)  # type: ignore[method-assign]
    # FSDP follows all that a forward pass returns, and warns of views, which predictions may be.
    method.register_forward_hook(_detach_predictions)
    for part in (*blocks, method):
        fully_shard(part, mesh=mesh, ignored_params=frozen)
    register_fsdp_forward_method(method, "features")


def _detach_predictions(method: nn.Module, arguments: Any, output: Any) -> None:
    if not isinstance(output, Tensor):  # logits are what the loss is of
        output.predicted = output.predicted.detach()


@contextmanager
def gradients_shared(module: Any, wanted: bool) -> Iterator[None]:
    """Let forward and backward passes inside talk about gradients or, unless ``wanted``, let them pile up here."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    if isinstance(module, DistributedDataParallel) and not wanted:
        with module.no_sync():
            yield
    else:
        yield


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a whole tensor, the same in all processes, as another one is cut."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def read_state(state: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors with what :meth:`Processes.write` wrote, by however many processes, and however it was sharded.

    Parameters
    ----------
    state
        Tensors by name, whole or sharded.
    folder
        What was written.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If the folder holds something else, or tensors of other names, shapes or dtypes; one line. Some of the tensors
        may be filled then.
    """
    damaged = ValueError(f"directory: expected a training state, got {folder}, which is damaged or something else")
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise
    except Exception:  # whatever becomes of bytes that are no such file
        raise damaged from None
    for name, tensor in state.items():
        _check_pieces(name, tensor, found.get(name), folder)
    for name in found:
        if name not in state:
            raise ValueError(f"directory: expected no tensor {name!r}, got one in {folder}")
    try:
        with _quiet():
            load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException:
        raise damaged from None


def _check_pieces(name: str, tensor: Tensor, found: Any, folder: Path) -> None:
    """Raise ValueError unless files hold all of a tensor."""
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"directory: expected a tensor {name!r}, got none in {folder}")
    if found.properties.dtype != tensor.dtype:
        raise ValueError(f"directory: {name}: expected {tensor.dtype}, got {found.properties.dtype} in {folder}")
    if not _make_up(found.chunks, tuple(tensor.shape)):
        raise ValueError(
            f"directory: {name}: expected shape {tuple(tensor.shape)}, got another, or not all of it, in {folder}"
        )


def _make_up(pieces: list[ChunkStorageMetadata], shape: tuple[int, ...]) -> bool:
    """Return whether pieces, cut along the first axis, are a tensor of a shape, each row once."""
    if not shape:
        return [tuple(piece.sizes) for piece in pieces] == [()]
    rows = 0
    for piece in sorted(pieces, key=lambda piece: tuple(piece.offsets)):
        if 0 in piece.sizes:  # of a process that no rows were left for
            continue
        if tuple(piece.offsets) != (rows, *(0 for _ in shape[1:])) or tuple(piece.sizes[1:]) != shape[1:]:
            return False
        rows += piece.sizes[0]
    return rows == shape[0]


def _cause(error: CheckpointException) -> BaseException:
    """Return what made a process fail to write, an OSError if there is one."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the remark that there is one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE, UserWarning)
        yield
