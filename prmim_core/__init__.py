"""Masking, furthest sampling and reconstruction schedules as pure functions over arrays of any library.

Arguments may be NumPy, PyTorch, JAX or any other arrays that follow the array API standard; results are of the same
kind, on the same device. Randomness is an argument everywhere: the same noise gives the same integers on every library.
"""

from prmim_core.cost import CostReport, PartCost, Transformer, cost, maskalign_cost, simmim_cost, vit_size
from prmim_core.counts import TokenCounts, count_tokens
from prmim_core.coverage import covering_radius, distance_histogram, nearest_known_distance, separation
from prmim_core.drop_path import drop_path_scales
from prmim_core.grid import Grid
from prmim_core.masking import block_visible, random_visible, tube_visible, weighted_visible
from prmim_core.noise import counter_noise, inverse_permutation, noise_rank
from prmim_core.reconstruct import interpolate, num_offsets, offset_index, offset_squared_distances, reconstruct_stages
from prmim_core.resize import resize_images, resize_matrix, resize_table
from prmim_core.sampling import furthest_point_sampling
from prmim_core.schedule import Plan, Schedule, is_member, make_plan, take_tokens
from prmim_core.targets import denormalize_patches, normalize_patches, patch_grid, patchify, unpatchify

__all__ = [
    "CostReport",
    "Grid",
    "PartCost",
    "Plan",
    "Schedule",
    "TokenCounts",
    "Transformer",
    "block_visible",
    "cost",
    "count_tokens",
    "counter_noise",
    "covering_radius",
    "denormalize_patches",
    "distance_histogram",
    "drop_path_scales",
    "furthest_point_sampling",
    "interpolate",
    "inverse_permutation",
    "is_member",
    "make_plan",
    "maskalign_cost",
    "nearest_known_distance",
    "noise_rank",
    "normalize_patches",
    "num_offsets",
    "offset_index",
    "offset_squared_distances",
    "patch_grid",
    "patchify",
    "random_visible",
    "reconstruct_stages",
    "resize_images",
    "resize_matrix",
    "resize_table",
    "separation",
    "simmim_cost",
    "take_tokens",
    "tube_visible",
    "unpatchify",
    "vit_size",
    "weighted_visible",
]
