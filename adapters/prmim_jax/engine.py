"""The JAX engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

import os
from collections.abc import Mapping
from functools import partial
from itertools import count, takewhile
from math import cos, pi
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

from prmim_core import CostReport, Schedule, counter_noise
from prmim_jax.interop import named_variables, read_weights, save_weights
from prmim_jax.method import FeatureMethod, Method, PixelMethod, Predicts, check_images
from prmim_jax.methods import create_method
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.vit import set_compute_dtype, stack_blocks, unstack_blocks

Precision = Literal["float32", "bfloat16"]
Decay = Literal["cosine", "step"]
State = nnx.State[Any, Any]
Arrays = dict[str, Array]
"""Arrays by the name of the parameter."""

WEIGHTS_FILE = "weights.safetensors"
STATE_FOLDER = "training_state"
STACKED = ".blocks.block."
"""What names of stacked blocks have where files have ``.blocks.0.`` and so on, see ``prmim_jax.vit.stack_blocks``."""


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


class TrainingState(NamedTuple):
    """What a training step takes, and gives back changed; its memory is handed on from step to step.

    Parameters
    ----------
    parameters
        float32, by name; of blocks that are scanned over, all blocks in one array.
    moments
        State of the optimiser.
    sums
        float32: sums of the method's losses and of the norm of the gradient over the finite steps since the last
        reading, then the number of those.
    nonfinite_step
        int32: the first step (counted from 1) that was not finite, or -1.
    """

    parameters: Arrays
    moments: optax.OptState
    sums: Array
    nonfinite_step: Array


class Engine:
    """A method with AdamW on one device.

    Parameters
    ----------
    method_options
        Arguments of :func:`prmim_jax.create_method`, ``name`` among them. Without ``init_seed``, ``seed``
        seeds the initial weights too.
    seed
        Seed of the noise, in [0, 2**32).
    total_steps, warmup_steps
        Length of the run, and of the linear rise of the learning rate from 0, in optimiser steps.
    learning_rate, min_learning_rate
        Peak and end of the learning rate, as used (already scaled by the batch).
    decay
        How the learning rate falls after the warm-up: see :func:`learning_rate_at`.
    weight_decay
        AdamW's; see :func:`decay_mask` for what is spared.
    betas
        AdamW's.
    clip_grad
        Largest norm of the whole gradient; None: not clipped.
    accumulate
        Parts into which a batch is cut, one after the other, to save memory; divides the batch.
    precision
        ``"float32"``, or ``"bfloat16"``: matrix products in bfloat16; weights, residual stream, norms, softmax, loss
        and optimiser in float32.
    compile
        Makes no difference: JAX compiles a step before it takes one, always.
    device
        ``"auto"`` (JAX's default), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; one line that names it.

    Notes
    -----
    A training step is one compiled program, from uint8 images and their numbers to the updated weights: noise, plan,
    normalisation, forward, backward, update. It never waits for the device, and works in the memory of the state it is
    given. It is compiled in the first step, and anew only if the batch changes its size. A step whose loss or gradient
    norm is not finite changes neither weights nor optimiser state. :attr:`step` and the learning rate move on all the
    same.
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
    ) -> None:
        _check_options(seed, total_steps, warmup_steps, learning_rate, min_learning_rate, clip_grad, accumulate)
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        if decay not in get_args(Decay):
            raise ValueError(f"decay: expected 'cosine' or 'step', got {decay!r}")
        self._device = _choose_device(device)
        with jax.default_device(self._device):
            method = create_method(**{"init_seed": seed, **method_options})
            is_decayed = decay_mask(method)
            stack_blocks(method)
        self._predicts: Predicts = method.predicts
        self._losses = method.losses
        self._schedule = method.schedule
        self._image_shape = (*method.image_size, method.channels)
        set_compute_dtype(method, jnp.bfloat16 if precision == "bfloat16" else None)
        self._graph, parameters, buffers = split(method)
        self._buffers = self._put(buffers)
        leaves, self._tree = jax.tree.flatten(self._put(parameters))
        # Names in the order of the leaves: both come from one walk over the same module.
        self._names = _names_of(parameters)
        mask = {name: is_decayed[name.replace(STACKED, ".blocks.0.")] for name in self._names}
        self._optimizer = optax.chain(
            optax.scale_by_adam(*betas, eps=1e-8), optax.add_decayed_weights(weight_decay, mask=mask)
        )
        self._seed = seed
        self._rates = (total_steps, warmup_steps, learning_rate, min_learning_rate, decay)
        self._clip_grad = clip_grad
        self._accumulate = accumulate
        self._precision = precision
        self._step = 0
        arrays = dict(zip(self._names, leaves, strict=True))
        self._state = TrainingState(
            arrays,
            self._put(_zeros_like(jax.eval_shape(self._optimizer.init, arrays))),
            self._zero_sums(),
            self._put(np.full((), -1, np.int32)),
        )
        self._train = jax.jit(self._train_program, donate_argnums=0)
        self._evaluate_features = jax.jit(self._features_program)
        self._evaluate_pictures = jax.jit(self._pictures_program)
        self._evaluate_comparison = jax.jit(self._comparison_program)

    @property
    def step(self) -> int:
        """Optimiser steps completed, those before a resume among them."""
        return self._step

    @property
    def num_parameters(self) -> int:
        """Learned numbers of the method."""
        return sum(array.size for array in self._state.parameters.values())

    @property
    def device(self) -> str:
        """The device, in words."""
        if self._device.platform == "gpu":
            return f"cuda:{self._device.id} ({self._device.device_kind})"
        return f"{self._device.platform} ({os.cpu_count()} cores)"

    @property
    def method(self) -> Method:
        """The method with the weights of now; the next training step takes its arrays away."""
        method = self._method(self._state.parameters, self._buffers)
        unstack_blocks(method)
        return method

    @property
    def predicts(self) -> Predicts:
        """What the method predicts: ``"pixels"`` can be rebuilt, ``"features"`` compared."""
        return self._predicts

    def cost(self) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        return self.method.cost(2 if self._precision == "bfloat16" else 4)

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
        inputs = self._inputs(images, sample)
        self._state = self._train(self._state, self._buffers, *inputs, self._step, learning_rate)
        self._step += 1

    def _train_program(
        self, state: TrainingState, buffers: State, images: Array, sample: Array, step: Array, learning_rate: Array
    ) -> TrainingState:
        """Map a state to the next one; compiled."""
        gradients, losses = self._gradients(state.parameters, buffers, images, self._noise(sample, step))
        norm = optax.tree.norm(gradients)
        is_bad = ~(jnp.isfinite(losses[0]) & jnp.isfinite(norm))
        if self._clip_grad is not None:
            scale = jnp.maximum((norm + 1e-6) / self._clip_grad, 1.0)
            gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
        updates, moments = self._optimizer.update(gradients, state.moments, state.parameters)
        parameters = jax.tree.map(lambda value, update: value - learning_rate * update, state.parameters, updates)
        keep = partial(jax.tree.map, partial(jnp.where, is_bad))
        measured = jnp.concatenate([losses, norm[None], jnp.ones_like(norm)[None]])
        return TrainingState(
            keep(state.parameters, parameters),
            keep(state.moments, moments),
            state.sums + jnp.where(is_bad, 0.0, measured),
            jnp.where(is_bad & (state.nonfinite_step < 0), step + 1, state.nonfinite_step),
        )

    def _gradients(self, parameters: Arrays, buffers: State, images: Array, noise: Array) -> tuple[Arrays, Array]:
        """Return the gradient of the loss, and the method's losses, means over the parts of a batch."""

        def losses_of(parameters: Arrays, images: Array, noise: Array) -> tuple[Array, Array]:
            output = self._method(parameters, buffers)(images, noise)
            return output.loss, jnp.stack([getattr(output, name) for name in self._losses])

        differentiate = jax.grad(losses_of, has_aux=True)
        if self._accumulate == 1:
            gradients, losses = differentiate(parameters, images, noise)
            return gradients, losses

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(parameters, *part)), None

        parts = [array.reshape(self._accumulate, -1, *array.shape[1:]) for array in (images, noise)]
        start: Any = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(len(self._losses), jnp.float32))
        total, _ = lax.scan(add, start, tuple(parts))
        gradients, losses = jax.tree.map(lambda value: value / self._accumulate, total)
        return gradients, losses

    @property
    def _measured(self) -> tuple[str, ...]:
        return (*self._losses, "grad_norm")

    def read_metrics(self) -> dict[str, Any]:
        """Wait for the steps taken, and return what they measured since the last reading.

        Returns
        -------
        dict
            The method's ``losses`` and ``grad_norm`` (before clipping): means over the steps that were finite, NaN if
            there was none. ``learning_rate``: of the last step taken. ``nonfinite_step``: the first step (counted from
            1) whose loss or gradient was not finite, of the whole run; None if there was none.
        """
        *sums, steps = np.asarray(self._state.sums).tolist()
        nonfinite_step = int(self._state.nonfinite_step)
        self._state = self._state._replace(sums=self._zero_sums())
        return {
            **{
                name: total / steps if steps else float("nan") for name, total in zip(self._measured, sums, strict=True)
            },
            "learning_rate": learning_rate_at(max(self._step - 1, 0), *self._rates),
            "nonfinite_step": None if nonfinite_step < 0 else nonfinite_step,
        }

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature of whole images, nothing masked: float32 (batch, dim)."""
        check_images(images, self._image_shape)
        return np.asarray(self._evaluate_features(self._state.parameters, self._buffers, self._put(images)))

    def _features_program(self, parameters: Arrays, buffers: State, images: Array) -> Array:
        return self._evaluated(parameters, buffers).features(images).astype(jnp.float32)

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
        if self._predicts != "pixels":
            raise TypeError("method: expected one that predicts pixels to rebuild images, got one of features")
        inputs = self._inputs(images, sample)
        order, patches = self._evaluate_pictures(self._state.parameters, self._buffers, *inputs)
        return Reconstruction(np.asarray(order, np.int64), self._schedule, np.asarray(patches, np.float32))

    def _pictures_program(
        self, parameters: Arrays, buffers: State, images: Array, sample: Array
    ) -> tuple[Array, Array]:
        method = cast(PixelMethod, self._evaluated(parameters, buffers))
        output = method(images, self._noise(sample, 0))
        return output.plan.order, method.rebuilt_pixels(images, output)

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
        if self._predicts != "features":
            raise TypeError("method: expected one that predicts features to compare them, got one of pixels")
        inputs = self._inputs(images, sample)
        order, *features = self._evaluate_comparison(self._state.parameters, self._buffers, *inputs)
        student, teacher = (np.asarray(part, np.float32) for part in features)
        return Comparison(np.asarray(order, np.int64), self._schedule, student, teacher)

    def _comparison_program(
        self, parameters: Arrays, buffers: State, images: Array, sample: Array
    ) -> tuple[Array, Array, Array]:
        method = cast(FeatureMethod, self._evaluated(parameters, buffers))
        output = method(images, self._noise(sample, 0))
        return output.plan.order, *method.compared_features(images, output)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors`` and a folder ``training_state`` into an existing one, each whole or not at all.

        The training state is a checkpoint of orbax.
        """
        directory = Path(directory).absolute()
        save_weights(self.method, directory / WEIGHTS_FILE)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(directory / STATE_FOLDER, self._saved_state(), force=True)

    def _saved_state(self) -> dict[str, Any]:
        """Return the training state, less the weights, as nested dictionaries of NumPy arrays, named as in files."""
        adam = self._state.moments[0]
        state = {
            "step": np.asarray(self._step),
            "count": adam.count,
            "mu": adam.mu,
            "nu": adam.nu,
            "sums": self._state.sums,
            "nonfinite_step": self._state.nonfinite_step,
        }
        arrays: dict[str, Any] = jax.tree.map(np.asarray, state)
        return {**arrays, "mu": _take_apart(arrays["mu"]), "nu": _take_apart(arrays["nu"])}

    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote, of an engine of the same architecture, on any device.

        Learning rate, weight decay and the like stay those of this engine. With the same options it goes on as the
        saved one would have; bit for bit on one device, as far as its kernels are deterministic.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is damaged, or of another architecture. The engine is unchanged then.
        """
        directory = Path(directory).absolute()
        weights = read_weights(self.method, directory / WEIGHTS_FILE)
        state = _read_state(directory / STATE_FOLDER, self._saved_state())
        self._take_weights(weights)
        state.update({name: _put_together(state[name], self._names) for name in ("mu", "nu")})
        adam, *others = self._state.moments
        adam = adam._replace(**{name: self._put(state[name]) for name in ("count", "mu", "nu")})
        self._state = self._state._replace(
            moments=(adam, *others), sums=self._put(state["sums"]), nonfinite_step=self._put(state["nonfinite_step"])
        )
        self._step = int(state["step"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file."""
        self._take_weights(read_weights(self.method, path))

    def _take_weights(self, weights: dict[str, NDArray[Any]]) -> None:
        method = self.method
        for name, variable in named_variables(method).items():
            variable.set_value(self._put(weights[name].astype(variable.dtype)))
        stack_blocks(method)
        _, parameters, self._buffers = split(method)
        arrays = dict(zip(self._names, jax.tree.leaves(parameters), strict=True))
        self._state = self._state._replace(parameters=arrays)

    def _method(self, parameters: Arrays, buffers: State) -> Method:
        state = jax.tree.unflatten(self._tree, [parameters[name] for name in self._names])
        return cast(Method, nnx.merge(self._graph, state, buffers))

    def _evaluated(self, parameters: Arrays, buffers: State) -> Method:
        method = self._method(parameters, buffers)
        method.eval()  # type: ignore[no-untyped-call]
        return method

    def _noise(self, sample: Array, step: int | Array) -> Array:
        noise: Array = counter_noise(self._seed, step, sample, self._schedule.counts.num_tokens)
        return noise

    def _inputs(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> tuple[Array, Array]:
        """Copy images and their numbers to the device."""
        check_images(images, self._image_shape)
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        if not np.issubdtype(sample.dtype, np.integer):
            raise TypeError(f"sample: expected integers, got {sample.dtype}")
        # A copy, since on a CPU JAX reads the batch itself, and later, when its memory may hold another one.
        return self._put(np.array(images)), self._put(sample.astype(np.int32))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._device)

    def _zero_sums(self) -> Array:
        return cast(Array, self._put(np.zeros(len(self._measured) + 1, np.float32)))


