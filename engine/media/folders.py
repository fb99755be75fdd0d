"""Sources that need no video codec: one picture, a folder of pictures, a .npy array. Each is a stream of timed pictures like a video."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.errors import MediaError
from engine.media.clip import MediaLimits, Picture, SourceInfo, shown

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def natural(name: str) -> list:
    """Sorts frame2 before frame10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part.lower()) for part in re.split(r"([0-9]+)", name)]


class PicturesSource:
    """One picture, or a folder's PNG and JPEG files in natural order at `fps`."""

    clock_error = Fraction(0)                                        # their times are made here, exactly

    def __init__(self, path: Path, limits: MediaLimits, fps: Fraction):
        self.path, self.limits, self.notes, self.cut, self.fps = path, limits, [], False, fps
        self.files = [path]
        if path.is_dir():
            try:
                files = [f for f in path.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES and not f.name.startswith(".") and f.is_file()]
                self.files = sorted(files, key=lambda file: natural(file.name))
            except OSError as error:
                raise MediaError(f"{shown(path)}: the folder cannot be read ({error.strerror})") from error
            if not self.files:
                raise MediaError(f"{shown(path)}: a folder without pictures: want {', '.join(PICTURE_SUFFIXES)} files in it")
        elif not path.is_file() or path.stat().st_size == 0:
            what = "no such file" if not path.exists() else "the file is empty" if path.is_file() else "not a regular file"
            raise MediaError(f"{shown(path)}: {what}: want a picture")
        limits.check_length(path, None, len(self.files), None)
        with self._open(self.files[0]) as image:
            width, height, codec = *image.size, (image.format or "").lower()
            if getattr(image, "n_frames", 1) > 1 and len(self.files) == 1:
                self.notes.append("an animated picture: only its first frame is used")
        kind = "pictures" if path.is_dir() else "picture"
        self.info = SourceInfo(kind, width, height, fps, float(len(self.files) / fps), codec)

    def close(self) -> None:
        pass

    def pictures(self, start: Fraction = Fraction(0)) -> Iterator[Picture]:
        for i, file in enumerate(self.files):
            yield Picture(i / self.fps, 1 / self.fps, lambda file=file: self._load(file))

    def _open(self, file: Path):
        """Only the header is read here, and only by the decoders named in FORMATS (Pillow has some that run other programs)."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                      # Pillow warns of large pictures; the limits below decide
                image = Image.open(file, formats=FORMATS)
        except Exception as error:                                   # damaged files make Pillow raise nearly anything
            raise MediaError(f"{shown(file)}: not a readable picture ({_reason(error)}): want {', '.join(FORMATS)}") from error
        try:
            self.limits.check_picture(file, *image.size)
        except MediaError:
            image.close()
            raise
        return image

    def _load(self, file: Path) -> np.ndarray:
        with self._open(file) as image:
            self.info.frames_decoded += 1
            if image.size != (self.info.width, self.info.height) and "pictures of different sizes" not in self.notes:
                self.notes.append("pictures of different sizes")
            try:
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):                     # 16-bit grey; convert("RGB") would clip it at 255
                    grey = np.asarray(upright).astype(np.int64).clip(0, 65535).astype(np.uint16)
                    return np.repeat(grey[..., None], 3, axis=-1)
                return np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
            except Exception as error:
                raise MediaError(f"{shown(file)}: damaged picture ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":             # its text repeats the path
        return "unknown format"
    return (str(error) or type(error).__name__).splitlines()[0][:120]


class ArraySource:
    """A .npy video [T, H, W, 3]: uint8 levels, or floats in [-1, 1] or [0, 1]. Memory-mapped, never unpickled.

    Floats that all lie in [0, 1] could be either: `value_range` ("signed" or "unit") must say, a guess would be a silent mistake.
    """

    clock_error = Fraction(0)                                        # their times are made here, exactly

    def __init__(self, path: Path, limits: MediaLimits, fps: Fraction, value_range: str | None = None):
        self.path, self.limits, self.notes, self.cut, self.fps = path, limits, [], False, fps
        if not path.is_file():
            raise MediaError(f"{shown(path)}: {'not a regular file' if path.exists() else 'no such file'}: want a .npy array")
        try:
            self.array = np.lib.format.open_memmap(path, mode="r")   # refuses pickles
        except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, KeyError, AttributeError) as error:
            raise MediaError(f"{shown(path)}: not a readable .npy array ({_reason(error)})") from error
        shape = self.array.shape
        if self.array.ndim != 4 or shape[-1] != 3 or 0 in shape:
            raise MediaError(f"{shown(path)}: array of shape {list(shape)}: want [T, H, W, 3]")
        limits.check_picture(path, shape[2], shape[1])
        limits.check_length(path, None, shape[0], None)
        self.unit = self._is_unit(value_range)
        self.info = SourceInfo("array", shape[2], shape[1], fps, float(shape[0] / fps), f"npy {self.array.dtype}")

    def close(self) -> None:
        self.array = None

    def _is_unit(self, value_range: str | None) -> bool:
        name = shown(self.path)
        if self.array.dtype == np.uint8:
            return False
        if self.array.dtype.kind != "f":
            raise MediaError(f"{name}: array of {self.array.dtype}: want uint8 levels or floats in [-1, 1]")
        low, high = np.inf, -np.inf
        for frame in self.array:                                     # frame by frame: the file may be larger than memory
            low, high = np.minimum(low, frame.min()), np.maximum(high, frame.max())
        if not (low >= -1 and high <= 1):                            # also refuses NaN
            raise MediaError(f"{name}: floats from {low:g} to {high:g}: want [-1, 1], or [0, 1] with value_range 'unit'")
        if value_range == "unit" and low < 0:
            raise MediaError(f"{name}: floats from {low:g} to {high:g}: want [0, 1] as value_range 'unit' says")
        if low >= 0 and value_range is None:
            could = f"floats from {low:g} to {high:g} could mean [0, 1] or [-1, 1]"
            raise MediaError(f"{name}: {could}: want value_range 'unit' or 'signed', or uint8")
        return value_range == "unit"

    def pictures(self, start: Fraction = Fraction(0)) -> Iterator[Picture]:
        for i in range(self.array.shape[0]):
            yield Picture(i / self.fps, 1 / self.fps, lambda i=i: self._load(i))

    def _load(self, i: int) -> np.ndarray:
        self.info.frames_decoded += 1
        frame = np.ascontiguousarray(self.array[i])
        return frame if frame.dtype == np.uint8 else (frame * 2 - 1 if self.unit else frame).astype(np.float32)
