"""What every training has in common: one step, its measurements and what is saved, whatever is trained."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from prmim_core import counter_noise
from prmim_core.files import dump_architecture
from prmim_core.training import Decay, check_training, learning_rate_at
from prmim_jax.distributed import ROWS, WHOLE, Layout, Parallel, Processes, choose_devices
from prmim_jax.interop import named_variables, read_weights, write_weights
from prmim_jax.method import Method, check_images
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.vit import Statistic, set_compute_dtype, stack_blocks, unstack_blocks

Precision = Literal["float32", "bfloat16"]
State = nnx.State[Any, Any]
Arrays = dict[str, Array]
"""Arrays by the name of the parameter."""

WEIGHTS_FILE = "weights.safetensors"
STATE_FOLDER = "training_state"
STACKED = ".blocks.block."
"""What names of stacked blocks have where files have ``.blocks.0.`` and so on, see ``prmim_jax.vit.stack_blocks``."""


class TrainingState(NamedTuple):
    """What a training step takes, and gives back changed; its memory is handed on from step to step.

    Parameters
    ----------
    parameters
        float32, by name; of blocks that are scanned over, all blocks in one array.
    average
        The running means of the parameters, by name; empty if there are none.
    moments
        State of the optimiser.
    statistics
        Buffers that forward passes change.
    sums
        float32: sums of the losses and of the norm of the gradient over the finite steps since the last reading, then
        the number of those.
    nonfinite_step
        int32: the first step (counted from 1) that was not finite, or -1.
    skipped
        int32 (2,): steps that were not finite: since the last reading, and the latest ones in a row.
    """

    parameters: Arrays
    average: Arrays
    moments: optax.OptState
    statistics: State
    sums: Array
    nonfinite_step: Array
    skipped: Array


class Trainer:
    """A module with its optimiser, on all devices of a platform, of one process or of several.

    A subclass says what is trained and what is minimised. The arguments, and what holds of every step, are those of
    :class:`prmim_jax.Engine`.
    """

    _num_inputs: int = 2
    """Arrays of a batch: images, their numbers, and what else the losses are of."""
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
        self._processes = Processes(timeout)
        self._layout = Layout(choose_devices(device), parallel)
        with jax.default_device(self._layout.local_device):
            module = self._create(method_options, seed)
            is_decayed = decay_mask(module)
            stack_blocks(module)
        self._measured = (*module.losses, "grad_norm")
        self._num_tokens = module.grid.num_tokens
        self._image_shape = (*module.image_size, module.channels)
        set_compute_dtype(module, jnp.bfloat16 if precision == "bfloat16" else None)
        self._graph, parameters, statistics, buffers = split(module)
        self._buffers = self._layout.put(buffers)
        leaves, self._tree = jax.tree.flatten(parameters)
        # Names in the order of the leaves: both come from one walk over the same module.
        self._names = _names_of(parameters)
        arrays = dict(zip(self._names, leaves, strict=True))
        mask = {name: is_decayed[name.replace(STACKED, ".blocks.0.")] for name in self._names}
        self._optimizer = self._create_optimizer(weight_decay, betas, mask)
        self._rate_scales = {name: self._rate_scales_of(name, array) for name, array in arrays.items()}
        self._seed = seed
        self._rates = (total_steps, warmup_steps, learning_rate, min_learning_rate, decay)
        self._clip_grad = clip_grad
        self._accumulate = accumulate
        self._precision = precision
        self._step = 0
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        average = {} if self._ema_decay is None else _copies(arrays)
        moments = jax.eval_shape(self._optimizer.init, arrays)
        # Of the same form as the state: how each of its arrays is cut.
        specs = self._layout.specs
        cut: Any = (specs(arrays), specs(average), specs(moments), WHOLE, WHOLE, WHOLE, WHOLE)
        self._specs: Any = TrainingState(*cut)
        self._state = TrainingState(
            self._layout.put(arrays, self._specs.parameters),
            self._layout.put(average, self._specs.average),
            self._layout.put(_zeros_like(moments), self._specs.moments),
            self._layout.put(statistics),
            self._zeros(len(self._measured) + 1, np.float32),
            self._layout.put(np.full((), -1, np.int32)),
            self._zeros(2, np.int32),
        )
        batch = [ROWS] * self._num_inputs
        self._train = self._layout.compile(
            self._train_program, (self._specs, WHOLE, *batch, WHOLE, WHOLE), self._specs, donate=(0,)
        )
        self._evaluations: dict[Callable[..., Any], Callable[..., Any]] = {}

    def _create(self, method_options: Mapping[str, Any], seed: int) -> Method:
        """Build what is trained, on one device."""
        raise NotImplementedError

    def _create_optimizer(
        self, weight_decay: float, betas: tuple[float, float], is_decayed: dict[str, bool]
    ) -> optax.GradientTransformation:
        """Return what makes updates of gradients, for learning rate 1; of all its parts one has a state."""
        return optax.chain(
            optax.scale_by_adam(*betas, eps=1e-8), optax.add_decayed_weights(weight_decay, mask=is_decayed)
        )

    def _rate_scale(self, name: str) -> float:
        """Return what the learning rate of a parameter, named as in files, is multiplied with."""
        return 1.0

    def _rate_scales_of(self, name: str, array: Array) -> float | NDArray[np.float32]:
        if STACKED not in name:
            return self._rate_scale(name)
        scales = [self._rate_scale(name.replace(STACKED, f".blocks.{number}.")) for number in range(len(array))]
        return np.array(scales, np.float32).reshape(-1, *[1] * (array.ndim - 1))

    def _losses(self, module: Any, images: Array, noise: Array, *more: Array) -> Sequence[Array]:
        """Return the scalars of a part of a batch that the module names as its losses; the first is minimised."""
        raise NotImplementedError

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
        return sum(array.size for array in self._state.parameters.values())

    @property
    def device(self) -> str:
        """The device, or the devices of this process, in words."""
        device, number = self._layout.local_device, self._layout.num_local
        name = "cuda" if device.platform == "gpu" else device.platform
        kind = device.device_kind if device.platform == "gpu" else f"{os.cpu_count()} cores"
        one = f"cuda:{device.id}" if name == "cuda" else name
        others = f", one of {self.world_size} processes" if self.world_size > 1 else ""
        return f"{one if number == 1 else f'{number} x {name}'} ({kind}){others}"

    @property
    def module(self) -> Method:
        """What is trained, with the weights of now, on one device; the next training step takes its arrays away.

        All processes have to ask for it.
        """
        parameters = self._layout.whole(self._state.parameters, self._specs.parameters)
        module = self._merge(*map(self._layout.local, (parameters, self._state.statistics, self._buffers)))
        unstack_blocks(module)
        return module

    def _take_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64], *more: NDArray[Any]) -> None:
        """Take one optimiser step on images, their numbers, and what else the losses are of."""
        self._check_batch(len(images))
        learning_rate = learning_rate_at(self._step, *self._rates)
        inputs = [self._layout.put_rows(array) for array in self._inputs(images, sample, *more)]
        if self._layout.in_turn:
            self._state.sums.block_until_ready()
        self._state = self._train(self._state, self._buffers, *inputs, self._step, learning_rate)
        self._step += 1

    def _train_program(self, state: TrainingState, buffers: State, *inputs: Array) -> TrainingState:
        """Map a state to the next one; compiled, and run by each device on its rows and its parts of the weights."""
        images, sample, *more, step, learning_rate = inputs
        cut = self._specs.parameters
        gradients, losses, statistics = self._gradients(
            self._layout.gather(state.parameters, cut),
            state.statistics,
            buffers,
            images,
            self._noise(sample, step),
            *more,
        )
        losses = self._layout.mean(losses)
        gradients, norm = self._layout.mean_gradients(gradients, cut)
        is_bad = ~(jnp.isfinite(losses[0]) & jnp.isfinite(norm))
        if self._clip_grad is not None:
            scale = jnp.maximum((norm + 1e-6) / self._clip_grad, 1.0)
            gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
        updates, moments = self._optimizer.update(gradients, state.moments, state.parameters)
        rates = {
            name: learning_rate * self._layout.part(scales, cut[name]) for name, scales in self._rate_scales.items()
        }
        parameters = jax.tree.map(lambda value, rate, update: value - rate * update, state.parameters, rates, updates)
        follow = 1 - (self._ema_decay or 0.0)
        average = {name: mean + follow * (parameters[name] - mean) for name, mean in state.average.items()}
        keep = partial(jax.tree.map, partial(jnp.where, is_bad))
        measured = jnp.concatenate([losses, norm[None], jnp.ones_like(norm)[None]])
        return TrainingState(
            keep(state.parameters, parameters),
            keep(state.average, average),
            keep(state.moments, moments),
            keep(state.statistics, statistics),
            state.sums + jnp.where(is_bad, 0.0, measured),
            jnp.where(is_bad & (state.nonfinite_step < 0), step + 1, state.nonfinite_step),
            # The first is a count since the last reading, the second one since the last finite step.
            jnp.where(is_bad, state.skipped + 1, state.skipped * jnp.array([1, 0], jnp.int32)),
        )

    def _gradients(
        self, parameters: Arrays, statistics: State, buffers: State, *batch: Array
    ) -> tuple[Arrays, Array, State]:
        """Return the gradient of the first loss, all losses, and the statistics after it.

        Gradient and losses are means over the parts of a device's rows, of which each sees the statistics that the one
        before has left.
        """

        def losses_of(parameters: Arrays, statistics: State, *part: Array) -> tuple[Array, tuple[Array, State]]:
            module = self._merge(parameters, statistics, buffers)
            losses = self._losses(module, *part)
            return losses[0], (jnp.stack(losses), nnx.state(module, Statistic))

        differentiate = jax.grad(losses_of, has_aux=True)
        if self._accumulate == 1:
            gradients, (losses, statistics) = differentiate(parameters, statistics, *batch)
            return gradients, losses, statistics

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            total, statistics = carry
            gradients, (losses, statistics) = differentiate(parameters, statistics, *part)
            return (jax.tree.map(jnp.add, total, (gradients, losses)), statistics), None

        parts = [array.reshape(self._accumulate, -1, *array.shape[1:]) for array in batch]
        zeros: Any = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(len(self._measured) - 1, jnp.float32))
        (total, statistics), _ = lax.scan(add, (zeros, statistics), tuple(parts))
        gradients, losses = jax.tree.map(lambda value: value / self._accumulate, total)
        return gradients, losses, statistics

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
        *sums, steps = np.asarray(self._state.sums).tolist()
        nonfinite_step = int(self._state.nonfinite_step)
        skipped, skipped_in_a_row = np.asarray(self._state.skipped).tolist()
        self._state = self._state._replace(
            sums=self._zeros(len(self._measured) + 1, np.float32),
            skipped=self._layout.put(np.array([0, skipped_in_a_row], np.int32)),
        )
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

        The training state is a checkpoint of orbax. All processes have to call it, with a folder that all of them see;
        it returns when all have written.

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
        directory = Path(directory).absolute()
        if not directory.is_dir():
            raise FileNotFoundError(f"directory: expected a folder that is there, got {directory}")
        if self._saving is not None:
            wait([self._saving])
        module = self.module
        metadata, weights = dump_architecture(module), {}
        if self.rank == 0:
            weights = {name: np.array(variable[...]) for name, variable in named_variables(module).items()}
        state = self._saved_state()
        _silence_orbax()

        def write() -> None:
            with _checkpointer() as checkpointer:
                checkpointer.save(directory / STATE_FOLDER, state, force=True)
            if self.rank == 0:
                write_weights(weights, metadata, directory / WEIGHTS_FILE)

        self._saving = self._background.submit(lambda: self._processes.together(write, in_background=True))
        return self._saving

    def _saved_state(self) -> dict[str, Any]:
        """Return a copy of the training state, less the weights, as nested dictionaries of arrays, named as in files.

        They are of NumPy, but for those that devices share out: each process writes what it holds of these.
        """
        arrays = self._by_parameter()
        if self._layout.cuts(self._specs.parameters):
            copies = self._layout.convert(arrays, _copies_apart)
        else:
            copies = _moments_apart(jax.tree.map(np.array, self._layout.local(arrays)))
        return {**self._host_state(), **copies}

    def _host_state(self) -> dict[str, Any]:
        """Return a copy of what is there once, whatever the number of parameters, in NumPy."""
        state = {
            "step": self._step,
            "sums": self._state.sums,
            "nonfinite_step": self._state.nonfinite_step,
            "skipped": self._state.skipped,
            **{name: value for name, value in _kept(self._state.moments).items() if not isinstance(value, dict)},
        }
        return {name: np.array(value) for name, value in state.items()}

    def _by_parameter(self) -> dict[str, Arrays]:
        """Return what is kept for each parameter besides its value: the optimiser's moments, and a running mean."""
        moments = {name: value for name, value in _kept(self._state.moments).items() if isinstance(value, dict)}
        return {**moments, "average": self._state.average} if self._state.average else moments

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote, of an engine of the same architecture.

        It may have been saved by other devices, by more or fewer of them, and shared among them in another way. All
        processes have to call it. Learning rate, weight decay and the like stay those of this engine. With the same
        options it goes on as the saved one would have; bit for bit on as many devices, as far as kernels are
        deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is damaged, or of another architecture. The engine is unchanged then.
        """
        directory = Path(directory).absolute()
        weights = self._read_weights(directory / WEIGHTS_FILE)
        like = {**self._host_state(), **jax.eval_shape(_moments_apart, self._by_parameter())}
        state = self._processes.together(lambda: _read_state(directory / STATE_FOLDER, like))
        self._take_weights(weights)
        specs = {**_kept(self._specs.moments), "average": self._specs.average}
        arrays = {
            name: self._layout.put(_put_together(state[name], self._names), specs[name])
            for name in self._by_parameter()
        }
        numbers = {name: self._layout.put(state[name]) for name in self._host_state()}
        self._state = self._state._replace(
            moments=tuple(_refilled(part, {**numbers, **arrays}) for part in self._state.moments),
            **{name: numbers[name] for name in ("sums", "nonfinite_step", "skipped")},
            **{name: arrays[name] for name in arrays if name == "average"},
        )
        self._step = int(state["step"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file; all processes have to."""
        self._take_weights(self._read_weights(path))

    def _read_weights(self, path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
        module = self.module
        return self._processes.together(lambda: read_weights(module, path))

    def _take_weights(self, weights: dict[str, NDArray[Any]]) -> None:
        module = self.module
        for name, variable in named_variables(module).items():
            variable.set_value(jax.device_put(weights[name].astype(variable.dtype), self._layout.local_device))
        stack_blocks(module)
        _, parameters, statistics, buffers = split(module)
        arrays = dict(zip(self._names, jax.tree.leaves(parameters), strict=True))
        self._buffers = self._layout.put(buffers)
        average = _copies(arrays) if self._state.average else {}
        self._state = self._state._replace(
            parameters=self._layout.put(arrays, self._specs.parameters),
            average=self._layout.put(average, self._specs.average),
            statistics=self._layout.put(statistics),
        )

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked, and needs no device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the other processes, if there are any; the last thing to do, and to do after an exception too."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    def _merge(self, parameters: Arrays, statistics: State, buffers: State) -> Method:
        state = jax.tree.unflatten(self._tree, [parameters[name] for name in self._names])
        # Copied, since a forward pass may change variables of the trace that it is in, and of no other.
        return cast(Method, nnx.merge(self._graph, state, statistics, buffers, copy=True))

    def _evaluate(self, function: Callable[..., Any], *inputs: NDArray[Any]) -> Any:
        """Call a function of the module, in evaluation mode, and of arrays, which are the same in all processes.

        The module has the running means of the weights, where there are any. Each function is compiled, once for each
        set of shapes.
        """
        if function not in self._evaluations:
            weights = (self._specs.parameters, WHOLE, WHOLE)
            self._evaluations[function] = self._layout.compile(
                partial(self._evaluation_program, function), (*weights, *[WHOLE] * len(inputs)), WHOLE
            )
        state = self._state
        return self._evaluations[function](
            state.average or state.parameters, state.statistics, self._buffers, *self._layout.put(inputs)
        )

    def _evaluation_program(
        self, function: Callable[..., Any], parameters: Arrays, statistics: State, buffers: State, *inputs: Array
    ) -> Any:
        module = self._merge(self._layout.gather(parameters, self._specs.parameters), statistics, buffers)
        module.eval()  # type: ignore[no-untyped-call]
        return function(module, *inputs)

    def _noise(self, sample: Array, step: int | Array) -> Array:
        noise: Array = counter_noise(self._seed, step, sample, self._num_tokens)
        return noise

    def _check_batch(self, batch: int) -> None:
        devices, parts = self._layout.num_local, self._accumulate
        if batch % (devices * parts):
            shared = f"accumulate={parts} divides" if devices == 1 else f"{devices} devices x accumulate={parts} divide"
            raise ValueError(f"images: expected a batch that {shared}, got {batch}")

    def _inputs(
        self, images: NDArray[np.uint8], sample: NDArray[np.int64], *more: NDArray[Any]
    ) -> tuple[NDArray[Any], ...]:
        """Check and copy images, their numbers, and what else the losses are of."""
        check_images(images, self._image_shape)
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        if not np.issubdtype(sample.dtype, np.integer):
            raise TypeError(f"sample: expected integers, got {sample.dtype}")
        # A copy, since on a CPU JAX reads the batch itself, and later, when its memory may hold another one.
        return np.array(images), sample.astype(np.int32), *map(np.array, more)

    def _zeros(self, size: int, dtype: type) -> Array:
        return cast(Array, self._layout.put(np.zeros(size, dtype)))


def split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], State, State, State]:
    """Return what is static of a module, its parameters, its statistics, and all else: buffers, and what is frozen."""
    graph, parameters, statistics, buffers = nnx.split(  # type: ignore[misc]  # flax's annotation
        module, nnx.Param, Statistic, ...
    )
    return graph, parameters, statistics, buffers


