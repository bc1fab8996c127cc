"""Masked image modelling in JAX: methods, engines that train them, and parts for other trainers."""

from prmim_jax.classifier import Classifier, ClassifierEngine
from prmim_jax.engine import Comparison, Engine, Reconstruction
from prmim_jax.interop import load_official_weights, load_weights, save_weights
from prmim_jax.localmim import LocalMIM, LocalOutput
from prmim_jax.mae import MAE
from prmim_jax.maskalign import AlignOutput, MaskAlign
from prmim_jax.method import Method, PixelOutput
from prmim_jax.methods import METHODS, create_method
from prmim_jax.plan import make_plan
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.simmim import SimMIM
from prmim_jax.teacher import Teacher, TeacherOutput
from prmim_jax.videomae import VideoMAE

__all__ = [
    "MAE",
    "METHODS",
    "AlignOutput",
    "Classifier",
    "ClassifierEngine",
    "Comparison",
    "Engine",
    "LocalMIM",
    "LocalOutput",
    "MaskAlign",
    "Method",
    "PixelOutput",
    "ProgressiveReconstruction",
    "Reconstruction",
    "SimMIM",
    "Teacher",
    "TeacherOutput",
    "VideoMAE",
    "create_method",
    "load_official_weights",
    "load_weights",
    "make_plan",
    "save_weights",
]
