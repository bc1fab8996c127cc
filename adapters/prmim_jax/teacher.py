"""Teachers: frozen vision transformers of others, whose features a student learns to predict."""

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

from prmim_core import patchify, resize_images, resize_table
from prmim_core.files import one_line
from prmim_core.options import positive_integers
from prmim_core.teacher import (
    TeacherConfig,
    check_layers,
    check_teacher,
    find_teacher,
    read_json,
    read_teacher,
)
from prmim_jax.vit import Block, LayerNorm, Linear, block_outputs, precision, project, run_blocks, wide

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
"""What tensors are called in files, of old and new releases of transformers, and here; to be applied one by one."""


class Frozen(nnx.Variable[Array]):
    """An array that is neither learned nor written to files."""


@jax.tree_util.register_dataclass
@dataclass
class TeacherOutput:
    """What a :class:`Teacher` makes of whole images.

    Parameters
    ----------
    hidden
        float32 or wider (k, batch, 1 + N, dim): outputs of the last k blocks, before any final norm; the cls token
        first, then all tokens in raster order.
    attention
        float32 or wider (batch, N): what the cls token looks at in the last block, mean over heads. The share of the
        cls token itself is left out, so the sum is below 1.

    Notes
    -----
    A pytree.
    """

    hidden: Array
    attention: Array


