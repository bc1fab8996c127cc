"""Choice of hardware-dependent options (``auto`` or null), without a framework."""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

CUDA_CAPABILITY = (8, 0)
"""Lowest compute capability with fast bfloat16 products (Ampere)."""
CPU_FLAGS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"}
"""CPU flags of fast bfloat16 products, and their names, fastest first."""
ONEDNN_ISA = {"amx_bf16": ("AMX",), "avx512_bf16": ("AMX", "BF16", "FP16")}
"""Parts of the values of ``ONEDNN_MAX_CPU_ISA`` that allow oneDNN to use a flag."""
DEVICES = Path("/dev")
ACCELERATORS = ("nvidiactl", "dxg", "kfd", "accel*", "vfio/[0-9]*")
"""Linux device files of GPUs (CUDA, WSL, ROCm) and TPUs."""


class Choice(NamedTuple, Generic[T]):
    """The effective value of an option, and the reason.

    Parameters
    ----------
    value
        The value.
    reason
        The reason, in a few words.
    """

    value: T
    reason: str


def choose_precision(
    asked: str, platform: str, *, backend: str, capability: tuple[int, int] | None = None
) -> Choice[str]:
    """Return the number format of a training step: ``"float32"`` or ``"bfloat16"``.

    Parameters
    ----------
    asked
        The option; any value but ``"auto"`` is returned unchanged.
    platform
        ``"cpu"``, ``"cuda"``, ``"mps"`` or ``"tpu"``.
    backend
        ``"torch"`` or ``"jax"``.
    capability
        Compute capability of a CUDA device. None: unknown.

    Examples
    --------
    >>> choose_precision("auto", "cuda", backend="torch", capability=(7, 5))
    Choice(value='float32', reason='auto: compute capability 7.5 is below 8.0')
    >>> choose_precision("bfloat16", "cpu", backend="torch")
    Choice(value='bfloat16', reason='as given')
    """
    if asked != "auto":
        return Choice(asked, "as given")
    value, reason = _precision_on_cpu(backend) if platform == "cpu" else _precision_on_accelerator(platform, capability)
    return Choice(value, f"auto: {reason}")


def is_slow(precision: str, platform: str, *, backend: str) -> bool:
    """Return whether the format is bfloat16 on a CPU that is slow in bfloat16."""
    return precision == "bfloat16" and platform == "cpu" and _precision_on_cpu(backend)[0] == "float32"


def choose_compile(asked: bool | None, platform: str, *, has_compiler: bool) -> Choice[bool]:
    """Return whether PyTorch compiles a training step.

    Parameters
    ----------
    asked
        The option; None: choose.
    platform
        ``"cpu"``, ``"cuda"`` or ``"mps"``.
    has_compiler
        Whether the compiler for the platform is installed.

    Examples
    --------
    >>> choose_compile(None, "cpu", has_compiler=True)
    Choice(value=False, reason='auto: compiled steps are not faster on a CPU')
    """
    if asked is not None:
        return Choice(asked, "as given")
    if platform != "cuda":
        known = "compiled steps are not faster on a CPU" if platform == "cpu" else f"not measured on {platform}"
        return Choice(False, f"auto: {known}")
    return Choice(has_compiler, "auto: the device is a GPU" if has_compiler else "auto: Triton is not installed")


def _precision_on_accelerator(platform: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    if platform == "tpu":
        return "bfloat16", "a TPU multiplies in bfloat16"
    if platform != "cuda":
        return "float32", f"bfloat16 is not measured on {platform}"
    if capability is None:
        return "float32", "the compute capability is unknown"
    found, lowest = ("{}.{}".format(*version) for version in (capability, CUDA_CAPABILITY))
    if capability >= CUDA_CAPABILITY:
        return "bfloat16", f"compute capability {found}"
    return "float32", f"compute capability {found} is below {lowest}"


def _precision_on_cpu(backend: str) -> tuple[str, str]:
    if backend == "jax":
        return "float32", "XLA is slower in bfloat16 on CPUs"
    flags = cpu_flags()
    if not flags:
        return "float32", "the instruction set of the CPU is unknown"
    for flag, name in CPU_FLAGS.items():
        if flag in flags and not _hidden_by(flag):
            return "bfloat16", f"the CPU has {name}"
    hidden = [flag for flag in CPU_FLAGS if flag in flags]
    if hidden:
        return "float32", f"{_hidden_by(hidden[0])} excludes {', '.join(CPU_FLAGS[flag] for flag in hidden)}"
    return "float32", f"the CPU has neither {' nor '.join(CPU_FLAGS.values())}"


@cache
def cpu_flags() -> frozenset[str]:
    """Return the flags of the CPU by Linux's names; empty if unknown."""
    return frozenset(_cpu_field("flags", "Features").split())


@cache
def cpu_vendor() -> str:
    """Return the vendor of the CPU, such as ``AuthenticAMD``; empty if unknown."""
    return _cpu_field("vendor_id")


def _cpu_field(*names: str) -> str:
    """Return the first field of these names in Linux's description of the CPU; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def physical_memory() -> int | None:
    """Return this machine's memory in bytes; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # AttributeError: Windows
        return None


def may_have_accelerator() -> bool:
    """Return whether this machine may have a GPU or TPU, judged without a framework."""
    if sys.platform == "linux":
        return any(any(DEVICES.glob(name)) for name in ACCELERATORS)
    return sys.platform != "darwin"  # neither framework uses Metal by default


def _hidden_by(flag: str) -> str:
    """Return the setting that disables a flag in PyTorch; empty if there is none."""
    capability, isa = (os.environ.get(name, "") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"))
    if capability.lower() in ("default", "avx2"):
        return f"ATEN_CPU_CAPABILITY={capability}"
    if isa.upper() not in ("", "ALL", "DEFAULT") and not any(part in isa.upper() for part in ONEDNN_ISA[flag]):
        return f"ONEDNN_MAX_CPU_ISA={isa}"
    return ""
