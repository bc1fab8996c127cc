"""MAE: masked autoencoder; also CrossMAE, MFF, PixMIM and AMT."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

from prmim_methods.cost import Accounting, CostReport, Parameters, PartCost, linear_parameters
from prmim_methods.encoder import position_option
from prmim_methods.method import PixelConfig, Rows, drop_path_option, mask_unit_option
from prmim_methods.record import option, record
from prmim_methods.sizes import CrossTransformer, Transformer, norm_bytes

FUSED = 6
"""Number of encoder blocks that MFF fuses, if the encoder has as many."""


@record
class MAEConfig(PixelConfig):
    """Masked autoencoder (MAE) with partial and progressive reconstruction.

    The encoder sees the visible tokens; the decoder sees the visible and the decoded ones. The features of the thrown
    tokens are reconstructed from the decoder's output. Decoded tokens predict the pixels of their patches, thrown ones
    the means of cells.

    With ``decoder="cross"`` (CrossMAE), the decoder sees only mask tokens, one per decoded token. They attend to the
    encoder's tokens, but not to each other.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377. Li et al., "PR-MIM: Delving Deeper
    into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746. Fu et al., "Rethinking Patch Dependence for
    Masked Autoencoders" (CrossMAE), arXiv 2401.14391.

    Examples
    --------
    >>> MAEConfig(image_size=(224, 448), model="vit_small").counts
    TokenCounts(visible=98, decoded=98, thrown=196)
    """

    name: ClassVar[str] = "mae"
    title: ClassVar[str] = "MAE"
    embed_bias: ClassVar[bool] = True
    """Whether the layer between encoder and decoder has a bias."""

    norm_pix: bool = option("Normalize each target patch by its own mean and standard deviation.", default=True)
    decoder: str = option(
        "Context that decoder blocks attend to.",
        default="self",
        choices={
            "self": "the visible and the decoded tokens",
            "cross": "learned mixes of the encoder's layers, without self-attention, as in CrossMAE",
        },
    )
    decoder_dim: int = option("Width of the decoder.", default=512, at_least=1)
    decoder_depth: int = option("Number of decoder blocks.", default=8, at_least=1)
    decoder_heads: int = option("Attention heads of the decoder.", default=16, at_least=1)
    fusion: str = option(
        "Input of the decoder from the encoder.",
        default="none",
        choices={
            "none": "the output of the last block",
            "mff": "a learned mean of the outputs of six blocks, as in MFF",
        },
    )
    token_decay: bool = option("Apply weight decay to the class token and the mask token.", default=True)
    mask_unit: int = mask_unit_option(default=1)
    class_tokens: int = option(
        "Class tokens of the encoder and the decoder, each with its own position.",
        default=1,
        at_least=0,
        at_most=1000,
    )
    position: str = position_option("Positions of the encoder and the decoder.", "absolute", "raster", "learned")
    drop_path: float = drop_path_option(default=0.0)

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        self._check_width("decoder_dim", "decoder_heads", self.decoder_size)
        if self.norm_pix and self.patch_dim < 2:
            raise ValueError("norm_pix: expected patches of at least 2 values to normalize, got patches of 1")
        if self.is_cross and self.fused_blocks:
            raise ValueError(f"fusion: expected 'none' for decoder 'cross', got {self.fusion!r}")

    @property
    def decoder_size(self) -> Transformer:
        """The size of the decoder."""
        return Transformer(self.decoder_dim, self.decoder_depth, self.decoder_heads)

    @property
    def fused_blocks(self) -> tuple[int, ...]:
        """Numbers of the fused encoder blocks, from 0, in order; empty without fusion.

        Block k D / 6, rounded down, for k = 0 .. 4, and the last of the D blocks: 0, 2, 4, 6, 8 and 11 of 12.

        Examples
        --------
        >>> MAEConfig(fusion="mff").fused_blocks
        (0, 2, 4, 6, 8, 11)
        """
        depth = self.encoder_size.depth
        shallow = {k * depth // FUSED for k in range(FUSED - 1)}
        return () if self.fusion == "none" else tuple(sorted({*shallow, depth - 1}))

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures; ``"loss"`` is the first.

        The weights of fused blocks are the last.
        """
        return (*super().losses, *(f"layer_weight_{block}" for block in self.fused_blocks))

    @property
    def cross_decoder_size(self) -> CrossTransformer:
        """The size of the cross-attention decoder."""
        return CrossTransformer(self.decoder_dim, self.decoder_depth, self.decoder_heads, self.encoder_size.dim)

    @property
    def is_cross(self) -> bool:
        """Whether the decoder uses cross-attention to the encoder's layers only."""
        return self.decoder == "cross"

    @property
    def has_visible_features(self) -> bool:
        """Whether visible tokens have features in the decoder's width.

        With cross-attention, they do only if thrown tokens are reconstructed from them, or if they predict cells.
        """
        return self.is_cross and (self.is_reconstructed or self.extra_cells == "known")

    @property
    def layer_mixes(self) -> tuple[int, int]:
        """Number of mixes that a cross-attention decoder reads, and of mixed layers.

        There is one mix per block, and one more for visible tokens with features. The layers are the input of the
        encoder's blocks and the output of each.
        """
        return self.decoder_depth + self.has_visible_features, 1 + self.encoder_size.depth

    @property
    def decoder_length(self) -> int:
        """Tokens of the decoder's sequence, class tokens included, or mask tokens only.

        With cross-attention, the decoder sees mask tokens only.
        """
        return self.counts.decoded + (0 if self.is_cross else self.counts.visible + self.class_tokens)

    @property
    def first_feature(self) -> int:
        """Place in plan order of the first token with features.

        0, or the place of the first decoded token.
        """
        return self.counts.visible if self.is_cross and not self.has_visible_features else 0

    @property
    def official_predictions(self) -> int:
        """Number of tokens that the original code predicts, the whole decoder sequence."""
        return self.decoder_length

    @property
    def _reconstructed_width(self) -> tuple[str, int]:
        return "decoder_dim", self.decoder_dim

    def parameters(self) -> Parameters:
        """Return the number of parameters, without building the model.

        Examples
        --------
        >>> MAEConfig().parameters()
        Parameters(learned=111665776, fixed=252160)
        """
        dim = self.decoder_dim
        blocks = self._cross_parameters() if self.is_cross else self._self_parameters()
        learned = dim + 2 * dim + linear_parameters(dim, self.patch_dim)  # mask token, final norm, head
        return (
            self._encoder_parameters()
            + self._fusion_parameters()
            + blocks
            + Parameters(learned)
            + self._table_parameters(dim)
            + self._reconstruction_parameters(dim)
            + self._cell_parameters(dim)
        )

    def _fusion_parameters(self) -> Parameters:
        dim, fused = self.encoder_size.dim, len(self.fused_blocks)
        return Parameters((fused - 1) * linear_parameters(dim, dim) + fused if fused else 0)

    def _self_parameters(self) -> Parameters:
        embed = (self.encoder_size.dim + self.embed_bias) * self.decoder_dim
        return Parameters(embed + self.decoder_size.parameters())

    def _cross_parameters(self) -> Parameters:
        dim, mixes = self.encoder_size.dim, prod(self.layer_mixes)
        learned = self.cross_decoder_size.parameters() + mixes
        if self.has_visible_features:
            learned += 2 * dim + linear_parameters(dim, self.decoder_dim)
        return Parameters(learned - 2 * dim, fixed=2 * dim)  # the encoder's final norm is not trained

    def cost(self, accounting: Accounting = Accounting()) -> CostReport:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image.

        Examples
        --------
        >>> official = MAEConfig().baseline().cost(Accounting(bookkeeping="official")).macs
        >>> ours = MAEConfig().cost().macs
        >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
        (9.781, 6.939, 0.291)
        """
        encoder, dim = self.encoder_size, self.decoder_dim
        embedded, predicted = self.counts.visible, len(self.patch_places)
        if accounting.is_official:
            embedded, predicted = self.counts.num_tokens, self.official_predictions
        reconstruction = "none" if accounting.is_official else self.reconstruction_in_effect
        num_cells = 0 if accounting.is_official else len(self.cell_places)
        recompute = self.recompute_blocks
        return CostReport(
            {
                "patch_embed": accounting.linear(embedded, self.patch_dim, encoder.dim),
                "encoder": accounting.blocks(
                    encoder, self.encoder_length, recompute=recompute, final_norm=not self.is_cross
                ),
                **({"fusion": self._fusion_cost(accounting)} if self.fused_blocks else {}),
                **(self._cross_costs(accounting) if self.is_cross else self._self_costs(accounting)),
                "stages": accounting.stages(self.schedule, dim, reconstruction),
                "head": accounting.head(predicted, dim, self.patch_dim),
                "cell_head": accounting.head(num_cells, dim, self.cell_dim),
            }
        )

    def _self_costs(self, accounting: Accounting) -> dict[str, PartCost]:
        return {
            "decoder_embed": accounting.linear(self.encoder_length, self.encoder_size.dim, self.decoder_dim),
            "decoder": accounting.blocks(self.decoder_size, self.decoder_length, recompute=self.recompute_blocks),
        }

    def _cross_costs(self, accounting: Accounting) -> dict[str, PartCost]:
        dim, length = self.encoder_size.dim, self.encoder_length
        mixes, layers = self.layer_mixes
        num_visible = self.counts.visible if self.has_visible_features else 0
        if accounting.is_official:
            mixes, num_visible = self.decoder_depth, 0
        embed = accounting.linear(num_visible, dim, self.decoder_dim)
        norms = norm_bytes(num_visible, dim) + norm_bytes(num_visible, self.decoder_dim)  # before and after
        return {
            "layer_mixes": accounting.layer_mixes(mixes, layers, length, dim),
            "decoder": accounting.cross_blocks(
                self.cross_decoder_size, self.decoder_length, length, recompute=self.recompute_blocks
            ),
            "decoder_embed": replace(embed, activation_bytes=embed.activation_bytes + norms),
        }

    def _fusion_cost(self, accounting: Accounting) -> PartCost:
        """Return the cost of projecting shallow outputs and averaging all outputs."""
        fused, length, dim = len(self.fused_blocks), self.encoder_length, self.encoder_size.dim
        projected = accounting.linear(length, dim, dim).times(fused - 1)
        return PartCost(projected.macs, projected.activation_bytes + fused * length * dim * 4)

    def not_decayed(self) -> frozenset[str]:
        """Return the class and mask tokens, unless they are decayed as in MAE."""
        return frozenset() if self.token_decay else frozenset({"encoder.cls_token", "decoder.mask_token"})

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        fusion = {} if self.fusion == "none" else {"fusion": self.fusion}
        cross = {"decoder": self.decoder, "visible_features": self.has_visible_features} if self.is_cross else {}
        return {
            **super().architecture(),
            **fusion,
            **cross,
            "norm_pix": self.norm_pix,
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
            **({} if self.position == "absolute" else {"position": self.position}),
        }

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        found = {
            **super().options_of(architecture),
            **{name: architecture[name] for name in ("norm_pix", "decoder_dim", "decoder_depth", "decoder_heads")},
            "fusion": architecture.get("fusion", "none"),
            "decoder": architecture.get("decoder", "self"),
            "class_tokens": architecture.get("class_tokens", 1),
            "position": architecture.get("position", "absolute"),
        }
        if found["reconstruction"] == "none" and architecture.get("visible_features"):
            found["extra_cells"] = "known"
        return found

    def _describe_sequences(self, dense: str) -> Rows:
        if self.is_cross:
            attended = f"attend to {self.encoder_length} encoder tokens in {self.decoder_depth} mixes of layers"
            return [
                ("encoder sequence", f"{self.encoder_length}, {self._class_text()}"),
                ("decoder queries", f"{self.decoder_length} (dense: {self.counts.masked}), {attended}"),
            ]
        fused = [("fused blocks", ", ".join(map(str, self.fused_blocks)))] if self.fused_blocks else []
        return [
            ("encoder sequence", f"{self.encoder_length}, {self._class_text()}"),
            *fused,
            ("decoder sequence", f"{self.decoder_length} ({dense})"),
        ]

    def _sequence_text(self) -> str:
        return f"decoder {'queries' if self.is_cross else 'sequence'} {self.decoder_length}"
