import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_methods.resize import resize_images, resize_matrix, resize_table

GENERATOR = np.random.default_rng(0)
SIZES = [((8, 8), (4, 4)), ((5, 7), (8, 3)), ((4, 6), (4, 9)), ((1, 3), (4, 2)), ((14, 14), (16, 12)), ((6, 4), (6, 4))]


def torch_resize(images, shape):
    torch = pytest.importorskip("torch")
    channels_first = torch.from_numpy(images).movedim(-1, 1)
    resized = torch.nn.functional.interpolate(channels_first, size=shape, mode="bicubic", align_corners=False)
    return resized.movedim(1, -1).numpy()


@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_images_are_resized_as_torch_does(source, target, dtype, tolerance):
    images = GENERATOR.random((2, *source, 3)).astype(dtype)
    resized = resize_images(images, target)
    assert resized.dtype == dtype
    np.testing.assert_allclose(resized, torch_resize(images, target), rtol=0, atol=tolerance)


def test_a_photo_is_resized_as_torch_does():
    images = GENERATOR.random((1, 224, 224, 3), dtype=np.float32)
    np.testing.assert_allclose(resize_images(images, (196, 196)), torch_resize(images, (196, 196)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("source", "target"), [*SIZES, ((9,), (5,)), ((2, 3, 4), (3, 3, 2))], ids=str)
def test_images_match_the_reference(xp, source, target):
    images = GENERATOR.random((2, *source, 3), dtype=np.float32)
    expected = np.stack([reference.resize.resize_image(image, target) for image in images])
    resized = xp.run(lambda images: resize_images(images, target), images)
    xp.assert_close(resized, expected, rtol=0, atol=1e-5, dtype="float32")


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integers_become_floats(xp, dtype):
    images = GENERATOR.integers(0, 256, (2, 4, 5, 1)).astype(dtype)
    for shape in ((4, 5), (3, 6)):
        expected = np.stack([reference.resize.resize_image(image, shape) for image in images])
        resized = xp.run(lambda images, shape=shape: resize_images(images, shape), images)
        xp.assert_close(resized, expected, rtol=0, atol=1e-3, dtype="float32")


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax:jit", "torch:compiled"], indirect=True)
def test_a_batch_gives_what_its_images_give(xp):
    images = GENERATOR.integers(0, 256, (3, 8, 6, 2)).astype(np.uint8)
    whole = resize_images(images, (5, 9))
    for chosen in (slice(None), slice(1, 2), slice(0, 0)):
        resized = xp.run(lambda images: resize_images(images, (5, 9)), images[chosen])
        xp.assert_close(resized, whole[chosen], rtol=1e-4, atol=1e-3, dtype="float32")


@given(st.integers(1, 40), st.integers(1, 40))
def test_matrices_match_the_reference(source, target):
    matrix = resize_matrix(source, target)
    assert matrix.dtype == np.float64
    # Pixels of the identity are resized to the columns of the matrix.
    expected = reference.resize.resize_image(np.eye(source), (target,))
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-13)
    assert ((matrix != 0).sum(axis=1) <= 4).all()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_an_equal_length_is_the_identity(length):
    np.testing.assert_array_equal(resize_matrix(length, length), np.eye(length))


def test_equal_shapes_come_back_as_they_are():
    images, table = np.ones((2, 4, 5, 3)), np.ones((1, 21, 6))
    assert resize_images(images, (4, 5)) is images
    assert resize_table(table, (4, 5), (4, 5)) is table


@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_mirrored_images_stay_mirrored(source, target):
    images = GENERATOR.random((2, *source, 3))
    expected = resize_images(images, target)[:, ::-1, ::-1]
    np.testing.assert_allclose(resize_images(images[:, ::-1, ::-1], target), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "target", "number"), [((4, 4), (2, 3), 1), ((3,), (7,), 0), ((2, 3, 2), (2, 4, 3), 3)], ids=str
)
def test_tables_match_the_reference_and_keep_the_rows_of_class_tokens(xp, source, target, number):
    table = GENERATOR.random((1, number + int(np.prod(source)), 6), dtype=np.float32)
    expected = reference.resize.resize_table(table[0], source, target, number)[None]
    resized = xp.run(lambda table: resize_table(table, source, target, number), table)
    xp.assert_close(resized, expected, rtol=0, atol=1e-5, dtype="float32")
    np.testing.assert_array_equal(xp.to_numpy(resized)[:, :number], table[:, :number])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resize_matrix(0, 4), ValueError, "source: expected at least 1, got 0"),
        (lambda: resize_matrix(4, -1), ValueError, "target: expected at least 1, got -1"),
        (lambda: resize_matrix(4.0, 4), TypeError, "source: expected an integer, got 4.0"),
        (lambda: resize_matrix(4, True), TypeError, "target: expected an integer, got True"),
        (
            lambda: resize_images(np.ones((2, 4, 4, 3)), (4,)),
            ValueError,
            r"shape: expected one length for each axis .* of images of shape \(2, 4, 4, 3\), got \(4,\)",
        ),
        (lambda: resize_images(np.ones((2, 4, 4, 3)), (4, 0)), ValueError, "target: expected at least 1, got 0"),
        (lambda: resize_images(np.ones((2, 3)), ()), ValueError, r"shape: expected one length .* got \(\)"),
        (
            lambda: resize_table(np.ones((1, 16, 3)), (4, 4), (2, 2)),
            ValueError,
            r"table: expected shape \(1, 17, dim\), got \(1, 16, 3\)",
        ),
        (lambda: resize_table(np.ones((17, 3)), (4, 4), (2, 2)), ValueError, r"table: .* got \(17, 3\)"),
        (lambda: resize_table(np.ones((1, 17, 3)), (4, 4), (2,)), ValueError, r"shape: .* got \(2,\)"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
