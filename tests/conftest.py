"""Shared fixtures: one wrapper per array library, and hypothesis settings.

Frameworks are imported when a test asks for one, not before.
"""

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import pytest

# XLA compiles in half of the time with few optimisations, and compiling takes most of the time of the tests on JAX.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

collect_ignore = ["hostile"]  # a script; test_hostile.py runs it

SLOW = ("/faults/", "distributed", "test_hostile", "test_benchmark_quality")
"""Parts of the names of modules that start processes."""

# No database and no randomness: a test does tomorrow what it does today.
hypothesis.settings.register_profile("prmim", deadline=None, derandomize=True, database=None, max_examples=50)
# A longer hunt for counterexamples, fresh each time: HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("search", deadline=None, database=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "prmim"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Exclude the collected tests and their imports from garbage collection.

    They are a million permanent objects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that take long to set up.

    xdist splits the end of the list, where a split sets up a module twice.
    """
    items.sort(key=lambda item: not any(part in item.nodeid for part in SLOW))


BACKENDS = (
    "numpy",
    "numpy:readonly",
    "strict",
    "torch",
    "jax",
    "jax:jit",
    "jax:x64",
    "torch:gpu",
    "jax:gpu",
)
"""The ids of the fixture ``xp``. Not among them, as it takes seconds: ``torch:compiled``."""

LIBRARIES = ("numpy", "strict", "torch", "jax:jit", "torch:gpu", "jax:gpu")
"""The ids of the fixture ``library``."""


@dataclass(frozen=True)
class Backend:
    """An array library, on one device, called in one way.

    Parameters
    ----------
    name
        One of `BACKENDS`, or ``"torch:compiled"``.
    library
        The top module that its arrays are of.
    module
        The namespace to hand to functions that make arrays.
    device
        Where its arrays must be; compared with ``device_of``.
    index_dtype
        The dtype of its ``argsort``.
    """

    name: str
    library: str
    module: Any
    device: Any
    index_dtype: str

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Set what is global in the library, and put it back."""
        if self.library != "jax":
            yield
            return
        import jax

        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.default_device(self.device))
            if self.name == "jax:x64":
                if not hasattr(jax, "enable_x64"):  # still experimental in older versions
                    jax = importlib.import_module("jax.experimental")
                stack.enter_context(jax.enable_x64(True))
            yield

    def from_numpy(self, array: Any) -> Any:
        """Copy to an array of the library."""
        array = np.array(array)
        if self.name == "numpy:readonly":
            array.flags.writeable = False
        if self.library == "numpy":
            return array
        if self.library == "torch":
            return self.module.asarray(array).to(self.device)
        with self.context():
            return self.module.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        """Copy back to NumPy."""
        return np.asarray(array.cpu() if self.library == "torch" else array)

    def run(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Call ``function`` on arrays of the library, converted from NumPy.

        Jitted where the backend is.
        """
        with self.context():
            if self.name in ("jax:jit", "jax:x64", "jax:gpu"):
                import jax

                function = jax.jit(function)
            elif self.name == "torch:compiled":
                import torch

                # One graph or an error. The backend traces and differentiates but generates no code: Inductor takes
                # half a minute per function, and is not what is tested here.
                function = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
            return function(*(self.from_numpy(array) for array in arrays))

    def device_of(self, array: Any) -> Any:
        """Return the device in the terms of ``device``."""
        return next(iter(array.devices())) if self.library == "jax" else array.device

    def assert_equal(self, actual: Any, expected: Any, dtype: str | None = None) -> None:
        """Raise AssertionError unless ``actual`` equals ``expected``, a NumPy array.

        ``actual`` must be of this library, on this device.

        Parameters
        ----------
        actual
            What the tested function returned.
        expected
            Anything that NumPy can make an array of.
        dtype
            The exact dtype; ``"index"``: that of ``argsort``; None: any of the same kind (bool, integer, float).
        """
        values = self._assert_alike(actual, expected, dtype)
        np.testing.assert_array_equal(values, expected, strict=False, err_msg=self.name)

    def assert_close(
        self, actual: Any, expected: Any, *, rtol: float, atol: float = 0.0, dtype: str | None = None
    ) -> None:
        """Raise AssertionError as `assert_equal` does, but compare values to a tolerance."""
        values = self._assert_alike(actual, expected, dtype)
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol, err_msg=self.name)

    def _assert_alike(self, actual: Any, expected: Any, dtype: str | None) -> np.ndarray:
        expected = np.asarray(expected)
        library = type(actual).__module__.partition(".")[0].removesuffix("lib")
        # Not `assert`: pytest rewrites asserts in test modules and plugins only if it loads them itself.
        if library != self.library or not hasattr(actual, "shape"):
            raise AssertionError(f"{self.name}: expected an array of {self.library}, got {type(actual)}")
        if self.device_of(actual) != self.device:
            raise AssertionError(f"{self.name}: expected device {self.device}, got {self.device_of(actual)}")
        if tuple(actual.shape) != expected.shape:
            raise AssertionError(f"{self.name}: expected shape {expected.shape}, got {tuple(actual.shape)}")
        values = self.to_numpy(actual)
        name = self.index_dtype if dtype == "index" else dtype
        if name is not None and values.dtype != np.dtype(name):
            raise AssertionError(f"{self.name}: expected dtype {name}, got {values.dtype}")
        if values.dtype.kind != expected.dtype.kind:
            raise AssertionError(f"{self.name}: expected dtype of kind {expected.dtype.kind}, got {values.dtype}")
        return values


def make_backend(name: str) -> Backend:
    """Return the backend of a name; skip the test if it needs a missing GPU."""
    library, _, way = name.partition(":")
    if library == "numpy":
        return Backend(name, "numpy", np, "cpu", "int64")
    if library == "strict":
        strict = importlib.import_module("array_api_strict")
        # What jit cannot do, no test may do: shapes that depend on values.
        strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
        return Backend(name, "array_api_strict", strict, strict.Device("CPU_DEVICE"), "int64")
    if library == "torch":
        torch = importlib.import_module("torch")
        if way == "gpu" and not torch.cuda.is_available():
            pytest.skip("PyTorch sees no GPU")
        if way == "compiled":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates what its own compiler imports
                importlib.import_module("torch._inductor.compile_fx")
        device = torch.device("cuda", 0) if way == "gpu" else torch.device("cpu")
        return Backend(name, "torch", torch, device, "int64")
    jax = importlib.import_module("jax")
    try:
        device = jax.devices("gpu" if way == "gpu" else "cpu")[0]
    except RuntimeError:
        pytest.skip("JAX sees no GPU")
    return Backend(name, "jax", jax.numpy, device, "int64" if way == "x64" else "int32")


@pytest.fixture(params=BACKENDS)
def xp(request: pytest.FixtureRequest) -> Backend:
    """Every array library in every way.

    Restrict it with ``@pytest.mark.parametrize("xp", [...], indirect=True)``.
    """
    return make_backend(request.param)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Backend:
    """Every array library in one way, for tests of many shapes.

    JAX compiles each shape.
    """
    return make_backend(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: small tensors gain nothing by more."""
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let JAX compile each program once."""
    jax = importlib.import_module("jax")
    compilation_cache = importlib.import_module("jax.experimental.compilation_cache.compilation_cache")
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    # JAX asks once whether there is a folder; what it compiled before this may have told it that there is none.
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()  # compiled programs are large


@pytest.fixture
def get_backend() -> Callable[[str], Backend]:
    """Return a function from a name to a backend, for tests that compare two."""
    return make_backend


@pytest.fixture
def tiny_simmim() -> dict[str, Any]:
    """Return options of a small SimMIM: 4x4 tokens in 2x2 units, one visible."""
    return {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def make_images() -> Callable[..., Any]:
    """Return a function from a shape to random uint8 images in NumPy."""

    def make(*shape: int, seed: int = 0) -> Any:
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make
