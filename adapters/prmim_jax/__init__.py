"""Cheap masked image modelling in JAX: a method to train, and its parts for trainers of one's own."""

from prmim_jax.engine import Engine, Reconstruction
from prmim_jax.interop import load_weights, save_weights
from prmim_jax.mae import MAE, MAEOutput
from prmim_jax.methods import METHODS, create_method
from prmim_jax.plan import make_plan
from prmim_jax.reconstruct import ProgressiveReconstruction

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
