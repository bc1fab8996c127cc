"""Distributed training: synchronization, and layout of arrays on devices.

Devices form a mesh: ``NamedSharding`` places arrays, ``jax.shard_map`` runs programs, and ``jax.distributed`` connects
processes. On a single device, all functions work without a mesh.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P  # the usual name
from numpy.typing import NDArray
from orbax.checkpoint import multihost

from prmim_methods.messages import ERRORS

Parallel = Literal["ddp", "fsdp"]
Result = TypeVar("Result")

AXIS = "data"
"""Name of the axis of the mesh."""
ROWS = P(AXIS)  # type: ignore[no-untyped-call]
"""Sharding of arrays by rows."""
WHOLE = P()  # type: ignore[no-untyped-call]
"""Sharding of arrays that are whole on each device."""

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables of a run with several processes."""
SRUN_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables by which JAX detects the tasks of SLURM's ``srun``."""
LAUNCH_TIMEOUT = 300
"""Timeout in seconds for other processes to join."""
HOST_TIMEOUT = 600.0
"""Timeout in seconds between training steps, for example while one process writes files."""

SHUTDOWN_TIMEOUT = 10
"""Seconds that an ending process waits for the others before it terminates them."""

_NUMBERS = {"main": itertools.count(), "files": itertools.count()}
"""Counters of exchanged messages by thread, equal in all processes."""


class Processes:
    """The processes of a run, described by environment variables, or a single one.

    Parameters
    ----------
    timeout
        Seconds without a heartbeat after which a process is considered dead, and the others end.

    Attributes
    ----------
    rank, world_size
        Rank of this process, from 0, and number of processes.

    Raises
    ------
    ValueError
        If the environment variables are incomplete or invalid.
    RuntimeError
        If JAX has used a device before connecting.

    Notes
    -----
    An existing connection (``jax.distributed.initialize``) is used, and left open by :meth:`close`.
    """

    def __init__(self, timeout: float) -> None:
        self._is_ours = False
        if num_processes() > 1 and not is_connected():
            _connect(timeout)
            self._is_ours = True
        self.rank, self.world_size = 0, 1
        if is_connected():
            self.rank, self.world_size = jax.process_index(), jax.process_count()

    def any(self, flag: bool) -> bool:
        """Return whether any process has a True flag; waits for all, without the device."""
        return any(self._tell(bool(flag)))

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
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:
            failure = error
        report = failure and (type(failure).__name__, str(failure))
        reports = self._tell(report, "files" if in_background else "main")
        if failure is not None:
            raise failure
        for kind, text in filter(None, reports):
            raise ERRORS.get(kind, RuntimeError)(text)
        return result

    def _tell(self, value: Any, thread: str = "main") -> list[Any]:
        """Exchange a JSON value; return those of all processes.

        Messages of different threads do not mix.
        """
        if self.world_size == 1:
            return [value]
        # JAX has no public interface to its key-value store, but orbax has.
        client: Any = multihost.get_jax_distributed_client()
        number = next(_NUMBERS[thread])
        client.key_value_set(f"prmim/{thread}/{number}/{self.rank}", json.dumps(value))
        answers = [
            client.blocking_key_value_get(f"prmim/{thread}/{number}/{rank}", int(1000 * HOST_TIMEOUT))
            for rank in range(self.world_size)
        ]
        # All processes have sent this message, so all have read the previous one.
        if number:
            client.key_value_delete(f"prmim/{thread}/{number - 1}/{self.rank}")
        return [json.loads(text) for text in answers]

    def close(self) -> None:
        """Disconnect; after an exception, without waiting for the others."""
        if not self._is_ours:
            return
        self._is_ours = False
        # After an exception, JAX disconnects at the end of the program, after the exception is reported: it waits for
        # the others, then terminates them.
        if sys.exc_info()[0] is None:
            self._tell(None)  # some may be busy for longer than JAX waits
            jax.distributed.shutdown()  # type: ignore[no-untyped-call]


def _connect(timeout: float) -> None:
    seconds = max(ceil(timeout), 1)
    limits: dict[str, Any] = {
        "initialization_timeout": LAUNCH_TIMEOUT,
        "heartbeat_timeout_seconds": seconds,
        "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT,
    }
    if VARIABLES[0] not in os.environ:
        jax.distributed.initialize(cluster_detection_method="slurm", **limits)
        return
    address, _, number = (os.environ[name] for name in VARIABLES)
    if not number.isdecimal() or int(number) >= num_processes():
        raise ValueError(
            f"JAX_PROCESS_ID: expected 0 to {num_processes() - 1} in the environment, as there are {num_processes()} "
            f"processes, got {number!r}"
        )
    jax.distributed.initialize(address, num_processes(), int(number), cluster_detection_method="deactivate", **limits)


