"""Trained encoders: a module from images to features, and an engine to run it."""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prmim_core import patchify
from prmim_methods import MethodConfig, TrainingConfig
from prmim_methods.architecture import MASK_TOKEN
from prmim_methods.encoder import EncoderConfig
from prmim_methods.hardware import Choice
from prmim_methods.positions import fit_positions
from prmim_methods.weight_files import check_architecture, find_weights
from prmim_torch.distributed import Processes
from prmim_torch.interop import check_fit, named_weights, put_weights, read_encoder
from prmim_torch.method import ImageModule, build_encoder, initial_weights
from prmim_torch.methods import METHODS
from prmim_torch.trainer import choose_device, precision_on


class ImageEncoder(ImageModule):
    """An encoder from images to features; :func:`load_encoder` returns a trained one.

    Parameters
    ----------
    config
        The record of the encoder.

    Attributes
    ----------
    config
        The record: sizes, and the mean and standard deviation of pixels.

    Examples
    --------
    >>> config = EncoderConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=16, depth=2,
    ...     num_heads=2)
    >>> encoder = ImageEncoder(config).eval()
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> encoder(images).shape, encoder(images, pool=None, layer=1).shape
    (torch.Size([2, 16]), torch.Size([2, 17, 16]))
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.config = config
        with initial_weights(0):
            self.encoder = build_encoder(config)

    def _new(self) -> nn.Module:
        return ImageEncoder(self.config)

    def forward(self, images: Tensor, pool: str | None = "mean", layer: int | None = None) -> Tensor:
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
        Tensor
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

    def _patches(self, images: Tensor) -> Tensor:
        if self.config.pixel_range is not None or not images.is_floating_point():
            return super()._patches(images)
        self._check_shape(images)
        return patchify(images.to(self.encoder.dtype) * 255, self._patch_size)

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return self.config.architecture()


def load_encoder(
    run_or_file: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
) -> ImageEncoder:
    """Load a trained encoder, with sizes from its file.

    Parameters
    ----------
    run_or_file
        The folder of a run, for its newest undamaged checkpoint; or a ``.safetensors`` file that
        :func:`prmim_torch.save_weights` of either adapter wrote, of any method or of an encoder alone; or the name of a
        repository on the Hugging Face hub, see ``prmim push``.
    image_size
        Size of the images in pixels, in place of the training size; a multiple of the patch size. Position tables are
        fitted to it; see :func:`prmim_methods.positions.fit_positions`.
    device
        Device of the module; None: PyTorch's default device.

    Returns
    -------
    ImageEncoder
        In evaluation mode, float32, frozen: its parameters need no gradients.

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
    >>> from prmim_torch import create_method, save_weights
    >>> method = create_method("mae", image_size=(32, 32), patch_size=(8, 8), embed_dim=16,
    ...     depth=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(method, f"{folder}/weights.safetensors")
    ...     encoder = load_encoder(folder, image_size=64)
    >>> encoder(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape
    torch.Size([2, 16])
    """
    path = find_weights(run_or_file)
    config, weights = read_encoder(path, image_size)
    encoder = ImageEncoder(config)
    check_fit(named_weights(encoder), weights, path)
    put_weights(encoder, weights)
    return encoder.to(device).eval().requires_grad_(False)


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
        self._device = choose_device(training.device)
        self.precision: Choice[str] = precision_on(training.precision, self._device)
        self._processes = Processes(self._device, training.timeout)
        config = method_config.encoder_config(image_size)
        module = ImageEncoder(config)
        if weights is not None:
            place, (own, found) = weights, self._processes.together(lambda: read_encoder(weights, config.image_size))
            check_architecture(config.architecture(), own.architecture())
        else:
            assert isinstance(method_config, MethodConfig)
            initial = METHODS[method_config.name](method_config).encoder.state_dict()
            found = fit_positions(
                {f"encoder.{name}": tensor for name, tensor in initial.items()}, method_config, config
            )
            found.pop(MASK_TOKEN, None)
            place = "a new method"
        check_fit(named_weights(module), found, place)
        put_weights(module, found)
        self.module = module.to(self._device).eval().requires_grad_(False)

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
        """Return features of images; see :meth:`ImageEncoder.forward`."""
        is_bfloat16 = self.precision.value == "bfloat16"
        with torch.inference_mode(), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
            found = self.module(torch.from_numpy(np.ascontiguousarray(images)).to(self._device), pool, layer)
        return found.float().cpu().numpy()

    def any(self, flag: bool) -> bool:
        """Return whether any process has a True flag; waits for all, without the device."""
        return self._processes.any(flag)

    def close(self) -> None:
        """Leave the process group; call it last, also after an exception."""
        self._processes.close()
