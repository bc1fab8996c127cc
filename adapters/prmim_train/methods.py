"""What is special about each method: its ratios, the options that only it has, the ways of throwing that it knows."""

from dataclasses import dataclass

from prmim_core.options import THROWING


@dataclass(frozen=True)
class MethodTraits:
    """What the trainer knows of a method.

    Parameters
    ----------
    title
        Its name in running text.
    mask_ratio
        Its own share of masked tokens, where none is given.
    throw_ratio
        Its own share of thrown tokens, of all; None: all masked tokens are thrown, and no other share is possible.
    options
        Those of its options that not every method has.
    throwing
        The ways of throwing that it knows, of `prmim_core.options.THROWING`.
    drop_path
        Its own rate of dropped branches, where it has that option.
    """

    title: str
    mask_ratio: float
    throw_ratio: float | None
    options: tuple[str, ...]
    throwing: tuple[str, ...] = THROWING
    drop_path: float = 0.0


METHODS = {
    "mae": MethodTraits(
        title="MAE",
        mask_ratio=0.75,
        throw_ratio=0.5,
        options=("furthest_from", "norm_pix", "decoder_dim", "decoder_depth", "decoder_heads"),
    ),
    "simmim": MethodTraits(
        title="SimMIM",
        mask_ratio=0.6,
        throw_ratio=0.25,
        options=("furthest_from", "mask_unit", "throw_by", "position", "layer_scale", "drop_path"),
        drop_path=0.1,
    ),
    "maskalign": MethodTraits(
        title="MaskAlign",
        mask_ratio=0.7,
        throw_ratio=None,
        options=("masking", "teacher", "teacher_layers", "fusion", "drop_path"),
        drop_path=0.1,
        # Nothing is decoded, so there is nothing to choose: the masked tokens are rebuilt, or they are not.
        throwing=("furthest", "none"),
    ),
}
"""Methods by name: the one table of which option belongs to which method. All others belong to every method."""

METHOD_OPTIONS = {name: traits.options for name, traits in METHODS.items()}
SPECIAL_OPTIONS = tuple(dict.fromkeys(option for options in METHOD_OPTIONS.values() for option in options))
"""The options that not every method has."""
