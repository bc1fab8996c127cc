"""The test machinery itself: a helper that cannot fail proves nothing."""

import numpy as np
import pytest


def double(x):
    return x * 2


def test_arrays_make_the_round_trip(xp):
    for array in (np.arange(3), np.asarray([[True, False]]), np.asarray([0.5], dtype=np.float32)):
        there = xp.from_numpy(array)
        xp.assert_equal(there, array)
        np.testing.assert_array_equal(xp.to_numpy(there), array)


def test_run_calls_the_function_on_the_librarys_arrays(xp):
    result = xp.run(double, np.arange(3))
    xp.assert_equal(result, [0, 2, 4], dtype="index")
    xp.assert_close(xp.run(double, np.float32([0.5])), np.float32([1.0]), rtol=1e-6, dtype="float32")


@pytest.mark.parametrize(
    ("expected", "dtype", "message"),
    [
        ([0, 1, 3], None, "Mismatched elements"),
        ([[0, 1, 2]], None, "expected shape"),
        ([0, 1], None, "expected shape"),
        ([0.0, 1.0, 2.0], None, "expected dtype of kind f"),
        ([False, True, True], None, "expected dtype of kind b"),
        ([0, 1, 2], "int16", "expected dtype int16"),
    ],
)
@pytest.mark.parametrize("method", ["assert_equal", "assert_close"])
def test_assertions_raise(xp, method, expected, dtype, message):
    tolerance = {} if method == "assert_equal" else {"rtol": 1e-3}
    with pytest.raises(AssertionError, match=message):
        getattr(xp, method)(xp.from_numpy(np.arange(3)), expected, dtype=dtype, **tolerance)


def test_assert_close_raises_beyond_its_tolerance(xp):
    actual = xp.from_numpy(np.float32([1.0]))
    xp.assert_close(actual, [1.001], rtol=1e-2)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        xp.assert_close(actual, [1.1], rtol=1e-2)


@pytest.mark.parametrize("wrong", [[0, 1, 2], 3, None])
def test_assertions_raise_on_what_is_no_array(xp, wrong):
    with pytest.raises(AssertionError, match="expected an array of"):
        xp.assert_equal(wrong, [0, 1, 2])


@pytest.mark.parametrize(("xp", "other"), [("torch", "numpy"), ("numpy", "jax"), ("jax", "strict")], indirect=["xp"])
def test_assertions_raise_on_another_library(xp, other, get_backend):
    with pytest.raises(AssertionError, match=f"expected an array of {xp.library}"):
        xp.assert_equal(get_backend(other).from_numpy(np.arange(3)), np.arange(3))


@pytest.mark.parametrize("xp", ["torch"], indirect=True)
def test_assertions_raise_on_another_device(xp):
    import torch

    with pytest.raises(AssertionError, match="expected device cpu, got meta"):
        xp.assert_equal(torch.zeros(3, device="meta"), np.zeros(3))


@pytest.mark.parametrize("xp", ["numpy:readonly"], indirect=True)
def test_readonly_arrays_cannot_be_written(xp):
    def write(x):
        x[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        xp.run(write, np.zeros(3))


@pytest.mark.parametrize("xp", ["strict"], indirect=True)
def test_strict_arrays_refuse_shapes_that_depend_on_values(xp):
    x = xp.from_numpy(np.arange(3))
    with pytest.raises(RuntimeError, match="boolean"):
        x[x > 1]
    with pytest.raises(RuntimeError, match="data-dependent"):
        xp.module.nonzero(x)


@pytest.mark.parametrize("xp", ["jax:jit", "jax:x64"], indirect=True)
def test_jitted_backends_refuse_branches_on_values(xp):
    import jax

    with pytest.raises(jax.errors.TracerBoolConversionError):
        xp.run(lambda x: x if x[0] > 0 else -x, np.arange(3))


@pytest.mark.parametrize("xp", ["torch:compiled"], indirect=True)
def test_the_compiled_backend_refuses_branches_on_values(xp):
    import torch

    xp.assert_equal(xp.run(double, np.arange(3)), [0, 2, 4])
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        xp.run(lambda x: x if x[0] > 0 else -x, np.arange(3))


@pytest.mark.parametrize("xp", ["jax:x64"], indirect=True)
def test_x64_is_switched_off_again(xp):
    import jax.numpy as jnp

    assert xp.from_numpy(np.zeros(1)).dtype == jnp.float64
    assert jnp.zeros(1).dtype == jnp.float32
