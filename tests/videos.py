"""Small videos whose frames show their own number, for tests."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARS = 8  # bits of the number


def numbered_frames(number: int, height: int = 32, width: int = 64) -> NDArray[np.uint8]:
    """Return frames (number, height, width, 3) that show their numbers in binary.

    Bar k from the left is white if bit k of the number is set.
    """
    bits = (np.arange(number)[:, None] >> np.arange(BARS)) & 1
    bars = np.repeat(20 + 215 * bits, width // BARS, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (number, height, width, 3)).copy()


def numbers_of(frames: NDArray[np.uint8]) -> list[int]:
    """Return the numbers that frames show."""
    bars = frames.mean((1, 3)).reshape(len(frames), BARS, -1).mean(2)
    return ((bars > 128) @ (1 << np.arange(BARS))).tolist()


def encode(
    frames: NDArray[np.uint8],
    format: str = "mp4",
    codec: str = "libx264",
    *,
    pixels: str = "yuv420p",
    b_frames: int = 0,
    key_every: int = 12,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    **options: str,
) -> bytes:
    """Encode frames (number, height, width, 3) at 25 per second, or at `times`.

    `times` are in milliseconds.
    """
    import av

    file = io.BytesIO()
    in_front = {"moov_size": "20000"} if format in ("mp4", "mov") else {}  # space for the index before the frames
    with av.open(file, "w", format=format, container_options=in_front) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"g": str(key_every), **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
