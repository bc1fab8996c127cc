"""Names of our weights in files of other libraries, for export and import.

A layout maps prefixes of our names to prefixes of the library's. ``*`` stands for the number of a block. The longest
matching prefix applies. Our ``attn.qkv`` is one linear layer. If a library has separate layers for queries, keys and
values, the layout lists three names; ``None`` stands for a missing tensor.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Layout = Mapping[str, Sequence[str | None]]
"""Prefixes of our names to the library's, one name, or one per part of equal length; empty without such a tensor."""


def _transformers_blocks(
    ours: str,
    theirs: str,
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after"),
    mlp: tuple[str, str] = ("intermediate.dense", "output.dense"),
) -> Layout:
    """Return the names of blocks in ``transformers`` files, readable by all releases."""
    parts = {
        "norm1": [norms[0]],
        "attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
        "attn.proj": ["attention.output.dense"],
        "norm2": [norms[1]],
        "mlp.fc1": [mlp[0]],
        "mlp.fc2": [mlp[1]],
    }
    return {f"{ours}.*.{part}.": [f"{theirs}.*.{name}." for name in names] for part, names in parts.items()}


def _transformers_encoder(prefix: str = "", **blocks: tuple[str, str]) -> Layout:
    return {
        "encoder.cls_token": [f"{prefix}embeddings.cls_token"],
        "encoder.pos_embed": [f"{prefix}embeddings.position_embeddings"],
        "encoder.patch_embed.proj.": [f"{prefix}embeddings.patch_embeddings.projection."],
        **_transformers_blocks("encoder.blocks", f"{prefix}encoder.layer", **blocks),
        "encoder.norm.": [f"{prefix}layernorm."],
    }


VIT: Layout = _transformers_encoder()
"""``ViTModel`` of transformers."""

PIXIO: Layout = _transformers_encoder(norms=("norm1", "norm2"), mlp=("mlp.fc1", "mlp.fc2"))
"""``PixioModel`` of transformers."""

BEIT: Layout = {
    **_transformers_encoder(),
    "encoder.mask_token": ["embeddings.mask_token"],
    # Its keys have no bias. A bias would have no effect after the softmax.
    "encoder.blocks.*.attn.qkv.bias": [
        "encoder.layer.*.attention.attention.query.bias",
        None,
        "encoder.layer.*.attention.attention.value.bias",
    ],
    "encoder.blocks.*.ls1.gamma": ["encoder.layer.*.lambda_1"],
    "encoder.blocks.*.ls2.gamma": ["encoder.layer.*.lambda_2"],
    "encoder.rel_pos_bias.": ["encoder.relative_position_bias."],
}
"""``BeitModel`` of transformers, SimMIM's encoder, with relative position bias and LayerScale."""

VIT_MAE: Layout = {
    **_transformers_encoder("vit."),
    "decoder.embed.": ["decoder.decoder_embed."],
    "decoder.mask_token": ["decoder.mask_token"],
    "decoder.pos_embed": ["decoder.decoder_pos_embed"],
    **_transformers_blocks("decoder.blocks", "decoder.decoder_layers"),
    "decoder.norm.": ["decoder.decoder_norm."],
    "decoder.pred.": ["decoder.decoder_pred."],
}
"""``ViTMAEForPreTraining`` of transformers."""

TIMM: Layout = {"encoder.": [""], "encoder.mask_token": []}
"""timm's ``VisionTransformer``, and the encoder in the files of most authors."""

TIMM_RELATIVE: Layout = {**TIMM, "encoder.rel_pos_bias.": ["shared_rel_pos."]}
"""timm's ``VisionTransformerRelPos``."""


def their_names(name: str, layout: Layout) -> list[str | None]:
    """Return the library's names of a weight, one per part; empty if it has none.

    Examples
    --------
    >>> their_names("encoder.blocks.3.norm1.bias", VIT)
    ['encoder.layer.3.layernorm_before.bias']
    >>> their_names("encoder.blocks.0.attn.qkv.bias", BEIT)[1:]
    [None, 'encoder.layer.0.attention.attention.value.bias']
    >>> their_names("cell_head.bias", VIT_MAE)
    []
    """
    number = re.search(r"\.blocks\.(\d+)\.", name)
    general = name if number is None else name.replace(number[0], ".blocks.*.", 1)
    beginnings = [beginning for beginning in layout if general.startswith(beginning)]
    if not beginnings:
        return []
    beginning = max(beginnings, key=len)
    rest, block = general.removeprefix(beginning), "*" if number is None else number[1]
    # If no prefix matches the blocks, their number is in the rest.
    return [None if found is None else (found + rest).replace("*", block) for found in layout[beginning]]


def to_library(weights: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Rename weights to a library's names, without those that it does not have.

    Parameters
    ----------
    weights
        Arrays by our names, of any library with slicing.
    layout
        The names.

    Returns
    -------
    dict
        Arrays by name; views where the library splits a tensor.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"encoder.blocks.0.attn.qkv.bias": np.arange(6), "cell_head.bias": np.zeros(3)}
    >>> found = to_library(weights, VIT)
    >>> {name.rpartition("attention.")[2]: part.tolist() for name, part in found.items()}
    {'query.bias': [0, 1], 'key.bias': [2, 3], 'value.bias': [4, 5]}
    """
    renamed = {}
    for name, weight in weights.items():
        names = their_names(name, layout)
        size = weight.shape[0] // max(len(names), 1) if names else 0
        for place, theirs in enumerate(names):
            if theirs is not None:
                renamed[theirs] = weight if len(names) == 1 else weight[place * size : (place + 1) * size]
    return renamed


def left_out(names: Iterable[str], layout: Layout) -> list[str]:
    """Return our names without a tensor in a library."""
    return [name for name in names if not their_names(name, layout)]