class Teacher(nnx.Module):
    """A frozen vision transformer, from the files of ``transformers``: CLIP, DINO (or any plain ViT), DINOv2.

    Parameters
    ----------
    source
        A folder with ``config.json`` and ``.safetensors`` files, as ``save_pretrained`` writes it, or the name of such
        a model on the Hugging Face hub (for that, ``huggingface_hub`` has to be installed).
    grid_shape
        Tokens of the student along both axes; the teacher is shown images of as many patches.
    channels
        Channels of the images: as many as the teacher's, or 1, which is repeated.
    layers
        How many of the last blocks to return the outputs of; None: all.
    dtype
        Of the weights of its linear layers: ``"float32"``, or ``"bfloat16"``, in which the products are computed then,
        as after :func:`prmim_jax.vit.set_compute_dtype`. All else is in float32.

    Attributes
    ----------
    dim, depth, num_heads
        Width, number of blocks, attention heads; ``size`` has them together.
    patch_size
        Pixels of a patch along both axes.
    num_parameters
        Numbers that are in use: not those of poolers, final norms and text models.
    description
        What it is, in words.
    scan
        Whether compiled programs hold one block and loop over it; see :func:`prmim_jax.vit.run_blocks`.

    Raises
    ------
    ImportError
        If a model is to be downloaded and ``huggingface_hub`` is not installed.
    TypeError
        If an option is of the wrong type.
    ValueError
        If there is no such model, it is damaged or of another kind, or does not fit the images; one line.

    Notes
    -----
    Images are resized bicubically to the size that the grid has in patches of the teacher, where they differ, and so is
    the table of positions of a teacher that was made for another grid. Pixels are normalised by the ``image_mean`` and
    ``image_std`` of ``preprocessor_config.json``, or else by CLIP's own (CLIP) or ImageNet's.

    No gradient goes through, and nothing is drawn at random. The weights are of type :class:`Frozen`.

    Only ``.safetensors`` files are read, and neither PyTorch nor transformers is needed.
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
        self.grid_shape = positive_integers("grid_shape", grid_shape)
        if dtype not in get_args(TeacherDtype):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
        config = read_teacher(find_teacher(source))
        check_teacher(config, self.grid_shape, channels)
        self.size, self.patch_size, self.channels = config.size, config.patch_size, config.channels
        self.dim, self.depth, self.num_heads = config.size.dim, config.size.depth, config.size.heads
        self.layers = check_layers(layers, self.depth)
        self.description = f"{config.title}, from {source}"
        # Plain numbers, not arrays: they are part of the program, and no part of the state.
        self._pixel_scale = tuple(1 / (255 * deviation) for deviation in config.std)
        self._pixel_shift = tuple(-m / s for m, s in zip(config.mean, config.std, strict=True))
        self.scan = False
        self.compute_dtype: np.dtype | None = None
        self._build(_read_tensors(config.folder, _shapes(config)), config)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self)))
        if dtype == "bfloat16":
            for _, part in nnx.iter_modules(self):
                if isinstance(part, Linear):
                    part.weight.set_value(part.weight[...].astype(jnp.bfloat16))

    def _build(self, tensors: Tensors, config: TeacherConfig) -> None:
        """Put what was read into place."""
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

        # Shapes alone: no weight is drawn that a file will replace.
        self.blocks = nnx.List(
            [_frozen(nnx.eval_shape(block), tensors, f"blocks.{number}") for number in range(self.depth)]
        )

    def __call__(self, images: Array) -> TeacherOutput:
        """Look at whole images.

        Parameters
        ----------
        images
            uint8 (batch, height, width, channels).

        Returns
        -------
        TeacherOutput
        """
        first = self.depth - self.layers
        x = run_blocks(self.blocks[:first], self._embed(images), scan=self.scan)
        states = [x, *block_outputs(self.blocks[first:], x, scan=self.scan)]
        hidden, attention = jnp.stack(states[1:]), self._cls_attention(states[-2])
        return TeacherOutput(lax.stop_gradient(hidden), lax.stop_gradient(attention))

    def _embed(self, images: Array) -> Array:
        """Turn uint8 images into what the first block sees: (batch, 1 + N, dim), the cls token first."""
        dtype = self.table.dtype
        shape = tuple(tokens * size for tokens, size in zip(self.grid_shape, self.patch_size, strict=True))
        scale, shift = (jnp.asarray(values, dtype) for values in (self._pixel_scale, self._pixel_shift))
        with jax.default_matmul_precision("highest"):
            pixels = resize_images(images.astype(dtype), shape)
        patches = patchify(pixels * scale + shift, self.patch_size)  # one channel becomes several here
        bias = jnp.zeros(self.dim, dtype) if self.bias is None else self.bias[...]
        tokens = project(patches, self.weight[...], bias, self.compute_dtype) + self.table[:, 1:]
        cls_token = jnp.broadcast_to(self.cls_token[...] + self.table[:, :1], (len(images), 1, self.dim))
        x = jnp.concatenate([cls_token, tokens], axis=1)
        return x if self.norm is None else self.norm(x)

    def _cls_attention(self, x: Array) -> Array:
        """Return what the cls token looks at in the last block, which sees (batch, 1 + N, dim): (batch, N)."""
        block = self.blocks[-1]
        x, qkv = block.norm1(x), block.attn.qkv
        weights, biases = (jnp.split(variable[...], 3)[:2] for variable in (qkv.weight, qkv.bias))
        q, k = (
            project(seen, weight, bias, qkv.compute_dtype).reshape(
                len(x), -1, self.num_heads, self.dim // self.num_heads
            )
            for seen, weight, bias in zip((x[:, :1], x), weights, biases, strict=True)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision(q.dtype), preferred_element_type=wide(q.dtype))
        return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)[:, :, 0, 1:].mean(1)


def _shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a model needs: shapes by name, for names as in this adapter, but q, k and v apart."""
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
    """Read tensors, float32, from all ``.safetensors`` files of a folder; q, k and v of attention become one."""
    tensors: Tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  # not a dict
                    name = _renamed(key)
                    if name in shapes:
                        tensors[name] = file.get_tensor(key).astype(np.float32)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"teacher: expected weights in .safetensors files in {folder}, got {one_line(error)}"
            ) from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"teacher: expected a tensor {name!r}, got none in {folder}")
        if tensors[name].shape != shape:
            raise ValueError(f"teacher: {name}: expected shape {shape}, got {tensors[name].shape} in {folder}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a model: one, or several that an index lists."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = read_json(folder / "model.safetensors.index.json")
    if index is None:
        raise ValueError(f"teacher: expected weights in .safetensors files in {folder}, got no model.safetensors")
    return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def _frozen(module: Any, tensors: Tensors, prefix: str) -> Any:
    """Fill a module: every parameter becomes a frozen one, with the numbers that were read for it."""
    for path, variable in list(nnx.iter_graph(module)):
        if isinstance(variable, nnx.Param):
            holder = module
            for step in path[:-1]:
                holder = getattr(holder, str(step))
            setattr(holder, str(path[-1]), Frozen(jnp.asarray(_tensor(tensors, ".".join(map(str, (prefix, *path)))))))
    return module


def _tensor(tensors: Tensors, name: str) -> NDArray[Any]:
    """Look up a tensor; queries, keys and values, which files hold apart, in one, with biases of 0 for none."""
    if ".attn.qkv." not in name:
        return tensors[name]
    parts = [tensors.get(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
    dim = len(tensors[name.rpartition(".")[0].replace(".qkv", ".q.weight")])
    return np.concatenate([np.zeros(dim, np.float32) if part is None else part for part in parts])
