"""``prmim`` with detached loss on thrown tokens (PyTorch only).

The loss on thrown tokens has no gradient with respect to the known features. It trains the reconstruction and the head,
but neither decoder nor encoder.
"""

import sys

from torch import Tensor

from prmim_torch import ProgressiveReconstruction
from prmim_train.cli.commands import main


def detach() -> None:
    """Stop the gradient of thrown tokens in all existing and future modules."""
    mix = ProgressiveReconstruction._mix

    def mix_detached(self: ProgressiveReconstruction, features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
        return mix(self, features.detach(), known, thrown)

    ProgressiveReconstruction._mix = mix_detached  # type: ignore[method-assign]


if __name__ == "__main__":
    detach()
    sys.exit(main())
