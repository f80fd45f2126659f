"""Frames of videos, for sources whose records name a video in place of an image. Needs PyAV (the extra `video`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.core.config import ConfigError
from xomni_jax.data.images import MAX_PIXELS, TooManyPixels, UnreadableImage

_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
# Named, since among all that FFmpeg knows are lists of files and addresses, which it would open.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


def is_video(file: bytes | Path) -> bool:
    """Whether a file is a video, by its first bytes, or by its name where it is named."""
    if not isinstance(file, bytes):  # a path, perhaps in a bucket
        return file.suffix.lower() in _SUFFIXES
    return file[4:8] == b"ftyp" or file[:4] == b"\x1aE\xdf\xa3" or file[8:12] == b"AVI "


def read_frame(file: bytes | Path, share: float = 0.0) -> Image.Image:
    """The frame that is shown at a share (0 to 1) of a video's length, as an RGB image; at 0 its first one.

    Raises:
      UnreadableImage: there is no such file, or it is no video, is damaged before that frame, or holds too many pixels.
      ConfigError: PyAV is missing.
    """
    with _opened(file) as video:
        stream = video.streams.video[0]
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise TooManyPixels(f"its frames have more than {MAX_PIXELS} pixels")
        stream.codec_context.thread_count = 1  # sources read several records at a time
        start, wanted = video.start_time or 0, int((video.duration or 0) * share)
        if wanted:
            video.seek(start + wanted)  # to the last frame before it that can be decoded by itself
        shown = None
        for frame in video.decode(stream):
            if shown is not None and frame.time is not None and frame.time * 1e6 > start + wanted:
                break
            shown = frame
            if not wanted:
                break
        if shown is None:
            raise UnreadableImage("it is a video without frames")
        return shown.to_image().rotate(shown.rotation, expand=True)


@contextmanager
def _opened(file: bytes | Path) -> Iterator[Any]:
    try:
        import av
    except ImportError as error:
        raise ConfigError("reading videos needs a package: pip install 'xomni_jax[video]'") from error
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
            with av.open(stream, options={"format_whitelist": _FORMATS}) as video:
                if not video.streams.video:
                    raise UnreadableImage("it holds no video")
                yield video
    except (OSError, av.error.FFmpegError) as error:
        raise UnreadableImage(error.strerror or str(error)) from error
