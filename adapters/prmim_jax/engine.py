"""The JAX engine: a method, its optimiser and its device, behind the calls that a training loop makes."""

import logging
import os
import sys
from collections.abc import Mapping
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

from prmim_core import CostReport, Schedule, counter_noise
from prmim_core.files import dump_architecture
from prmim_core.training import Decay, check_training, learning_rate_at
from prmim_jax.distributed import ROWS, WHOLE, Layout, Parallel, Processes, choose_devices
from prmim_jax.interop import named_variables, read_weights, write_weights
from prmim_jax.method import FeatureMethod, Method, PixelMethod, Predicts, check_images
from prmim_jax.methods import create_method
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.vit import set_compute_dtype, stack_blocks, unstack_blocks

Precision = Literal["float32", "bfloat16"]
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
    skipped
        int32 (2,): steps that were not finite: since the last reading, and the latest ones in a row.
    """

    parameters: Arrays
    moments: optax.OptState
    sums: Array
    nonfinite_step: Array
    skipped: Array


class Engine:
    """A method with AdamW, on all devices of a platform, of one process or of several.

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
        How the learning rate falls after the warm-up: see :func:`prmim_core.training.learning_rate_at`.
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
        ``"auto"`` (JAX's default platform), ``"cpu"`` or ``"cuda"``: all devices there are; ``"cuda:1"``: one alone.
    parallel
        How several devices share the work: ``"ddp"``, each holds all weights; ``"fsdp"``, each holds a part of weights
        and optimiser state, and gathers the weights in every step. One device alone: either is the same.
    timeout
        Seconds without a sign of life after which a process counts as dead, and the others end.

    Raises
    ------
    TypeError, ValueError
        If an option is wrong; one line that names it.

    Notes
    -----
    Several processes (see :class:`prmim_jax.distributed.Processes`) make one run: each is to call the same methods in
    the same order. A step is that of one device on all their rows together, up to rounding: losses and gradients are
    means over all rows, and so is what is measured. Devices talk once a step.

    A training step is one compiled program, from uint8 images and their numbers to the updated weights: noise, plan,
    normalisation, forward, backward, update. It never waits for the device (but several devices of a CPU take one step
    at a time), and works in the memory of the state it is given. It is compiled in the first step, and anew only if the
    batch changes its size. A step whose loss or gradient norm is not finite changes neither weights nor optimiser
    state. :attr:`step` and the learning rate move on all the same.
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
        self._processes = Processes(timeout)
        self._layout = Layout(choose_devices(device), parallel)
        with jax.default_device(self._layout.local_device):
            method = create_method(**{"init_seed": seed, **method_options})
            is_decayed = decay_mask(method)
            stack_blocks(method)
        self._predicts: Predicts = method.predicts
        self._losses = method.losses
        self._schedule = method.schedule
        self._image_shape = (*method.image_size, method.channels)
        set_compute_dtype(method, jnp.bfloat16 if precision == "bfloat16" else None)
        self._graph, parameters, buffers = split(method)
        self._buffers = self._layout.put(buffers)
        leaves, self._tree = jax.tree.flatten(parameters)
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
        self._background = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None
        arrays = dict(zip(self._names, leaves, strict=True))
        moments = jax.eval_shape(self._optimizer.init, arrays)
        # Of the same form as the state: how each of its arrays is cut.
        cut: Any = (self._layout.specs(arrays), self._layout.specs(moments), WHOLE, WHOLE, WHOLE)
        self._specs: Any = TrainingState(*cut)
        self._state = TrainingState(
            self._layout.put(arrays, self._specs.parameters),
            self._layout.put(_zeros_like(moments), self._specs.moments),
            self._zeros(len(self._measured) + 1, np.float32),
            self._layout.put(np.full((), -1, np.int32)),
            self._zeros(2, np.int32),
        )
        compiled = self._layout.compile
        self._train = compiled(
            self._train_program, (self._specs, WHOLE, ROWS, ROWS, WHOLE, WHOLE), self._specs, donate=(0,)
        )
        weights = (self._specs.parameters, WHOLE)
        self._evaluate_features = compiled(self._features_program, (*weights, WHOLE), WHOLE)
        self._evaluate_pictures = compiled(self._pictures_program, (*weights, WHOLE, WHOLE), WHOLE)
        self._evaluate_comparison = compiled(self._comparison_program, (*weights, WHOLE, WHOLE), WHOLE)

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
    def method(self) -> Method:
        """The method with the weights of now, on one device; the next training step takes its arrays away.

        All processes have to ask for it.
        """
        parameters = self._layout.whole(self._state.parameters, self._specs.parameters)
        method = self._method(self._layout.local(parameters), self._layout.local(self._buffers))
        unstack_blocks(method)
        return method

    @property
    def predicts(self) -> Predicts:
        """What the method predicts: ``"pixels"`` can be rebuilt, ``"features"`` compared."""
        return self._predicts

    def cost(self) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        return self._method(self._state.parameters, self._buffers).cost(2 if self._precision == "bfloat16" else 4)

    def train_step(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> None:
        """Take one optimiser step, without waiting for it to end.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels). Of several processes, each brings as many images of its own; they
            are shared out among its devices.
        sample
            int64 (batch,): which image of the data set each one is. Seed, step and this number give its mask.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype does not fit, or devices of the process times ``accumulate`` do not divide the batch.
        """
        self._check_batch(len(images))
        learning_rate = learning_rate_at(self._step, *self._rates)
        inputs = [self._layout.put_rows(array) for array in self._inputs(images, sample)]
        if self._layout.in_turn:
            self._state.sums.block_until_ready()
        self._state = self._train(self._state, self._buffers, *inputs, self._step, learning_rate)
        self._step += 1

    def _train_program(
        self, state: TrainingState, buffers: State, images: Array, sample: Array, step: Array, learning_rate: Array
    ) -> TrainingState:
        """Map a state to the next one; compiled, and run by each device on its rows and its parts of the weights."""
        cut = self._specs.parameters
        parameters = self._layout.gather(state.parameters, cut)
        gradients, losses = self._gradients(parameters, buffers, images, self._noise(sample, step))
        losses = self._layout.mean(losses)
        gradients, norm = self._layout.mean_gradients(gradients, cut)
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
            # The first is a count since the last reading, the second one since the last finite step.
            jnp.where(is_bad, state.skipped + 1, state.skipped * jnp.array([1, 0], jnp.int32)),
        )

    def _gradients(self, parameters: Arrays, buffers: State, images: Array, noise: Array) -> tuple[Arrays, Array]:
        """Return the gradient of the loss, and the method's losses, means over the parts of a device's rows."""

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
            1) whose loss or gradient was not finite, of the whole run; None if there was none. ``skipped``: the number
            of such steps since the last reading; ``skipped_in_a_row``: that of the latest ones, 0 if the last step was
            finite. The same in all processes.
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

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean patch feature of whole images, nothing masked: float32 (batch, dim).

        Several processes are to bring the same images, here and to :meth:`reconstruct` and :meth:`compare`.
        """
        check_images(images, self._image_shape)
        return np.asarray(self._evaluate_features(self._state.parameters, self._buffers, self._layout.put(images)))

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
        inputs = self._layout.put(self._inputs(images, sample))
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
        inputs = self._layout.put(self._inputs(images, sample))
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
        method = self.method
        metadata, weights = dump_architecture(method), {}
        if self.rank == 0:
            weights = {name: np.array(variable[...]) for name, variable in named_variables(method).items()}
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

        They are of NumPy, but for moments that devices share out: each process writes what it holds of those.
        """
        moments = self._moments()
        if self._layout.cuts(self._specs.parameters):
            copies = self._layout.convert(moments, _copies_apart)
        else:
            copies = _moments_apart(jax.tree.map(np.array, self._layout.local(moments)))
        return {**self._host_state(), **copies}

    def _host_state(self) -> dict[str, Any]:
        """Return a copy of what there is besides weights and moments, in NumPy."""
        state = {
            "step": self._step,
            "count": self._state.moments[0].count,
            "sums": self._state.sums,
            "nonfinite_step": self._state.nonfinite_step,
            "skipped": self._state.skipped,
        }
        return {name: np.array(value) for name, value in state.items()}

    def _moments(self) -> dict[str, Arrays]:
        adam = self._state.moments[0]
        return {"mu": adam.mu, "nu": adam.nu}

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
        like = {**self._host_state(), **jax.eval_shape(_moments_apart, self._moments())}
        state = self._processes.together(lambda: _read_state(directory / STATE_FOLDER, like))
        self._take_weights(weights)
        adam, *others = self._state.moments
        specs = self._specs.moments[0]
        adam = adam._replace(
            count=self._layout.put(state["count"]),
            **{
                name: self._layout.put(_put_together(state[name], self._names), getattr(specs, name))
                for name in ("mu", "nu")
            },
        )
        self._state = self._state._replace(
            moments=(adam, *others),
            **{name: self._layout.put(state[name]) for name in ("sums", "nonfinite_step", "skipped")},
        )
        self._step = int(state["step"])

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Take weights alone from a ``.safetensors`` file; all processes have to."""
        self._take_weights(self._read_weights(path))

    def _read_weights(self, path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
        method = self.method
        return self._processes.together(lambda: read_weights(method, path))

    def _take_weights(self, weights: dict[str, NDArray[Any]]) -> None:
        method = self.method
        for name, variable in named_variables(method).items():
            variable.set_value(jax.device_put(weights[name].astype(variable.dtype), self._layout.local_device))
        stack_blocks(method)
        _, parameters, buffers = split(method)
        arrays = dict(zip(self._names, jax.tree.leaves(parameters), strict=True))
        self._buffers = self._layout.put(buffers)
        self._state = self._state._replace(parameters=self._layout.put(arrays, self._specs.parameters))

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked, and needs no device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the other processes, if there are any; the last thing to do, and to do after an exception too."""
        self._background.shutdown(wait=sys.exc_info()[0] is None)
        self._processes.close()

    def _method(self, parameters: Arrays, buffers: State) -> Method:
        state = jax.tree.unflatten(self._tree, [parameters[name] for name in self._names])
        return cast(Method, nnx.merge(self._graph, state, buffers))

    def _evaluated(self, parameters: Arrays, buffers: State) -> Method:
        method = self._method(self._layout.gather(parameters, self._specs.parameters), buffers)
        method.eval()  # type: ignore[no-untyped-call]
        return method

    def _noise(self, sample: Array, step: int | Array) -> Array:
        noise: Array = counter_noise(self._seed, step, sample, self._schedule.counts.num_tokens)
        return noise

    def _check_batch(self, batch: int) -> None:
        devices, parts = self._layout.num_local, self._accumulate
        if batch % (devices * parts):
            shared = f"accumulate={parts} divides" if devices == 1 else f"{devices} devices x accumulate={parts} divide"
            raise ValueError(f"images: expected a batch that {shared}, got {batch}")

    def _inputs(self, images: NDArray[np.uint8], sample: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Check and copy images and their numbers."""
        check_images(images, self._image_shape)
        if tuple(sample.shape) != (len(images),):
            raise ValueError(f"sample: expected shape {(len(images),)}, got {tuple(sample.shape)}")
        if not np.issubdtype(sample.dtype, np.integer):
            raise TypeError(f"sample: expected integers, got {sample.dtype}")
        # A copy, since on a CPU JAX reads the batch itself, and later, when its memory may hold another one.
        return np.array(images), sample.astype(np.int32)

    def _zeros(self, size: int, dtype: type) -> Array:
        return cast(Array, self._layout.put(np.zeros(size, dtype)))


def split(method: nnx.Module) -> tuple[nnx.GraphDef[Any], State, State]:
    """Return what is static of a method, its parameters, and all else: its buffers, and what is frozen."""
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


def _names_of(parameters: State) -> list[str]:
    """Return the names of the leaves of a state, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [".".join(str(entry.key) for entry in path) for path, _ in leaves]


def _checkpointer() -> ocp.Checkpointer:
    """Return orbax's checkpointer of trees, in whose methods all processes meet.

    Where they are named, they meet without their devices. These are at work on steps while a thread saves, and would
    wait for each other for ever where two processes ask them for two things in different order.
    """
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


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
    """Return the zeros with which AdamW starts, made by NumPy: JAX would compile a program for every shape."""
    return jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), tree)


def _read_state(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read a training state, and check that it has the parts and shapes of another."""
    if not path.exists():
        raise FileNotFoundError(f"directory: expected a training state, there is none at {path}")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    try:
        with _checkpointer() as checkpointer:
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
