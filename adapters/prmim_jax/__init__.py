"""Masked image modelling in JAX: methods, training engines and modules."""

from prmim_jax.classifier import Classifier, ClassifierEngine
from prmim_jax.encoder import EncoderEngine, ImageEncoder, load_encoder
from prmim_jax.engine import Engine
from prmim_jax.foreign import import_weights, init_weights
from prmim_jax.interop import load_weights, save_weights
from prmim_jax.localmim import LocalMIM, LocalOutput
from prmim_jax.mae import MAE
from prmim_jax.maskalign import AlignOutput, MaskAlign
from prmim_jax.method import Method, PixelOutput
from prmim_jax.methods import METHODS, create_method
from prmim_jax.pixel_loss import PixelLoss
from prmim_jax.plan import make_plan
from prmim_jax.reconstruct import ProgressiveReconstruction, no_weight_decay
from prmim_jax.simmim import SimMIM
from prmim_jax.teacher import Teacher, TeacherOutput
from prmim_jax.videomae import VideoMAE
from prmim_methods.outputs import Comparison, Reconstruction

__all__ = [
    "MAE",
    "METHODS",
    "AlignOutput",
    "Classifier",
    "ClassifierEngine",
    "Comparison",
    "EncoderEngine",
    "Engine",
    "ImageEncoder",
    "LocalMIM",
    "LocalOutput",
    "MaskAlign",
    "Method",
    "PixelLoss",
    "PixelOutput",
    "ProgressiveReconstruction",
    "Reconstruction",
    "SimMIM",
    "Teacher",
    "TeacherOutput",
    "VideoMAE",
    "create_method",
    "import_weights",
    "init_weights",
    "load_encoder",
    "load_weights",
    "make_plan",
    "no_weight_decay",
    "save_weights",
]
