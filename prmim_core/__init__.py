"""Masking, furthest sampling and reconstruction as pure functions of arrays.

Arguments are NumPy, PyTorch, JAX or other arrays that follow the array API standard. Results come from the same
library, on the same device. Randomness is an argument: equal noise gives equal integers on every library.

Arguments come in this order: static ones (grid, counts), noise, other arrays. ``known`` holds token indices,
``is_known`` is a bool mask. Shapes: N tokens per image; V are visible, M decoded, T thrown.
"""

from prmim_core.counts import TokenCounts, count_tokens
from prmim_core.coverage import covering_radius, nearest_known_distance
from prmim_core.drop_path import drop_path_scales
from prmim_core.grid import Grid
from prmim_core.hog import hog, hog_pyramid
from prmim_core.masking import (
    attention_weights,
    block_visible,
    random_visible,
    tube_visible,
    unattended_visible,
    weighted_visible,
)
from prmim_core.noise import counter_noise
from prmim_core.pooling import pool_units, unit_index
from prmim_core.reconstruct import (
    interpolate,
    num_offsets,
    offset_index,
    offset_squared_distances,
    reconstruct_stages,
    stage_weights,
)
from prmim_core.sampling import furthest_point_sampling
from prmim_core.schedule import Plan, Schedule, is_member, make_plan, take_tokens
from prmim_core.targets import (
    cell_means,
    denormalize_patches,
    denormalize_values,
    expand_cells,
    image_statistics,
    low_pass,
    normalize_over_image,
    normalize_patches,
    normalize_values,
    patch_grid,
    patch_statistics,
    patchify,
    unpatchify,
    window_statistics,
)
from prmim_core.throwing import cell_decoded, furthest_decoded, random_decoded, weighted_decoded

__all__ = [
    "Grid",
    "Plan",
    "Schedule",
    "TokenCounts",
    "attention_weights",
    "block_visible",
    "cell_decoded",
    "cell_means",
    "count_tokens",
    "counter_noise",
    "covering_radius",
    "denormalize_patches",
    "denormalize_values",
    "drop_path_scales",
    "expand_cells",
    "furthest_decoded",
    "furthest_point_sampling",
    "hog",
    "hog_pyramid",
    "image_statistics",
    "interpolate",
    "is_member",
    "low_pass",
    "make_plan",
    "nearest_known_distance",
    "normalize_over_image",
    "normalize_patches",
    "normalize_values",
    "num_offsets",
    "offset_index",
    "offset_squared_distances",
    "patch_grid",
    "patch_statistics",
    "patchify",
    "pool_units",
    "random_decoded",
    "random_visible",
    "reconstruct_stages",
    "stage_weights",
    "take_tokens",
    "tube_visible",
    "unattended_visible",
    "unit_index",
    "unpatchify",
    "weighted_decoded",
    "weighted_visible",
    "window_statistics",
]
