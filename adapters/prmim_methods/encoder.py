"""Options of an encoder and its images, shared by all methods."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

from prmim_core import Grid, num_offsets, patch_grid
from prmim_methods.cost import Parameters, linear_parameters
from prmim_methods.messages import shown
from prmim_methods.record import Record, find_option, option, options, record
from prmim_methods.sizes import VIT_SIZES, Transformer, vit_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ENCODER_FIELDS = ("image_size", "patch_size", "channels", "mean", "std", "embed_dim", "depth", "num_heads")
"""Fields of every architecture; each is an option of the same name."""
CLASS_ROWS = 3
"""Rows of the class token at the end of a table of relative position bias."""
POSITIONS = {
    "absolute": "a fixed sine-cosine table",
    "raster": "a fixed sine-cosine table of the tokens' numbers in raster order",
    "learned": "a learned table",
    "relative": "a learned bias on the attention scores, shared by the blocks",
}


def position_option(text: str, *names: str) -> Any:
    """Declare the option ``position`` with some of the choices; the first is the default."""
    return option(text, default=names[0], choices={name: POSITIONS[name] for name in names})


def recompute_option() -> Any:
    """Declare the option ``recompute_blocks``."""
    return option(
        "Save only the inputs of blocks, and recompute the rest in the backward pass (activation checkpointing).",
        default=False,
    )


def scan_option() -> Any:
    """Declare the option ``scan_blocks``."""
    return option("Compile one block and loop over it, for faster compilation. Backend jax only.", default=False)


@record
class EncoderOptions(Record):
    """Options of an encoder and of its images."""

    model: str = option(
        "Size of the encoder.",
        default="vit_base",
        choices={name: f"width {size.dim}, {size.depth} blocks" for name, size in VIT_SIZES.items()},
    )
    embed_dim: int | None = option("Width of the encoder, in place of the model's.", default=None, at_least=1)
    depth: int | None = option("Number of encoder blocks, in place of the model's.", default=None, at_least=1)
    num_heads: int | None = option("Attention heads of the encoder, in place of the model's.", default=None, at_least=1)
    image_size: tuple[int, ...] = option(
        "Size of the images in pixels: one number for both sides, or height,width.", default=(224, 224), at_least=1
    )
    patch_size: tuple[int, ...] = option(
        "Size of a patch in pixels: one number for both sides, or height,width.", default=(16, 16), at_least=1
    )
    channels: int = option(
        "Channels of an image; images with another number are converted.", default=3, at_least=1, at_most=10_000
    )
    pixel_range: tuple[float, float] | None = option(
        "Range of pixel values that is mapped to [0, 1], as low,high. auto: measured at the start of the run. Values "
        "outside are clipped, and images keep the depth of their files up to the device. Null: images become 8 bits; "
        "16-bit values are divided by 257.",
        default=None,
        rising=True,
    )
    mean: tuple[float, ...] | None = option(
        "Mean of each channel, for pixels in [0, 1]. Null: ImageNet's for three channels, else 0.5.", default=None
    )
    std: tuple[float, ...] | None = option(
        "Standard deviation of each channel. Null: ImageNet's for three channels, else 0.5.", default=None, above=0
    )

    def check(self) -> None:
        """Validate combinations of options."""
        self._check_grid()
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError(f"pixel_range: expected low,high with low < high, got {self.pixel_range}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"{name}: expected one number for each of the {self.channels} channels, got {shown(list(values))}"
                )
        self._check_width("embed_dim", "num_heads", self.encoder_size)

    def _check_grid(self) -> None:
        if len(self.patch_size) != len(self.image_size):
            raise ValueError(
                f"patch_size: expected one number for each of the {len(self.image_size)} axes, got {self.patch_size}"
            )
        _ = self.grid

    def _check_width(self, name: str, heads_name: str, size: Transformer) -> None:
        if size.dim % size.heads:
            raise ValueError(f"{name}: expected a multiple of {heads_name} {size.heads}, got {size.dim}")
        axes = len(self.image_size)
        if self.position == "absolute" and size.dim % (2 * axes):
            raise ValueError(f"{name}: expected a multiple of {2 * axes} for images of {axes} axes, got {size.dim}")
        if self.position == "raster" and size.dim % 2:
            raise ValueError(f"{name}: expected an even number for position 'raster', got {size.dim}")

    @cached_property
    def grid(self) -> Grid:
        """The grid of the tokens."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def patch_dim(self) -> int:
        """Values in a patch."""
        return prod(self.patch_size) * self.channels

    @property
    def image_dtypes(self) -> tuple[str, ...]:
        """Accepted dtypes of images, uint8, and more with a ``pixel_range``."""
        return ("uint8",) if self.pixel_range is None else ("uint8", "uint16", "float32")

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean of each channel in effect."""
        return self._statistics(self.mean, IMAGENET_MEAN)

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel in effect."""
        return self._statistics(self.std, IMAGENET_STD)

    def _statistics(self, given: tuple[float, ...] | None, of_imagenet: tuple[float, ...]) -> tuple[float, ...]:
        if given is not None:
            return given
        return of_imagenet if self.channels == 3 else (0.5,) * self.channels

    @property
    def encoder_size(self) -> Transformer:
        """The size of the encoder."""
        return vit_size(self.model, self.embed_dim, self.depth, self.num_heads)

    @property
    def position(self) -> str:
        """Position encoding: ``"absolute"``, ``"raster"``, ``"learned"`` or ``"relative"``.

        ``"relative"`` is a bias on the attention scores.
        """
        return "absolute"

    @property
    def class_tokens(self) -> int:
        """Number of class tokens."""
        return 1

    @property
    def recompute_blocks(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return False

    @property
    def scan_blocks(self) -> bool:
        """Whether JAX compiles one block and loops over it."""
        return False

    @property
    def layer_scale(self) -> float | None:
        """Initial value of LayerScale in the encoder's blocks; None without LayerScale."""
        return None

    def _encoder_parameters(self) -> Parameters:
        """Return the number of parameters of the encoder, including its final norm."""
        size = self.encoder_size
        learned = linear_parameters(self.patch_dim, size.dim) + self.class_tokens * size.dim
        learned += size.parameters() + 2 * size.dim
        if self.layer_scale is not None:
            learned += 2 * size.depth * size.dim
        if self.position == "relative":
            return Parameters(learned + num_bias_rows(self.grid) * size.heads)
        return Parameters(learned) + self._table_parameters(size.dim)

    def _table_parameters(self, dim: int) -> Parameters:
        """Return the number of parameters of a position table of width ``dim``."""
        size = (self.class_tokens + self.grid.num_tokens) * dim
        return Parameters(size) if self.position == "learned" else Parameters(fixed=size)

    def encoder_architecture(self) -> dict[str, Any]:
        """Return the part of :meth:`architecture` for the images and the encoder."""
        size = self.encoder_size
        return {
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
            "channels": self.channels,
            "mean": list(self.pixel_mean),
            "std": list(self.pixel_std),
            "embed_dim": size.dim,
            "depth": size.depth,
            "num_heads": size.heads,
            **({} if self.class_tokens == 1 else {"class_tokens": self.class_tokens}),
            **({} if self.pixel_range is None else {"pixel_range": list(self.pixel_range)}),
        }

    def check_pool(self, pool: str | None, *, all_tokens: bool = False) -> None:
        """Raise ValueError unless the pool fits the encoder.

        ``"mean"`` always fits, ``"cls"`` if there is a class token, None with ``all_tokens``.
        """
        if pool is None and all_tokens:
            return
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool: expected 'mean' or 'cls', got {shown(pool)}")
        if pool == "cls" and self.class_tokens == 0:
            raise ValueError("pool: expected 'mean' for an encoder without class tokens, got 'cls'")

    def encoder_config(self, image_size: int | tuple[int, ...] | None = None) -> "EncoderConfig":
        """Return the record of the encoder alone.

        Parameters
        ----------
        image_size
            Size of the images, in place of this record's; one number for two equal sides.

        Raises
        ------
        ValueError
            If the patches do not divide the images, or the numbers of axes differ.
        """
        own = {item.name: getattr(self, item.name) for item in options(EncoderConfig)}
        if image_size is None:
            return EncoderConfig(**own)
        size = find_option(EncoderConfig, "image_size").check(image_size)
        patch = self.patch_size
        if len(size) != len(patch) or any(length % step for length, step in zip(size, patch, strict=True)):
            raise ValueError(f"image_size: expected multiples of the patch size {times(patch)}, got {times(size)}")
        return EncoderConfig(**{**own, "image_size": size})

    def check_layer(self, layer: int | None) -> None:
        """Raise ValueError unless ``layer`` is None or in [0, depth]."""
        depth = self.encoder_size.depth
        if layer is not None and (type(layer) is not int or not 0 <= layer <= depth):
            raise ValueError(f"layer: expected 0 to {depth}, the number of blocks, or null, got {shown(layer)}")

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that an architecture defines.

        Raises
        ------
        KeyError
            If a field is missing.
        """
        return {**{name: architecture[name] for name in ENCODER_FIELDS}, "pixel_range": architecture.get("pixel_range")}


@record
class EncoderConfig(EncoderOptions):
    """An encoder without a method, as in weight files of an encoder alone.

    Examples
    --------
    >>> config = EncoderConfig(model="vit_small", image_size=(448, 448), position="learned")
    >>> config.grid.shape, config.architecture()["position"]
    ((28, 28), 'learned')
    """

    class_tokens: int = option("Class tokens.", default=1, at_least=0, at_most=1000)
    position: str = position_option("Type of the positions.", *POSITIONS)
    layer_scale: float | None = option(
        "Initial value of LayerScale on each branch of a block. Null: no LayerScale.", default=None, above=0
    )
    recompute_blocks: bool = recompute_option()
    scan_blocks: bool = scan_option()

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        if self.position == "relative" and self.class_tokens != 1:
            raise ValueError(f"class_tokens: expected 1 for position 'relative', got {self.class_tokens}")

    def parameters(self) -> Parameters:
        """Return the number of parameters, without building the model."""
        return self._encoder_parameters()

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        return {
            **self.encoder_architecture(),
            **({} if self.position == "absolute" else {"position": self.position}),
            **({} if self.layer_scale is None else {"layer_scale": True}),
        }

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that an architecture defines.

        The initial value of LayerScale is left out, since the weights replace it.
        """
        return {
            **super().options_of(architecture),
            "class_tokens": architecture.get("class_tokens", 1),
            "position": architecture.get("position", "absolute"),
            "layer_scale": 1.0 if architecture.get("layer_scale") else None,
        }


def num_bias_rows(grid: Grid) -> int:
    """Return the number of rows of a table of relative position bias."""
    return num_offsets(grid) + CLASS_ROWS


def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the factor and the summand of each channel that normalize pixels in [0, 255].

    Examples
    --------
    >>> scale_and_shift((0.5,), (0.25,))
    ((0.01568627450980392,), (-2.0,))
    """
    return tuple(1 / (255 * deviation) for deviation in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def times(shape: tuple[int, ...]) -> str:
    """Format sizes for text.

    Examples
    --------
    >>> times((14, 14))
    '14 x 14'
    """
    return " x ".join(map(str, shape))
