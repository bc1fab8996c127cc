"""The trainer behind all engines: training steps, measurements and checkpoints."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_core import counter_noise
from prmim_jax.distributed import ROWS, WHOLE, Layout, Processes, choose_devices
from prmim_jax.interop import (
    file_names,
    is_stacked,
    named_variables,
    named_weights,
    put_weights,
    read_weights,
    write_weights,
)
from prmim_jax.method import ImageModule, check_images, check_not_empty
from prmim_jax.vit import Statistic, project
from prmim_methods import TrainingConfig
from prmim_methods.hardware import Choice, choose_precision, is_slow
from prmim_methods.sizes import Transformer
from prmim_methods.weight_files import WEIGHTS_FILE, dump_architecture

Module = TypeVar("Module", bound=ImageModule)
Loss = Callable[..., Sequence[Array]]
"""Signature ``loss(module, images, noise, *more)``; returns the scalars named in ``losses`` of the module."""
State = nnx.State[Any, Any]
Arrays = dict[str, Array]
"""Arrays by the name of the parameter, as in ``prmim_jax.interop.named_variables``."""

STATE_FOLDER = "training_state"
TIMED_IMAGES, TIMED_TOKENS = 8, 16
"""Input shape of the layer that is timed in both number formats."""


class TrainingState(NamedTuple):
    """State of training.

    A step returns a new state, which reuses the memory of the old one.

    Parameters
    ----------
    parameters
        float32, by name.
    average
        Exponential moving averages of the parameters, by name; may be empty.
    moments
        State of the optimizer.
    statistics
        Buffers that forward passes change.
    sums
        float32: sums of losses and gradient norm over finite steps since the last reading, then the number of these
        steps.
    nonfinite_step
        int32: the first nonfinite step, counted from 1; -1 if there was none.
    skipped
        int32 (2,): number of nonfinite steps: since the last reading, and consecutive up to now.
    """

    parameters: Arrays
    average: Arrays
    moments: optax.OptState
    statistics: State
    sums: Array
    nonfinite_step: Array
    skipped: Array


class Trainer(Generic[Module]):
    """Trains a module on all devices of a platform, of one process or of several.

    Parameters
    ----------
    make_module
        Returns the module for a dtype of matrix products (None: that of the weights). Called after processes are
        connected, with the device set. The module has ``losses``, ``architecture()`` and ``no_weight_decay()``.
    training
        The options; ``training.compile`` has no effect, since JAX always compiles the step.
    loss
        See :data:`Loss`; the first scalar is minimized.
    make_optimizer
        Returns the optimizer of a module, for learning rate 1. It receives gradients by name, as in :data:`Arrays`;
        only one part of a chain may have a state.
    rate_scale
        Returns the factor of a parameter's learning rate, by its name in files; None: all 1.
    ema_decay
        Decay, per step, of an exponential moving average of the weights; None: no average.

    Attributes
    ----------
    precision, compiled
        Number format, and whether the step is compiled, each with the reason.

    Notes
    -----
    Processes of a run (see :class:`prmim_jax.distributed.Processes`) must call the same methods in the same order. Up
    to rounding, a step equals the step of a single device on the rows of all devices: losses, gradients and
    measurements are means over all rows. Devices communicate once per step.

    A training step is one compiled program, from uint8 images and their sample numbers to the updated weights. It never
    waits for the device (except several devices of one CPU, which take one step at a time). It is recompiled only if
    the batch size changes. A step with a nonfinite loss or gradient norm changes no weights, optimizer state, average
    or statistics. :attr:`step` and the learning rate still advance.
    """

    def __init__(
        self,
        make_module: Callable[[DTypeLike | None], Module],
        training: TrainingConfig,
        loss: Loss,
        make_optimizer: Callable[[Module], optax.GradientTransformation],
        *,
        rate_scale: Callable[[str], float] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self._training = training
        self._loss = loss
        self._ema_decay = ema_decay
        self._processes = Processes(training.timeout)
        self._layout = Layout(choose_devices(training.device), training.parallel)  # type: ignore[arg-type]
        self.precision: Choice[str] = precision_on(training.precision, self._layout.local_device)
        self.compiled: Choice[bool] = Choice(True, "JAX always compiles")
        with jax.default_device(self._layout.local_device):
            module = make_module(jnp.bfloat16 if self.precision.value == "bfloat16" else None)
            self._optimizer = make_optimizer(module)
        self._measured = (*module.losses, "grad_norm")
        self._num_tokens = module.num_tokens
        self._image_shape, self._image_dtypes = module.image_shape, module.image_dtypes
        self._graph, parameters, statistics, buffers = split(module)
        self._buffers = self._layout.put(buffers)
        leaves, self._tree = jax.tree.flatten(parameters)
        # Names in the order of the leaves, since both come from the same traversal of the module.
        self._names = _names_of(parameters)
        arrays = dict(zip(self._names, leaves, strict=True))
        self._rate_scales = {} if rate_scale is None else _rate_scales(rate_scale, arrays)
        self._step = 0
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        average = {} if ema_decay is None else _copies(arrays)
        moments = jax.eval_shape(self._optimizer.init, arrays)
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
        self._train = self._layout.compile(
            self._train_program, (self._specs, WHOLE, ROWS, WHOLE, WHOLE), self._specs, donate=(0,)
        )
        self._gather = self._layout.compile_gather(specs(arrays))
        self._copy = self._layout.compile_copy(_by_parameter(self._specs))
        self._evaluations: dict[Callable[..., Any], Callable[..., Any]] = {}

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
        """Number of devices of all processes."""
        return self._layout.num_devices

    @property
    def step(self) -> int:
        """Completed optimizer steps, including those before a resume."""
        return self._step

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(array.size for array in self._state.parameters.values())

    @property
    def device(self) -> str:
        """Description of the device, or of the devices of this process."""
        device, number = self._layout.local_device, self._layout.num_local
        name = "cuda" if device.platform == "gpu" else device.platform
        kind = device.device_kind if device.platform == "gpu" else f"{os.cpu_count()} cores"
        one = f"cuda:{device.id}" if name == "cuda" else name
        others = f", one of {self.world_size} processes" if self.world_size > 1 else ""
        return f"{one if number == 1 else f'{number} x {name}'} ({kind}){others}"

    def measure_slowdown(self, size: Transformer) -> float | None:
        """Return the time of a layer in bfloat16 relative to float32, if it may be slow.

        Otherwise returns None. Takes about a second at most, and no time on accelerators.
        """
        if not is_slow(self.precision.value, self._layout.local_device.platform, backend="jax"):
            return None
        seconds = {}
        with jax.default_device(self._layout.local_device):
            x = jnp.ones((TIMED_IMAGES, TIMED_TOKENS, size.dim))
            weight = jnp.ones((size.mlp_ratio * size.dim, size.dim))
            inputs = x, weight, weight[:, 0]
            for dtype in (jnp.float32, jnp.bfloat16):
                layer = jax.jit(jax.grad(partial(_summed_product, dtype=dtype), argnums=(0, 1, 2)))
                seconds[dtype] = min(_seconds(layer, inputs) for _ in range(3))  # the first call compiles
        return seconds[jnp.bfloat16] / seconds[jnp.float32]

    @property
    def module(self) -> Module:
        """The module with current weights, on one device; valid until the next step.

        All processes must ask for it.
        """
        parameters = self._gather(self._state.parameters)
        return self._merge(*map(self._layout.local, (parameters, self._state.statistics, self._buffers)))

    def _take_step(self, images: NDArray[Any], sample: NDArray[np.int64], *more: NDArray[Any]) -> None:
        """Take an optimizer step; ``more`` holds further inputs of the loss."""
        check_not_empty(images)
        self._check_batch(len(images))
        learning_rate = self._training.learning_rate_at(self._step)
        batch = tuple(map(self._layout.put_rows, self._inputs(images, sample, *more)))
        if self._layout.in_turn:
            self._state.sums.block_until_ready()
        self._state = self._train(self._state, self._buffers, batch, self._step, learning_rate)
        self._step += 1

    def _train_program(
        self, state: TrainingState, buffers: State, batch: tuple[Array, ...], step: Array, learning_rate: Array
    ) -> TrainingState:
        """Return the next state; runs on each device, on its rows and parts of weights."""
        images, sample, *more = batch
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
        if self._training.clip_grad is not None:
            scale = jnp.maximum((norm + 1e-6) / self._training.clip_grad, 1.0)
            gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
        updates, moments = self._optimizer.update(gradients, state.moments, state.parameters)
        rates = {
            name: learning_rate * self._layout.part(self._rate_scales.get(name, 1.0), cut[name]) for name in self._names
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
            # The first number counts from the last reading, the second from the last finite step.
            jnp.where(is_bad, state.skipped + 1, state.skipped * jnp.array([1, 0], jnp.int32)),
        )

    def _gradients(
        self, parameters: Arrays, statistics: State, buffers: State, *batch: Array
    ) -> tuple[Arrays, Array, State]:
        """Return the gradient of the first loss, all losses, and the new statistics.

        Gradient and losses are means over the parts of a device's rows. Each part starts from the statistics after the
        previous part.
        """

        def losses_of(parameters: Arrays, statistics: State, *part: Array) -> tuple[Array, tuple[Array, State]]:
            module = self._merge(parameters, statistics, buffers)
            losses = self._loss(module, *part)
            return losses[0], (jnp.stack(losses), nnx.state(module, Statistic))

        differentiate = jax.grad(losses_of, has_aux=True)
        parts = self._training.accumulate
        if parts == 1:
            gradients, (losses, statistics) = differentiate(parameters, statistics, *batch)
            return gradients, losses, statistics

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            total, statistics = carry
            gradients, (losses, statistics) = differentiate(parameters, statistics, *part)
            return (jax.tree.map(jnp.add, total, (gradients, losses)), statistics), None

        chunks = tuple(array.reshape(parts, -1, *array.shape[1:]) for array in batch)
        zeros: Any = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(len(self._measured) - 1, jnp.float32))
        (total, statistics), _ = lax.scan(add, (zeros, statistics), chunks)
        gradients, losses = jax.tree.map(lambda value: value / parts, total)
        return gradients, losses, statistics

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
            "learning_rate": self._training.learning_rate_at(max(self._step - 1, 0)),
            "nonfinite_step": None if nonfinite_step < 0 else nonfinite_step,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and ``training_state/`` atomically into a folder.

        The training state is an orbax checkpoint. All processes must call it, with an existing folder on a shared file
        system. It returns when all have written.

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
        directory = Path(directory).absolute()
        if not directory.is_dir():
            raise FileNotFoundError(f"directory: expected an existing folder, got {directory}")
        if self._saving is not None:
            wait([self._saving])
        module = self.module
        metadata = dump_architecture(module)
        weights = named_weights(module) if self.rank == 0 else {}
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
        """Return a copy of the training state without weights, as nested dictionaries.

        The arrays are NumPy's, except sharded ones: each process writes its part of these.
        """
        arrays = _by_parameter(self._state)
        if self._layout.cuts(self._specs.parameters):
            copies = self._copy(arrays)
        else:
            copies = jax.tree.map(np.array, self._layout.local(arrays))
        return {**self._host_state(), **copies}

    def _host_state(self) -> dict[str, Any]:
        """Return a NumPy copy of the parameter-independent part of the training state."""
        state = {
            "step": self._step,
            "sums": self._state.sums,
            "nonfinite_step": self._state.nonfinite_step,
            "skipped": self._state.skipped,
            **{name: value for name, value in _kept(self._state.moments).items() if not isinstance(value, dict)},
        }
        return {name: np.array(value) for name, value in state.items()}

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Restore a state written by :meth:`save`; all processes must call it.

        The devices, their number and ``parallel`` may differ from the saved run. Learning rate, weight decay and other
        options are those of this engine. With equal options and an equal number of devices, the run continues
        bit-identically if all kernels are deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is corrupt or of another architecture. The engine is unchanged then.
        """
        directory = Path(directory).absolute()
        weights = self._read_weights(directory / WEIGHTS_FILE)
        like = {**self._host_state(), **_by_parameter(self._state)}
        state = self._processes.together(lambda: _read_state(directory / STATE_FOLDER, like))
        self._put_weights(weights)
        arrays = {name: self._layout.put(state[name], specs) for name, specs in _by_parameter(self._specs).items()}
        numbers = {name: self._layout.put(state[name]) for name in self._host_state()}
        self._state = self._state._replace(
            moments=tuple(_refilled(part, {**numbers, **arrays}) for part in self._state.moments),
            **{name: numbers[name] for name in ("sums", "nonfinite_step", "skipped")},
            **{name: arrays[name] for name in arrays if name == "average"},
        )
        self._step = int(state["step"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Load weights from a ``.safetensors`` file; all processes must call it.

        For methods, the image size of the file may differ; see :func:`prmim_jax.load_weights`.
        """
        self._put_weights(self._read_weights(path, resize=True))

    def _read_weights(self, path: str | os.PathLike[str], *, resize: bool = False) -> dict[str, NDArray[Any]]:
        module = self.module
        return self._processes.together(lambda: read_weights(module, path, resize=resize))

    def _put_weights(self, weights: dict[str, NDArray[Any]]) -> None:
        module = self.module
        put_weights(module, weights)
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
        """Return whether any process has a True flag; waits for all, without the device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Disconnect from the other processes; call it last, also after an exception."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    def _merge(self, parameters: Arrays, statistics: State, buffers: State) -> Module:
        state = jax.tree.unflatten(self._tree, [parameters[name] for name in self._names])
        # Copied, since a forward pass may change only variables of its own trace.
        return cast(Module, nnx.merge(self._graph, state, statistics, buffers, copy=True))

    def _evaluate(self, function: Callable[..., Any], *inputs: NDArray[Any]) -> Any:
        """Call ``function(module, *inputs)`` in evaluation mode.

        All processes must pass the same inputs. The module has averaged weights, if available. Each function is
        compiled once per set of shapes.
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

    def _evaluate_rows(self, function: Callable[..., Any], images: NDArray[Any]) -> NDArray[Any]:
        """Call ``function(module, images)`` in evaluation mode, distributed by rows.

        All processes must pass the same number of images.
        """
        if function not in self._evaluations:
            self._evaluations[function] = self._layout.compile(
                partial(self._evaluation_program, function), (self._specs.parameters, WHOLE, WHOLE, ROWS), ROWS
            )
        state = self._state
        program = partial(
            self._evaluations[function], state.average or state.parameters, state.statistics, self._buffers
        )
        return self._layout.map_rows(program, images)

    def _evaluation_program(
        self, function: Callable[..., Any], parameters: Arrays, statistics: State, buffers: State, *inputs: Array
    ) -> Any:
        module = self._merge(self._layout.gather(parameters, self._specs.parameters), statistics, buffers)
        module.eval()  # type: ignore[no-untyped-call]
        return function(module, *inputs)

    def _noise(self, sample: Array, step: int | Array) -> Array:
        return counter_noise(self._training.seed, step, sample, self._num_tokens)

    def _check_batch(self, batch: int) -> None:
        devices, parts = self._layout.num_local, self._training.accumulate
        if batch % (devices * parts):
            shared = f"accumulate={parts} divides" if devices == 1 else f"{devices} devices x accumulate={parts} divide"
            raise ValueError(f"images: expected a batch that {shared}, got {batch}")

    def _inputs(self, images: NDArray[Any], sample: NDArray[np.int64], *more: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Validate and copy images, their sample numbers, and further inputs of the loss."""
        check_images(images, self._image_shape, self._image_dtypes)
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        if not np.issubdtype(sample.dtype, np.integer):
            raise TypeError(f"sample: expected integers, got {sample.dtype}")
        # Without 64-bit types, JAX has only the low word.
        outside = sample[sample.astype(np.int64) >> 32 != 0]
        if outside.size:
            raise ValueError(f"sample: expected integers in [0, 2**32), got {outside[0]}")
        # A copy, because JAX on a CPU reads the batch later and in place, when its memory may hold another batch.
        return np.array(images), sample.astype(np.int32), *map(np.array, more)

    def _zeros(self, size: int, dtype: type) -> Array:
        return self._layout.put(np.zeros(size, dtype))


def split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], State, State, State]:
    """Split a module into graph definition, parameters, statistics and other state."""
    graph, parameters, statistics, buffers = nnx.split(  # type: ignore[misc]  # flax's annotation
        module, nnx.Param, Statistic, ...
    )
    return graph, parameters, statistics, buffers


