"""Teachers: frozen, published vision transformers whose features are the target."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from prmim_core import patchify
from prmim_jax.vit import (
    Block,
    LayerNorm,
    Linear,
    block_outputs,
    precision,
    project,
    run_blocks,
    stack_blocks,
    wide,
)
from prmim_methods.checkpoints import shards
from prmim_methods.encoder import scale_and_shift
from prmim_methods.files import open_regular
from prmim_methods.messages import one_line
from prmim_methods.resize import resize_images, resize_table
from prmim_methods.teacher import TeacherConfig, check_images, find_teacher, read_teacher

TeacherDtype = Literal["float32", "bfloat16"]
Tensors = dict[str, NDArray[Any]]

RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(vision_model|vit|dinov2)\.", ""),
        (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
        (r"^embeddings\.(position_embedding\.weight|position_embeddings)$", "pos_embed"),
        (r"^embeddings\.(patch_embedding|patch_embeddings\.projection)\.", "patch_embed.proj."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(encoder\.)?layers?\.(?=\d)", "blocks."),
        (r"\.(layer_norm1|layernorm_before)\.", ".norm1."),
        (r"\.(layer_norm2|layernorm_after)\.", ".norm2."),
        (r"\.(self_attn|attention\.attention|attention)\.(?=[qkv]_proj\.|query\.|key\.|value\.)", ".attn."),
        (r"\.(q_proj|query)\.", ".q."),
        (r"\.(k_proj|key)\.", ".k."),
        (r"\.(v_proj|value)\.", ".v."),
        (r"\.(self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layer_scale(?=[12]\.)", ".ls"),
        (r"\.lambda1$", ".gamma"),
    )
)
"""Renaming of tensors from files of old and new releases of transformers, applied in order."""


class Frozen(nnx.Variable[Array]):
    """An array that is neither trained nor part of weight files."""


@jax.tree_util.register_dataclass
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

    hidden: Array
    attention: Array


class Teacher(nnx.Module):
    """A frozen CLIP, DINO (or any plain ViT) or DINOv2, from ``transformers`` files.

    Parameters
    ----------
    source
        Folder with ``config.json`` and ``.safetensors`` files, as written by ``save_pretrained``, or the name of such
        a model on the Hugging Face hub (needs ``huggingface_hub``).
    grid_shape
        Tokens of the student along both axes; the teacher sees images of the same grid.
    channels
        Channels of the images: the teacher's number, or 1, which is repeated.
    layers
        Number of last blocks whose outputs are returned; None: all.
    dtype
        Dtype of the weights of the linear layers, and of their products: ``"float32"`` or ``"bfloat16"``. Everything
        else is float32.
    scan
        See :func:`prmim_jax.vit.run_blocks`.

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
        If a model must be downloaded and ``huggingface_hub`` is not installed.
    ValueError
        If there is no such model, it is corrupt or of another kind, or it does not fit the images; one line.

    Notes
    -----
    If sizes differ, images are resized bicubically to the grid in patches of the teacher, and the teacher's position
    table is resized to the grid. Pixels are normalized with ``image_mean`` and ``image_std`` of
    ``preprocessor_config.json``, or else with CLIP's own (CLIP) or ImageNet's.

    The teacher has no gradient and no randomness. Its weights are of type :class:`Frozen`.

    Only ``.safetensors`` files are read; neither PyTorch nor transformers is needed.
    """

    def __init__(
        self,
        source: str | Path,
        grid_shape: Sequence[int],
        channels: int,
        *,
        layers: int | None = None,
        dtype: TeacherDtype = "float32",
        scan: bool = False,
    ) -> None:
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
        # Plain numbers, because they are constants of the compiled program, not state.
        self._pixel_scale, self._pixel_shift = scale_and_shift(config.mean, config.std)
        self.scan = scan
        self._build(_read_tensors(config.folder, _shapes(config)), config)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self)))
        if dtype == "bfloat16":
            for _, part in nnx.iter_modules(self):
                if isinstance(part, Linear):
                    part.weight.set_value(part.weight[...].astype(jnp.bfloat16))

    def _build(self, tensors: Tensors, config: TeacherConfig) -> None:
        """Create the parts from the tensors of the files."""
        weight = np.moveaxis(tensors["patch_embed.proj.weight"], 1, -1).reshape(self.dim, -1)
        table = resize_table(tensors["pos_embed"].reshape(1, -1, self.dim), config.grid_shape, self.grid_shape)
        bias = tensors.get("patch_embed.proj.bias")
        self.weight = Frozen(jnp.asarray(weight))
        self.bias = None if bias is None else Frozen(jnp.asarray(bias))
        self.cls_token = Frozen(jnp.asarray(tensors["cls_token"].reshape(1, 1, self.dim)))
        self.table = Frozen(jnp.asarray(table))
        is_clip = config.family == "clip"
        self.norm = _frozen(LayerNorm(self.dim, eps=config.eps), tensors, "norm_pre") if is_clip else None

        def block() -> Block:
            return Block(
                self.dim,
                self.num_heads,
                self.size.mlp_ratio,
                layer_scale=1.0 if config.family == "dinov2" else None,
                activation=config.activation,
                eps=config.eps,
                rngs=nnx.Rngs(0),
            )

        # Shapes only, since files provide the weights.
        blocks = [_frozen(nnx.eval_shape(block), tensors, f"blocks.{number}") for number in range(self.depth)]
        first = self.depth - self.layers
        self.first_blocks = stack_blocks(blocks[:first]) if first else None
        self.last_blocks = stack_blocks(blocks[first:])

    def __call__(self, images: Array) -> TeacherOutput:
        """Compute the features and the attention of whole images.

        Parameters
        ----------
        images
            uint8 (batch, height, width, channels).

        Returns
        -------
        TeacherOutput
        """
        x = self._embed(images)
        if self.first_blocks is not None:
            x = run_blocks(self.first_blocks, x, scan=self.scan)
        hidden = block_outputs(self.last_blocks, x, scan=self.scan)
        attention = self._cls_attention(x if self.layers == 1 else hidden[-2])
        return TeacherOutput(lax.stop_gradient(hidden), lax.stop_gradient(attention))

    def _embed(self, images: Array) -> Array:
        """Embed uint8 images to the first block's input (batch, 1 + N, dim).

        The class token is first.
        """
        dtype = self.table.dtype
        shape = tuple(tokens * size for tokens, size in zip(self.grid_shape, self.patch_size, strict=True))
        scale, shift = (jnp.asarray(values, dtype) for values in (self._pixel_scale, self._pixel_shift))
        with jax.default_matmul_precision("highest"):
            pixels = resize_images(images.astype(dtype), shape)
        # Broadcasts a single channel to all channels.
        patches = patchify(pixels * scale + shift, self.patch_size)
        bias = jnp.zeros(self.dim, dtype) if self.bias is None else self.bias[...]
        tokens = project(patches, self.weight[...], bias, dtype) + self.table[:, 1:]
        cls_token = jnp.broadcast_to(self.cls_token[...] + self.table[:, :1], (images.shape[0], 1, self.dim))
        x = jnp.concatenate([cls_token, tokens], axis=1)
        return x if self.norm is None else self.norm(x)

    def _cls_attention(self, x: Array) -> Array:
        """Return the class token's attention (batch, N) from the input of the last block."""
        block = jax.tree.map(lambda array: array[-1], self.last_blocks)
        x, qkv = block.norm1(x), block.attn.qkv
        weights, biases = (jnp.split(variable[...], 3)[:2] for variable in (qkv.weight, qkv.bias))
        q, k = (
            project(seen, weight, bias, qkv.dtype).reshape(x.shape[0], -1, self.num_heads, self.dim // self.num_heads)
            for seen, weight, bias in zip((x[:, :1], x), weights, biases, strict=True)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision(q.dtype), preferred_element_type=wide(q.dtype))
        return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)[:, :, 0, 1:].mean(1)


