"""Masked image modelling in PyTorch: methods, training engines and modules."""

from prmim_methods.outputs import Comparison, Reconstruction
from prmim_torch.classifier import Classifier, ClassifierEngine
from prmim_torch.encoder import EncoderEngine, ImageEncoder, load_encoder
from prmim_torch.engine import Engine
from prmim_torch.foreign import import_weights, init_weights
from prmim_torch.interop import load_weights, save_weights
from prmim_torch.localmim import LocalMIM, LocalOutput
from prmim_torch.mae import MAE
from prmim_torch.maskalign import AlignOutput, MaskAlign
from prmim_torch.method import Method, PixelOutput
from prmim_torch.methods import METHODS, create_method
from prmim_torch.pixel_loss import PixelLoss
from prmim_torch.plan import make_plan
from prmim_torch.reconstruct import ProgressiveReconstruction, no_weight_decay
from prmim_torch.simmim import SimMIM
from prmim_torch.teacher import Teacher, TeacherOutput
from prmim_torch.videomae import VideoMAE

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
