"""Framework-neutral definitions of the methods: options, sizes, costs, weights."""

from prmim_methods.classifier import ClassifierConfig
from prmim_methods.cost import Accounting, CostReport, PartCost
from prmim_methods.localmim import LocalMIMConfig
from prmim_methods.mae import MAEConfig
from prmim_methods.maskalign import MaskAlignConfig
from prmim_methods.method import DecodingConfig, MethodConfig, PixelConfig
from prmim_methods.methods import METHODS, create_config
from prmim_methods.simmim import SimMIMConfig
from prmim_methods.sizes import Transformer, vit_size
from prmim_methods.training import TrainingConfig
from prmim_methods.videomae import VideoMAEConfig

__all__ = [
    "METHODS",
    "Accounting",
    "ClassifierConfig",
    "CostReport",
    "DecodingConfig",
    "LocalMIMConfig",
    "MAEConfig",
    "MaskAlignConfig",
    "MethodConfig",
    "PartCost",
    "PixelConfig",
    "SimMIMConfig",
    "TrainingConfig",
    "Transformer",
    "VideoMAEConfig",
    "create_config",
    "vit_size",
]
