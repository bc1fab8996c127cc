"""The executable specification of prmim.

This package implements every definition a second time, as literally as possible: Python loops over Python integers for
discrete parts, float64 NumPy for continuous parts. It shares no code with ``prmim_core`` or the adapters, and is not
optimized. If a fast implementation disagrees with it, the fast implementation is wrong.

All modules follow the same conventions:

* A function describes **one image**: ``noise`` is a sequence of N integers, results are lists of integers.
* A token is its raster number 0 .. N-1. A set of tokens is a list of raster numbers.
* A grid is its ``shape``, a tuple of lengths. Token ``positions`` are tuples of integers (see `grid.positions`).
* Features are float64 arrays (tokens, channels), images are arrays (axes..., channels).

Only `forward` and `encode` of the methods take batches. They loop over the images.

Each module has the name of its counterpart in ``prmim_core`` or in the adapters.
"""

from prmim_reference import (
    counts,
    coverage,
    cross_decoder,
    drop_path,
    grid,
    hog,
    localmim,
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
    videomae,
    vit,
)

__all__ = [
    "counts",
    "coverage",
    "cross_decoder",
    "drop_path",
    "grid",
    "hog",
    "localmim",
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
    "videomae",
    "vit",
]