def adamw(module: nnx.Module, training: TrainingConfig) -> optax.GradientTransformation:
    """Return AdamW at learning rate 1, with the weight decay of :func:`decay_mask`."""
    return optax.chain(
        optax.scale_by_adam(*training.betas, eps=1e-8),
        optax.add_decayed_weights(training.weight_decay, mask=decay_mask(module)),
    )


def decay_mask(module: nnx.Module) -> dict[str, bool]:
    """Return whether each parameter has weight decay, by name.

    Exempt from weight decay are parameters of one axis (biases, norms), and those that the module or a part of it names
    by a method ``no_weight_decay()``, such as :class:`prmim_jax.ProgressiveReconstruction` (our choice).

    Examples
    --------
    >>> from flax import nnx
    >>> decay_mask(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    {'bias': False, 'kernel': True}
    """
    named = {
        ".".join(map(str, (*path, name)))
        for path, part in nnx.iter_modules(module)
        for name in getattr(part, "no_weight_decay", frozenset)()
    }
    return {
        name: variable.ndim - is_stacked(name) > 1 and name not in named
        for name, variable in named_variables(module).items()
        if isinstance(variable, nnx.Param)
    }


def _rate_scales(rate_scale: Callable[[str], float], arrays: Arrays) -> dict[str, float | NDArray[np.float32]]:
    """Return learning-rate factors of parameters: a number, or one per stacked block."""
    scales: dict[str, float | NDArray[np.float32]] = {}
    for name, array in arrays.items():
        factors = [rate_scale(part) for part in file_names(name, array.shape)]
        shape = (-1, *[1] * (array.ndim - 1))
        scales[name] = np.array(factors, np.float32).reshape(shape) if is_stacked(name) else factors[0]
    return scales


