"""Pixel loss from features of visible and decoded tokens, for custom trainers."""

from collections.abc import Callable, Sequence
from math import prod

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from prmim_core import Plan, cell_means, image_statistics, normalize_patches, normalize_values, take_tokens
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.vit import Linear
from prmim_methods.method import cell_shape


class PixelLoss(nnx.Module):
    """Error of each masked token, from features of visible and decoded tokens.

    Decoded tokens predict the pixels of their patches with the trainer's head. Features of thrown tokens are
    reconstructed; a linear layer predicts the means of their cells, normalized over the image.

    Parameters
    ----------
    reconstruct
        The reconstruction, in the width of the features, on the grid of the tokens.
    patch_size
        Pixels of a patch along each axis.
    channels
        Channels of the images.
    norm_pix
        Whether the target of a decoded token is normalized over its patch, as in MAE.
    cells
        Cells along each side of a patch, a divisor of it; None: 2, or 1 along odd sides.
    dtype
        Dtype of the product of the linear layer; None: that of the parameters.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If a number is out of range, or patches and grid have different numbers of axes.

    Notes
    -----
    A subclass may override :meth:`error`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> from prmim_jax import PixelLoss, ProgressiveReconstruction, make_plan
    >>> schedule = Schedule(Grid((4, 4)), TokenCounts(visible=4, decoded=4, thrown=8))
    >>> plan = make_plan(schedule, jnp.arange(32).reshape(2, 16))
    >>> pixel_loss = PixelLoss(ProgressiveReconstruction(8, schedule.grid), (2, 2),
    ...     rngs=nnx.Rngs(0))
    >>> head = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    >>> features, patches = jnp.ones((2, 8, 8)), jnp.ones((2, 16, 12))
    >>> pixel_loss(features, plan, patches, head).shape  # the mean is the loss
    (2, 12)
    """

    def __init__(
        self,
        reconstruct: ProgressiveReconstruction,
        patch_size: Sequence[int],
        channels: int = 3,
        *,
        norm_pix: bool = True,
        cells: int | None = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch_size, self.channels, self.norm_pix = tuple(patch_size), channels, norm_pix
        self.cell_shape = cell_shape(self.patch_size, cells)
        if len(self.patch_size) != reconstruct.grid.axes:
            raise ValueError(f"patch_size: expected {reconstruct.grid.axes} axes, got {self.patch_size}")
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        self.reconstruct_norm = reconstruct
        self.cell_head = Linear(reconstruct.dim, prod(self.cell_shape) * channels, dtype=dtype, rngs=rngs)

    def __call__(self, features: Array, plan: Plan, patches: Array, head: Callable[[Array], Array]) -> Array:
        """Compute the error of each masked token.

        Parameters
        ----------
        features
            (batch, V + M, dim): features of the visible, then of the decoded tokens, in plan order.
        plan
            The plan of the batch, on the grid of the reconstruction.
        patches
            float (batch, N, prod(patch) * C): all patches in raster order, see ``prmim_core.patchify``, normalized as
            the trainer normalizes images.
        head
            Maps features (batch, M, dim) to patches (batch, M, prod(patch) * C).

        Returns
        -------
        Array
            (batch, N - V), in the order of ``plan.masked``. The mean is the loss of MAE.

        Raises
        ------
        TypeError
            If the patches do not hold floats.
        ValueError
            If shapes do not fit the plan, or the plan is on another grid.
        """
        return self.errors(*self.predict(features, plan, head), plan, patches)

    def predict(self, features: Array, plan: Plan, head: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Predict patches of decoded tokens and cells of thrown tokens.

        Returns (batch, M, prod(patch) * C) and (batch, T, prod(cells) * C).
        """
        features = self.reconstruct_norm(features, plan)
        visible, known = plan.schedule.counts.visible, plan.schedule.num_known(1)
        return head(features[:, visible:known]), self.cell_head(features[:, known:])

    def errors(self, predicted: Array, predicted_cells: Array, plan: Plan, patches: Array) -> Array:
        """Return the errors of the predictions of :meth:`predict`: (batch, N - V)."""
        expected = plan.schedule.grid.num_tokens, prod(self.patch_size) * self.channels
        if tuple(patches.shape[1:]) != expected:
            raise ValueError(
                f"patches: expected shape (batch, {expected[0]}, {expected[1]}), got {tuple(patches.shape)}"
            )
        target = take_tokens(patches, plan.decoded)
        thrown = normalize_values(take_tokens(patches, plan.thrown), *image_statistics(patches, self.channels))
        errors = self.error(predicted, normalize_patches(target) if self.norm_pix else target)
        cell_errors = self.error(predicted_cells, cell_means(thrown, self.patch_size, self.cell_shape))
        return jnp.concatenate([errors, cell_errors], axis=1)

    def error(self, predicted: Array, target: Array) -> Array:
        """Return the mean squared error (batch, n), in the precision of the target."""
        return jnp.square(predicted.astype(target.dtype) - target).mean(-1)
