"""Predictability of patch targets from neighbours, on a user's images.

Measured by ridge regression. The inputs are the pixels of the adjacent patches (four in an image), normalized over the
image, without patches at the border. The share of the explained variance is measured on other images. Thrown tokens see
only features of other tokens, so a target that adjacent pixels do not explain asks too much of them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report, argument_parser
from prmim_core import Grid, cell_means, normalize_over_image, normalize_patches, patch_grid, patchify
from prmim_train.data.sources import open_source
from prmim_train.data.transforms import center_crop
from prmim_train.report.figures import new_figure, save_figure, write_caption

Array = NDArray[np.float64]

LUMINANCE = (0.299, 0.587, 0.114)
ITSELF, IMAGE = "patch, normalized by itself", "patch, normalized over the image"
TEST_SHARE = 0.25
"""Share of the images on which the regression is tested."""


class Explained(NamedTuple):
    """Explained variance of targets, given adjacent patches.

    Parameters
    ----------
    targets
        Number of values and share of the explained variance, by target.
    spectra
        Share of the explained variance by frequency, in periods per patch, for each normalization of the patch. The
        coefficients of the discrete cosine transform (DCT) of a patch are taken together in steps of half a period.
    coefficients
        The same for each DCT coefficient, in the shape of a patch, lowest frequencies first.
    """

    targets: dict[str, tuple[int, float]]
    spectra: dict[str, dict[float, float]]
    coefficients: dict[str, Array]


def read_luminance(data: str, count: int, size: int, channels: int) -> Array:
    """Return the luminance of evenly spaced images, in [0, 1].

    Shape (images, size, size, 1). Other numbers of channels are averaged.
    """
    source = open_source(data, channels=channels)
    chosen = np.linspace(0, len(source), min(count, len(source)), endpoint=False).astype(int)
    images = np.stack([center_crop(source.read(int(index)), (size, size)) for index in chosen]) / 255
    weights = np.asarray(LUMINANCE if channels == 3 else [1 / channels] * channels)
    return (images @ weights)[..., None]


def adjacent(grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens with both neighbours along each axis, and their neighbours.

    Shapes (n,) and (n, 2 * axes).

    Examples
    --------
    >>> inner, neighbours = adjacent(Grid((3, 3)))
    >>> inner.tolist(), neighbours.tolist()
    ([4], [[1, 7, 3, 5]])
    """
    numbers = np.pad(np.arange(grid.num_tokens).reshape(grid.shape), 1, constant_values=-1)
    middle = (slice(1, -1),) * grid.axes
    moved = [np.roll(numbers, step, axis)[middle] for axis in range(grid.axes) for step in (1, -1)]
    neighbours = np.stack(moved, axis=-1).reshape(grid.num_tokens, -1)
    inner = np.flatnonzero((neighbours >= 0).all(axis=1))
    return inner, neighbours[inner]


