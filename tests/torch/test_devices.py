"""No float64 on devices that lack it.

The meta device stands for one: it computes shapes and dtypes, but no values.
"""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prmim_core import counter_noise
from prmim_methods import ClassifierConfig, MAEConfig, SimMIMConfig, TrainingConfig, hardware
from prmim_methods.sizes import Transformer
from prmim_torch import MAE, Classifier, ClassifierEngine, Engine, SimMIM, Teacher, trainer
from tests import teachers

WIDE = (torch.float64, torch.complex64, torch.complex128)
SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}


class NothingWide(TorchDispatchMode):
    """Raises for a float64 or complex tensor on the meta device, read or made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype in WIDE:
                raise TypeError(f"{function}: {tensor.dtype}")
        return result


@pytest.fixture
def nothing_wide():
    with NothingWide():
        yield


@pytest.fixture
def engines_use_meta(monkeypatch):
    monkeypatch.setattr(trainer, "choose_device", lambda name: torch.device("meta"))
    # What MPS has, and meta has not.
    monkeypatch.setattr(trainer.Trainer, "_autocast", lambda self: contextlib.nullcontext())
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *arguments, **options: None)


BUILDERS = {
    "kernel": lambda: MAE(MAEConfig(**SIZES)),
    "interpolate": lambda: MAE(MAEConfig(**SIZES, reconstruction="interpolate", norm_pix=True)),
    "conv": lambda: MAE(MAEConfig(**SIZES, reconstruction="conv", cell_norm="window")),
    "simmim": lambda: SimMIM(SimMIMConfig(**SIZES, drop_path=0.5)),
    "linear": lambda: Classifier(MAEConfig(**SIZES), ClassifierConfig(protocol="linear"), 3),
    "finetune": lambda: Classifier(MAEConfig(**SIZES), ClassifierConfig(protocol="finetune"), 3),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_module_moves_and_computes_without_float64(name, nothing_wide):
    module = BUILDERS[name]().to("meta")
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8).to("meta")
    noise = counter_noise(0, 0, torch.arange(2).to("meta"), 16)
    output = module(images, noise)
    (output if isinstance(output, torch.Tensor) else output.loss).sum().backward()
    if isinstance(module, MAE | SimMIM):
        assert module.rebuilt_pixels(images, output).dtype == torch.float32
        assert module.features(images).dtype == torch.float32


def test_the_guard_notices_float64(nothing_wide):
    with pytest.raises(TypeError, match=r"torch\.float64$"):
        torch.zeros(1, dtype=torch.float64).to("meta")


@pytest.mark.parametrize("config", [MAEConfig(**SIZES), SimMIMConfig(**SIZES, drop_path=0.5)], ids=["mae", "simmim"])
def test_a_training_step_has_no_float64(config, nothing_wide, engines_use_meta):
    engine = Engine(config, TrainingConfig(clip_grad=1.0, precision="float32", device="cpu"))
    engine.train_step(np.zeros((2, 16, 16, 3), np.uint8), np.arange(2))
    assert engine.step == 1
    engine.close()


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_a_step_of_a_classifier_has_no_float64(protocol, nothing_wide, engines_use_meta):
    config = ClassifierConfig(protocol=protocol)
    engine = ClassifierEngine(MAEConfig(**SIZES), config, 3, TrainingConfig(precision="float32", device="cpu"))
    engine.train_step(np.zeros((2, 16, 16, 3), np.uint8), np.arange(2), np.full((2, 3), 1 / 3, np.float32))
    assert engine.step == 1
    engine.close()


def test_sums_without_float64_are_saved_in_float64(monkeypatch):
    monkeypatch.setattr(trainer, "HAVE_FLOAT64", ())
    engine = Engine(MAEConfig(**SIZES), TrainingConfig(precision="float32", device="cpu"))
    assert engine._sums.dtype == torch.float32
    assert engine._state()["sums"].dtype == torch.float64
    engine.close()


def test_a_teacher_keeps_its_weights_wherever_it_goes(tmp_path):
    images = torch.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).to(torch.uint8)
    folder = str(teachers.write_teacher(tmp_path))
    wanted = Teacher(folder, (4, 4), 3)(images)
    with torch.device("meta"):
        teacher = Teacher(folder, (4, 4), 3)
    for moved in (teacher, teacher.to("meta"), teacher.to_empty(device="cpu"), teacher.double().float()):
        torch.testing.assert_close(moved(images).hidden, wanted.hidden, rtol=0, atol=0)
    assert teacher.double()(images).hidden.dtype == torch.float64


def test_mps_is_refused_where_there_is_none():
    if torch.backends.mps.is_available():
        pytest.skip("there is one")
    message = r"^device: expected an available device, got 'mps', but torch finds no Metal device$"
    with pytest.raises(ValueError, match=message):
        Engine(MAEConfig(**SIZES), TrainingConfig(device="mps"))


def test_mps_is_refused_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert trainer.choose_device("mps") == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^device: expected cpu or cuda for 2 processes, got 'mps'$"):
        trainer.choose_device("mps")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", None, ("float32", "auto: the CPU has neither AMX-BF16 nor AVX512-BF16")),
        ("cuda:1", (8, 0), ("bfloat16", "auto: compute capability 8.0")),
        ("cuda:1", (7, 0), ("float32", "auto: compute capability 7.0 is below 8.0")),
        ("mps", None, ("float32", "auto: bfloat16 is not measured on mps")),
    ],
)
def test_the_precision_follows_the_device(monkeypatch, device, capability, expected):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    capabilities = {torch.device("cuda:1"): capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert trainer.precision_on("auto", torch.device(device)) == expected


def test_the_slowdown_of_bfloat16_is_measured_where_float32_is_chosen(monkeypatch):
    size = Transformer(dim=8, depth=1, heads=2)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    engines = {
        precision: Engine(MAEConfig(**SIZES), TrainingConfig(precision=precision, device="cpu"))
        for precision in ("auto", "bfloat16")
    }
    assert [engine.precision.value for engine in engines.values()] == ["float32", "bfloat16"]
    assert not any(engine.compiled.value for engine in engines.values())
    state = torch.random.get_rng_state()
    assert engines["auto"].measure_slowdown(size) is None
    assert engines["bfloat16"].measure_slowdown(size) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in engines["bfloat16"].method.parameters())
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert engines["bfloat16"].measure_slowdown(size) is None
    for engine in engines.values():
        engine.close()
