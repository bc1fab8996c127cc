"""Sources of clips: detection, frames of crops, and unreadable clips."""

import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from prmim_train.config.axes import ThreeAxes
from prmim_train.config.training import SourceOptions
from prmim_train.data.batches import evaluation_batches, train_batches
from prmim_train.data.image_files import UnreadableImageError
from prmim_train.data.sources import open_source
from prmim_train.data.three_axes import read_center
from prmim_train.report.stats import stats_command
from tests.videos import encode, numbered_frames, numbers_of

pytest.importorskip("av")

SIZE = (4, 32, 64)
LENGTHS = {"jump/a.mp4": 40, "jump/b.webm": 30, "run/c.avi": 6, "run/d.gif": 20}
KINDS = {
    "mp4": {"b_frames": 2},
    "webm": {"format": "webm", "codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
    "avi": {"format": "avi", "codec": "mpeg4"},
    "gif": {"format": "gif", "codec": "gif", "pixels": "rgb8"},
}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, number in LENGTHS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(numbered_frames(number), **KINDS[path.suffix[1:]]))
    Image.new("RGB", (8, 8)).save(folder / "jump" / "a.jpg")  # a thumbnail is no clip
    np.save(folder / "jump" / "a.npy", np.zeros(7))  # neither are features
    return folder


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for name, number in LENGTHS.items():
        (folder / name).mkdir(parents=True)
        for place, frame in enumerate(numbered_frames(number)):
            Image.fromarray(frame).save(folder / name / f"{place}.png")
    return folder


@pytest.fixture(params=["videos", "frames", "tar", "npz"])
def source(request, tmp_path):
    stride = ThreeAxes(4, 3)
    if request.param == "npz":
        clips = np.stack([numbered_frames(40)] * 4)
        np.savez(tmp_path / "clips.npz", images=clips, labels=[0, 0, 1, 1])
        return open_source(str(tmp_path / "clips.npz"), channels=3, three_axes=stride)
    if request.param == "tar":
        with tarfile.open(tmp_path / "clips.tar", "w") as file:
            file.add(request.getfixturevalue("videos"), ".")
        return open_source(str(tmp_path / "clips.tar"), channels=3, three_axes=stride)
    return open_source(str(request.getfixturevalue(request.param)), channels=3, three_axes=stride)


def lengths(source):
    return [source.header(record).shape[0] for record in range(len(source))]


def test_a_crop_takes_every_third_frame_from_a_random_start(source):
    found = lengths(source)
    assert found in ([40, 30, 6, 20], [40] * 4)
    assert source.labels.tolist() == [0, 0, 1, 1]
    with train_batches(source, batch_size=4, image_size=SIZE, seed=0, start_step=0, total_steps=8, **WHOLE) as batches:
        shown = [
            (int(record), numbers_of(clip))
            for batch in batches
            for record, clip in zip(batch.index, batch.images, strict=True)
        ]
    starts = {record: {frames[0] for other, frames in shown if other == record} for record in range(4)}
    for record, taken in shown:
        last = found[record] - 1
        assert taken == [min(taken[0] + 3 * k, last) for k in range(4)]
        assert last < 9 or taken[3] == taken[0] + 9
    assert all((len(starts[record]) > 1) == (found[record] > 10) for record in range(4))
    assert starts[2] == {0} or found[2] == 40


