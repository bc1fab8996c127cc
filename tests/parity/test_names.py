"""Both adapters have the same names, and take the same arguments."""

import importlib
import inspect
import pkgutil

import pytest

import prmim_jax
import prmim_torch

# What one of them has more, each because its framework asks for it.
ONLY_JAX = {
    "create_method": {"rngs"},
    # PyTorch has autocast, and draws from a global random state.
    **{name: {"rngs", "dtype"} for name in ("MAE", "SimMIM", "MaskAlign", "LocalMIM", "ScaleHead", "build_encoder")},
    **{name: {"rngs", "dtype"} for name in ("Linear", "PatchProjection", "PatchEmbed", "Attention", "Fusion")},
    **{name: {"rngs", "dtype"} for name in ("CrossAttention", "CrossBlock")},
    **{name: {"rngs", "dtype", "scan"} for name in ("Encoder", "Decoder", "CrossDecoder")},
    **{name: {"dtype"} for name in ("Classifier", "ImageEncoder", "ProgressiveReconstruction")},
    "PixelLoss": {"rngs", "dtype"},
    "Teacher": {"scan"},
    # A teacher's blocks are those of transformers in PyTorch.
    "Block": {"rngs", "dtype", "activation", "eps"},
    "Mlp": {"rngs", "dtype", "activation"},
    "LayerNorm": {"eps"},
    # A module is built on the device that the trainer chooses.
    "Trainer": {"make_module", "rate_scale"},
}
# XLA chooses kernels, and makes a loop of JAX's one kernel by itself. Programs of torch.export are PyTorch's own, and
# transformers has models of PyTorch only.
ONLY_TORCH_FILES = {"furthest", "cpu_kernels", "program", "transformers"}
# The device of a process decides how processes talk; flax sets modes by attributes; optimizers of optax have no state.
ONLY_TORCH = {
    "Processes": {"device"},
    "Classifier": {"train"},
    "Trainer": {"module", "moments", "statistics"},
    "bias_rows": {"device"},
}
MODULES = [module.name for module in pkgutil.iter_modules(prmim_jax.__path__)]
CLASSES = ["Engine", "Method", "MAE", "SimMIM", "MaskAlign", "LocalMIM", "Teacher", "Classifier", "ClassifierEngine"]
CLASSES += ["ImageEncoder", "EncoderEngine"]
PARTS = [
    ("trainer", "Trainer"),
    ("method", "PixelMethod"),
    ("method", "FeatureMethod"),
    ("vit", "Encoder"),
    ("vit", "Decoder"),
    ("cross_decoder", "CrossDecoder"),
]
OUTPUTS = ["PixelOutput", "AlignOutput", "LocalOutput", "TeacherOutput", "Reconstruction", "Comparison"]


def parameters(thing):
    # Of a class: flax hides the signature of the constructor behind its metaclass.
    function = thing.__init__ if inspect.isclass(thing) else thing
    return {p.name: (p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"}


def public(module):
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    }


def assert_alike(name, here, there):
    given, taken = parameters(here), parameters(there)
    assert set(taken) - set(given) == ONLY_JAX.get(name, set())
    assert set(given) - set(taken) == ONLY_TORCH.get(name, set()) & set(given)
    for key in set(given) & set(taken):
        assert taken[key] == given[key], key


def test_packages_export_the_same_names():
    assert prmim_jax.__all__ == prmim_torch.__all__
    assert set(prmim_jax.METHODS) == set(prmim_torch.METHODS)


def test_packages_have_the_same_files():
    files = {module.name for module in pkgutil.iter_modules(prmim_torch.__path__)}
    assert set(MODULES) == files - ONLY_TORCH_FILES


@pytest.mark.parametrize("name", MODULES)
def test_what_both_files_define_takes_the_same_arguments(name):
    here, there = (public(importlib.import_module(f"{package}.{name}")) for package in ("prmim_torch", "prmim_jax"))
    shared = sorted(set(here) & set(there))
    assert set(prmim_torch.__all__) & set(here) <= set(shared)
    for thing in shared:
        if inspect.isfunction(here[thing]) or (inspect.isclass(here[thing]) and "__init__" in vars(here[thing])):
            assert_alike(thing, here[thing], there[thing])


@pytest.mark.parametrize(
    ("file", "name"), [*(("__init__", name) for name in CLASSES), *PARTS], ids=[*CLASSES, *(name for _, name in PARTS)]
)
def test_classes_have_the_same_methods(file, name):
    suffix = "" if file == "__init__" else f".{file}"
    here, there = (
        getattr(importlib.import_module(f"{package}{suffix}"), name) for package in ("prmim_torch", "prmim_jax")
    )
    # JAX builds a module without memory by tracing its constructor, so it has nothing to initialise afterwards.
    more = {"forward", "reset_parameters", *ONLY_TORCH.get(name, ())}
    for key, thing in vars(here).items():
        if key.startswith("_") or key in more:
            continue
        other = inspect.getattr_static(there, key)
        if isinstance(thing, property):
            assert isinstance(other, property), key
        elif inspect.isfunction(thing):
            assert parameters(other) == parameters(thing), key
        else:
            assert other == thing, key
    if "forward" in vars(here):
        assert parameters(there.__call__) == parameters(here.forward)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_have_the_same_fields(name):
    here, there = (getattr(package, name).__annotations__ for package in (prmim_torch, prmim_jax))
    assert list(here) == list(there)
