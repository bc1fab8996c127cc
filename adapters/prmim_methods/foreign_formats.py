"""Formats of other code: tensor names of full models, mapped to ours.

A format maps the authors' names, without the encoder's prefix, to our names and shapes. Names of transformers are
mapped to timm's first. The authors' code was read for names and layouts only.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.encoder import ENCODER_FIELDS, EncoderConfig, num_bias_rows
from prmim_methods.localmim import SCALES, LocalMIMConfig
from prmim_methods.mae import MAEConfig
from prmim_methods.maskalign import MaskAlignConfig
from prmim_methods.positions import SHARED_TABLE, sincos_table
from prmim_methods.simmim import SimMIMConfig

Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]

DECODER_HEAD_DIM = 32
"""Channels of an attention head in the published decoders of MAE, CrossMAE and LocalMIM."""
ALIGNED = 5
"""Number of teacher layers that MaskAlign's recipe aligns."""
TABLE_TOLERANCE = 1e-3
"""Largest error of a sine-cosine table, also in half precision."""
_NUMBER = re.compile(r"\d+")


@dataclass
class Facts:
    """Facts about a checkpoint, besides its arrays.

    Parameters
    ----------
    config
        Content of ``config.json``.
    arguments
        Options of the training run that wrote it.
    given
        Facts given by the user; the checkpoint takes precedence.
    notes
        Assumptions and filled in parts, one sentence each; appended to.
    """

    config: Mapping[str, Any]
    arguments: Mapping[str, Any]
    given: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def find(self, name: str, *said: Any, assumed: Any, expected: str) -> Any:
        """Look up a fact in the checkpoint, the user's arguments and the defaults.

        The first that exists counts. A default adds a note.

        Raises
        ------
        ValueError
            If the fact is not given and has no default (None).
        """
        for value in (*said, self.given.get(name)):
            if value is not None:
                return value
        if assumed is None:
            raise ValueError(f"{name}: expected {expected}, which the weights do not determine, got nothing")
        self.notes.append(f"{name}: {assumed} assumed, since the weights do not determine it")
        return assumed


@dataclass(frozen=True)
class Full:
    """A full model under our names.

    Parameters
    ----------
    architecture
        The method's architecture.
    weights
        Arrays by our names.
    shapes
        Expected shapes of all tensors.
    """

    architecture: dict[str, Any]
    weights: Arrays
    shapes: Shapes


@dataclass(frozen=True)
class Format:
    """A format of full models.

    Parameters
    ----------
    title
        Its name.
    signs
        Prefixes of names, which all occur.
    rules
        Patterns of names and our names; the first match applies. Other names of the encoder only get its prefix.
    build
        Builds a full model from arrays under our names.
    """

    title: str
    signs: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    build: Callable[[EncoderConfig, Arrays, Facts], Full]

    def is_format_of(self, names: Iterable[str]) -> bool:
        """Return whether tensor names have all signs of the format."""
        names = tuple(names)
        return all(any(name.startswith(sign) for name in names) for sign in self.signs)

    def rename(self, name: str) -> str:
        """Return our name of a tensor."""
        for pattern, ours in self.rules:
            if re.match(pattern, name):
                return re.sub(pattern, ours, name, count=1)
        return f"encoder.{name}"


def _options(encoder: EncoderConfig) -> dict[str, Any]:
    """Return the options of any method with this encoder."""
    return {name: getattr(encoder, name) for name in ENCODER_FIELDS}


def encoder_shapes(encoder: EncoderConfig) -> Shapes:
    """Return the shapes of the tensors of an encoder."""
    size, table = encoder.encoder_size, (1, encoder.class_tokens + encoder.grid.num_tokens)
    shapes: Shapes = {"encoder.patch_embed.proj.weight": (size.dim, encoder.channels, *encoder.patch_size)}
    shapes["encoder.patch_embed.proj.bias"] = (size.dim,)
    if encoder.class_tokens:
        shapes["encoder.cls_token"] = (1, encoder.class_tokens, size.dim)
    if encoder.position == "relative":
        shapes[SHARED_TABLE] = (num_bias_rows(encoder.grid), size.heads)
    else:
        shapes["encoder.pos_embed"] = (*table, size.dim)
    has_scale = encoder.layer_scale is not None
    shapes |= block_shapes("encoder.blocks.", size.dim, size.depth, layer_scale=has_scale)
    return shapes | _norm("encoder.norm", size.dim)


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def block_shapes(
    prefix: str, dim: int, depth: int, *, layer_scale: bool = False, context_dim: int | None = None
) -> Shapes:
    """Return the shapes of transformer blocks.

    With ``context_dim``, the blocks use cross-attention.
    """
    shapes: Shapes = {}
    for number in range(depth):
        block = f"{prefix}{number}."
        shapes |= _norm(f"{block}norm1", dim) | _norm(f"{block}norm2", dim) | _linear(f"{block}attn.proj", dim, dim)
        shapes |= _linear(f"{block}mlp.fc1", 4 * dim, dim) | _linear(f"{block}mlp.fc2", dim, 4 * dim)
        if context_dim is None:
            shapes |= _linear(f"{block}attn.qkv", 3 * dim, dim)
        else:
            shapes |= _linear(f"{block}attn.q", dim, dim) | _linear(f"{block}attn.kv", 2 * dim, context_dim)
            shapes |= _norm(f"{block}norm_context", context_dim)
        if layer_scale:
            shapes |= {f"{block}ls1.gamma": (dim,), f"{block}ls2.gamma": (dim,)}
    return shapes