def test_the_evaluation_takes_the_centre(source):
    expected = [
        [(number - 10) // 2 + 3 * k for k in range(4)] if number > 6 else [0, 3, 5, 5] for number in lengths(source)
    ]
    with evaluation_batches(source, batch_size=3, image_size=SIZE) as batches:
        clips = np.concatenate([batch.images for batch in batches])
    assert [numbers_of(clip) for clip in clips] == expected
    assert numbers_of(read_center(source, 1, SIZE)) == expected[1]


def test_resumed_and_pickled_sources_give_the_same_clips(source):
    options = {"batch_size": 2, "image_size": (4, 16, 16), "seed": 0, "total_steps": 4}
    with train_batches(source, start_step=0, **options) as batches:
        whole = [batch.images for batch in batches]
    with train_batches(pickle.loads(pickle.dumps(source)), start_step=2, **options) as batches:
        rest = [batch.images for batch in batches]
    np.testing.assert_array_equal(rest, whole[2:])
    assert whole[0].shape == (2, 4, 16, 16, 3)


def test_what_is_found_is_said(videos, frames, capsys):
    found = open_source(str(videos), channels=None, three_axes=ThreeAxes(4))
    assert found.description == f"folder {videos}: 4 videos in 2 classes, 2 other files skipped (.jpg 1, .npy 1)"
    assert (found.channels, found.header(0).rate) == (3, 25)
    found = open_source(str(frames), channels=None, three_axes=ThreeAxes(4))
    assert found.description == f"folder {frames}: 4 folders of 6 to 40 frames in 2 classes"
    assert found.header(0).rate is None
    assert found.name(2) == "run/c.avi"
    stats_command(str(videos), clips=True)
    text = capsys.readouterr().out
    assert "40 x 32 x 64 pixels (1)" in text
    assert "frame rates         25 a second" in text
    assert "duplicates          0\n" in text


def test_videos_in_tables_are_told_by_their_content(videos, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [(videos / name).read_bytes() for name in LENGTHS]
    parquet.write_table(pa.table({"video": contents, "label": [0, 0, 1, 1]}), tmp_path / "clips.parquet")
    options = SourceOptions(image_key="video")
    source = open_source(str(tmp_path / "clips.parquet"), channels=3, three_axes=ThreeAxes(4), options=options)
    assert lengths(source) == [40, 30, 6, 20]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert numbers_of(read_center(source, 1, SIZE)) == [13, 14, 15, 16]


def test_the_image_size_tells_clips_from_images(videos, frames, tmp_path):
    assert len(open_source(str(frames), channels=3)) == sum(LENGTHS.values())
    assert [open_source(str(videos), channels=3).name(k) for k in range(2)] == ["jump/a.jpg", "run/d.gif"]
    (tmp_path / "c.avi").write_bytes((videos / "run/c.avi").read_bytes())
    with pytest.raises(
        ValueError, match=r"no images in .*: 1 other file \(\.avi 1\); .*; for clips, write --image_size 16"
    ):
        open_source(str(tmp_path), channels=3)


def test_unreadable_clips_are_named_with_a_reason(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode(numbered_frames(8)))
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(b"no video at all")
    source = open_source(str(tmp_path), channels=3, three_axes=ThreeAxes(4))
    with pytest.raises(UnreadableImageError, match=r"^b\.mp4: empty file$"):
        source.header(1)
    with pytest.raises(UnreadableImageError, match=r"^c\.mp4: cannot be decoded \(FFmpeg: Invalid data"):
        read_center(source, 2, SIZE)
    small = open_source(str(tmp_path), channels=3, three_axes=ThreeAxes(4), max_pixels=2000)
    with pytest.raises(UnreadableImageError, match=r"^a\.mp4: 2,048 pixels, more than max_pixels 2,000$"):
        small.header(0)


def test_channels_of_clips_are_converted(videos):
    for channels in (1, 4):
        source = open_source(str(videos), channels=channels, three_axes=ThreeAxes(2))
        assert read_center(source, 0, (2, 8, 8)).shape == (2, 8, 8, channels)
    with pytest.raises(ValueError, match=r"channels: image files give 1 \(grey\), 3 \(RGB\) or 4"):
        open_source(str(videos), channels=2, three_axes=ThreeAxes(2))


def test_a_missing_package_is_one_line(videos, monkeypatch):
    import prmim_train.config.packages as packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"^data: PyAV is not installed; pip install 'prmim\[video\]', or folders of frames$"
    ):
        open_source(str(videos), channels=3, three_axes=ThreeAxes(2))
