"""Masked image modelling in JAX: methods, engines that train them, and parts for other trainers."""

from prmim_jax.classifier import Classifier, ClassifierEngine
from prmim_jax.engine import Comparison, Engine, Reconstruction
from prmim_jax.interop import load_weights, save_weights
from prmim_jax.mae import MAE
from prmim_jax.maskalign import AlignOutput, MaskAlign
from prmim_jax.method import Method, PixelOutput
from prmim_jax.methods import METHODS, create_method
from prmim_jax.plan import make_plan
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.simmim import SimMIM
from prmim_jax.teacher import Teacher, TeacherOutput

__all__ = [
    "MAE",
    "METHODS",
    "AlignOutput",
    "Classifier",
    "ClassifierEngine",
    "Comparison",
    "Engine",
    "MaskAlign",
    "Method",
    "PixelOutput",
    "ProgressiveReconstruction",
    "Reconstruction",
    "SimMIM",
    "Teacher",
    "TeacherOutput",
    "create_method",
    "load_weights",
    "make_plan",
    "save_weights",
]