def num_processes() -> int:
    """Return the number of processes: ``JAX_NUM_PROCESSES``, SLURM's, or 1."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if len(missing) == len(VARIABLES):
        return int(os.environ["SLURM_NTASKS"]) if all(name in os.environ for name in SRUN_VARIABLES) else 1
    if missing:
        there = next(name for name in VARIABLES if name in os.environ)
        raise ValueError(f"{missing[0]}: expected in the environment, where {there} is, got none")
    text = os.environ["JAX_NUM_PROCESSES"]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"JAX_NUM_PROCESSES: expected a positive integer in the environment, got {text!r}")
    return int(text)


def is_connected() -> bool:
    """Return whether this process is connected to others."""
    return jax.distributed.is_initialized()


def choose_devices(name: str) -> list[jax.Device]:
    """Return the devices of all processes that a name selects.

    Parameters
    ----------
    name
        ``"auto"``: all of JAX's default platform; ``"cpu"`` or ``"cuda"``: all of that platform; ``"cuda:1"``: device 1
        of each process.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if name == "auto":
        return jax.devices()
    platform, colon, number = name.partition(":")
    try:
        devices = jax.devices(platform)
        if not colon:
            return devices
        by_process = itertools.groupby(devices, lambda device: device.process_index)
        return [list(group)[int(number or 0)] for _, group in by_process]
    except (RuntimeError, IndexError):
        raise ValueError(f"device: expected an available device, got {name!r}, but JAX finds no such device") from None


