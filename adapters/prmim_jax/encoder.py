"""Trained encoders: a module from images to features, and an engine to run it."""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_core import patchify
from prmim_jax.distributed import ROWS, WHOLE, Layout, Processes, choose_devices
from prmim_jax.interop import check_fit, named_weights, put_weights, read_encoder
from prmim_jax.method import ImageModule, build_encoder, check_images, check_shape
from prmim_jax.methods import METHODS
from prmim_jax.trainer import precision_on
from prmim_methods import MethodConfig, TrainingConfig
from prmim_methods.architecture import MASK_TOKEN
from prmim_methods.encoder import EncoderConfig
from prmim_methods.hardware import Choice
from prmim_methods.positions import fit_positions
from prmim_methods.weight_files import check_architecture, find_weights


class ImageEncoder(ImageModule):
    """An encoder from images to features; :func:`load_encoder` returns a trained one.

    Parameters
    ----------
    config
        The record of the encoder.
    dtype
        Dtype of the matrix products, for example ``jax.numpy.bfloat16``; None: float32.

    Attributes
    ----------
    config
        The record: sizes, and the mean and standard deviation of pixels.

    Examples
    --------
    >>> config = EncoderConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=16, depth=2,
    ...     num_heads=2)
    >>> encoder = ImageEncoder(config)
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> encoder(images).shape, encoder(images, pool=None, layer=1).shape
    ((2, 16), (2, 17, 16))
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.encoder = build_encoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(self, images: Array, pool: str | None = "mean", layer: int | None = None) -> Array:
        """Return features of whole images.

        Parameters
        ----------
        images
            (batch, image_size..., channels): uint8, or floating-point numbers in [0, 1]; with a ``pixel_range``, uint8,
            uint16 or float32 values of files. They are normalized here, with the file's mean and standard deviation.
        pool
            ``"mean"``: the mean of the patch tokens; ``"cls"``: the class token, or the mean of several; None: all
            tokens.
        layer
            None: the output of the encoder, after the final norm, as in ``prmim evaluate``. A number: the output of
            this block, counted from 1, before the norm; 0: the input of the first block.

        Returns
        -------
        jax.Array
            (batch, dim); for ``pool=None`` (batch, C + N, dim), class tokens first.

        Raises
        ------
        TypeError
            If the images are neither uint8 nor floating-point.
        ValueError
            If a shape does not fit, the pool is unknown, there is no class token, or there is no such layer.
        """
        self.config.check_pool(pool, all_tokens=True)
        self.config.check_layer(layer)
        patches = self._normalize(self._patches(images))
        encoder = self.encoder
        if layer is None:
            encoded = encoder(patches)
        else:
            encoded = encoder.hidden_states(encoder.place(encoder.patch_embed(patches)))[layer]
        return encoded if pool is None else self._pool(encoded, pool)

    def _patches(self, images: Array) -> Array:
        if self.config.pixel_range is not None or not jnp.issubdtype(images.dtype, jnp.floating):
            return super()._patches(images)
        check_shape(images, self.image_shape)
        return patchify(jnp.asarray(images, self.encoder.dtype) * 255, self._patch_size)

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return self.config.architecture()


def load_encoder(
    run_or_file: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, ...] | None = None,
    device: jax.Device | str | None = None,
) -> ImageEncoder:
    """Load a trained encoder, with sizes from its file.

    Parameters
    ----------
    run_or_file
        The folder of a run, for its newest undamaged checkpoint; or a ``.safetensors`` file that
        :func:`prmim_jax.save_weights` of either adapter wrote, of any method or of an encoder alone; or the name of a
        repository on the Hugging Face hub, see ``prmim push``.
    image_size
        Size of the images in pixels, in place of the training size; a multiple of the patch size. Position tables are
        fitted to it; see :func:`prmim_methods.positions.fit_positions`.
    device
        Device of the module, or a platform such as ``"cpu"``; None: JAX's default device.

    Returns
    -------
    ImageEncoder
        In evaluation mode, float32. ``nnx.jit(encoder)`` compiles it.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no checkpoint in the folder.
    ImportError
        If a name on the hub needs ``huggingface_hub``, which is not installed.
    OSError
        If all checkpoints are damaged.
    ValueError
        If the file holds no encoder of prmim, or the patches do not divide ``image_size``.

    Examples
    --------
    >>> import tempfile
    >>> from prmim_jax import create_method, save_weights
    >>> method = create_method("mae", image_size=(32, 32), patch_size=(8, 8), embed_dim=16,
    ...     depth=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(method, f"{folder}/weights.safetensors")
    ...     encoder = load_encoder(folder, image_size=64)
    >>> encoder(jnp.zeros((2, 64, 64, 3), jnp.uint8)).shape
    (2, 16)
    """
    path = find_weights(run_or_file)
    config, weights = read_encoder(path, image_size)
    with jax.default_device(jax.devices(device)[0] if isinstance(device, str) else device):
        encoder = ImageEncoder(config)
        check_fit(named_weights(encoder), weights, path)
        put_weights(encoder, weights)
    encoder.eval()  # type: ignore[no-untyped-call]
    return encoder


class EncoderEngine:
    """A frozen encoder on the device of a process, as used for evaluation.

    Parameters
    ----------
    method_config
        The method, or an encoder alone.
    training
        The options of the run; only device, number format and timeout are used.
    weights
        The weight file; None: the weights of a new method.
    image_size
        Size of the images, in place of that of ``method_config``.

    Raises
    ------
    FileNotFoundError
        If the weight file does not exist.
    ValueError
        If the weights are of another encoder, the patches do not divide the images, or the device is not available.

    Notes
    -----
    Processes are independent: each may pass other images, and any number of them.
    """

    def __init__(
        self,
        method_config: MethodConfig | EncoderConfig,
        training: TrainingConfig,
        weights: str | os.PathLike[str] | None = None,
        image_size: tuple[int, ...] | None = None,
    ) -> None:
        self._processes = Processes(training.timeout)
        here = [device for device in choose_devices(training.device) if device.process_index == jax.process_index()]
        self._layout = Layout(here, "ddp")
        self.precision: Choice[str] = precision_on(training.precision, self._layout.local_device)
        config = method_config.encoder_config(image_size)
        with jax.default_device(self._layout.local_device):
            module = ImageEncoder(config, dtype=jnp.bfloat16 if self.precision.value == "bfloat16" else None)
            if weights is not None:
                place, (own, found) = (
                    weights,
                    self._processes.together(lambda: read_encoder(weights, config.image_size)),
                )
                check_architecture(config.architecture(), own.architecture())
            else:
                assert isinstance(method_config, MethodConfig)
                initial = named_weights(METHODS[method_config.name](method_config).encoder)
                initial = {f"encoder.{name}": array for name, array in initial.items()}
                place, found = "a new method", fit_positions(initial, method_config, config)
                found.pop(MASK_TOKEN, None)
            check_fit(named_weights(module), found, place)
            put_weights(module, found)
        module.eval()  # type: ignore[no-untyped-call]
        self.module = module
        self._graph, state = nnx.split(module)
        self._state = self._layout.put(state)
        self._programs: dict[tuple[str | None, int | None], Any] = {}

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self._processes.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._processes.world_size

    def features(
        self, images: NDArray[Any], pool: str | None = "mean", layer: int | None = None
    ) -> NDArray[np.float32]:
        """Return features of images; see :meth:`ImageEncoder.__call__`."""
        check_images(images, self.module.image_shape, self.module.image_dtypes)
        if (pool, layer) not in self._programs:

            def program(state: Any, images: Array) -> Array:
                module: ImageEncoder = nnx.merge(self._graph, state)
                return module(images, pool, layer).astype(jnp.float32)

            self._programs[pool, layer] = self._layout.compile(program, (WHOLE, ROWS), ROWS)
        return self._layout.map_rows(partial(self._programs[pool, layer], self._state), images)

    def any(self, flag: bool) -> bool:
        """Return whether any process has a True flag; waits for all, without the device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the process group; call it last, also after an exception."""
        self._processes.close()