def count_numbered(names: Mapping[str, Any], prefix: str) -> int:
    """Return the number of numbered parts: the largest number after a prefix, plus 1.

    Examples
    --------
    >>> count_numbered({"blocks.0.norm1.bias": 0, "blocks.11.norm1.bias": 0}, "blocks.")
    12
    """
    found = (_NUMBER.match(name, len(prefix)) for name in names if name.startswith(prefix))
    return max((int(number[0]) + 1 for number in found if number), default=0)


def position_of(tables: list[NDArray[Any]], grid_shape: tuple[int, ...], class_tokens: int) -> str:
    """Return ``"absolute"`` if all position tables are fixed, else ``"learned"``.

    Fixed tables are sine-cosine tables.
    """
    for table in tables:
        if table.shape[-1] % (2 * len(grid_shape)):
            return "learned"
        fixed = sincos_table(grid_shape, table.shape[-1], class_tokens)
        if fixed.shape != table.shape or not np.allclose(table, fixed, rtol=0, atol=TABLE_TOLERANCE):
            return "learned"
    return "absolute"


def _decoder_heads(dim: int, facts: Facts) -> int:
    said = facts.config.get("decoder_num_attention_heads")
    assumed = dim // DECODER_HEAD_DIM if dim % DECODER_HEAD_DIM == 0 else None
    heads: int = facts.find("decoder_heads", said, assumed=assumed, expected="the attention heads of the decoder")
    return heads


def _target_norm(facts: Facts) -> bool:
    said = (facts.config.get("norm_pix_loss"), facts.arguments.get("norm_pix_loss"))
    return bool(facts.find("norm_pix", *said, assumed=True, expected="whether target patches were normalized"))


def _width(weights: Arrays, *names: str, axis: int = -1) -> int:
    """Return a length of the first existing tensor; 1 without any.

    Later checks report the missing tensors.
    """
    shapes = (weights[name].shape for name in names if name in weights)
    return max(next((shape[axis] for shape in shapes if len(shape) > axis), 1), 1)


def _decoder_width(weights: Arrays, prefix: str) -> int:
    names = [f"{prefix}{name}" for name in ("mask_token", "pos_embed", "norm.weight", "norm.bias")]
    if not any(name in weights for name in names):
        raise ValueError(f"source: expected a tensor {names[0]}, which determines the width of the decoder, got none")
    return _width(weights, *names)


def _mae(encoder: EncoderConfig, weights: Arrays, facts: Facts, *, cross: bool = False) -> Full:
    """Return an MAE, or a CrossMAE."""
    dim, depth = _decoder_width(weights, "decoder."), count_numbered(weights, "decoder.blocks.")
    tables = [weights[name] for name in ("encoder.pos_embed", "decoder.pos_embed") if name in weights]
    config = MAEConfig(
        **_options(encoder),
        class_tokens=encoder.class_tokens,
        position=position_of(tables, encoder.grid.shape, encoder.class_tokens),
        throw_ratio=0.0,
        norm_pix=_target_norm(facts),
        decoder="cross" if cross else "self",
        decoder_dim=dim,
        decoder_depth=max(depth, 1),
        decoder_heads=_decoder_heads(dim, facts),
    )
    shapes: Shapes = {
        "decoder.mask_token": (1, 1, dim),
        "decoder.pos_embed": (1, encoder.class_tokens + encoder.grid.num_tokens, dim),
    }
    shapes |= _norm("decoder.norm", dim) | _linear("decoder.pred", config.patch_dim, dim)
    if cross:
        shapes |= block_shapes("decoder.blocks.", dim, depth, context_dim=encoder.encoder_size.dim)
        shapes["decoder.mix"] = (depth, 1 + encoder.encoder_size.depth)
        weights = fill_norm(_pad_mix(weights, encoder.encoder_size.depth), encoder, facts)
    else:
        shapes |= block_shapes("decoder.blocks.", dim, depth) | _linear("decoder.embed", dim, encoder.encoder_size.dim)
    return Full(config.architecture(), weights, encoder_shapes(encoder) | shapes)