def split(method: nnx.Module) -> tuple[nnx.GraphDef[Any], State, State]:
    """Return what is static of a method, its parameters, and its buffers."""
    graph, parameters, buffers = nnx.split(method, nnx.Param, ...)  # type: ignore[misc]  # flax's annotation
    return graph, parameters, buffers


def decay_mask(method: nnx.Module) -> dict[str, bool]:
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
    named = method.not_decayed() if isinstance(method, Method) else frozenset()
    rebuilding = {
        id(variable)
        for _, part in nnx.iter_modules(method)
        if isinstance(part, ProgressiveReconstruction)
        for variable in named_variables(part).values()
    }
    return {
        name: variable.ndim > 1 and name not in named and id(variable) not in rebuilding
        for name, variable in named_variables(method).items()
        if isinstance(variable, nnx.Param)
    }


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float, decay: Decay = "cosine"
) -> float:
    """Return the learning rate of a step, counted from 0.

    After a linear warm-up from 0: ``"cosine"``, half a cosine to ``minimum``; ``"step"``, constant, and a tenth after
    seven eighths of the steps (SimMIM), though never below ``minimum``.

    Examples
    --------
    >>> [learning_rate_at(step, 4, 2, 1.0, 0.0) for step in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    >>> [learning_rate_at(step, 8, 2, 1.0, 0.0, "step") for step in (1, 2, 6, 7)]
    [0.5, 1.0, 1.0, 0.1]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "step":
        return max(peak * (0.1 if 8 * step >= 7 * total_steps else 1.0), minimum)
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


def _names_of(parameters: State) -> list[str]:
    """Return the names of the leaves of a state, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [".".join(str(entry.key) for entry in path) for path, _ in leaves]


def _take_apart(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
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
    """Return the zeros with which AdamW starts, made by NumPy: JAX would compile a program for every shape."""
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), tree)


def _choose_device(name: str) -> jax.Device:
    if name == "auto":
        return jax.local_devices()[0]
    platform, _, number = name.partition(":")
    if platform not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    try:
        return jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, IndexError):
        raise ValueError(f"device: expected one that is there, got {name!r}, but JAX finds no such device") from None


def _read_state(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read a training state, and check that it has the parts and shapes of another."""
    if not path.exists():
        raise FileNotFoundError(f"directory: expected a training state, there is none at {path}")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            state: dict[str, Any] = checkpointer.restore(path, restore_args=as_numpy)
        shapes, expected = ({name: _shapes(tree[name]) for name in like} for tree in (state, like))
    except Exception:  # whatever orbax makes of files that are no training state
        raise ValueError(
            f"directory: expected a training state, got {path}, which is damaged or something else"
        ) from None
    if shapes != expected:
        raise ValueError(
            f"directory: expected a training state of {len(like['mu'])} parameters, got {len(state['mu'])}, or ones of "
            "other shapes"
        )
    return state


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.shape, tree)
