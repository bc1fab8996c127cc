"""LocalMIM: encoder layers predict the image at several scales."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from prmim_methods.cost import Accounting, CostReport, Parameters, PartCost, linear_parameters
from prmim_methods.encoder import times
from prmim_methods.messages import shown
from prmim_methods.method import DecodingConfig, Predicts, Rows
from prmim_methods.record import find_option, option, record
from prmim_methods.sizes import Transformer, norm_bytes

SCALES = (4.0, 2.0, 1.0, 0.5)
"""The published scales."""


@record
class LocalMIMConfig(DecodingConfig):
    """LocalMIM with partial and progressive reconstruction.

    The encoder sees the visible tokens. Several encoder layers have a small decoder each, which sees the visible and
    the decoded tokens and predicts one scale. Shallow layers predict small cells of the image, deep layers large cells.
    The features of the thrown tokens are reconstructed from each decoder's output.

    Notes
    -----
    Scale 4 has 4 x 4 cells per token, scale 0.5 one cell for 2 x 2 tokens. Decoded and thrown tokens predict the same
    targets. The error of a token at a scale is the mean squared error of its cells, or of the cell that contains it.
    The errors of all scales are added. The loss is a mean over tokens, with weights 1 (decoded) and ``thrown_weight``.

    References
    ----------
    Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv 2303.05251.

    Examples
    --------
    >>> config = LocalMIMConfig()
    >>> config.counts
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> dict(zip(config.scales_in_effect, config.layers_in_effect))
    {4.0: 2, 2.0: 4, 1.0: 10, 0.5: 12}
    """

    name: ClassVar[str] = "localmim"
    title: ClassVar[str] = "LocalMIM"
    predicts: ClassVar[Predicts] = "features"

    target: str = option(
        "Target of each cell.",
        default="hog",
        choices={
            "hog": "a histogram of oriented gradients per channel",
            "pixels": "the mean of its pixels per channel, normalized over the image",
        },
    )
    bins: int = option("Bins of a histogram of oriented gradients.", default=9, at_least=1, at_most=1000)
    scales: Sequence[float] | None = option(
        "Cells along each side of a token, one number per decoder (0.5, 1, 2, 4, ...), in decreasing order. Null: all "
        "of 4, 2, 1, 0.5 that fit the sizes of image and patch.",
        default=None,
        at_least=0.5,
    )
    layers: Sequence[int] | None = option(
        "Encoder block that each decoder reads, counted from 1; the last one must be the encoder's last. Null: 2, 4, "
        "depth - 2 and depth; with fewer scales, the last of these.",
        default=None,
        at_least=1,
        rising=True,
    )
    decoder_dim: int = option("Width of the decoder.", default=256, at_least=1)
    decoder_depth: int = option("Number of decoder blocks.", default=1, at_least=1)
    decoder_heads: int = option("Attention heads of the decoder.", default=8, at_least=1)

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        self._check_scales()
        self._check_layers()
        self._check_width("decoder_dim", "decoder_heads", self.decoder_size)
        finest = max(int(max(self.scales_in_effect)), 1)
        if self.decoder_dim % finest:
            raise ValueError(f"decoder_dim: expected a multiple of {finest} for scale {finest}, got {self.decoder_dim}")
        if self.target == "hog" and (len(self.image_size) != 2 or min(self.image_size) < 2):
            raise ValueError(
                "target: expected 'pixels' unless images have two axes of at least 2 pixels, "
                f"got 'hog' for {times(self.image_size)}"
            )

    def _check_scales(self) -> None:
        scales = self.scales_in_effect
        if any(scale not in (0.5, *(2**power for power in range(17))) for scale in scales):
            raise ValueError(f"scales: expected 0.5 or powers of 2, got {shown(list(scales))}")
        if any(finer <= coarser for finer, coarser in pairwise(scales)):
            raise ValueError(f"scales: expected decreasing numbers, got {shown(list(scales))}")
        for scale in scales:
            if not self._fits(scale):
                raise ValueError(
                    f"scales: expected scales that cut patches of {times(self.patch_size)} pixels, or a grid of "
                    f"{times(self.grid.shape)} tokens, into whole cells, got {scale:g}"
                )

    def _fits(self, scale: float) -> bool:
        """Return whether cells of this scale are whole pixels and fill the image."""
        if scale < 1:
            return not any(length % 2 for length in self.grid.shape)
        return not any(size % scale for size in self.patch_size)

    def _check_layers(self) -> None:
        layers, depth = self.layers_in_effect, self.encoder_size.depth
        if len(layers) != len(self.scales_in_effect):
            given = None if self.layers is None else list(self.layers)
            raise ValueError(
                f"layers: expected one for each of the {len(self.scales_in_effect)} scales, got {shown(given)}"
            )
        if layers[-1] != depth:
            raise ValueError(f"layers: expected the last to be the depth {depth}, got {shown(list(layers))}")

    @property
    def compared_text(self) -> str:
        """Description of the compared features, for pictures."""
        what = {"hog": "histograms of oriented gradients", "pixels": "mean colours"}[self.target]
        return f"Predicted and true {what} of all cells of a token, or of the cell that contains the token."

    @property
    def scales_in_effect(self) -> tuple[float, ...]:
        """Cells along each side of a token, for each decoder."""
        return tuple(filter(self._fits, SCALES) if self.scales is None else self.scales)

    @property
    def layers_in_effect(self) -> tuple[int, ...]:
        """Encoder block that each decoder reads, counted from 1."""
        if self.layers is not None:
            return tuple(self.layers)
        depth = self.encoder_size.depth
        published = sorted(min(max(layer, 1), depth) for layer in (2, 4, depth - 2, depth))
        return tuple(published[-len(self.scales_in_effect) :])

    @property
    def cell_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Pixels of a cell along each axis, for each scale."""
        return tuple(tuple(int(size / scale) for size in self.patch_size) for scale in self.scales_in_effect)

    @property
    def map_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Cells of an image along each axis, for each scale."""
        return tuple(tuple(int(length * scale) for length in self.grid.shape) for scale in self.scales_in_effect)

    @property
    def unit(self) -> tuple[int, ...]:
        """Tokens of a cell of scale 0.5 along each axis."""
        return (2,) * self.grid.axes

    @property
    def cell_values(self) -> int:
        """Number of predicted values per cell."""
        return self.channels * (self.bins if self.target == "hog" else 1)

    @property
    def decoder_size(self) -> Transformer:
        """The size of each decoder."""
        return Transformer(self.decoder_dim, self.decoder_depth, self.decoder_heads)

    @property
    def decoder_length(self) -> int:
        """Tokens of a decoder's sequence, with the class token."""
        return self.counts.visible + self.counts.decoded + 1

    @property
    def _reconstructed_width(self) -> tuple[str, int]:
        return "decoder_dim", self.decoder_dim

    def head_layers(self, scale: float) -> list[tuple[int, int, int]]:
        """Return the linear layers of a head: cells per token before, inputs, outputs.

        All but the last double the number of cells along each axis and halve the width.

        Examples
        --------
        >>> LocalMIMConfig().head_layers(4)
        [(1, 256, 512), (4, 128, 256), (16, 64, 27)]
        """
        children = 2**self.grid.axes
        doublings = max(int(scale).bit_length() - 1, 0)
        widths = [self.decoder_dim >> number for number in range(doublings + 1)]
        finer = [(children**number, widths[number], children * widths[number + 1]) for number in range(doublings)]
        return [*finer, (children**doublings, widths[-1], self.cell_values)]

    def _head_parameters(self, scale: float) -> int:
        layers = self.head_layers(scale)
        norms = sum(2 * inputs for _, inputs, _ in layers[1:-1])
        return norms + sum(linear_parameters(inputs, outputs) for _, inputs, outputs in layers)

    def parameters(self) -> Parameters:
        """Return the number of parameters, without building the model.

        Examples
        --------
        >>> LocalMIMConfig().parameters()
        Parameters(learned=89930812, fixed=353024)
        """
        encoder, decoder = self.encoder_size, self.decoder_size
        learned = linear_parameters(encoder.dim, decoder.dim) + decoder.dim + decoder.parameters() + 2 * decoder.dim
        one = Parameters(learned, fixed=(self.grid.num_tokens + 1) * decoder.dim)
        one += self._reconstruction_parameters(decoder.dim)
        total = self._encoder_parameters() + Parameters((len(self.scales_in_effect) - 1) * 2 * encoder.dim)
        for scale in self.scales_in_effect:
            total += one + Parameters(self._head_parameters(scale))
        return total

    def cost(self, accounting: Accounting = Accounting()) -> CostReport:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image.

        The cost of a decoder includes its projection and its head.

        Examples
        --------
        >>> official = LocalMIMConfig().baseline().cost(Accounting(bookkeeping="official")).macs
        >>> ours = LocalMIMConfig().cost().macs
        >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
        (5.234, 4.77, 0.089)
        """
        encoder, counts = self.encoder_size, self.counts
        embedded = counts.num_tokens if accounting.is_official else counts.visible
        reconstruction = "none" if accounting.is_official else self.reconstruction_in_effect
        stages = accounting.stages(self.schedule, self.decoder_dim, reconstruction)
        return CostReport(
            {
                "patch_embed": accounting.linear(embedded, self.patch_dim, encoder.dim),
                "encoder": accounting.blocks(encoder, self.encoder_length, recompute=self.recompute_blocks),
                **{f"decoder_x{scale:g}": self._decoder_cost(scale, accounting) for scale in self.scales_in_effect},
                "stages": stages.times(len(self.scales_in_effect)),
            }
        )

    def _decoder_cost(self, scale: float, accounting: Accounting) -> PartCost:
        encoder, decoder = self.encoder_size, self.decoder_size
        # The layer norm of the encoder's output, and the projection.
        norm = PartCost(0, norm_bytes(self.encoder_length, encoder.dim))
        cost = norm + accounting.linear(self.encoder_length, encoder.dim, decoder.dim)
        cost += accounting.blocks(decoder, self.decoder_length, recompute=self.recompute_blocks)
        predicted = self.decoder_length - 1 if accounting.is_official else self.num_supervised
        if scale < 1:
            predicted = self.counts.num_tokens // 2**self.grid.axes
        *finer, (cells, inputs, outputs) = self.head_layers(scale)
        for number, (coarse_cells, width, doubled) in enumerate(finer):
            length = predicted * coarse_cells
            cost += accounting.linear(length, width, doubled)
            if number:  # a layer norm and a GELU come before
                cost += PartCost(0, norm_bytes(length, width) + length * width * accounting.compute_bytes)
        return cost + accounting.head(predicted * cells, inputs, outputs)

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        return {
            **super().architecture(),
            "target": self.target,
            **({"bins": self.bins} if self.target == "hog" else {}),
            "scales": list(self.scales_in_effect),
            "layers": list(self.layers_in_effect),
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
        }

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        names = ("target", "scales", "layers", "decoder_dim", "decoder_depth", "decoder_heads")
        found = {name: architecture[name] for name in names}
        return {**super().options_of(architecture), **found, "bins": architecture.get("bins")}

    def _describe_sequences(self, dense: str) -> Rows:
        number = len(self.scales_in_effect)
        return [
            ("encoder sequence", f"{self.encoder_length}, with the class token"),
            ("decoder sequences", f"{number} of {self.decoder_length} ({dense})"),
        ]

    def _describe_targets(self) -> Rows:
        what = find_option(type(self), "target").rule.choices[self.target]
        bins = f" of {self.bins} bins" if self.target == "hog" else ""
        rows = [("  target", what + bins)]
        decoders = zip(self.scales_in_effect, self.layers_in_effect, self.map_shapes, self.cell_sizes, strict=True)
        for scale, layer, shape, cell in decoders:
            rows.append((f"  scale {scale:g}", f"{times(shape)} cells of {times(cell)} pixels, from block {layer}"))
        return rows

    def _sequence_text(self) -> str:
        return f"{len(self.scales_in_effect)} decoder sequences of {self.decoder_length}"