def _shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by our names, with separate q, k and v."""
    dim, hidden = config.size.dim, config.size.mlp_ratio * config.size.dim
    rows = 1 + prod(config.grid_shape)
    is_clip = config.family == "clip"
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, config.channels, *config.patch_size),
        "cls_token": (dim,) if is_clip else (1, 1, dim),
        "pos_embed": (rows, dim) if is_clip else (1, rows, dim),
    }
    if is_clip:
        shapes |= {"norm_pre.weight": (dim,), "norm_pre.bias": (dim,)}
    else:
        shapes["patch_embed.proj.bias"] = (dim,)
    block: dict[str, tuple[int, ...]] = {
        **{f"{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        **{f"attn.{part}.weight": (dim, dim) for part in ("q", "k", "v", "proj")},
        **{f"attn.{part}.bias": (dim,) for part in ("q", "k", "v", "proj") if part == "proj" or config.qkv_bias},
        **{"mlp.fc1.weight": (hidden, dim), "mlp.fc1.bias": (hidden,)},
        **{"mlp.fc2.weight": (dim, hidden), "mlp.fc2.bias": (dim,)},
    }
    if config.family == "dinov2":
        block |= {"ls1.gamma": (dim,), "ls2.gamma": (dim,)}
    for number in range(config.size.depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return shapes


def _read_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Read tensors of the expected shapes as float32 from all files of a folder."""
    tensors: Tensors = {}
    for path in _weight_files(folder):
        try:
            open_regular(path).close()  # safe_open would block on a pipe
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  # not a dict
                    name = _renamed(key)
                    if name in shapes:
                        tensors[name] = file.get_tensor(key).astype(np.float32)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"teacher: expected weights in .safetensors files in {folder}, got {one_line(error)}"
            ) from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"teacher: expected a tensor {name!r}, got none in {folder}")
        if tensors[name].shape != shape:
            raise ValueError(f"teacher: {name}: expected shape {shape}, got {tensors[name].shape} in {folder}")
    return tensors


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a model: one, or those of an index."""
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ValueError(f"teacher: expected weights in .safetensors files in {folder}, got no model.safetensors")
    try:
        return shards(index, "teacher")
    except FileNotFoundError as error:  # a corrupt model, as a missing tensor
        raise ValueError(str(error)) from None


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def _frozen(module: Any, tensors: Tensors, prefix: str) -> Any:
    """Return a module with its parameters replaced by frozen tensors."""
    for path, variable in list(nnx.iter_graph(module)):
        if isinstance(variable, nnx.Param):
            holder = module
            for step in path[:-1]:
                holder = getattr(holder, str(step))
            setattr(holder, str(path[-1]), Frozen(jnp.asarray(_tensor(tensors, ".".join(map(str, (prefix, *path)))))))
    return module


def _tensor(tensors: Tensors, name: str) -> NDArray[Any]:
    """Return a tensor by our name.

    Queries, keys and values are concatenated; missing biases are zeros.
    """
    if ".attn.qkv." not in name:
        return tensors[name]
    parts = [tensors.get(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
    dim = len(tensors[name.rpartition(".")[0].replace(".qkv", ".q.weight")])
    return np.concatenate([np.zeros(dim, np.float32) if part is None else part for part in parts])