def decay_mask(module: nnx.Module) -> dict[str, bool]:
    """Say which parameters weight decay draws towards 0, by name.

    Spared are parameters of one axis (biases, norms), those that a :class:`Method` names in ``not_decayed``, and those
    of :class:`prmim_jax.ProgressiveReconstruction`, since a table drawn towards 0 would weigh near and far tokens
    alike (this is ours).

    Examples
    --------
    >>> from flax import nnx
    >>> decay_mask(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    {'bias': False, 'kernel': True}
    """
    named = module.not_decayed() if isinstance(module, Method) else frozenset()
    rebuilding = {
        id(variable)
        for _, part in nnx.iter_modules(module)
        if isinstance(part, ProgressiveReconstruction)
        for variable in named_variables(part).values()
    }
    return {
        name: variable.ndim > 1 and name not in named and id(variable) not in rebuilding
        for name, variable in named_variables(module).items()
        if isinstance(variable, nnx.Param)
    }


def _names_of(parameters: State) -> list[str]:
    """Return the names of the leaves of a state, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [".".join(str(entry.key) for entry in path) for path, _ in leaves]


@cache
def _silence_orbax() -> None:
    """Keep orbax from printing tracebacks of errors that it raises as well.

    Of all files that a full disk has no room for, it raises the error of the first and logs that; of the others Python
    says that nobody listens any more.
    """
    print_unraisable = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    sys.unraisablehook = print_others
    for logger, repeated in (("absl", "_SignalingThread"), ("asyncio", "/orbax/")):
        logging.getLogger(logger).addFilter(partial(_lacks, repeated))


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


def _kept(moments: Any) -> dict[str, Any]:
    """Return the fields of that part of an optimiser's state that holds anything."""
    (kept,) = (part for part in moments if jax.tree.leaves(part))
    fields: dict[str, Any] = kept._asdict()
    return fields


