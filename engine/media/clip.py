"""What reading a video gives back (`Clip`, `SourceInfo`), the limits it is read under, and one decoded picture. Plain data only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from engine.errors import MediaError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def shown(path) -> str:
    """A path as it may stand in a one-line message: control characters are escaped."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


def as_fps(fps, name: str = "fps") -> Fraction:
    """An exact rate from int, float or Fraction; 29.97002997 becomes 30000/1001. Raises: ValueError unless 1/1000 <= fps <= 1000."""
    try:
        rate = Fraction(fps).limit_denominator(1001 if isinstance(fps, float) else 1_000_000)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not Fraction(1, 1000) <= rate <= 1000:
        raise ValueError(f"{name}: want a number of frames per second from 0.001 to 1000, got {fps!r}")
    return rate


@dataclass(frozen=True)
class MediaLimits:
    """What an input may be at most. Checked against its header before anything is decoded, and again while decoding."""

    max_pixels: int = 4096 * 2304        # per picture; 4K passes, a 200 KB file that unpacks to 8192 x 8192 does not
    max_duration: float = 3600.0         # seconds
    max_frames: int = 90_000             # an hour at 25 fps
    max_fps: float = 480.0               # average rate by the header
    min_side: int = 2                    # pixels; a 1 x 1 picture is a tracking pixel, not an input

    def check_picture(self, path, width: int, height: int) -> None:
        if min(width, height) < self.min_side:
            raise MediaError(f"{shown(path)}: pictures of {width}x{height}: want at least {self.min_side} pixels a side")
        if width * height > self.max_pixels:
            raise MediaError(f"{shown(path)}: pictures of {width}x{height}: want at most {self.max_pixels} pixels (max_pixels)")

    def check_length(self, path, duration: float | None, frames: int | None, fps: float | None) -> None:
        if duration is not None and duration > self.max_duration:
            raise MediaError(f"{shown(path)}: {duration:.0f} s long: want at most {self.max_duration:g} s (max_duration)")
        if fps is not None and fps > self.max_fps:
            raise MediaError(f"{shown(path)}: {float(fps):g} frames per second: want at most {self.max_fps:g} (max_fps)")
        if frames is not None and frames > self.max_frames:
            raise MediaError(f"{shown(path)}: {frames} frames: want at most {self.max_frames} (max_frames)")


DEFAULT_LIMITS = MediaLimits()


@dataclass
class SourceInfo:
    """The input as its header and first picture describe it. Width and height are as stored, before rotation and pixel aspect."""

    kind: str                            # video | pictures | picture | array
    width: int
    height: int
    fps: Fraction | None                 # average; None where the file does not say
    duration: float | None               # seconds; None where the file does not say
    codec: str
    rotation: int = 0                    # degrees counter-clockwise that were undone: 0, 90, 180, 270
    pixel_aspect: Fraction = Fraction(1)  # width of a stored pixel over its height
    matrix: str = "rgb"                  # bt709 | bt601 | bt2020 | ... | rgb, with its range: "bt709 limited"
    has_audio: bool = False
    frames_decoded: int = 0
    comment: str | None = None           # where write_video puts its metadata JSON


@dataclass
class Clip:
    """A clip ready for the cascade. `video` [T, H, W, 3] float32 in [-1, 1], gamma-encoded sRGB.

    `duration` is the length in seconds of the source from the chosen start, `covered` how many of the T frames lie inside it
    (the rest hold the last picture), `notes` what the user should be told.
    """

    video: Tensor
    fps: Fraction
    duration: float
    covered: int
    source: SourceInfo
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """One source picture: when it is shown (seconds from the first), for how long, and how to get at its pixels when wanted.

    `load()` gives [h, w, 3 or 4] uint8, uint16 (full scale 65535) or float32 in [-1, 1]; the fourth channel is straight alpha.
    """

    time: Fraction
    duration: Fraction
    load: Callable[[], np.ndarray]
    pixel_aspect: Fraction = Fraction(1)