def targets_of(patches: Array, patch_size: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yield each target by name: (images, N, values)."""
    yield ITSELF, normalize_patches(patches)
    yield IMAGE, normalize_over_image(patches, patches, 1)
    for cells in range(min(patch_size) - 1, 0, -1):
        if all(side % cells == 0 for side in patch_size):
            means = cell_means(patches, patch_size, (cells,) * len(patch_size))
            yield f"{' x '.join([str(cells)] * len(patch_size))} cell means", normalize_over_image(means, patches, 1)


def explain(images: Array, patch_size: tuple[int, ...]) -> Explained:
    """Regress the targets of inner patches on the pixels of their neighbours.

    Parameters
    ----------
    images
        (images, axes..., 1).
    patch_size
        Pixels of a patch along each axis.
    """
    from scipy.fft import dctn
    from sklearn.linear_model import Ridge

    grid = patch_grid(images.shape[1:-1], patch_size)
    inner, neighbours = adjacent(grid)
    patches = patchify(images, patch_size)
    num_test = max(1, round(TEST_SHARE * len(images)))
    seen = normalize_over_image(patches, patches, 1)[:, neighbours].reshape(len(images), len(inner), -1)

    def shares(target: Array) -> tuple[Array, Array]:
        """Return the explained and the total variance of each target value.

        Measured on the test images.
        """
        wanted = target[:, inner].reshape(len(images), len(inner), -1)
        model = Ridge(alpha=1.0)
        model.fit(_rows(seen[num_test:]), _rows(wanted[num_test:]))
        test = _rows(wanted[:num_test])
        error = ((model.predict(_rows(seen[:num_test])).reshape(test.shape) - test) ** 2).sum(axis=0)
        variance = ((test - test.mean(axis=0)) ** 2).sum(axis=0)
        return variance - error, variance

    targets, spectra, coefficients = {}, {}, {}
    for name, target in targets_of(patches, patch_size):
        explained, variance = shares(target)
        targets[name] = (target.shape[-1], float(explained.sum() / variance.sum()))
        if name in (ITSELF, IMAGE):
            axes = tuple(range(-len(patch_size), 0))
            spectrum = dctn(target.reshape(*target.shape[:2], *patch_size), axes=axes, norm="ortho")
            explained, variance = shares(spectrum.reshape(target.shape))
            spectra[name] = _by_frequency(explained, variance, patch_size)
            constant = variance < 1e-9 * variance.sum()  # the mean of a patch that is normalized by itself
            coefficients[name] = np.where(constant, np.nan, explained / variance).reshape(patch_size)
    return Explained(targets, spectra, coefficients)


def _by_frequency(explained: Array, variance: Array, patch_size: tuple[int, ...]) -> dict[float, float]:
    """Return the explained share by frequency.

    Each DCT coefficient counts by its variance.
    """
    index = np.stack(np.meshgrid(*map(np.arange, patch_size), indexing="ij"), axis=-1)
    halves = np.sqrt((index**2).sum(axis=-1)).round().reshape(-1)
    shares = {}
    for step in np.unique(halves):
        whole = variance[halves == step].sum()
        if whole > 1e-9 * variance.sum():  # the mean of a patch that is normalized by itself does not vary
            shares[float(step) / 2] = float(explained[halves == step].sum() / whole)
    return shares


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def draw(found: Explained, path: Path, caption: str) -> None:
    """Draw the share of the explained variance: by target, and by frequency."""
    figure = new_figure(9.0, 3.4)
    bars, lines = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
    names = list(found.targets)[::-1]
    colours = ["#b5543c" if name == ITSELF else "#2a9d5c" for name in names]
    bars.barh(names, [found.targets[name][1] for name in names], color=colours)
    for place, name in enumerate(names):
        bars.text(found.targets[name][1] + 0.01, place, f"{found.targets[name][1]:.2f}", va="center", fontsize=8)
    bars.set_xlim(0, 1.1)
    bars.set_xlabel("explained share of the variance")
    for name, colour in ((ITSELF, "#b5543c"), (IMAGE, "#2a9d5c")):
        shares = found.spectra[name]
        lines.plot(list(shares), list(shares.values()), color=colour, marker="o", markersize=4, label=name)
    lines.set_xlabel("frequency in periods per patch")
    lines.set_ylabel("explained share")
    lines.set_ylim(0, 1)
    lines.legend(frameon=False, fontsize=8)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    write_caption(figure, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and draw the figure if asked to."""
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default="digits", metavar="SOURCE", help="images, as for prmim pretrain")
    parser.add_argument("--image_size", type=int, default=16, metavar="PIXELS", help="side of the central square")
    parser.add_argument("--patch_size", type=int, default=4, metavar="PIXELS", help="side of a patch")
    parser.add_argument("--channels", type=int, default=3, help="channels of the images")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="number of images that are read")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure to this file")
    options = parser.parse_args(arguments)
    try:
        grid = patch_grid((options.image_size,) * 2, (options.patch_size,) * 2)
        if min(grid.shape) < 3 or options.patch_size < 2:
            raise ValueError(f"patch_size: expected patches of 2 pixels or more, at least 3 x 3 of them, got {grid}")
        images = read_luminance(options.data, options.images, options.image_size, options.channels)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    settings = {name: getattr(options, name) for name in ("data", "image_size", "patch_size")}
    settings = {**settings, "data": Path(options.data).stem, "images": len(images)}
    report = Report("targets", settings, options.json)
    found = explain(images, (options.patch_size,) * 2)
    report.table("explained by adjacent patches", {"values": "d", "share": ".2f"}, found.targets)
    if options.plot is not None:
        about = f"{settings['data']}, {len(images)} images of {options.image_size} pixels, patches of "
        draw(found, options.plot, f"{about}{options.patch_size}. Ridge regression, tested on other images.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