def _refilled(part: Any, values: dict[str, Any]) -> Any:
    """Return a part of an optimiser's state with other values, if it holds any."""
    return part._replace(**{name: values[name] for name in part._fields}) if jax.tree.leaves(part) else part


def _copies(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Copy arrays to the host, since no memory may be handed on twice from step to step."""
    return {name: np.array(array) for name, array in arrays.items()}


def _checkpointer() -> ocp.Checkpointer:
    """Return orbax's checkpointer of trees, in whose methods all processes meet.

    Where they are named, they meet without their devices. These are at work on steps while a thread saves, and would
    wait for each other for ever where two processes ask them for two things in different order.
    """
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _moments_apart(moments: dict[str, Any]) -> dict[str, Any]:
    return {name: _take_apart(arrays) for name, arrays in moments.items()}


def _copies_apart(moments: dict[str, Any]) -> dict[str, Any]:
    """Take moments apart on the devices, in memory of their own."""
    copies: dict[str, Any] = jax.tree.map(jnp.copy, _moments_apart(moments))
    return copies


def _take_apart(arrays: dict[str, Any]) -> dict[str, Any]:
    """Give every block arrays of its own, under the names of files."""
    apart = {}
    for name, array in arrays.items():
        parts = enumerate(array) if STACKED in name else [(0, array)]
        apart.update({name.replace(STACKED, f".blocks.{number}."): part for number, part in parts})
    return apart


def _put_together(arrays: dict[str, NDArray[Any]], names: list[str]) -> dict[str, NDArray[Any]]:
    """Undo :func:`_take_apart`; ``names`` are those to come out."""

    def together(name: str) -> NDArray[Any]:
        if STACKED not in name:
            return arrays[name]
        of_blocks = (name.replace(STACKED, f".blocks.{number}.") for number in count())
        return np.stack([arrays[part] for part in takewhile(arrays.__contains__, of_blocks)])

    return {name: together(name) for name in names}


def _zeros_like(tree: Any) -> Any:
    """Return the zeros with which optimisers start, made by NumPy: JAX would compile a program for every shape."""
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), tree)


def _read_state(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read a training state, and check that it has the parts and shapes of another."""
    if not path.exists():
        raise FileNotFoundError(f"directory: expected a training state, there is none at {path}")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    try:
        with _checkpointer() as checkpointer:
            state: dict[str, Any] = checkpointer.restore(path, restore_args=as_numpy)
        shapes, expected = _shapes(state), _shapes(like)
    except Exception:  # whatever orbax makes of files that are no training state
        raise ValueError(
            f"directory: expected a training state, got {path}, which is damaged or something else"
        ) from None
    if shapes != expected:
        number, got = (sum(len(tree) for tree in trees.values() if isinstance(tree, dict)) for trees in (like, state))
        raise ValueError(
            f"directory: expected a training state of {number} arrays by parameter, got {got}, or ones of other shapes"
        )
    return state


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.shape, tree)