class Layout:
    """Placement of arrays on devices, and compilation of programs for them.

    Parameters
    ----------
    devices
        The devices of all processes, including this one.
    parallel
        Weights per device: ``"ddp"``, all; ``"fsdp"``, a part.

    Attributes
    ----------
    num_devices
        Number of devices.
    num_local
        Number of devices of this process.
    local_device
        The first device of this process.
    in_turn
        Whether a step must wait for the previous one. Devices of one CPU share threads, so concurrent steps can
        deadlock.

    Notes
    -----
    A program is written for one device, its rows and its parts of the weights. Devices communicate only in calls of
    :meth:`gather`, :meth:`mean` and :meth:`mean_gradients`. (XLA's own partitioning would also gather batches, indices
    and activations.) With one device, these calls are no-ops, and programs are compiled without a mesh.
    """

    def __init__(self, devices: Sequence[jax.Device], parallel: Parallel) -> None:
        local = [device for device in devices if device.process_index == jax.process_index()]
        self.num_devices, self.num_local = len(devices), len(local)
        self.local_device = local[0]
        self.in_turn = len(devices) > 1 and local[0].platform == "cpu"
        self._is_sharded = parallel == "fsdp"
        self._mesh = Mesh(np.array(devices), (AXIS,))

    def specs(self, tree: Any) -> Any:
        """Return how each array of a tree is sharded; see :func:`cut`."""
        number = self.num_devices if self._is_sharded else 1
        return jax.tree.map(lambda array: cut(array.shape, number), tree)

    @staticmethod
    def cuts(specs: dict[str, P]) -> bool:
        """Return whether any array is sharded."""
        return any(spec != WHOLE for spec in specs.values())

    def put(self, tree: Any, specs: Any = WHOLE) -> Any:
        """Put arrays, equal in all processes, on the devices; ``specs``: their sharding."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.local_device)
        if isinstance(specs, P):
            specs = jax.tree.map(lambda _: specs, tree)
        return jax.tree.map(self._put, tree, specs)

    def _put(self, array: Any, spec: P) -> Array:
        array = np.asarray(array)
        # Not device_put, which would compare the arrays of all processes.
        return jax.make_array_from_callback(array.shape, NamedSharding(self._mesh, spec), lambda part: array[part])

    def put_rows(self, array: NDArray[Any]) -> Array:
        """Put the rows of this process on its devices, as part of a global array."""
        if self.num_devices == 1:
            return jax.device_put(array, self.local_device)
        sharding = NamedSharding(self._mesh, ROWS)
        return jax.make_array_from_process_local_data(sharding, array)  # type: ignore[no-untyped-call]

    def local_rows(self, array: Array) -> NDArray[Any]:
        """Return this process's rows of an array; the inverse of :meth:`put_rows`."""
        if self.num_devices == 1:
            return np.asarray(array)
        parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start or 0)
        return np.concatenate([np.asarray(part.data) for part in parts])

    def map_rows(self, program: Callable[[Array], Array], rows: NDArray[Any]) -> NDArray[Any]:
        """Apply a compiled program to the rows of this process, distributed over its devices.

        Zeros pad the rows to equal numbers for all devices; their results are left out.
        """
        missing = -len(rows) % self.num_local
        padded = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        return self.local_rows(program(self.put_rows(padded)))[: len(rows)]

    def compile(self, program: Callable[..., Any], inputs: Any, outputs: Any, donate: tuple[int, ...] = ()) -> Any:
        """Compile a program that every device runs on its parts of the arguments.

        Parameters
        ----------
        program
            The function.
        inputs
            A tuple with the spec, or tree of specs, of each argument.
        outputs
            The spec, or tree of specs, of the result.
        donate
            Numbers of the arguments whose memory the outputs reuse.
        """
        if self.num_devices == 1:
            return jax.jit(program, donate_argnums=donate)
        # Unchecked, since gradients are per device and summed once.
        shared = jax.shard_map(program, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        here, there = self._shardings(inputs), self._shardings(outputs)
        return jax.jit(shared, in_shardings=here, out_shardings=there, donate_argnums=donate)

    def gather(self, arrays: dict[str, Array], specs: dict[str, P]) -> dict[str, Array]:
        """Inside a program: gather sharded arrays."""
        return {
            name: array if specs[name] == WHOLE else lax.all_gather(array, AXIS, axis=_axis(specs[name]), tiled=True)
            for name, array in arrays.items()
        }

    def part(self, factor: Any, spec: P) -> Any:
        """Inside a program: return the part of a factor for this device's weights.

        The factor is a number, or broadcasts to the weights, with as many axes.
        """
        if spec == WHOLE or np.ndim(factor) == 0 or factor.shape[_axis(spec)] == 1:
            return factor
        size = factor.shape[_axis(spec)] // self.num_devices
        return lax.dynamic_slice_in_dim(factor, lax.axis_index(AXIS) * size, size, _axis(spec))

    def mean(self, tree: Any) -> Any:
        """Inside a program: average over the devices."""
        return tree if self.num_devices == 1 else lax.pmean(tree, AXIS)  # type: ignore[no-untyped-call]

    def mean_gradients(self, gradients: dict[str, Array], specs: dict[str, P]) -> tuple[dict[str, Array], Array]:
        """Inside a program: average gradients; return this device's parts and the norm."""
        if self.num_devices == 1:
            return gradients, optax.tree.norm(gradients)
        whole = self.mean({name: gradient for name, gradient in gradients.items() if specs[name] == WHOLE})
        parts = {
            name: self._scatter(gradient, specs[name]) / self.num_devices
            for name, gradient in gradients.items()
            if specs[name] != WHOLE
        }
        square = optax.tree.norm(whole, squared=True) if whole else jnp.zeros(())
        if parts:
            square += lax.psum(optax.tree.norm(parts, squared=True), AXIS)  # type: ignore[no-untyped-call]
        return {name: (whole | parts)[name] for name in gradients}, jnp.sqrt(square)

    def _scatter(self, gradient: Array, spec: P) -> Array:
        return lax.psum_scatter(  # type: ignore[no-untyped-call]
            gradient, AXIS, scatter_dimension=_axis(spec), tiled=True
        )

    def compile_gather(self, specs: dict[str, P]) -> Any:
        """Compile a program that gathers weights to all devices; all processes must call it."""
        if not self.cuts(specs):
            return lambda arrays: arrays
        return self.compile(lambda arrays: self.gather(arrays, specs), (specs,), WHOLE)

    def local(self, tree: Any) -> Any:
        """Return replicated arrays as arrays of one local device, without a copy."""
        if self.num_devices == 1:
            return tree
        return jax.tree.map(lambda array: array.addressable_data(0), tree)

    def compile_copy(self, specs: Any) -> Any:
        """Compile a program that copies arrays on the devices; ``specs``: their sharding."""
        return jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=self._shardings(specs))

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self._mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
        )


def cut(shape: Sequence[int], num_devices: int) -> P:
    """Return the sharding of an array: along its longest divisible axis, else none.

    Examples
    --------
    >>> tuple(cut((6, 8, 9), 2))
    (None, 'data')
    >>> tuple(cut((3, 5), 2))
    ()
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % num_devices == 0]
    if num_devices == 1 or not axes:
        return WHOLE
    return P(*[None] * max(axes, key=lambda axis: shape[axis]), AXIS)  # type: ignore[no-untyped-call]


def _axis(spec: P) -> int:
    return len(spec) - 1
