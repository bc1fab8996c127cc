"""Teachers: frozen, published vision transformers whose features are the target."""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from prmim_core import patchify
from prmim_methods.encoder import scale_and_shift
from prmim_methods.messages import one_line
from prmim_methods.resize import resize_images, resize_table
from prmim_methods.teacher import Family, TeacherConfig, check_images, find_teacher, read_teacher
from prmim_torch.vit import constant_like

TeacherDtype = Literal["float32", "bfloat16"]


class _Names(NamedTuple):
    """Names of modules of a model family in transformers."""

    model: str
    blocks: str
    norm: str  # of a block, before its attention
    attention: str  # of a block


NAMES: dict[Family, _Names] = {
    "clip": _Names("CLIPVisionModel", "encoder.layers", "layer_norm1", "self_attn"),
    "vit": _Names("ViTModel", "layers", "layernorm_before", "attention"),
    "dinov2": _Names("Dinov2Model", "encoder.layer", "norm1", "attention"),
}
NOT_NEEDED = ("post_layernorm.", "layernorm.", "embeddings.mask_token")
"""Prefixes of unused tensors, which may be missing."""


@dataclass
class TeacherOutput:
    """Output of :class:`Teacher` for whole images; a pytree.

    Parameters
    ----------
    hidden
        float32 or wider (k, batch, 1 + N, dim): outputs of the last k blocks, before any final norm; class token first,
        then all tokens in raster order.
    attention
        float32 or wider (batch, N): attention of the class token to each token in the last block, averaged over heads.
        The attention of the class token to itself is left out, so the sum is below 1.
    """

    hidden: Tensor
    attention: Tensor


register_dataclass(TeacherOutput, serialized_type_name="prmim_torch.TeacherOutput")


