"""Several devices that train one method, of one process or of several: who they are, and what each of them holds.

The sharing is JAX's own: a mesh of devices, ``NamedSharding`` for what they hold, ``jax.shard_map`` for what they do,
``jax.distributed`` for processes. One device alone needs none of it.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

# JAX has no public way to talk from host to host; orbax takes this one too.
from jax._src.distributed import global_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P  # as everybody calls it
from numpy.typing import NDArray

Parallel = Literal["ddp", "fsdp"]
Result = TypeVar("Result")

AXIS = "data"
"""Name of the axis of the mesh."""
ROWS = P(AXIS)  # type: ignore[no-untyped-call]
"""Of arrays of which each device has some rows."""
WHOLE = P()  # type: ignore[no-untyped-call]
"""Of arrays that each device has whole."""

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What the environment says where there are several processes."""
LAUNCH_TIMEOUT = 300
"""Seconds that a process waits for the others to appear."""
HOST_TIMEOUT = 600.0
"""Seconds that processes wait for each other between training steps, when one of them may have files to write."""

SHUTDOWN_TIMEOUT = 10
"""Seconds that a process which ends waits for the others before it ends them."""

_NUMBERS = {"main": itertools.count(), "files": itertools.count()}
"""Of what processes tell each other, by thread; the same in all of them."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, OSError, FileNotFoundError, NotADirectoryError, PermissionError)
}
"""What an error of one process becomes in the others, by name; all else becomes a RuntimeError."""


class Processes:
    """The processes that train together: those that the environment speaks of, or this one alone.

    Parameters
    ----------
    timeout
        Seconds without a sign of life after which a process counts as dead; the others then end.

    Attributes
    ----------
    rank, world_size
        Number of this process, from 0, and of all of them.

    Raises
    ------
    ValueError
        If the environment says half of what it should, or nonsense.
    RuntimeError
        If JAX has used a device before: processes have to connect first.

    Notes
    -----
    Connections that are there already (``jax.distributed.initialize``) are used, and left open by :meth:`close`.
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
        """Return whether any process says True. It returns when all have asked, and needs no device."""
        return any(self._tell(bool(flag)))

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
        """Return what each process tells, in JSON, by the thread of that name."""
        if self.world_size == 1:
            return [value]
        client: Any = global_state.client
        number = next(_NUMBERS[thread])
        client.key_value_set(f"prmim/{thread}/{number}/{self.rank}", json.dumps(value))
        told = [
            client.blocking_key_value_get(f"prmim/{thread}/{number}/{rank}", int(1000 * HOST_TIMEOUT))
            for rank in range(self.world_size)
        ]
        # All have told the last now, so all have heard the one before.
        if number:
            client.key_value_delete(f"prmim/{thread}/{number - 1}/{self.rank}")
        return [json.loads(text) for text in told]

    def close(self) -> None:
        """Leave the others; nothing is waited for while an exception is on its way."""
        if not self._is_ours:
            return
        self._is_ours = False
        # With an exception, JAX leaves at the end of the program, when it has been reported: at first it waits for the
        # others, then it ends them.
        if sys.exc_info()[0] is None:
            self._tell(None)  # some may be busy for longer than JAX would wait
            jax.distributed.shutdown()  # type: ignore[no-untyped-call]


def _connect(timeout: float) -> None:
    address, _, number = (os.environ[name] for name in VARIABLES)
    if not number.isdecimal() or int(number) >= num_processes():
        raise ValueError(
            f"JAX_PROCESS_ID: expected 0 to {num_processes() - 1} in the environment, as there are {num_processes()} "
            f"processes, got {number!r}"
        )
    seconds = max(ceil(timeout), 1)
    jax.distributed.initialize(
        address,
        num_processes(),
        int(number),
        initialization_timeout=LAUNCH_TIMEOUT,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=seconds,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )


