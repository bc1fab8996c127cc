"""VideoMAE and VideoMAE V2: masked autoencoders of clips."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from prmim_core import TokenCounts
from prmim_core.counts import Rounding
from prmim_methods.encoder import times
from prmim_methods.mae import MAEConfig
from prmim_methods.method import Rows, throwing_option
from prmim_methods.record import Function, option, record

PHASES = 4
"""Tokens of a running cell, each in a different phase. Every time step advances phases by one."""


@record
class VideoMAEConfig(MAEConfig):
    """VideoMAE and VideoMAE V2 with partial and progressive reconstruction.

    A token is a cube of a clip: some frames, rows and columns. The axes of a clip are time, height and width; in a
    volume, the first axis acts as time. A mask is drawn for one time step and repeated in all others (a tube). Images
    of two axes have no time, so their mask is random. Otherwise, the method is MAE.

    Notes
    -----
    VideoMAE V2 draws a mask for the decoder too, a running cell over all tokens. Its decoder sees the visible tokens,
    and a mask token for each token that the cell keeps; the loss ignores visible ones. This is ``throwing`` ``"dual"``.
    Other choices decode masked tokens only. The cell passes through its four phases in four time steps. So it keeps the
    same number of visible tokens in all clips if the number of time steps is a multiple of 4.

    References
    ----------
    Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training",
    arXiv 2203.12602. Wang et al., "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking", arXiv 2303.16727.

    Examples
    --------
    >>> VideoMAEConfig().counts
    TokenCounts(visible=160, decoded=624, thrown=784)
    >>> dual = VideoMAEConfig(throwing="dual", reconstruction="none")
    >>> dual.counts, dual.decoder_length
    (TokenCounts(visible=160, decoded=704, thrown=704), 944)
    """

    name: ClassVar[str] = "videomae"
    title: ClassVar[str] = "VideoMAE"
    float_rounding: ClassVar[Rounding] = "amt_float"
    embed_bias: ClassVar[bool] = False

    image_size: tuple[int, ...] = (16, 224, 224)
    patch_size: tuple[int, ...] = (2, 16, 16)
    mask_ratio: float = 0.9
    throwing: str | Function = throwing_option(
        dual="a running cell over all tokens; its visible tokens are decoded too, without a loss (VideoMAE V2)"
    )
    norm_over: str = option(
        "Region over which norm_pix normalizes a target patch.",
        default="channel",
        choices={
            "channel": "each channel, in units of [0, 1] (VideoMAE)",
            "patch": "all its values (MAE)",
        },
    )
    decoder_dim: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    token_decay: bool = False
    class_tokens: int = 0
    position: str = "raster"

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        if self.norm_pix and self.norm_over == "channel" and prod(self.patch_size) < 2:
            raise ValueError("norm_over: expected 'patch' for patches of one pixel, got 'channel'")

    def _check_grid(self) -> None:
        super()._check_grid()
        if not self.is_dual:
            return
        if self.is_cross:
            raise ValueError("throwing: expected a choice other than 'dual' for decoder 'cross', got 'dual'")
        if self.time_steps % PHASES:
            got = times(self.grid.shape)
            raise ValueError(f"throwing: expected a multiple of {PHASES} time steps for 'dual', got a grid of {got}")
        if PHASES * self.throw_ratio not in range(PHASES):
            raise ValueError(f"throw_ratio: expected 0.25, 0.5 or 0.75 for throwing 'dual', got {self.throw_ratio}")

    @property
    def time_steps(self) -> int:
        """Number of time steps; 1 for images of fewer than three axes."""
        return self.grid.shape[0] if self.grid.axes == 3 else 1

    @property
    def is_dual(self) -> bool:
        """Whether the decoder also decodes the visible tokens that its mask keeps."""
        return self.throwing == "dual" and self.throw_ratio > 0

    @cached_property
    def mask_shape(self) -> tuple[int, ...]:
        """Tokens along each axis that are masked together, a tube in time."""
        unit = super().mask_shape
        return (self.time_steps, *unit[1:]) if self.grid.axes == 3 else unit

    @property
    def count_rounding(self) -> Rounding:
        """The rounding rule in effect. The number of masked tubes is rounded down."""
        return "amt" if self.rounding == "exact" else self.float_rounding

    @cached_property
    def counts(self) -> TokenCounts:
        """Number of visible, decoded and thrown tokens."""
        counts = super().counts
        if not self.is_dual:
            return counts
        thrown = int(PHASES * self.throw_ratio) * counts.masked // PHASES
        return TokenCounts(counts.visible, counts.masked - thrown, thrown)

    @property
    def plan_throwing(self) -> Any:
        """The throwing strategy of the schedule, a name or a function."""
        return "cell" if self.throwing == "dual" else super().plan_throwing

    @property
    def num_repeated(self) -> int:
        """Number of visible tokens that are decoded too, without a loss."""
        visible = self.counts.visible
        return visible - int(PHASES * self.throw_ratio) * visible // PHASES if self.is_dual else 0

    @property
    def decoder_length(self) -> int:
        """Tokens of the decoder's sequence."""
        return super().decoder_length + self.num_repeated

    @property
    def official_predictions(self) -> int:
        """Number of tokens that the original code predicts, those of the decoder mask."""
        return self.counts.decoded + self.num_repeated

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        return {**super().architecture(), **({"norm_over": self.norm_over} if self.norm_pix else {})}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        return {**super().options_of(architecture), "norm_over": architecture.get("norm_over")}

    def _describe_sequences(self, dense: str) -> Rows:
        rows = super()._describe_sequences(dense)
        if self.is_dual:
            rows.append(("decoded again", f"{self.num_repeated} visible tokens, without a loss"))
        return rows

    @property
    def norm_text(self) -> str:
        """Description of the normalization of target patches."""
        return "each channel of the patch" if self.norm_over == "channel" else super().norm_text