def _crossmae(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Full:
    return _mae(encoder, weights, facts, cross=True)


def _pad_mix(weights: Arrays, encoder_depth: int) -> Arrays:
    """Set the weight of the blocks' input to 0 if the decoder reads outputs only."""
    mix = weights.get("decoder.mix")
    if mix is None or mix.ndim != 2 or mix.shape[1] != encoder_depth:
        return weights
    return {**weights, "decoder.mix": np.pad(mix, ((0, 0), (1, 0)))}


def fill_norm(weights: Arrays, encoder: EncoderConfig, facts: Facts) -> Arrays:
    """Add the initial final norm to an encoder without one."""
    if "encoder.norm.weight" in weights or "encoder.norm.bias" in weights:
        return weights
    dim = encoder.encoder_size.dim
    facts.notes.append("encoder.norm: not in the source; filled with ones and zeros")
    return {**weights, "encoder.norm.weight": np.ones(dim, np.float32), "encoder.norm.bias": np.zeros(dim, np.float32)}


def _fill_scales(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Arrays:
    """Add a LayerScale of factor 1, which is a no-op, to blocks without one."""
    if encoder.layer_scale is not None:
        return weights
    facts.notes.append("encoder.blocks.*.ls1 and ls2: not in the source; filled with ones")
    names = (
        f"encoder.blocks.{number}.ls{branch}.gamma" for number in range(encoder.encoder_size.depth) for branch in (1, 2)
    )
    return {**weights, **{name: np.ones(encoder.encoder_size.dim, np.float32) for name in names}}


def _simmim(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Full:
    config = SimMIMConfig(**_options(encoder), position=encoder.position, mask_unit=1, throw_ratio=0.0)
    weights = _fill_scales(encoder, weights, facts)
    dim = encoder.encoder_size.dim
    shapes = {**encoder_shapes(replace(encoder, layer_scale=1.0)), "encoder.mask_token": (1, 1, dim)}
    shapes |= _linear("head", config.patch_dim, dim)
    # A 1 x 1 convolution, whose outputs are numbered by channel, row, column of the patch.
    for name, inputs in (("head.weight", (dim,)), ("head.bias", ())):
        if name in weights and weights[name].size == prod((config.patch_dim, *inputs)):
            parts = weights[name].reshape(encoder.channels, prod(encoder.patch_size), *inputs)
            weights = {**weights, name: parts.swapaxes(0, 1).reshape(config.patch_dim, *inputs)}
    return Full(config.architecture(), weights, shapes)


def _maskalign(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Full:
    """Return a MaskAlign with the layers that its loss aligns."""
    depth = count_numbered(weights, "heads.")
    top = re.fullmatch(r"top(\d+)", str(facts.arguments.get("loss_weights")))
    kept = min(int(top[1]) if top else ALIGNED, depth)
    if not top:
        facts.notes.append(f"teacher_layers: {kept} assumed, as published")
    if kept < depth:
        facts.notes.append(f"heads and fusion: the last {kept} of {depth} layers of the teacher; others are left out")
    first = depth - kept
    teacher_dim = _width(weights, f"heads.{depth - 1}.weight", axis=0)
    chosen: Arrays = {}
    for name, array in weights.items():
        number = re.match(r"heads\.(\d+)(\..*)", name)
        if not number:
            chosen[name] = array
        elif int(number[1]) >= first:
            chosen[f"heads.{int(number[1]) - first}{number[2]}"] = array
    if "fusion" not in weights and depth == encoder.encoder_size.depth:
        facts.notes.append("fusion: not in the source; each layer of the teacher from the student's of the same depth")
        chosen["fusion"] = np.eye(depth, dtype=np.float32)
    if "fusion" in chosen:
        chosen["fusion"] = chosen["fusion"][first:]
    config = MaskAlignConfig(**_options(encoder), teacher="imported", reconstruction="none", fusion="sum")
    shapes = {**encoder_shapes(encoder), "fusion": (kept, encoder.encoder_size.depth)}
    for place in range(kept):
        shapes |= _linear(f"heads.{place}", teacher_dim, encoder.encoder_size.dim)
    architecture = {
        "method": config.name,
        **config.encoder_architecture(),
        "teacher_dim": teacher_dim,
        "teacher_layers": kept,
        "reconstruction": config.reconstruction_in_effect,
    }
    return Full(architecture, chosen, shapes)


def _localmim(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Full:
    """Build a LocalMIM; the heads' convolutions become linear layers on tokens."""
    dim, number = _decoder_width(weights, "decoders.0."), count_numbered(weights, "decoders.")
    if number != len(SCALES):
        raise ValueError(f"source: expected a decoder for each of the scales {list(SCALES)}, got {number}")
    values = _width(weights, "decoders.2.pred.0.weight", axis=0)
    if values % encoder.channels:
        raise ValueError(f"source: expected histograms of {encoder.channels} channels, got {values} values of a cell")
    config = LocalMIMConfig(
        **_options(encoder),
        throw_ratio=0.0,
        bins=values // encoder.channels,
        scales=SCALES,
        decoder_dim=dim,
        decoder_depth=max(count_numbered(weights, "decoders.0.blocks."), 1),
        decoder_heads=_decoder_heads(dim, facts),
    )
    shapes = encoder_shapes(encoder)
    renamed = dict(weights)
    for place, scale in enumerate(SCALES):
        decoder, head = f"decoders.{place}.", f"heads.{place}."
        shapes[f"{decoder}mask_token"] = (1, 1, dim)
        shapes[f"{decoder}pos_embed"] = (1, 1 + encoder.grid.num_tokens, dim)
        shapes |= block_shapes(f"{decoder}blocks.", dim, config.decoder_depth) | _norm(f"{decoder}norm", dim)
        shapes |= _linear(f"{decoder}embed", dim, encoder.encoder_size.dim)
        if place:
            shapes |= _norm(f"norms.{place - 1}", encoder.encoder_size.dim)
        *finer, (_, width, outputs) = config.head_layers(scale)
        shapes |= _linear(f"{head}pred", outputs, width)
        for step, (_, inputs, doubled) in enumerate(finer):
            shapes |= _linear(f"{head}up.{step}", doubled, inputs)
            shapes |= _norm(f"{head}norms.{step - 1}", inputs) if step else {}
        renamed = _linear_heads(renamed, f"{decoder}pred.", head, len(finer), pooled=scale < 1)
    return Full(config.architecture(), renamed, shapes)


def _linear_heads(weights: Arrays, old: str, new: str, num_ups: int, *, pooled: bool) -> Arrays:
    """Rename a head's layers: transposed convolutions, norms and one convolution."""
    places = {3 * step: f"up.{step}" for step in range(num_ups)}  # a norm and a GELU lie between two of them
    places |= {3 * step + 1: f"norms.{step}" for step in range(num_ups - 1)}
    places[max(3 * num_ups - 2, 0) + pooled] = "pred"
    renamed = {name: array for name, array in weights.items() if not name.startswith(old)}
    for name, array in weights.items():
        if not name.startswith(old):
            continue
        number, _, part = name.removeprefix(old).partition(".")
        ours = places.get(int(number)) if number.isdigit() else None
        if ours is None:
            renamed[name] = array  # reported as unexpected
        elif ours.startswith("up."):
            renamed[f"{new}{ours}.{part}"] = _per_token(array)
        else:
            renamed[f"{new}{ours}.{part}"] = array.reshape(array.shape[:2]) if array.ndim == 4 else array
    return renamed


def _per_token(array: NDArray[Any]) -> NDArray[Any]:
    """Return a 2 x 2 transposed convolution, stride 2, as a linear layer.

    Its outputs are in the order row, column, channel.
    """
    if array.ndim == 4:
        inputs, outputs, height, width = array.shape
        return array.transpose(2, 3, 1, 0).reshape(height * width * outputs, inputs)
    return np.tile(array, 4)


_DECODER = ((r"mask_token$", "decoder.mask_token"), (r"decoder_", "decoder."))
FORMATS = (
    Format(
        "CrossMAE",
        ("decoder_blocks.0.cross_attn.", "decoder_pred."),
        (
            (r"decoder_blocks\.(\d+)\.cross_attn\.", r"decoder.blocks.\1.attn."),
            (r"dec_norms\.(\d+)\.", r"decoder.blocks.\1.norm_context."),
            (r"wfm\.linear\.weight$", "decoder.mix"),
            *_DECODER,
        ),
        _crossmae,
    ),
    Format("MAE", ("decoder_",), _DECODER, _mae),
    Format("SimMIM", ("decoder.0.weight", "mask_token"), ((r"decoder\.0\.(weight|bias)$", r"head.\1"),), _simmim),
    Format(
        "MaskAlign",
        ("distill_heads.",),
        ((r"distill_heads\.", "heads."), (r"distill_weights$", "fusion")),
        _maskalign,
    ),
    Format(
        "LocalMIM",
        ("decoder.0.embed.", "norm.0."),
        # The decoders use the norms in order; the last one is the encoder's.
        ((r"norm\.3\.", "encoder.norm."), (r"norm\.(\d+)\.", r"norms.\1."), (r"decoder\.", "decoders.")),
        _localmim,
    ),
)
"""Formats of full models. The first one whose signs all occur applies."""


def _build_encoder(encoder: EncoderConfig, weights: Arrays, facts: Facts) -> Full:
    return Full(encoder.architecture(), fill_norm(weights, encoder, facts), encoder_shapes(encoder))


ENCODER = Format("ViT", (), (), _build_encoder)
"""The format of any other model, for its encoder alone."""
