"""Opening a video container through PyAV (FFmpeg's libraries), and nothing that the file asks for beyond itself.

The file is data from a stranger: only containers on a list are opened and only the `file:` protocol, so that a playlist or an
ffconcat text named .mp4 is refused before it can make FFmpeg open another file.
"""

from __future__ import annotations

from pathlib import Path

import av

from engine.errors import MediaError
from engine.media.clip import shown

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,nut,mxf,ivf,yuv4mpegpipe"
WANTED = "want a video (MP4, MOV, MKV, WebM, AVI, ...), a GIF, a PNG or JPEG, a folder of them, or a .npy array"
# What PyAV was seen to raise on 400 damaged files: FFmpegError, IndexError, UnicodeDecodeError; the rest is what its calls can raise.
READ_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError, OverflowError, AssertionError, RuntimeError, MemoryError, EOFError)


def open_container(path: Path, max_pixels: int):
    """Open for reading under the whitelists. Raises: MediaError, also for devices, pipes and anything that is not a known container."""
    try:
        if not path.is_file():
            raise MediaError(f"{shown(path)}: {'not a regular file' if path.exists() else 'no such file'}: {WANTED}")
        if path.stat().st_size == 0:
            raise MediaError(f"{shown(path)}: the file is empty: {WANTED}")
    except OSError as error:                                         # a name too long, a loop of links, a folder that may not be entered
        raise MediaError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    options = {
        "protocol_whitelist": "file", "format_whitelist": "gif" if path.suffix.lower() == ".gif" else CONTAINERS,
        "max_pixels": str(max_pixels),
    }
    try:                                                             # file: so that no part of a name is taken for a protocol
        return av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace")
    except READ_ERRORS as error:
        raise MediaError(f"{shown(path)}: not a readable video ({reason(error)}): {WANTED}") from error


def reason(error: Exception) -> str:
    """FFmpeg's own words for an error, in one line and without the file name it repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]


def first_video(container):
    """The first real video stream: cover art is a video stream too, of one attached picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None
