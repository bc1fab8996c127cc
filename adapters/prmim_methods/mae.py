"""MAE: masked autoencoder, dense, partial or PR-MIM."""

from typing import Any, ClassVar

from prmim_methods.cost import Accounting, CostReport, Parameters, linear_parameters
from prmim_methods.method import PixelConfig, Rows
from prmim_methods.record import option, record
from prmim_methods.sizes import Transformer


@record
class MAEConfig(PixelConfig):
    """Masked autoencoder (MAE) with partial and progressive reconstruction.

    The encoder sees the visible tokens; the decoder sees the visible and the decoded ones. The features of the thrown
    tokens are reconstructed from the decoder's output. Decoded tokens predict the pixels of their patches, thrown ones
    the means of cells.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377. Li et al., "PR-MIM: Delving Deeper
    into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.

    Examples
    --------
    >>> MAEConfig(image_size=(224, 448), model="vit_small").counts
    TokenCounts(visible=98, decoded=98, thrown=196)
    """

    name: ClassVar[str] = "mae"
    title: ClassVar[str] = "MAE"

    norm_pix: bool = option("Normalise each target patch by its own mean and standard deviation.", default=True)
    decoder_dim: int = option("Width of the decoder.", default=512, at_least=1)
    decoder_depth: int = option("Number of decoder blocks.", default=8, at_least=1)
    decoder_heads: int = option("Attention heads of the decoder.", default=16, at_least=1)

    def check(self) -> None:
        """Validate options that depend on one another."""
        super().check()
        self._check_width("decoder_dim", "decoder_heads", self.decoder_size, has_position_table=True)
        if self.norm_pix and self.patch_dim < 2:
            raise ValueError("norm_pix: expected patches of at least 2 values to normalise, got patches of 1")

    @property
    def decoder_size(self) -> Transformer:
        """The size of the decoder."""
        return Transformer(self.decoder_dim, self.decoder_depth, self.decoder_heads)

    @property
    def decoder_length(self) -> int:
        """Tokens of the decoder's sequence, with the class token."""
        return self.counts.visible + self.counts.decoded + 1

    @property
    def _reconstructed_width(self) -> tuple[str, int]:
        return "decoder_dim", self.decoder_dim

    def parameters(self) -> Parameters:
        """Return the number of parameters, from the options alone: nothing is built.

        Examples
        --------
        >>> MAEConfig().parameters()
        Parameters(learned=111665776, fixed=252160)
        """
        encoder, decoder = self.encoder_size, self.decoder_size
        learned = linear_parameters(encoder.dim, decoder.dim) + decoder.dim + decoder.parameters() + 2 * decoder.dim
        learned += linear_parameters(decoder.dim, self.patch_dim)
        return (
            self._encoder_parameters()
            + Parameters(learned, fixed=(self.grid.num_tokens + 1) * decoder.dim)
            + self._reconstruction_parameters(decoder.dim)
            + self._cell_parameters(decoder.dim)
        )

    def cost(self, accounting: Accounting = Accounting()) -> CostReport:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image.

        Examples
        --------
        >>> official = MAEConfig().baseline().cost(Accounting(bookkeeping="official")).macs
        >>> ours = MAEConfig().cost().macs
        >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
        (9.781, 6.939, 0.291)
        """
        encoder, decoder = self.encoder_size, self.decoder_size
        embedded, predicted = self.counts.visible, len(self.patch_places)
        if accounting.is_official:
            embedded, predicted = self.counts.num_tokens, self.decoder_length
        reconstruction = "none" if accounting.is_official else self.reconstruction_in_effect
        num_cells = 0 if accounting.is_official else len(self.cell_places)
        recompute = self.recompute_blocks
        return CostReport(
            {
                "patch_embed": accounting.linear(embedded, self.patch_dim, encoder.dim),
                "encoder": accounting.blocks(encoder, self.encoder_length, recompute=recompute),
                "decoder_embed": accounting.linear(self.encoder_length, encoder.dim, decoder.dim),
                "decoder": accounting.blocks(decoder, self.decoder_length, recompute=recompute),
                "stages": accounting.stages(self.schedule, decoder.dim, reconstruction),
                "head": accounting.head(predicted, decoder.dim, self.patch_dim),
                "cell_head": accounting.head(num_cells, decoder.dim, self.cell_dim),
            }
        )

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`MethodConfig.architecture`."""
        return {
            **super().architecture(),
            "norm_pix": self.norm_pix,
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
        }

    def _describe_sequences(self, dense: str) -> Rows:
        return [
            ("encoder sequence", f"{self.encoder_length}, with the class token"),
            ("decoder sequence", f"{self.decoder_length} ({dense})"),
        ]

    def _sequence_text(self) -> str:
        return f"decoder sequence {self.decoder_length}"
