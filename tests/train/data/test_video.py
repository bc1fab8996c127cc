"""Frames of videos by exact number, for all containers and codecs; errors."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest

from prmim_train.data.formats import video
from prmim_train.data.formats.video import VideoStack
from tests.videos import encode, numbered_frames, numbers_of

pytest.importorskip("av")

FRAMES = numbered_frames(60)
IRREGULAR = np.cumsum(np.random.default_rng(0).integers(10, 100, 60)).tolist()
KINDS = {
    "B-frames": {"b_frames": 2},
    "open groups of pictures": {"format": "matroska", "b_frames": 3, "x264-params": "open-gop=1"},
    "variable rate": {"format": "matroska", "b_frames": 2, "times": IRREGULAR},
    "variable rate in mp4": {"b_frames": 2, "times": IRREGULAR},
    "one key frame": {"format": "mov", "key_every": 1000, "b_frames": 2},
    "vp8 with hidden frames": {"format": "webm", "codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9": {"format": "webm", "codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
    "avi": {"format": "avi", "codec": "mpeg4", "b_frames": 2},
    "avi with B-frames of H.264": {"format": "avi", "b_frames": 2},
    "gif": {"format": "gif", "codec": "gif", "pixels": "rgb8"},
    "mpeg": {"format": "mpeg", "codec": "mpeg2video", "b_frames": 2},
    "transport stream": {"format": "mpegts", "b_frames": 2},
}


def read(content: bytes, frames: list[int], channels: int = 3) -> np.ndarray:
    stack = VideoStack(io.BytesIO(content), channels)
    return stack.read(np.array(frames), (0, 0, *stack.shape[1:]))


def read_ends(content: bytes) -> np.ndarray:
    stack = VideoStack(io.BytesIO(content), 3)
    return stack.read(np.array([0, stack.shape[0] - 1]), (0, 0, *stack.shape[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_wanted_frames_are_read(kind):
    content = encode(FRAMES, **KINDS[kind])
    stack = VideoStack(io.BytesIO(content), 3)
    assert stack.shape == (60, 32, 64)
    assert stack.channels == (4 if kind == "gif" else 3)
    whole = (0, 0, 32, 64)
    for frames in ([0], [59], [59, 59], list(range(60)), list(range(5, 37, 4)), [11, 12, 13], [0, 7, 7, 30, 31, 55]):
        assert numbers_of(stack.read(np.array(frames), whole)) == frames
    if "rate" not in kind:
        assert stack.rate == pytest.approx(25, rel=0.01)


def test_only_frames_from_the_key_frame_on_are_decoded(monkeypatch):
    decoded = []
    stack = VideoStack(io.BytesIO(encode(FRAMES, b_frames=2)), 3)
    steps = video._decoded
    monkeypatch.setattr(video, "_decoded", lambda *opened: (decoded.append(step[0]) or step for step in steps(*opened)))
    assert numbers_of(stack.read(np.array([25, 27, 50]), (0, 0, 32, 64))) == [25, 27, 50]
    assert len(decoded) == 4 + 3  # key frames are 24 and 48


def test_a_box_is_a_part_of_the_frame():
    content = encode(FRAMES[:3])
    whole = read(content, [2])
    part = VideoStack(io.BytesIO(content), 3).read(np.array([2]), (3, 10, 20, 31))
    np.testing.assert_array_equal(part, whole[:, 3:23, 10:41])


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_frames_are_turned_upright(rotation, turns):
    stored = read(encode(FRAMES[:3]), [1, 2])
    np.testing.assert_array_equal(read(encode(FRAMES[:3], rotation=rotation), [1, 2]), np.rot90(stored, turns, (1, 2)))


def test_channels_and_depths_are_converted():
    colour = np.full((2, 16, 16, 3), (200, 60, 30), np.uint8)
    content = encode(colour, "matroska", "ffv1", pixels="yuv420p10le")  # ten bits a value
    np.testing.assert_allclose(read(content, [1])[0, 5, 5], (200, 60, 30), atol=3)
    np.testing.assert_allclose(read(content, [1], channels=4)[0, 5, 5], (200, 60, 30, 255), atol=3)
    np.testing.assert_allclose(read(content, [1], channels=1)[0, 5, 5], (98,), atol=2)
    grey = io.BytesIO(encode(colour, "matroska", "ffv1", pixels="gray"))
    assert VideoStack(grey, 1).channels == 1
    np.testing.assert_allclose(read(grey.getvalue(), [1])[0, 5, 5], (98, 98, 98), atol=2)


def test_a_video_of_one_frame_has_no_rate():
    stack = VideoStack(io.BytesIO(encode(FRAMES[:1], "gif", "gif", pixels="rgb8")), 3)
    assert (stack.shape, stack.rate) == ((1, 32, 64), None)


def test_decoding_starts_no_threads():
    threads = Path("/proc/self/task")
    if not threads.is_dir():
        pytest.skip("counts threads as Linux does")
    read(encode(FRAMES), [1])
    before = len(list(threads.iterdir())), threading.active_count()
    stack = VideoStack(io.BytesIO(encode(FRAMES, codec="libx264")), 3)
    stack.read(np.array([1, 50]), (0, 0, 32, 64))
    assert (len(list(threads.iterdir())), threading.active_count()) == before


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (bytes(5000), "cannot be decoded"),
        (b"no video\n" * 1000, "cannot be decoded"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be decoded"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "cannot be decoded"),
    ],
)
def test_what_is_no_video_has_a_reason(content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        VideoStack(io.BytesIO(content), 3)
    assert "\n" not in str(caught.value)


def test_no_other_file_is_read(tmp_path):
    (tmp_path / "other.mp4").write_bytes(encode(FRAMES[:5]))
    for text in (PLAYLIST.format(tmp_path / "other.mp4"), f"ffconcat version 1.0\nfile {tmp_path / 'other.mp4'}\n"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            VideoStack(io.BytesIO(text.encode()), 3)


def test_sound_without_pictures_has_a_reason():
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video in this file"):
        VideoStack(file, 3)


def test_truncated_files_have_a_reason():
    content = encode(FRAMES, b_frames=2)
    for share in (0.02, 0.3, 0.7, 0.95):
        with pytest.raises(ValueError, match=r"truncated or corrupt|cannot be decoded|no video"):
            read_ends(content[: int(share * len(content))])


def test_a_truncated_matroska_file_is_a_shorter_video():
    content = encode(FRAMES, "matroska")
    stack = VideoStack(io.BytesIO(content[: len(content) // 2]), 3)
    last = stack.shape[0] - 1
    assert 0 < last < 59
    assert numbers_of(stack.read(np.array([0, last]), (0, 0, 32, 64))) == [0, last]


@pytest.mark.parametrize("kind", ["B-frames", "vp9", "gif"])
def test_corrupt_files_give_frames_or_one_line(kind):
    content, rng = encode(FRAMES, **KINDS[kind]), np.random.default_rng(0)
    reasons = set()
    for _ in range(30):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 8):
            damaged[place] = rng.integers(0, 256)
        try:
            assert read_ends(bytes(damaged)).dtype == np.uint8
        except ValueError as error:
            reasons.add(str(error))
    assert not any("\n" in reason for reason in reasons)
    assert reasons or kind == "gif"  # whose pixels have no redundancy


def test_limits(monkeypatch):
    content = encode(FRAMES)
    with pytest.raises(ValueError, match=r"2,048 pixels, more than max_pixels 2,000"):
        VideoStack(io.BytesIO(content), 3, max_pixels=2000)
    monkeypatch.setattr(video, "MAX_DECODED", 12 * 32 * 64)
    assert VideoStack(io.BytesIO(content), 3).shape[0] == 60
    with pytest.raises(ValueError, match=r"60 frames of 64 x 32 pixels between key frames, more than 24,576 pixels"):
        VideoStack(io.BytesIO(encode(FRAMES, key_every=1000)), 3)
    monkeypatch.setattr(video, "MAX_FRAMES", 59)
    with pytest.raises(ValueError, match="more than 59 frames"):
        VideoStack(io.BytesIO(content), 3)
