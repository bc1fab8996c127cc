"""Conversion of weights of other code; tensor names identify the format.

Sizes follow from the shapes, and from ``config.json`` if present. Arrays are NumPy's; the adapters read files.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.architecture import ENCODER as PREFIX
from prmim_methods.architecture import MASK_TOKEN, encoder_of
from prmim_methods.encoder import CLASS_ROWS, ENCODER_FIELDS, EncoderConfig, times
from prmim_methods.foreign_formats import (
    ENCODER,
    FORMATS,
    Arrays,
    Facts,
    Full,
    count_numbered,
    encoder_shapes,
    position_of,
)
from prmim_methods.messages import printable, shown
from prmim_methods.positions import SHARED_TABLE, fit_positions
from prmim_methods.sizes import LAYER_NORM_EPS, VIT_SIZES
from prmim_methods.weight_files import (
    METADATA_KEY,
    architecture_of,
    check_architecture,
    check_tensors,
    read_architecture,
)

TABLE = "encoder.pos_embed"
MOST_NAMED = 3
"""Most tensors named in a message or a line of a report."""
HEAD_DIM = 64
"""Channels of an attention head, unless the model is a published one."""
PUBLISHED_HEADS = {(size.dim, size.depth): size.heads for size in VIT_SIZES.values()}

WRAPPERS = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.", "vit.")
"""Prefixes that wrappers and larger models give to names."""
ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
"""A tensor that every format has, by timm's name and by that of transformers."""
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
TRANSFORMERS = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"layernorm\.", "norm."),
    (r"decoder\.(mask_token|decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)", r"\1"),
    (r"decoder\.decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),  # the latter is written by 5.23
    (r"(?:encoder\.relative_position_bias|shared_rel_pos)\.", "rel_pos_bias."),
    (_BLOCK, r"blocks.\1."),
)
"""Prefixes of names in transformers, and in timm or MAE's code."""
IN_BLOCK = (
    (r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale(1|2)\.lambda1$", r"ls\1.gamma"),
    (r"(?:gamma|lambda)_(1|2)$", r"ls\1.gamma"),
)
"""Prefixes of names inside a block, and timm's."""
UNUSED = re.compile(
    r"(head|fc_norm|classifier|pooler|clip_model|dino_model|hog_enc|pixel_loss)\..*|(.*\.)?relative_position_index"
)
"""Tensors without effect on token features, which our models do not have or name differently."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Parameters
    ----------
    place
        The source, for messages.
    arrays
        Arrays by name; floating-point ones are float32 or float64.
    metadata
        Metadata of a ``.safetensors`` file.
    config, preprocessing
        Content of ``config.json`` and of ``preprocessor_config.json``.
    arguments
        Options of the training run that wrote it.
    left_out
        Other entries of the file, such as the state of an optimizer.
    """

    place: str
    arrays: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignWeights:
    """Weights of other code under our names.

    Parameters
    ----------
    format
        The detected format.
    architecture
        The architecture of a method, or, without ``"method"``, of an encoder alone.
    weights
        float32 or float64 arrays by our names.
    notes
        Assumptions, and filled in or omitted parts, one sentence each.
    """

    format: str
    architecture: dict[str, Any]
    weights: Arrays
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a ``.safetensors`` file of these weights."""
        return {"format": "pt", METADATA_KEY: json.dumps(self.architecture)}

    def describe(self) -> list[str]:
        """Return lines of text: format, encoder, weights, and notes."""
        what = self.architecture
        kept = f"the method {what['method']}" if "method" in what else "the encoder alone"
        number = sum(array.size for array in self.weights.values())
        return [
            f"Format: {self.format}",
            f"Encoder: width {what['embed_dim']}, {what['depth']} blocks, {what['num_heads']} heads; images of "
            f"{times(what['image_size'])} pixels and {what['channels']} channels, patches of "
            f"{times(what['patch_size'])}; positions {what.get('position', 'absolute')}",
            f"Weights: {kept}, {len(self.weights)} tensors, {number / 1e6:.2f} M numbers",
            *(f"Note: {note}" for note in self.notes),
        ]


def convert(
    checkpoint: Checkpoint,
    *,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, ...] | None = None,
    norm_pix: bool | None = None,
    encoder_only: bool = False,
) -> ForeignWeights:
    """Detect the format of a checkpoint, and return its weights under our names.

    Parameters
    ----------
    checkpoint
        The checkpoint. Its own facts take precedence over the arguments.
    num_heads, decoder_heads
        Attention heads of the encoder and of the decoder, which shapes do not determine. None: those of the published
        model of this width and depth, or else 64 channels per head in the encoder and 32 in the decoder.
    image_size
        Pixels along each axis. None: a square of as many patches as there are positions.
    norm_pix
        Whether MAE's target patches were normalized. None: yes, as published.
    encoder_only
        Whether to keep only the encoder.

    Returns
    -------
    ForeignWeights

    Raises
    ------
    ValueError
        If the format is unknown; if tensors are missing, unexpected, of another shape or not finite (the message lists
        them); or if a size is undetermined.

    Notes
    -----
    Formats: the original code of MAE and Pixio, CrossMAE, SimMIM, MaskAlign and LocalMIM; ``ViTMAE``, ``ViT`` and
    ``ViTForMaskedImageModeling`` of transformers; ViTs of timm, also with a relative position bias shared by all
    blocks, and with LayerScale; our own files. Other models are imported as an encoder alone.

    Queries, keys and values become one layer. Keys without a bias, as in BEiT and SimMIM, get a bias of zero, which is
    equivalent.
    """
    given = {"num_heads": num_heads, "decoder_heads": decoder_heads, "image_size": image_size, "norm_pix": norm_pix}
    for name, array in checkpoint.arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(f"source: expected finite numbers, got others in {shown(name)} of {checkpoint.place}")
    if METADATA_KEY in checkpoint.metadata:
        architecture = read_architecture(checkpoint.metadata, checkpoint.place)
        found = ForeignWeights("prmim", architecture, dict(checkpoint.arrays))
        encoder = encoder_alone(found)
        shapes = encoder_shapes(encoder_of(architecture))
        _check_tensors(Full(encoder.architecture, encoder.weights, shapes), {}, f"our encoder in {checkpoint.place}")
        return encoder if encoder_only else found
    return _convert(checkpoint, Facts(checkpoint.config, checkpoint.arguments, given), encoder_only=encoder_only)


def check_given(found: ForeignWeights, given: Mapping[str, Any]) -> None:
    """Raise ValueError if weights contradict the given fields; None: not given."""
    for name, value in given.items():
        got = list(value) if isinstance(value, tuple) else value
        expected = found.architecture.get(name, got)
        if got is not None and got != expected:
            raise ValueError(f"{name}: expected {shown(expected)}, as in the source, got {shown(got)}")


def encoder_alone(found: ForeignWeights) -> ForeignWeights:
    """Return the weights of the encoder, without the parts around it."""
    weights = {name: array for name, array in found.weights.items() if _is_of_encoder(name)}
    return replace(found, architecture=encoder_of(found.architecture).architecture(), weights=weights)


def _convert(checkpoint: Checkpoint, facts: Facts, *, encoder_only: bool) -> ForeignWeights:
    theirs: dict[str, str] = {}
    for source, name in _strip(checkpoint).items():
        if (other := theirs.setdefault(_as_timm(name), source)) != source:
            raise ValueError(f"source: expected one model in {checkpoint.place}, got both {other} and {source}")
    unused = sorted(source for name, source in theirs.items() if UNUSED.fullmatch(name))
    arrays = {name: checkpoint.arrays[source] for name, source in theirs.items() if source not in unused}
    arrays = _join(arrays, facts)
    layout = next((item for item in FORMATS if item.is_format_of(arrays)), ENCODER)
    weights, sources = {}, {}
    for name, array in arrays.items():
        ours = layout.rename(name)
        weights[ours], sources[ours] = array, theirs.get(name, name)
    encoder = _read_encoder(checkpoint, weights, facts)
    builder = ENCODER if encoder_only else layout
    if builder is ENCODER:  # all names of a ViT count as encoder names, so that unexpected ones are reported
        unused += [sources[name] for name in weights if not _is_of_encoder(name)]
        weights = {name: array for name, array in weights.items() if _is_of_encoder(name)}
    found = builder.build(encoder, weights, facts)
    _check_tensors(found, sources, f"{layout.title} in {checkpoint.place}")
    notes = list(facts.notes)
    if unused or checkpoint.left_out:
        notes.append(f"left out: {_listed([*unused, *checkpoint.left_out])}")
    library = "transformers" if any(name.endswith(ANCHORS[1]) for name in checkpoint.arrays) else "timm's names"
    weights = {name: np.ascontiguousarray(found.weights[name]) for name in found.shapes}
    return ForeignWeights(f"{layout.title} ({library})", found.architecture, weights, tuple(notes))


def _is_of_encoder(name: str) -> bool:
    return name.startswith(PREFIX) and name != MASK_TOKEN


def _listed(names: Iterable[str]) -> str:
    """Return some names of tensors for a message, and the number of the others."""
    names = list(names)
    more = len(names) - MOST_NAMED
    return ", ".join(map(printable, names[:MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def _strip(checkpoint: Checkpoint) -> dict[str, str]:
    """Map every name to the name without prefixes of wrappers and the encoder."""
    names = {name: name for name in checkpoint.arrays}
    while names and any(all(short.startswith(prefix) for short in names.values()) for prefix in WRAPPERS):
        prefix = next(prefix for prefix in WRAPPERS if all(short.startswith(prefix) for short in names.values()))
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    for anchor in ANCHORS:
        # MaskAlign contains its teacher, which may have the anchor of transformers.
        found = [short for short in names.values() if short == anchor or short.endswith(f".{anchor}")]
        if len(found) > 1:
            raise ValueError(f"source: expected one model in {checkpoint.place}, got {len(found)}: {_listed(found)}")
        if found:
            prefix = found[0].removesuffix(anchor)
            rest = prefix
            while rest and any(rest.startswith(wrapper) for wrapper in WRAPPERS):
                rest = rest.partition(".")[2]
            if rest:
                raise ValueError(
                    f"source: expected prefixes among {', '.join(WRAPPERS)}, got {shown(prefix)} in {checkpoint.place}"
                )
            return {name: short.removeprefix(prefix) for name, short in names.items()}
    raise ValueError(
        f"source: expected a vision transformer with a tensor {' or '.join(ANCHORS)}, got "
        f"{_listed(sorted(names)) or 'no tensors'} in {checkpoint.place}"
    )


def _as_timm(name: str) -> str:
    """Map a name of transformers to that of timm's ViT, or of the authors' code.

    Examples
    --------
    >>> _as_timm("encoder.layer.3.attention.attention.query.bias"), _as_timm("layers.3.layernorm_after.weight")
    ('blocks.3.attn.q.bias', 'blocks.3.norm2.weight')
    """
    for pattern, timm in TRANSFORMERS:
        name = re.sub(rf"^{pattern}", timm, name)
    block = re.match(r"(?:decoder_)?blocks\.\d+\.", name)
    if not block:
        return name
    part = name[block.end() :]
    for pattern, timm in IN_BLOCK:
        part = re.sub(rf"^{pattern}", timm, part)
    return block[0] + part


def _join(arrays: Arrays, facts: Facts) -> Arrays:
    """Join queries, keys and values, and class tokens and registers; add zero biases."""
    joined = dict(arrays)
    if "cls_token" in joined and "reg_token" in joined:
        joined["cls_token"] = np.concatenate([joined["cls_token"], joined.pop("reg_token")], axis=1)
        facts.notes.append("reg_token: registers count as class tokens")
    for prefix in {found[0] for found in (re.match(r".*blocks\.\d+\.attn\.", name) for name in arrays) if found}:
        for part in ("weight", "bias"):
            names = [f"{prefix}{kind}.{part}" for kind in "qkv"]
            if all(name in joined for name in names):
                joined[f"{prefix}qkv.{part}"] = np.concatenate([joined.pop(name) for name in names])
        for names in ([f"{prefix}q_bias", f"{prefix}v_bias"], [f"{prefix}q.bias", f"{prefix}v.bias"]):
            if f"{prefix}k.bias" not in joined and all(name in joined for name in names):
                q, v = (joined.pop(name) for name in names)
                joined[f"{prefix}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
    weights = [name for name in joined if name.endswith("attn.qkv.weight")]
    if weights and not any(name.replace("weight", "bias") in joined for name in weights):
        facts.notes.append("biases of queries, keys and values: not in the source; filled with zeros")
        joined |= {name.replace("weight", "bias"): np.zeros(len(joined[name]), np.float32) for name in weights}
    return joined


def _read_encoder(checkpoint: Checkpoint, weights: Arrays, facts: Facts) -> EncoderConfig:
    """Return the record of the encoder; pad positions if class tokens have none."""
    config = checkpoint.config
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"source: expected the activation 'gelu', got {shown(config['hidden_act'])}")
    eps = config.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        facts.notes.append(f"epsilon of the layer norms: {eps!r} in the source, {LAYER_NORM_EPS!r} here")
    projection = weights["encoder.patch_embed.proj.weight"]
    if projection.ndim < 3:
        raise ValueError(f"source: expected a convolution as patch embedding, got shape {projection.shape}")
    dim, channels, *patch_size = projection.shape
    token = weights.get("encoder.cls_token")
    class_tokens = 0 if token is None or token.ndim != 3 else token.shape[1]
    depth = max(count_numbered(weights, "encoder.blocks."), 1)
    image_size = _image_size(weights, class_tokens, tuple(patch_size), facts)
    grid_shape = tuple(side // patch for side, patch in zip(image_size, patch_size, strict=True))
    table = weights.get(TABLE)
    if table is not None and class_tokens and table.shape[1] == prod(grid_shape):
        table = weights[TABLE] = np.pad(table, ((0, 0), (class_tokens, 0), (0, 0)))
    mean, std = _statistics(checkpoint, channels, facts)
    biases = weights.get(SHARED_TABLE)
    heads = facts.find(
        "num_heads",
        config.get("num_attention_heads"),
        None if biases is None else biases.shape[1],
        assumed=PUBLISHED_HEADS.get((dim, depth), dim // HEAD_DIM if dim % HEAD_DIM == 0 else None),
        expected="the attention heads of the encoder",
    )
    return EncoderConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        image_size=image_size,
        patch_size=tuple(patch_size),
        channels=channels,
        mean=mean,
        std=std,
        class_tokens=class_tokens,
        position="relative" if table is None else position_of([table], grid_shape, class_tokens),
        layer_scale=1.0 if any(name.endswith(".ls1.gamma") for name in weights) else None,
    )


def _image_size(weights: Arrays, class_tokens: int, patch_size: tuple[int, ...], facts: Facts) -> tuple[int, ...]:
    """Return the pixels along each axis, from the number of positions."""
    table, biases = weights.get(TABLE), weights.get(SHARED_TABLE)
    if table is not None and table.ndim == 3:
        rows = table.shape[1]
        numbers = {rows - class_tokens, rows}  # in some ViTs, class tokens have no position
    elif biases is not None and biases.ndim == 2:
        side = (isqrt(max(biases.shape[0] - CLASS_ROWS, 0)) + 1) // 2  # (2 side - 1)^2 offsets
        numbers = {side**2}
    else:
        raise ValueError(
            "source: expected a table of positions, or a relative position bias that all blocks share, got neither"
        )
    for said, is_certain in ((facts.config.get("image_size"), True), (facts.given.get("image_size"), False)):
        size: tuple[Any, ...] = tuple(said) if isinstance(said, list | tuple) else (said,) * len(patch_size)
        is_size = len(size) == len(patch_size) and all(type(length) is int and length > 0 for length in size)
        if is_size and prod(length // patch for length, patch in zip(size, patch_size, strict=True)) in numbers:
            return size
        if said is not None and is_certain:
            expected = f"{' or '.join(map(str, sorted(numbers)))} patches of {times(patch_size)}"
            raise ValueError(f"image_size: expected images of {expected} in config.json, got {shown(said)}")
    for number in sorted(numbers):
        if len(patch_size) == 2 and isqrt(number) ** 2 == number:
            return tuple(isqrt(number) * patch for patch in patch_size)
    raise ValueError(
        f"image_size: expected the size of images of {min(numbers)} patches of {times(patch_size)}, which the weights "
        "do not determine, got nothing"
    )


def _statistics(checkpoint: Checkpoint, channels: int, facts: Facts) -> tuple[tuple[float, ...] | None, ...]:
    """Return mean and deviation of each channel; None: the defaults."""
    timm = checkpoint.config.get("pretrained_cfg")
    timm = timm if isinstance(timm, dict) else {}
    found: list[tuple[float, ...] | None] = []
    for name in ("mean", "std"):
        values = checkpoint.preprocessing.get(f"image_{name}", timm.get(name))
        is_list = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        found.append(tuple(map(float, values)) if is_list and len(values) == channels else None)
    if None in found:
        facts.notes.append(f"mean and std of pixels: {'those of ImageNet' if channels == 3 else '0.5'} assumed")
        return None, None
    return tuple(found)


def _check_tensors(found: Full, sources: Mapping[str, str], what: str) -> None:
    """Raise ValueError unless the tensors fit the model; list those that do not."""
    weights, shapes = found.weights, found.shapes
    faults = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [sources.get(name, name) for name in weights if name not in shapes],
        "mismatched": [
            f"{name} {weights[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"source: expected the tensors of {what}, got {listed}")
    for name in shapes:
        if not np.issubdtype(weights[name].dtype, np.floating):
            raise ValueError(f"source: expected floating-point values, got {weights[name].dtype} in {name} of {what}")


@dataclass(frozen=True)
class Start:
    """Initial weights of a method.

    Parameters
    ----------
    weights
        Arrays by name, for all parts of the method in the source.
    line
        Text on the source, and on the parts that keep their initial weights.
    """

    weights: Arrays
    line: str


def _facts_of(encoder: EncoderConfig) -> dict[str, Any]:
    """Return the architecture of an encoder with all fields, defaults included."""
    usual = {"class_tokens": 1, "position": "absolute", "layer_scale": False}
    return {**usual, **encoder.architecture()}


_OF_ENCODER = (*ENCODER_FIELDS, "class_tokens", "position", "layer_scale")
NEW_PARTS = {"reconstruction": "reconstruct.", "cells": "cell_head.", "cell_norm": "cell_head."}
"""Fields of an architecture that concern a single part, and the names of that part; it is new if they differ."""


def start_from(found: ForeignWeights, place: str, method: object, shapes: Mapping[str, tuple[int, ...]]) -> Start:
    """Choose the initial weights of a method from a source.

    Parameters
    ----------
    found
        The weights of the source.
    place
        The source, for messages.
    method
        The method.
    shapes
        Shapes of its weights by name.

    Returns
    -------
    Start
        All weights if the methods are equal. If only reconstruction or cells differ, all but these parts. Else the
        encoder. Tables of positions fit the method's grid, see :func:`prmim_methods.positions.fit_positions`.

    Raises
    ------
    ValueError
        If the encoders differ in more than the size of the images, or tensors do not fit.
    """
    ours = architecture_of(method)
    source, target = encoder_of(found.architecture), encoder_of(ours)
    # Tables are fitted to the size of the images, and a fixed table can be the start of a learned one.
    wanted = replace(target, image_size=source.image_size)
    if (source.position, target.position) == ("absolute", "learned"):
        wanted = replace(wanted, position="absolute")
    check_architecture(_facts_of(wanted), _facts_of(source))
    weights = fit_positions(found.weights, source, target)
    different = [
        name
        for name in dict.fromkeys([*ours, *found.architecture])
        if name not in _OF_ENCODER and ours.get(name) != found.architecture.get(name)
    ]
    new = sorted({NEW_PARTS[name] for name in different if name in NEW_PARTS})
    other = [name for name in different if name not in NEW_PARTS]
    kept = [name for name in shapes if not name.startswith(tuple(new))]
    if other:
        kept = [name for name in shapes if _is_of_encoder(name)]
        got = shown(found.architecture.get(other[0])) if "method" in found.architecture else "an encoder"
        loaded = f"the encoder alone; {other[0]}: expected {shown(ours.get(other[0]))}, got {got}"
    else:
        loaded = f"without {' and '.join(part.rstrip('.') for part in new)}" if new else "all of them"
    fitted = [f"positions fitted to {times(target.grid.shape)} tokens"] if source.grid != target.grid else []
    line = "; ".join([f"Initial weights: {place} ({found.format}), {loaded}", *fitted, *found.notes])
    chosen = {name: weights[name] for name in kept if name in weights}
    check_tensors(
        {name: tuple(shapes[name]) for name in kept},
        {
            name: (array.shape, str(array.dtype), np.issubdtype(array.dtype, np.floating))
            for name, array in chosen.items()
        },
        place,
    )
    if not other and (surplus := [name for name in weights if name not in shapes and not name.startswith(tuple(new))]):
        raise ValueError(f"source: expected no tensor {_listed(surplus)}, got one in {place}")
    return Start(chosen, line)
