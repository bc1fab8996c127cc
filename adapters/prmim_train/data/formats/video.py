"""Video files, decoded through PyAV (FFmpeg) and treated as untrusted input.

Any content gives frames or a one-line reason. Frames are identified by their presentation times, so their numbers are
exact, even with B-frames and a variable frame rate. Decoding starts at the key frame before the wanted
frames, and runs in the calling thread.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prmim_methods.messages import counted
from prmim_train.config.packages import check_installed
from prmim_train.data.image_files import MAX_PIXELS, check_pixels, convert_picture

__all__ = ["MAX_DECODED", "MAX_FRAMES", "VIDEO_ENDINGS", "VideoStack", "is_video"]

VIDEO_ENDINGS = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"),
)
"""Endings of video files. The content determines the decoder."""

MAX_FRAMES = 2**20
"""Maximum number of frames of a video, ten hours at 30 frames per second."""

MAX_DECODED = 2**34
"""Maximum number of pixels between two key frames, one minute of 4K video, or four minutes of full HD."""

# FFmpeg also knows formats that name other files and addresses to read (HLS, DASH, concat, SDP).
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg"
# In these, seeking to the time of a key frame is exact. Others are decoded from their start.
_SEEKABLE = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"))
_WITHOUT_TIMES = "avi"  # stores the order of decoding only: the decoder's n-th frame is frame n
_BUFFER = 2**17
_MISSING_FRAMES = 2  # packets without a frame that are tolerated: some encoders write them
_QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


# MP4 and MOV, Matroska and WebM, AVI, GIF.
_START = re.compile(rb"....(ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI |GIF8", re.DOTALL)


def is_video(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a common video format.

    At least twelve bytes.

    Examples
    --------
    >>> is_video(b"RIFF....AVI "), is_video(b"II*.........")
    (True, False)
    """
    return _START.match(start) is not None