def _names_of(parameters: State) -> list[str]:
    """Return the names of the leaves of a state, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [".".join(str(entry.key) for entry in path) for path, _ in leaves]


@cache
def _silence_orbax() -> None:
    """Suppress tracebacks that orbax prints for errors that it also raises.

    If a disk is full, orbax raises and logs the error of the first file, and Python reports the others as unraisable.
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


def precision_on(asked: str, device: jax.Device) -> Choice[str]:
    """Return the number format on a device, with the reason."""
    platform = "cuda" if device.platform == "gpu" else device.platform
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    is_known = major.isdecimal() and minor.isdecimal()  # ROCm has names
    capability = (int(major), int(minor)) if is_known else None
    return choose_precision(asked, platform, backend="jax", capability=capability)


def _seconds(program: Callable[..., Any], inputs: Sequence[Array]) -> float:
    start = time.perf_counter()
    for output in program(*inputs):
        output.block_until_ready()
    return time.perf_counter() - start


def _summed_product(x: Array, weight: Array, bias: Array, dtype: DTypeLike) -> Array:
    return project(x, weight, bias, dtype).sum()


def _kept(moments: Any) -> dict[str, Any]:
    """Return the fields of the only nonempty part of an optimizer's state."""
    (kept,) = (part for part in moments if jax.tree.leaves(part))
    fields: dict[str, Any] = kept._asdict()
    return fields


