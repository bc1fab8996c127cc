"""Cheap masked image modelling in PyTorch: a method to train, and its parts for trainers of one's own."""

from prmim_torch.engine import Engine, Reconstruction
from prmim_torch.interop import load_weights, save_weights
from prmim_torch.mae import MAE, MAEOutput
from prmim_torch.methods import METHODS, create_method
from prmim_torch.plan import make_plan
from prmim_torch.reconstruct import ProgressiveReconstruction

__all__ = [
    "MAE",
    "METHODS",
    "Engine",
    "MAEOutput",
    "ProgressiveReconstruction",
    "Reconstruction",
    "create_method",
    "load_weights",
    "make_plan",
    "save_weights",
]
