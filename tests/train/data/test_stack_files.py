"""Clips and volumes in NumPy and NIfTI files, in folders and in tar files."""

import gzip
import io
import tarfile

import numpy as np
import pytest

from prmim_train.config.axes import ThreeAxes
from prmim_train.data.batches import train_batches
from prmim_train.data.formats.npy import npy_stack
from prmim_train.data.formats.stacks import read_stack
from prmim_train.data.sources import UnreadableImageError, open_source
from prmim_train.data.statistics import measure_images

VOLUMES = ThreeAxes(4, volumes=True)
VOLUME = np.random.default_rng(0).integers(-1000, 2000, (6, 8, 10)).astype(np.int16)
PLACES = np.array([1, 2, 4]), (2, 3, 5, 6)
PART = VOLUME[[1, 2, 4], 2:7, 3:9, None]


def opened(path, **options):
    return open_source(str(path), **{"channels": 1, "three_axes": VOLUMES, "keep_depth": True} | options)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    return file


class Counting(io.BytesIO):
    """A file that counts the bytes that are read."""

    count = 0

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content


# ---------------------------------------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize(
    "array",
    [VOLUME, np.asfortranarray(VOLUME), VOLUME.astype(">i2"), VOLUME[..., None]],
    ids=["C", "F", ">", "channel"],
)
def test_a_part_of_an_array_is_read(array):
    stack = npy_stack(npy(array))
    assert (stack.shape, stack.channels, stack.depth) == ((6, 8, 10), 1, "float32")
    part = read_stack(stack, lambda shape: PLACES, "float32")
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, PART)
    np.testing.assert_array_equal(read_stack(stack, depth="float32")[..., 0], VOLUME)


def test_only_the_rows_of_the_slices_that_a_crop_shows_are_read():
    file = Counting(npy(np.zeros((100, 50, 40), np.uint8)).getvalue())
    stack = npy_stack(file)
    file.count = 0
    part = read_stack(stack, lambda shape: (np.array([3, 3, 90]), (10, 0, 5, 40)))
    assert part.shape == (3, 5, 40, 1)
    assert file.count == 2 * 5 * 40


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(VOLUME[0]).getvalue(), r"expected an array \(frames, height, width\) or .*, got \(8, 10\)"),
        (npy(VOLUME).getvalue()[:-1], r"takes 1,088 bytes, got 1,087"),
        (npy(VOLUME.astype(np.int32)).getvalue(), "expected uint8, uint16, int16, float32, got int32"),
        (npy(np.array([[[None]]])).getvalue(), "contains Python objects"),
        (b"", "empty file"),
        (b"\x00" * 400, "not NPY or NIfTI"),
    ],
)
def test_other_arrays_are_unreadable(tmp_path, content, reason):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"a.npy: .*{reason}"):
        opened(tmp_path).read(0)


def test_a_folder_holds_volumes_of_differing_sizes(tmp_path):
    for k in range(8):
        path = tmp_path / f"c{k % 2}" / f"{k}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, VOLUME[: 3 + k % 4])
    source = opened(tmp_path, channels=None)
    assert source.description.endswith("8 images in 2 classes")
    assert (source.channels, source.depth, source.header(1).shape) == (1, "float32", (5, 8, 10))
    with train_batches(source, batch_size=4, image_size=(4, 4, 4), seed=0, total_steps=2, threads=0) as batches:
        assert [batch.images.shape for batch in batches] == [(4, 4, 4, 4, 1)] * 2
    assert len(opened(tmp_path / "c0" / "0.npy")) == 1
    assert len(opened(tmp_path / "c*" / "[0-3].npy")) == 4
    with pytest.raises(ValueError, match=r"channels: c0/0\.npy has 1 channel, got 3"):
        opened(tmp_path, channels=3)
    with pytest.raises(ValueError, match="pixel_range: expected low,high or auto for int16 or float32 images"):
        opened(tmp_path, keep_depth=False)


def test_2d_methods_refuse_volumes_and_say_what_to_write(tmp_path):
    np.savez(tmp_path / "a.npz", images=VOLUME[None, ..., None])
    with pytest.raises(ValueError, match=r"got \(1, 6, 8, 10, 1\); for clips or volumes, write --volumes true --image"):
        open_source(str(tmp_path / "a.npz"), channels=1)
    np.save(tmp_path / "a.npy", VOLUME.repeat(2, axis=2))
    with pytest.raises(ValueError, match=r"a\.npy has 20 channels, got 1; for volumes, write --volumes true --image"):
        open_source(str(tmp_path), channels=1)
    np.save(tmp_path / "a.npy", VOLUME[..., None])
    with pytest.raises(UnreadableImageError, match=r"got \(6, 8, 10, 1\); for clips or volumes, write --volumes true"):
        open_source(str(tmp_path), channels=1).read(0)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.fixture(scope="module")
def nibabel():
    return pytest.importorskip("nibabel")


