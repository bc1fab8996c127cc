"""Options left to the hardware: a table of capabilities, choices and reasons."""

import sys
from pathlib import Path

import pytest

from prmim_methods import hardware
from prmim_methods.hardware import (
    choose_compile,
    choose_precision,
    cpu_flags,
    cpu_vendor,
    is_slow,
    may_have_accelerator,
    physical_memory,
)

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
AVX2 = {"fma", "avx2"}
AVX512 = {*AVX2, "avx512f", "avx512_bf16"}
AMX = {*AVX512, "amx_tile", "amx_bf16"}
NEITHER = "the CPU has neither AMX-BF16 nor AVX512-BF16"

CPUS = [
    (set(), {}, "float32", "the instruction set of the CPU is unknown"),
    (AVX2, {}, "float32", NEITHER),
    ({*AVX2, "avx512f"}, {}, "float32", NEITHER),
    (AVX512, {}, "bfloat16", "the CPU has AVX512-BF16"),
    (AMX, {}, "bfloat16", "the CPU has AMX-BF16"),
    (AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, "float32", "ATEN_CPU_CAPABILITY=avx2 excludes AMX-BF16, AVX512-BF16"),
    (AVX512, {"ATEN_CPU_CAPABILITY": "avx512"}, "bfloat16", "the CPU has AVX512-BF16"),
    (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "float32", "ONEDNN_MAX_CPU_ISA=AVX2 excludes AVX512-BF16"),
    (AMX, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, "bfloat16", "the CPU has AVX512-BF16"),
    (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "bfloat16", "the CPU has AMX-BF16"),
    (AVX512, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "bfloat16", "the CPU has AVX512-BF16"),
]

ACCELERATORS = [
    ("cuda", (9, 0), "bfloat16", "compute capability 9.0"),
    ("cuda", (8, 0), "bfloat16", "compute capability 8.0"),
    ("cuda", (7, 5), "float32", "compute capability 7.5 is below 8.0"),
    ("cuda", (12, 0), "bfloat16", "compute capability 12.0"),
    ("cuda", None, "float32", "the compute capability is unknown"),
    ("mps", None, "float32", "bfloat16 is not measured on mps"),
    ("tpu", None, "bfloat16", "a TPU multiplies in bfloat16"),
]


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that pretends flags of the CPU and a clean environment."""

    def pretend(flags, environment=()):
        monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in dict(environment).items():
            monkeypatch.setenv(name, value)

    return pretend


@pytest.mark.parametrize(("flags", "environment", "value", "reason"), CPUS)
def test_the_precision_of_a_cpu_follows_its_flags_and_the_environment(cpu, flags, environment, value, reason):
    cpu(flags, environment)
    assert choose_precision("auto", "cpu", backend="torch") == (value, f"auto: {reason}")
    assert is_slow("bfloat16", "cpu", backend="torch") == (value == "float32")
    assert not is_slow("float32", "cpu", backend="torch")


@pytest.mark.parametrize("flags", [AVX2, AMX])
def test_jax_computes_in_float32_on_every_cpu(cpu, flags):
    cpu(flags)
    assert choose_precision("auto", "cpu", backend="jax") == ("float32", "auto: XLA is slower in bfloat16 on CPUs")
    assert is_slow("bfloat16", "cpu", backend="jax")


@pytest.mark.parametrize(("platform", "capability", "value", "reason"), ACCELERATORS)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_precision_of_an_accelerator_follows_its_capability(backend, platform, capability, value, reason):
    chosen = choose_precision("auto", platform, backend=backend, capability=capability)
    assert chosen == (value, f"auto: {reason}")
    assert not is_slow("bfloat16", platform, backend=backend)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "mps", "tpu"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_given_precision_is_kept(asked, platform):
    assert choose_precision(asked, platform, backend="torch") == (asked, "as given")


@pytest.mark.parametrize(
    ("asked", "platform", "has_compiler", "value", "reason"),
    [
        (True, "cpu", False, True, "as given"),
        (False, "cuda", True, False, "as given"),
        (None, "cuda", True, True, "auto: the device is a GPU"),
        (None, "cuda", False, False, "auto: Triton is not installed"),
        (None, "cpu", True, False, "auto: compiled steps are not faster on a CPU"),
        (None, "mps", True, False, "auto: not measured on mps"),
    ],
)
def test_only_steps_on_cuda_are_compiled_unless_given(asked, platform, has_compiler, value, reason):
    assert choose_compile(asked, platform, has_compiler=has_compiler) == (value, reason)


@pytest.mark.parametrize(
    ("text", "vendor", "flags"),
    [
        (
            "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            "GenuineIntel",
            {"fpu", "amx_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "", {"fp", "asimd", "bf16"}),
        ("processor: 0\n", "", set()),
        (None, "", set()),
    ],
)
def test_vendor_and_flags_are_those_of_the_first_processor(monkeypatch, text, vendor, flags):
    def read(path):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert cpu_flags.__wrapped__() == flags
    assert cpu_vendor.__wrapped__() == vendor


@pytest.mark.parametrize(
    ("platform", "files", "expected"),
    [
        ("linux", [], False),
        ("linux", ["nvidiactl"], True),
        ("linux", ["kfd"], True),
        ("linux", ["accel0"], True),
        ("linux", ["vfio/vfio"], False),
        ("linux", ["vfio/0"], True),
        ("darwin", [], False),
        ("win32", [], True),
    ],
)
def test_device_files_tell_of_accelerators(monkeypatch, tmp_path, platform, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    assert may_have_accelerator() == expected


def test_the_memory_of_this_machine(monkeypatch):
    assert 2**28 < physical_memory() < 2**50
    monkeypatch.setattr("os.sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert physical_memory() is None
