"""The executable specification of prmim.

Every definition of the project is written here once more, as literally as it can be said: Python loops over Python
integers for everything discrete, float64 NumPy for everything continuous. Nothing is shared with ``prmim_core`` or with
the adapters, nothing is optimised, and nothing is configurable beyond the definition itself: where a fast
implementation and this package disagree, the fast one is wrong.

One scheme runs through all modules, and keeps batches out of the definitions:

* a function describes **one image**: ``noise`` is a sequence of N integers, and index results are lists of integers;
* a token is its raster number 0 .. N-1, a set of tokens a list of raster numbers;
* a grid is its ``shape``, a tuple of lengths; its tokens' ``positions`` are tuples of integers (see `grid.positions`);
* features are float64 arrays (tokens, channels), images arrays (axes..., channels), channels last.

Only `forward` and `encode` of the methods take batches, and they loop over the images.

Modules carry the names of their counterparts in ``prmim_core`` (integers) and in the adapters (``vit``, ``method``,
``mae``, ``simmim``, ``maskalign``).
"""

from prmim_reference import (
    counts,
    coverage,
    drop_path,
    grid,
    mae,
    maskalign,
    masking,
    method,
    noise,
    reconstruct,
    resize,
    sampling,
    schedule,
    simmim,
    targets,
    throwing,
    vit,
)

__all__ = [
    "counts",
    "coverage",
    "drop_path",
    "grid",
    "mae",
    "maskalign",
    "masking",
    "method",
    "noise",
    "reconstruct",
    "resize",
    "sampling",
    "schedule",
    "simmim",
    "targets",
    "throwing",
    "vit",
]