class Teacher(nn.Module):
    """A frozen CLIP, DINO (or any plain ViT) or DINOv2, loaded by ``transformers``.

    Parameters
    ----------
    source
        Folder with ``config.json`` and ``.safetensors`` files, as written by ``save_pretrained``, or the name of such
        a model on the Hugging Face hub.
    grid_shape
        Tokens of the student along both axes; the teacher sees images of the same grid.
    channels
        Channels of the images: the teacher's number, or 1, which is repeated.
    layers
        Number of last blocks whose outputs are returned; None: all.
    dtype
        Dtype of the weights of the linear layers. ``"bfloat16"`` also computes their products in bfloat16, as under
        ``torch.autocast``. Everything else is float32.

    Attributes
    ----------
    dim, depth, num_heads
        Width, number of blocks, attention heads; ``size`` holds all three.
    patch_size
        Pixels of a patch along both axes.
    num_parameters
        Number of parameters in use, without poolers, final norms and text models.
    description
        Text on the model.

    Raises
    ------
    ImportError
        If ``transformers`` is not installed.
    ValueError
        If there is no such model, it is corrupt or of another kind, or it does not fit the images; one line.

    Notes
    -----
    If sizes differ, images are resized bicubically to the grid in patches of the teacher, and the teacher's position
    table is resized to the grid. Pixels are normalized with ``image_mean`` and ``image_std`` of
    ``preprocessor_config.json``, or else with CLIP's own (CLIP) or ImageNet's.

    The teacher has no gradient and no randomness. It adds nothing to the parameters and the state dict of its parent
    module, but its weights follow the parent to another device or dtype. They are always loaded and kept. If the parent
    is built on the meta device or moved to it, they stay on the CPU.

    Only ``.safetensors`` files are read.
    """

    def __init__(
        self,
        source: str | Path,
        grid_shape: Sequence[int],
        channels: int,
        *,
        layers: int | None = None,
        dtype: TeacherDtype = "float32",
    ) -> None:
        super().__init__()
        self.grid_shape = tuple(grid_shape)
        if dtype not in get_args(TeacherDtype):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
        config = read_teacher(find_teacher(source))
        check_images(config, self.grid_shape, channels)
        self.size, self.patch_size, self.channels = config.size, config.patch_size, config.channels
        self.dim, self.depth, self.num_heads = config.size.dim, config.size.depth, config.size.heads
        self.layers = self.depth if layers is None else layers
        if not 1 <= self.layers <= self.depth:
            raise ValueError(f"layers: expected 1 to {self.depth}, the teacher's depth, got {layers}")
        self.description = f"{config.title}, from {source}"
        self._pixel_scale, self._pixel_shift = scale_and_shift(config.mean, config.std)
        with torch.device("cpu"):  # weights come from files, even if the default device is meta
            parts = _Parts(_load_model(config), config, self.grid_shape)
        self.num_parameters = sum(tensor.numel() for tensor in (*parts.parameters(), *parts.buffers()))
        if dtype == "bfloat16":
            for part in parts.blocks.modules():
                if isinstance(part, nn.Linear):
                    part.bfloat16()
        # In a tuple, the parts are hidden from torch: they are not trained, saved, or switched to training mode.
        self._held = (parts,)
        self._dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the parts to the device and dtype of ``fn``, and keep their values.

        No state dict holds the values, so nothing could restore what ``to("meta")`` or ``to_empty`` drops.
        """

        def move(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))
            return tensor if like.is_meta else tensor.to(like)

        (parts,) = self._held
        parts._apply(move, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Compute the features and the attention of whole images.

        Parameters
        ----------
        images
            uint8 (batch, height, width, channels).

        Returns
        -------
        TeacherOutput
        """
        (parts,) = self._held
        if images.is_meta:  # only shapes are computed, and weights stay where they are
            parts = copy.deepcopy(parts).to("meta")
        device = images.device.type
        with _full_precision(device):  # autocast would resize pixels in bfloat16
            patches = self._patches(images, parts.table.dtype)
        with self._precision(device):
            states = [parts.embed(patches)]
            for block in parts.blocks:
                # One more than requested: the attention is computed from the input of the last block.
                states = [*states[-self.layers :], block(states[-1], None)]
            return TeacherOutput(torch.stack(states[-self.layers :]), parts.cls_attention(states[-2]))

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        if self._dtype == "float32":
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def _patches(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return normalized patches (batch, N, prod(patch) * channels) of uint8 images."""
        shape = tuple(tokens * size for tokens, size in zip(self.grid_shape, self.patch_size, strict=True))
        pixels = resize_images(images.to(dtype), shape)
        # Broadcasts a single channel to all channels.
        pixels = pixels * constant_like(self._pixel_scale, pixels) + constant_like(self._pixel_shift, pixels)
        return patchify(pixels, self.patch_size)


class _Parts(nn.Module):
    """The used parts of a transformers model, with equal names for all families.

    The model's own forward pass returns no attention weights with fused attention, and resizes the position table in
    every call.
    """

    weight: Tensor
    bias: Tensor | None
    cls_token: Tensor
    table: Tensor

    def __init__(self, model: Any, config: TeacherConfig, grid_shape: tuple[int, ...]) -> None:
        super().__init__()
        embeddings, names = model.embeddings, NAMES[config.family]
        if config.family == "clip":
            projection, cls_token = embeddings.patch_embedding, embeddings.class_embedding[None, None]
            table, self.norm = embeddings.position_embedding.weight[None], model.pre_layrnorm
        else:
            projection, cls_token = embeddings.patch_embeddings.projection, embeddings.cls_token
            table, self.norm = embeddings.position_embeddings, nn.Identity()
        self.register_buffer("weight", projection.weight.detach().movedim(1, -1).flatten(1))
        self.register_buffer("bias", None if projection.bias is None else projection.bias.detach())
        self.register_buffer("cls_token", cls_token.detach())
        self.register_buffer("table", resize_table(table.detach(), config.grid_shape, grid_shape))
        self.blocks: nn.ModuleList = attrgetter(names.blocks)(model)
        self._names = (names.norm, names.attention)
        self._num_heads = config.size.heads
        self.requires_grad_(False).eval()

    def embed(self, patches: Tensor) -> Tensor:
        """Embed patches, class token first: (batch, 1 + N, dim)."""
        tokens = F.linear(patches, self.weight, self.bias) + self.table[:, 1:]
        cls_token = (self.cls_token + self.table[:, :1]).expand(patches.shape[0], -1, -1)
        return self.norm(torch.cat([cls_token, tokens], dim=1))

    def cls_attention(self, x: Tensor) -> Tensor:
        """Return the class token's attention (batch, N) from the input of the last block."""
        norm, attention = (getattr(self.blocks[-1], name) for name in self._names)
        x = norm(x)
        q, k = (
            projected.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)  # batch, heads, length, head_dim
            for projected in (attention.q_proj(x[:, :1]), attention.k_proj(x))
        )
        scores = (q @ k.mT).to(x.dtype) * q.shape[-1] ** -0.5
        return scores.softmax(-1)[:, :, 0, 1:].mean(1)


def _load_model(config: TeacherConfig) -> Any:
    """Load a model in float32; ValueError for missing tensors and wrong shapes."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(
            "teacher: expected transformers to be installed, got no such package; pip install 'prmim[hf]'"
        ) from None
    folder = config.folder
    options = {"add_pooling_layer": False} if config.family == "vit" else {}
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            model, report = getattr(transformers, NAMES[config.family].model).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # of any type, from transformers or safetensors
            raise ValueError(
                f"teacher: expected weights in .safetensors files in {folder}, got {one_line(error)}"
            ) from None
    # transformers fills such tensors with random numbers, with a warning at most.
    for name, got, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"teacher: {name}: expected shape {tuple(expected)}, got {tuple(got)} in {folder}")
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(NOT_NEEDED))
    if missing:
        raise ValueError(f"teacher: expected a tensor {missing[0]!r}, got none in {folder}")
    return model


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Silence the progress bars and reports of transformers."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Disable autocast inside, if the device has it."""
    if _has_autocast(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