def _by_parameter(state: TrainingState) -> dict[str, Any]:
    """Return the arrays of each parameter, or their specs: optimizer moments, and the average."""
    moments = {name: value for name, value in _kept(state.moments).items() if isinstance(value, dict)}
    return {**moments, "average": state.average} if state.average else moments


def _refilled(part: Any, values: dict[str, Any]) -> Any:
    """Return a part of an optimizer's state with new values, unless it is empty."""
    return part._replace(**{name: values[name] for name in part._fields}) if jax.tree.leaves(part) else part


def _copies(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Copy arrays to the host, each separately.

    A step can donate the same memory only once.
    """
    return {name: np.array(array) for name, array in arrays.items()}


def _checkpointer() -> ocp.Checkpointer:
    """Return orbax's checkpointer of trees, which synchronizes the processes.

    With ``active_processes``, it synchronizes without devices. Devices execute steps while a thread saves, and would
    deadlock if two processes queued steps and synchronization in different order.
    """
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _zeros_like(tree: Any) -> Any:
    """Return an optimizer's initial state from NumPy; JAX would compile per shape."""
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), tree)


def _read_state(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read a training state; validate its parts and shapes."""
    if not path.exists():
        raise FileNotFoundError(f"directory: expected a training state, got none at {path}")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    try:
        with _checkpointer() as checkpointer:
            state: dict[str, Any] = checkpointer.restore(path, restore_args=as_numpy)
        shapes, expected = _shapes(state), _shapes(like)
    except Exception:  # orbax raises many types for corrupt files
        raise ValueError(
            f"directory: expected a training state, got {path}, which is corrupt or of another kind"
        ) from None
    if shapes != expected:
        number, got = (sum(len(tree) for tree in trees.values() if isinstance(tree, dict)) for trees in (like, state))
        raise ValueError(
            f"directory: expected a training state of {number} arrays by parameter, got {got}, or ones of other shapes"
        )
    return state


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.shape, tree)
