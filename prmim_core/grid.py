"""Grids: token positions in an image, a clip or a volume."""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, array_namespace, device_of

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """A regular grid of tokens in raster order (last axis fastest).

    Parameters
    ----------
    shape
        Tokens along each of one to three axes: (length,), (height, width) or (time, height, width).
    spacing
        Distance between neighbours along each axis, positive integers; None is 1 everywhere. Anisotropic data has
        unequal spacing: a scan with slices four voxels apart has (4, 1, 1).

    Raises
    ------
    TypeError
        If a size or a spacing is not an integer.
    ValueError
        If a size or a spacing is not positive, the number of axes is not 1 to 3, or squared distances reach 2**30
        (arithmetic is int32).

    Examples
    --------
    >>> grid = Grid((2, 3))
    >>> grid.num_tokens
    6
    >>> grid.positions.tolist()
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    >>> Grid((2, 3), spacing=(4, 1)).positions[-1].tolist()
    [4, 2]
    """

    shape: tuple[int, ...]
    spacing: tuple[int, ...] = None  # type: ignore[assignment]  # None in the call becomes ones below

    def __post_init__(self) -> None:
        shape = _positive_integers("shape", self.shape)
        if not 1 <= len(shape) <= 3:
            raise ValueError(f"shape: expected one to three axes, got {shape}")
        spacing = (1,) * len(shape) if self.spacing is None else _positive_integers("spacing", self.spacing)
        if len(spacing) != len(shape):
            raise ValueError(f"spacing: expected one number for each of the {len(shape)} axes, got {spacing}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "spacing", spacing)
        if self.max_squared_distance >= 2**30 or self.num_tokens >= 2**30:
            raise ValueError(
                f"shape: expected fewer than 2**30 tokens and squared distances below 2**30 (int32 arithmetic), "
                f"got shape {shape} with spacing {spacing}"
            )

    @property
    def axes(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, N."""
        return prod(self.shape)

    @property
    def max_squared_distance(self) -> int:
        """Squared distance between opposite corners, spacing applied."""
        return sum(((n - 1) * step) ** 2 for n, step in zip(self.shape, self.spacing, strict=True))

    @property
    def positions(self) -> NDArray[np.int32]:
        """Positions of the tokens, spacing applied, int32 (N, axes)."""
        return np.stack(self.coordinates(np.empty(0)), axis=1)

    def units(self, unit: tuple[int, ...]) -> "Grid":
        """Return the coarser grid of units, blocks of several tokens.

        Parameters
        ----------
        unit
            Tokens per unit along each axis; must divide :attr:`shape`.

        Raises
        ------
        TypeError
            If a size is not an integer.
        ValueError
            If the unit does not divide the grid.

        Examples
        --------
        >>> Grid((14, 14)).units((2, 2))
        Grid(shape=(7, 7), spacing=(2, 2))
        """
        unit = _positive_integers("unit", unit)
        if len(unit) != self.axes or any(n % size for n, size in zip(self.shape, unit, strict=True)):
            raise ValueError(f"unit: expected sizes that divide the grid {self.shape}, got {unit}")
        return Grid(
            tuple(n // size for n, size in zip(self.shape, unit, strict=True)),
            tuple(step * size for step, size in zip(self.spacing, unit, strict=True)),
        )

    def coordinates(self, like: Array) -> list[Array]:
        """Compute token positions per axis on the device of an array, without a copy.

        Parameters
        ----------
        like
            An array of the wanted library, on the wanted device.

        Returns
        -------
        list of array
            int32 (N,) for each axis, spacing applied.

        Examples
        --------
        >>> rows, columns = Grid((2, 3)).coordinates(np.empty(0))
        >>> rows.tolist(), columns.tolist()
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
        """
        xp = array_namespace(like)
        token = xp.arange(self.num_tokens, dtype=xp.int32, device=device_of(like))
        columns = []
        stride = self.num_tokens
        for size, step in zip(self.shape, self.spacing, strict=True):
            stride //= size
            columns.append(token // stride % size * step)
        return columns


def _positive_integers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise TypeError(f"{name}: expected a tuple of integers, got {values!r}")
    if not all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        raise TypeError(f"{name}: expected integers, got {values!r}")
    if not all(value > 0 for value in values):
        raise ValueError(f"{name}: expected positive integers, got {values!r}")
    return tuple(int(value) for value in values)
