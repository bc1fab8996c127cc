"""``prmim``, but that the loss on thrown tokens stops at the features that they are rebuilt from (PyTorch only).

What the tokens of a stage are mixed from counts as given then: their loss teaches the mixing and the head, and neither
the decoder nor the encoder.
"""

import sys

from torch import Tensor

from prmim_torch import ProgressiveReconstruction
from prmim_train.cli import main


def detach() -> None:
    """Cut the gradient in all modules that are built or have been."""
    mix = ProgressiveReconstruction._mix

    def mix_detached(self: ProgressiveReconstruction, known: Tensor, order: Tensor, size: int) -> Tensor:
        return mix(self, known.detach(), order, size)

    ProgressiveReconstruction._mix = mix_detached  # type: ignore[method-assign]


if __name__ == "__main__":
    detach()
    sys.exit(main())