def num_processes() -> int:
    """Return how many processes the environment speaks of: ``JAX_NUM_PROCESSES``, or 1."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if len(missing) == len(VARIABLES):
        return 1
    if missing:
        there = next(name for name in VARIABLES if name in os.environ)
        raise ValueError(f"{missing[0]}: expected in the environment, where {there} is, got none")
    text = os.environ["JAX_NUM_PROCESSES"]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"JAX_NUM_PROCESSES: expected a positive integer in the environment, got {text!r}")
    return int(text)


def is_connected() -> bool:
    """Return whether this process has been connected to others."""
    return global_state.client is not None


def choose_devices(name: str) -> list[jax.Device]:
    """Return the devices of all processes that a name stands for.

    Parameters
    ----------
    name
        ``"auto"``: all of JAX's default platform; ``"cpu"`` or ``"cuda"``: all of that one; ``"cuda:1"``: number 1 of
        each process.

    Raises
    ------
    ValueError
        If the name is another, or there is no such device.
    """
    if name == "auto":
        return jax.devices()
    platform, colon, number = name.partition(":")
    if platform not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    try:
        devices = jax.devices(platform)
        if not colon:
            return devices
        by_process = itertools.groupby(devices, lambda device: device.process_index)
        return [list(group)[int(number or 0)] for _, group in by_process]
    except (RuntimeError, IndexError):
        raise ValueError(f"device: expected one that is there, got {name!r}, but JAX finds no such device") from None


class Layout:
    """Where arrays live on the devices of all processes, and how programs run on them.

    Parameters
    ----------
    devices
        Of all processes; some of them are of this one.
    parallel
        What devices hold of weights: ``"ddp"``, all; ``"fsdp"``, a part.

    Attributes
    ----------
    num_devices
        How many.
    num_local
        How many of them are of this process.
    local_device
        The first of those.
    in_turn
        Whether a step has to wait for the one before: devices of one CPU share their threads, and steps that are under
        way at once would keep those for which others wait.

    Notes
    -----
    A program is written as for one device, on its rows and its parts, and calls :meth:`gather`, :meth:`mean` and
    :meth:`mean_gradients` where devices have to talk. They talk nowhere else: left to itself, XLA would gather the
    batch for its parts, indices for look-ups, and activations where weights are cut. With one device these calls do
    nothing, and programs are compiled as if there were no layout.
    """

    def __init__(self, devices: Sequence[jax.Device], parallel: Parallel) -> None:
        local = [device for device in devices if device.process_index == jax.process_index()]
        self.num_devices, self.num_local = len(devices), len(local)
        self.local_device = local[0]
        self.in_turn = len(devices) > 1 and local[0].platform == "cpu"
        self._is_sharded = parallel == "fsdp"
        self._mesh = Mesh(np.array(devices), (AXIS,))

    def specs(self, tree: Any) -> Any:
        """Say how each of a tree of weights, or of things that have a shape, is cut."""
        number = self.num_devices if self._is_sharded else 1
        return jax.tree.map(lambda array: cut(array.shape, number), tree)

    @staticmethod
    def cuts(specs: dict[str, P]) -> bool:
        """Say whether any array is cut."""
        return any(spec != WHOLE for spec in specs.values())

    def put(self, tree: Any, specs: Any = WHOLE) -> Any:
        """Put arrays, the same in all processes, on the devices, cut as ``specs`` say: one, or a tree of them."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.local_device)
        if isinstance(specs, P):
            specs = jax.tree.map(lambda _: specs, tree)
        return jax.tree.map(self._put, tree, specs)

    def _put(self, array: Any, spec: P) -> Array:
        array = np.asarray(array)
        # Not device_put, with which processes would compare all that they have.
        return jax.make_array_from_callback(array.shape, NamedSharding(self._mesh, spec), lambda part: array[part])

    def put_rows(self, array: NDArray[Any]) -> Array:
        """Put rows of this process on its devices, as a part of the rows of all."""
        if self.num_devices == 1:
            return cast(Array, jax.device_put(array, self.local_device))
        spread: Array = jax.make_array_from_process_local_data(  # type: ignore[no-untyped-call]
            NamedSharding(self._mesh, ROWS), array
        )
        return spread

    def compile(self, program: Callable[..., Any], inputs: Any, outputs: Any, donate: tuple[int, ...] = ()) -> Any:
        """Compile a program that every device runs on what it holds.

        Parameters
        ----------
        program
            The function.
        inputs
            A tuple with the spec, or tree of specs, of each argument.
        outputs
            The same of what it returns.
        donate
            Numbers of the arguments whose memory the outputs take.
        """
        if self.num_devices == 1:
            return jax.jit(program, donate_argnums=donate)
        # Unchecked, since a gradient is to be that of a device alone, to be summed up once.
        shared = jax.shard_map(program, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        here, there = self._shardings(inputs), self._shardings(outputs)
        return jax.jit(shared, in_shardings=here, out_shardings=there, donate_argnums=donate)

    def gather(self, arrays: dict[str, Array], specs: dict[str, P]) -> dict[str, Array]:
        """Inside a program: get arrays whole."""
        return {
            name: array if specs[name] == WHOLE else lax.all_gather(array, AXIS, axis=_axis(specs[name]), tiled=True)
            for name, array in arrays.items()
        }

    def part(self, factor: Any, spec: P) -> Any:
        """Inside a program: of a factor of an array of weights, get what belongs to the part of that which is here.

        The factor is a number, or has as many axes as the weights, of the same length or of length 1.
        """
        if spec == WHOLE or np.ndim(factor) == 0 or factor.shape[_axis(spec)] == 1:
            return factor
        size = factor.shape[_axis(spec)] // self.num_devices
        return lax.dynamic_slice_in_dim(factor, lax.axis_index(AXIS) * size, size, _axis(spec))

    def mean(self, tree: Any) -> Any:
        """Inside a program: average over the devices."""
        return tree if self.num_devices == 1 else lax.pmean(tree, AXIS)  # type: ignore[no-untyped-call]

    def mean_gradients(self, gradients: dict[str, Array], specs: dict[str, P]) -> tuple[dict[str, Array], Array]:
        """Inside a program: average gradients over the devices, each of which gets its part; and their whole norm."""
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
        total: Array = lax.psum_scatter(  # type: ignore[no-untyped-call]
            gradient, AXIS, scatter_dimension=_axis(spec), tiled=True
        )
        return total

    def whole(self, arrays: dict[str, Array], specs: dict[str, P]) -> dict[str, Array]:
        """Return weights such that each device has them whole; all processes have to ask for it."""
        if not self.cuts(specs):
            return arrays
        gathered: dict[str, Array] = self.compile(lambda arrays: self.gather(arrays, specs), (specs,), WHOLE)(arrays)
        return gathered

    def local(self, tree: Any) -> Any:
        """Return arrays that each device has whole as arrays of one device of this process; nothing is copied."""
        if self.num_devices == 1:
            return tree
        return jax.tree.map(lambda array: array.addressable_data(0), tree)

    def convert(self, tree: Any, function: Callable[[Any], Any]) -> Any:
        """Make other weights of some, on the devices; they are cut as :meth:`specs` says."""
        specs = self.specs(jax.eval_shape(function, tree))
        return jax.jit(function, out_shardings=self._shardings(specs))(tree)

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self._mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
        )


def cut(shape: Sequence[int], num_devices: int) -> P:
    """Say how devices share an array of weights: along its longest axis that they can share evenly, else not at all.

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