def nifti(nibabel, codes="LPS", values=VOLUME, steps=(0.7, 0.8, 5.0)):
    """Return a NIfTI image (depth, height, width) with axes stored as `codes`."""
    affine = np.diag([-steps[0], -steps[1], steps[2], 1])  # columns to the left, rows to the back, slices to the head
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)
    orientations = nibabel.orientations
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SAL", "ILA"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_volumes_are_turned_to_one_orientation(nibabel, codes, ending, tmp_path):
    nibabel.save(nifti(nibabel, codes), tmp_path / f"a{ending}")
    source = opened(tmp_path)
    assert source.header(0).shape == (6, 8, 10)
    np.testing.assert_allclose(source.header(0).spacing, (5, 0.8, 0.7), rtol=1e-6)
    np.testing.assert_array_equal(source.read(0)[..., 0], VOLUME)
    np.testing.assert_array_equal(source.read(0, lambda shape: PLACES), PART)


@pytest.mark.parametrize(
    ("dtype", "slope", "depth"),
    [(np.uint8, 1, "uint8"), (np.uint16, 1, "uint16"), (np.int16, 2, "float32"), (np.float64, 1, "float32")],
)
def test_values_have_their_scale(nibabel, dtype, slope, depth, tmp_path):
    image = nifti(nibabel, values=np.arange(24, dtype=dtype).reshape(2, 3, 4))
    image.header.set_slope_inter(slope, 10 * (slope > 1))
    nibabel.save(image, tmp_path / "a.nii")
    source = opened(tmp_path)
    assert (source.header(0).depth, source.read(0).dtype) == (depth, depth)
    np.testing.assert_array_equal(
        source.read(0).ravel(), nibabel.load(tmp_path / "a.nii").get_fdata().T[:, :, :].ravel()
    )


def test_large_gzipped_files_are_read_up_to_the_last_slice(nibabel, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (40, 64, 64)).astype(np.uint8)
    nibabel.save(nifti(nibabel, values=values), tmp_path / "a.nii.gz")
    part = opened(tmp_path).read(0, lambda shape: (np.arange(30, 33), (0, 0, 64, 64)))
    np.testing.assert_array_equal(part[..., 0], values[30:33])


def test_damaged_and_foreign_files_have_one_line(nibabel, tmp_path):
    path = tmp_path / "a.nii"

    def reason(content):
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError) as caught:
            opened(tmp_path).read(0)
        return caught.value.reason

    whole = nifti(nibabel).to_bytes()
    assert reason(whole[:-1]) == f"truncated: {len(whole) - 1:,} of {len(whole):,} bytes"
    assert reason(gzip.compress(whole)[:-20]).startswith("Compressed file ended before")
    assert reason(whole.replace(b"n+1", b"ni1")).startswith("header without its volume")
    four = nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.uint8), np.eye(4)).to_bytes()
    assert reason(four) == "expected a volume of three axes, got (4, 5, 6, 2); save each volume as a file of its own"
    one = nibabel.Nifti1Image(np.zeros((4, 5, 6, 1), np.uint8), np.eye(4)).to_bytes()
    path.write_bytes(one)
    assert opened(tmp_path).header(0).shape == (6, 5, 4)
    huge = bytearray(whole)
    huge[42:48] = np.array([30000] * 3, "<i2").tobytes()
    assert "save it as .nii" in reason(gzip.compress(bytes(huge)))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="volumes: expected true for NIfTI files, got false"):
        opened(tmp_path, three_axes=ThreeAxes(4))
    with pytest.raises(ValueError, match=r"\.nii 1.*; for volumes, write --volumes true --image_size 96,96,96"):
        open_source(str(tmp_path), channels=1)


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_volumes_lie_in_tar_files_too(nibabel, tmp_path):
    contents = {"s0.npy": npy(VOLUME).getvalue(), "s1.nii": nifti(nibabel).to_bytes()}
    contents["s2.nii.gz"] = gzip.compress(contents["s1.nii"])
    source = opened(write_tar(tmp_path / "a.tar", contents))
    assert len(source) == 3
    for k in range(3):
        np.testing.assert_array_equal(source.read(k, lambda shape: PLACES), PART)


def test_no_volume_is_read_from_a_tar_file_that_changed(tmp_path):
    contents = {f"{k}.npy": npy(VOLUME + k).getvalue() for k in range(2)}
    source = opened(write_tar(tmp_path / "a.tar", contents))
    source.read(0)
    write_tar(tmp_path / "a.tar", dict(reversed(contents.items())))
    with pytest.raises(UnreadableImageError, match=r"a\.tar/0\.npy: its tar file: changed since it was opened"):
        source.read(0)


def test_statistics_count_spacings(nibabel, tmp_path):
    nibabel.save(nifti(nibabel, steps=(1, 1, 5)), tmp_path / "a.nii")
    found = measure_images(opened(tmp_path), find_duplicates=True)
    assert (found.sizes, found.spacings) == ({(6, 8, 10): 1}, {(5, 1, 1): 1})
    assert (found.low, found.high, found.pixels) == (VOLUME.min(), VOLUME.max(), VOLUME.size)
    np.testing.assert_allclose(found.mean, VOLUME.mean())
