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
    "MAE": {"rngs"},
    "Encoder": {"rngs"},
    "Decoder": {"rngs"},
    **{name: {"rngs"} for name in ("Linear", "PatchProjection", "PatchEmbed", "Attention", "Mlp", "Block")},
}
MODULES = [module.name for module in pkgutil.iter_modules(prmim_torch.__path__)]


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
    more = ONLY_JAX.get(name, set())
    taken = parameters(there)
    assert set(taken) - set(parameters(here)) == more
    assert {key: value for key, value in taken.items() if key not in more} == parameters(here)


def test_packages_export_the_same_names():
    assert prmim_jax.__all__ == prmim_torch.__all__
    assert set(prmim_jax.METHODS) == set(prmim_torch.METHODS)


def test_packages_have_the_same_files():
    assert [module.name for module in pkgutil.iter_modules(prmim_jax.__path__)] == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_what_both_files_define_takes_the_same_arguments(name):
    here, there = (public(importlib.import_module(f"{package}.{name}")) for package in ("prmim_torch", "prmim_jax"))
    shared = sorted(set(here) & set(there))
    assert set(prmim_torch.__all__) & set(here) <= set(shared)
    for thing in shared:
        if inspect.isfunction(here[thing]) or (inspect.isclass(here[thing]) and "__init__" in vars(here[thing])):
            assert_alike(thing, here[thing], there[thing])


@pytest.mark.parametrize("name", ["MAE", "Engine"])
def test_classes_have_the_same_methods(name):
    here, there = getattr(prmim_torch, name), getattr(prmim_jax, name)
    methods = {key: thing for key, thing in vars(here).items() if not key.startswith("_") and key != "forward"}
    for key, thing in methods.items():
        if isinstance(thing, property):
            assert isinstance(inspect.getattr_static(there, key), property)
        else:
            assert parameters(getattr(there, key)) == parameters(thing)
    assert [field.name for field in inspect.getattr_static(prmim_jax.MAEOutput, "__dataclass_fields__").values()] == [
        field.name for field in inspect.getattr_static(prmim_torch.MAEOutput, "__dataclass_fields__").values()
    ]
    assert prmim_jax.Reconstruction._fields == prmim_torch.Reconstruction._fields
