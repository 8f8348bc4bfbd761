"""Frames to files and back: lossless ones for measuring, small ones for eyes.

PyAV is imported where it is used, so that planning stays fast.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np


def encode_lossless(frames: np.ndarray, fps: int) -> bytes:
    """uint8 [F, H, W, 3] as ffv1 in Matroska; the same frames give the same bytes.

    libx264 is not an alternative: neither its pixels nor its files are reproducible.
    """
    return _encode(frames, fps, "matroska", "ffv1", "bgr0", {})


def encode_preview(frames: np.ndarray, fps: int) -> bytes:
    """H.264 that every browser plays. Odd sides get their last row or column twice."""
    _, height, width, _ = frames.shape
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return _encode(even, fps, "mp4", "libx264", "yuv420p", {"crf": "18", "preset": "fast"})


def decode(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]; ValueError or OSError where the file is no video."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError("no frames")
    return np.stack(frames)


def frames_sha256(frames: np.ndarray) -> str:
    """Hash of shape and pixels."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: expected uint8 (F, H, W, 3)")
    return hashlib.sha256(f"{frames.shape}".encode() + frames.tobytes()).hexdigest()


def _encode(
    frames: np.ndarray, fps: int, container: str, codec: str, pixels: str, options: dict[str, str]
) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.thread_count = 1
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()
