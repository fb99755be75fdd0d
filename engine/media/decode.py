"""Read a clip: T frames at a chosen rate and size from a video, a GIF, a picture, a folder of pictures or an array.

Frame i is the picture the source shows at `start + i / fps`, by timestamp, so that a variable frame rate comes out right. Only
those pictures are converted and resized, as they are decoded: nothing but the result is held in memory.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from pathlib import Path

import torch

from engine.errors import MediaError
from engine.media.clip import DEFAULT_LIMITS, Clip, MediaLimits, SourceInfo, as_fps, shown
from engine.media.folders import PICTURE_SUFFIXES, ArraySource, PicturesSource
from engine.media.geometry import FITS, place, to_signed


def _open(path, limits: MediaLimits, source_fps, value_range: str | None):
    if path == "":
        raise MediaError("the input's path is empty")                # Path("") would be the current folder
    try:
        path = Path(path)
        is_dir = path.is_dir()
    except (TypeError, ValueError, OSError) as error:                # NUL in the name, too long, a loop of links
        raise MediaError(f"{path!r}: not a usable path ({error})") from error
    fps = as_fps(24 if source_fps is None else source_fps, "source_fps")
    try:
        if path.suffix.lower() == ".npy" and not is_dir:
            return ArraySource(path, limits, fps, value_range)
        if is_dir or path.suffix.lower() in PICTURE_SUFFIXES:
            return PicturesSource(path, limits, fps)
        from engine.media.video import VideoSource  # needs PyAV; arrays and folders work without

        return VideoSource(path, limits)
    except OSError as error:
        raise MediaError(f"{shown(path)}: cannot be read ({error.strerror or error})") from error
    except ImportError as error:
        raise MediaError(f"{shown(path)}: reading video files needs PyAV (pip install av): want a folder of PNG or a .npy array") from error


def probe(path, *, limits: MediaLimits = DEFAULT_LIMITS, source_fps=None, value_range: str | None = None) -> SourceInfo:
    """What `path` is, from its header and its first picture. Raises: MediaError where read_clip would."""
    source = _open(path, limits, source_fps, value_range)
    try:
        if next(source.pictures(), None) is None:
            raise MediaError(f"{shown(path)}: no picture in it can be decoded")
        return source.info
    finally:
        source.close()


def read_clip(
    path,
    *,
    frames: int,
    fps: Fraction | float,
    height: int,
    width: int,
    fit: str = "crop",
    start: float = 0.0,
    background: tuple[int, int, int] = (0, 0, 0),
    limits: MediaLimits = DEFAULT_LIMITS,
    source_fps: Fraction | float | None = None,
    value_range: str | None = None,
) -> Clip:
    """Read `frames` frames at `fps`, each height x width, from `start` seconds on. -> Clip with video [T, H, W, 3] in [-1, 1].

    fit: crop | pad | stretch, see geometry. background: levels 0..255 behind alpha and in the bars of pad. source_fps: the rate of
    sources that have none (folders, arrays; default 24). value_range: "unit" or "signed", for a float .npy that could be either.
    Frames past the end of the source hold its last picture; `covered`, `duration` and `notes` say so.
    Raises: MediaError, one line, for any input that cannot be used; ValueError for an argument out of range.
    """
    rate = as_fps(fps)
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: want a positive integer, got {value!r}")
    if fit not in FITS:
        raise ValueError(f"fit: want one of {', '.join(FITS)}, got {fit!r}")
    if not 0 <= start < float("inf"):
        raise ValueError(f"start: want seconds >= 0, got {start!r}")
    if len(background) != 3 or not all(0 <= level <= 255 for level in background):
        raise ValueError(f"background: want three levels from 0 to 255, got {background!r}")
    if value_range not in (None, "unit", "signed"):
        raise ValueError(f"value_range: want 'unit' or 'signed', got {value_range!r}")

    source = _open(path, limits, source_fps, value_range)
    notes = source.notes
    try:
        begin = Fraction(start).limit_denominator(1_000_000)
        targets = [begin + i / rate for i in range(frames)]
        if source.info.duration is not None and begin and begin >= Fraction(source.info.duration):
            raise MediaError(f"{shown(path)}: start {float(start):g} s: want less than its length of {source.info.duration:g} s")

        video = torch.empty(frames, height, width, 3)

        def hold(picture, first: int, end: int) -> None:
            if first < end:
                pixels = picture.load()
                if pixels.shape[-1] == 4 and pixels[..., 3].min() < (255 if pixels.dtype.itemsize == 1 else 65535):
                    text = f"alpha composited over {tuple(background)}"
                    notes.append(text) if text not in notes else None
                video[first:end] = place(to_signed(pixels, background), height, width, fit, background, picture.pixel_aspect)

        done, current, end = 0, None, None
        for picture in source.pictures(begin):
            if current is not None:
                until = bisect_left(targets, picture.time - source.clock_error)
                hold(current, done, until)
                done = max(done, until)
                if done == frames:
                    break
            current = picture
        else:
            if current is None:
                raise MediaError(f"{shown(path)}: no picture in it can be decoded")
            end = current.time + current.duration
            if begin and begin >= end:
                raise MediaError(f"{shown(path)}: start {float(start):g} s: want less than the {float(end):g} s that can be decoded")
            hold(current, done, frames)

        told = None if source.info.duration is None else Fraction(source.info.duration)
        if end is None:                                              # every frame was had before the end: the header's word stands
            covered, length = frames, told or targets[-1] + 1 / rate
        else:
            covered, length = bisect_left(targets, end - source.clock_error), end
            if told is not None and end + Fraction(3, 2) * current.duration < told:
                notes.append(f"truncated: the header promises {float(told):.2f} s, {float(end):.2f} s could be decoded")
            elif source.cut:
                notes.append("the file ends in a damaged picture, which was left out")
            if covered < frames:
                over = f"{frames - covered} of {frames} frames"
                notes.append(f"{over} lie past the end ({float(end - begin):.2f} s) and hold the last picture")
        return Clip(video, rate, float(length - begin), covered, source.info, notes)
    finally:
        source.close()
