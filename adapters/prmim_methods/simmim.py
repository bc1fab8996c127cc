"""SimMIM: mask tokens in the encoder, and a linear head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from prmim_core.counts import Rounding
from prmim_methods.cost import Accounting, CostReport, Parameters, linear_parameters
from prmim_methods.encoder import position_option
from prmim_methods.method import PixelConfig, Rows, drop_path_option, mask_unit_option
from prmim_methods.record import option, record


@record
class SimMIMConfig(PixelConfig):
    """SimMIM with partial and progressive reconstruction.

    The encoder sees the visible patches and a mask token for each decoded one. The features of the thrown tokens are
    reconstructed from the encoder's output. One linear layer predicts the pixels of the decoded tokens, another one the
    means of cells of the thrown ones.

    Notes
    -----
    The loss is the absolute error, a mean over the values of each target and over the masked tokens. 1e-5 is added to
    the number of pixels, as published. Thrown tokens never enter the encoder. This is our choice: the paper of PR-MIM
    does not mention SimMIM.

    References
    ----------
    Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886.

    Examples
    --------
    >>> SimMIMConfig().counts
    TokenCounts(visible=76, decoded=71, thrown=49)
    """

    name: ClassVar[str] = "simmim"
    title: ClassVar[str] = "SimMIM"
    float_rounding: ClassVar[Rounding] = "simmim_float"

    mask_ratio: float = 0.6
    throw_ratio: float = 0.25
    mask_unit: int = mask_unit_option(default=2)
    throw_by: str = option(
        "Unit of throwing.", default="token", choices={"token": "single tokens", "unit": "units of mask_unit"}
    )
    position: str = position_option("Positions of the encoder.", "relative", "absolute", "learned")
    layer_scale: float = option("Initial value of LayerScale on each branch of a block.", default=0.1, above=0, below=1)
    drop_path: float = drop_path_option()

    @property
    def throw_shape(self) -> tuple[int, ...] | None:
        """Tokens along each axis that are thrown together; None for single tokens."""
        return self.mask_shape if self.throw_by == "unit" else None

    @property
    def encoder_length(self) -> int:
        """Length of the encoder's sequence of class, visible and mask tokens."""
        return self.counts.visible + self.counts.decoded + 1

    def parameters(self) -> Parameters:
        """Return the number of parameters, without building the model."""
        dim = self.encoder_size.dim  # includes the mask token
        return (
            self._encoder_parameters()
            + Parameters(dim + linear_parameters(dim, self.patch_dim))
            + self._reconstruction_parameters(dim)
            + self._cell_parameters(dim)
        )

    @property
    def shared_bytes(self) -> int:
        """Bytes of the float32 attention bias, if all images share it."""
        is_shared = self.position == "relative" and self.counts.thrown == 0
        return 4 * self.encoder_size.heads * self.encoder_length**2 if is_shared else 0

    def cost(self, accounting: Accounting = Accounting()) -> CostReport:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image.

        Examples
        --------
        >>> official = SimMIMConfig().baseline().cost(Accounting(bookkeeping="official")).macs
        >>> ours = SimMIMConfig().cost().macs
        >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
        (17.679, 13.067, 0.261)
        """
        encoder, length = self.encoder_size, self.encoder_length
        embedded, predicted = self.counts.visible, len(self.patch_places)
        if accounting.is_official:
            embedded, predicted = self.counts.num_tokens, length - 1
        reconstruction = "none" if accounting.is_official else self.reconstruction_in_effect
        num_cells = 0 if accounting.is_official else len(self.cell_places)
        # LayerScale saves the outputs of both branches.
        scaled_bytes = 2 * length * encoder.dim * accounting.compute_bytes
        blocks = accounting.blocks(encoder, length, recompute=self.recompute_blocks, more_bytes=scaled_bytes)
        # The bias of every head, and an 8-byte table index per pair of tokens. If nothing is thrown, all images of a
        # batch share one bias.
        has_bias = self.position == "relative" and self.counts.thrown > 0
        bias_bytes = has_bias * length**2 * (encoder.heads * accounting.compute_bytes + 8)
        return CostReport(
            {
                "patch_embed": accounting.linear(embedded, self.patch_dim, encoder.dim),
                "encoder": replace(blocks, activation_bytes=blocks.activation_bytes + bias_bytes),
                "stages": accounting.stages(self.schedule, encoder.dim, reconstruction),
                "head": accounting.head(predicted, encoder.dim, self.patch_dim),
                "cell_head": accounting.head(num_cells, encoder.dim, self.cell_dim),
            }
        )

    def not_decayed(self) -> frozenset[str]:
        """Return the class token, as in SimMIM; mask token and bias table are decayed."""
        return frozenset({"encoder.cls_token"})

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        return {**super().architecture(), "position": self.position}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        return {**super().options_of(architecture), "position": architecture["position"]}

    def _describe_sequences(self, dense: str) -> Rows:
        return [("encoder sequence", f"{self.encoder_length}, with mask tokens and class token ({dense})")]

    def _sequence_text(self) -> str:
        return f"encoder sequence {self.encoder_length}"
