"""Pre-training with prmim: data, configuration, the loop, pictures, and the command `prmim`.

The package knows no array framework; it reaches an engine of `prmim_torch` or `prmim_jax` by name when a run starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmim_train.config import PretrainConfig
    from prmim_train.loop import pretrain

__all__ = ["PretrainConfig", "pretrain"]

_HOMES = {"PretrainConfig": "prmim_train.config", "pretrain": "prmim_train.loop"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no sooner: the program must be able to say which of its packages is missing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