class VideoStack:
    """A video file as a clip; see `prmim_train.data.formats.stacks.Stack`.

    Opening reads the times of all frames: the whole file, but only its first frame is decoded. Frames are
    rotated by the file's metadata. Pixels count as square. Values of more than 8 bits become 8 bits.

    Parameters
    ----------
    file : binary file
        Seekable. Stays open.
    channels : int
        Of the frames that are read: 1 (grey), 3 (RGB) or 4 (RGBA).
    max_pixels : int, optional
        Larger frames are refused.

    Attributes
    ----------
    shape : (frames, height, width)
    channels : int
        Of the file: 1 for grey, 4 with opacity, else 3.
    depth : "uint8"
    spacing : None
    is_array : False
    rate : float or None
        Mean number of frames per second; None for a single frame.

    Raises
    ------
    ValueError
        If the file is empty, truncated, corrupt, of another format or without video, has more than `MAX_FRAMES` frames,
        or more than `MAX_DECODED` pixels between two key frames.
    ImportError
        If PyAV is not installed.
    """

    depth = "uint8"
    spacing = None
    is_array = False

    def __init__(self, file: BinaryIO, channels: int, *, max_pixels: int = MAX_PIXELS) -> None:
        check_installed("data", "av")
        self._file, self._channels = file, channels
        self._index = index = _read_index(file, max_pixels)
        self.shape = (len(index.times), *index.size)
        self.channels, self.rate = index.channels, index.rate

    def read(self, frames: NDArray[np.int64], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return a box of some frames, (number of frames, height, width, channels).

        Parameters
        ----------
        frames : int array
            Numbers of frames, sorted. May repeat.
        box : (top, left, height, width)
            In pixels.

        Raises
        ------
        ValueError
            If a requested frame, or a frame that it depends on, is corrupt.
        """
        top, left, height, width = box
        wanted, places = np.unique(frames, return_inverse=True)
        parts = []
        converter = _converter()
        for frame in _decode(self._file, self._index, wanted):
            picture = _upright(frame, self._index, self._channels, converter).crop(
                (left, top, left + width, top + height)
            )
            parts.append(np.asarray(picture).reshape(height, width, self._channels))
        return np.stack(parts)[places]


class _Index(NamedTuple):
    times: NDArray[np.int64]  # when each frame is shown, increasing
    keys: NDArray[np.int64]  # times of the frames at which decoding can start, increasing
    size: tuple[int, int]  # height and width of the upright frames
    turn: Image.Transpose | None  # from the stored frames to the upright ones
    channels: int
    rate: float | None


def _read_index(file: BinaryIO, max_pixels: int) -> _Index:
    times: list[int] = []
    keys: list[int] = []
    first = None
    with _opened(file) as (container, stream):
        check_pixels(stream.codec_context.width * stream.codec_context.height, max_pixels)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(f"truncated or corrupt after {counted(len(times), 'frame')}")
            if first is None:
                first = next(iter(packet.decode()), None)
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or packet.is_discard:  # the end, or cut away by the file's edit list
                continue
            times.append(time)
            if packet.is_keyframe:
                keys.append(time)
            if len(times) > MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES:,} frames")
        if first is None or not times:
            raise ValueError("truncated or corrupt: no frame can be decoded")
        return _index(np.array(times, np.int64), np.array(keys, np.int64), first, container, stream)


def _index(times: NDArray[np.int64], keys: NDArray[np.int64], frame: Any, container: Any, stream: Any) -> _Index:
    times, keys = np.unique(times), np.unique(keys)
    rate = float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base)) if len(times) > 1 else None
    if container.format.name == _WITHOUT_TIMES:
        times = np.arange(len(times))
    if container.format.name not in _SEEKABLE or not len(keys):
        keys = times[:1]
    turn = _QUARTER_TURNS.get(round(frame.rotation))
    is_turned = turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    size = (frame.width, frame.height) if is_turned else (frame.height, frame.width)
    apart = int(np.diff(np.searchsorted(times, keys), append=len(times)).max())
    if apart * size[0] * size[1] > MAX_DECODED:
        raise ValueError(
            f"{apart:,} frames of {frame.width:,} x {frame.height:,} pixels between key frames, more than "
            f"{MAX_DECODED:,} pixels; encode with more key frames, or cut the video"
        )
    return _Index(times, keys, size, turn, _channels(frame.format), rate)


def _channels(format: Any) -> int:
    if any(component.is_alpha for component in format.components):
        return 4
    return 1 if len(format.components) == 1 and not format.has_palette else 3


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """Open the container and its main video stream."""
    import av

    file.seek(0)
    if not file.read(1):
        raise ValueError("empty file")
    file.seek(0)
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with av.open(file, "r", container_options=options, buffer_size=_BUFFER, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or not stream.codec_context:
                raise ValueError("no video in this file, or of a kind that PyAV cannot decode")
            # Batches are read in threads or processes, one per core.
            codec: Any = stream.codec_context
            codec.thread_count, codec.thread_type = 1, "NONE"
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"cannot be decoded (FFmpeg: {error.strerror})") from error


def _decode(file: BinaryIO, index: _Index, wanted: NDArray[np.int64]) -> Iterator[Any]:
    """Decode the requested frames, in order, by their presentation times."""
    with _opened(file) as (container, stream):
        decoded = _decoded(container, stream)
        shown: tuple[int, Any] | None = None
        following: tuple[int, Any] | None = None  # decoded, but shown later
        reached = int(index.times[0])
        for number in wanted:
            time = index.times[number]
            key = int(index.keys[max(0, np.searchsorted(index.keys, time, "right") - 1)])
            if key > reached:
                container.seek(key, stream=stream)
                decoded, shown, following = _decoded(container, stream), None, None
            while shown is None or shown[0] < time:
                following = following or next(decoded, None)
                if following is None or following[0] > time:
                    break
                shown, following = following, None
            reached = max(frame[0] for frame in (shown, following, (reached, None)) if frame)
            next_number = 0 if shown is None else np.searchsorted(index.times, shown[0], "right")
            if shown is None or number - next_number >= _MISSING_FRAMES:
                raise ValueError(f"truncated or corrupt: frame {number:,} of {len(index.times):,} cannot be decoded")
            yield shown[1]


def _decoded(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Iterate over the frames from here to the end, with the time of each."""
    has_times = container.format.name != _WITHOUT_TIMES
    frames = (frame for packet in container.demux(stream) for frame in packet.decode())
    for count, frame in enumerate(frames):
        yield (count if not has_times else frame.dts if frame.pts is None else frame.pts), frame


def _converter() -> Any:
    """Return an object that converts frames. Reusing it is faster."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _upright(frame: Any, index: _Index, channels: int, converter: Any) -> Image.Image:
    if frame.is_corrupt:
        raise ValueError(f"corrupt frame at {frame.time:.2f} seconds")
    mode = "rgba" if _channels(frame.format) == 4 else "rgb24"
    picture = Image.fromarray(converter.reformat(frame, format=mode, threads=1).to_ndarray())
    picture = picture if index.turn is None else picture.transpose(index.turn)
    if (picture.height, picture.width) != index.size:
        raise ValueError("frames of different sizes")
    return convert_picture(picture, channels)
