"""Write a video: MP4 (H.264), GIF, .npy or a folder of PNG, by the name's ending; complete or absent.

The frames may come in chunks, so that 128 frames of 768x1280 never have to be in memory at once. The same frames give the same
bytes: x264 runs on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError, DiskError, MediaError
from engine.media.atomic import disk_errors, replacing
from engine.media.clip import as_fps, shown

CHUNK = 16                                                           # frames converted at a time when a whole tensor is given


def write_video(
    path,
    video: Tensor | Iterable[Tensor],
    fps: Fraction | float,
    *,
    audio_from=None,
    audio_start: float = 0.0,
    metadata: dict | None = None,
) -> Path:
    """Write `video` [T, H, W, 3] in [-1, 1], or an iterable of such chunks, at `fps`. -> the path written.

    Ending: .mp4, .gif, .npy (float32, exact) or none (a folder of %05d.png). MP4 only: `audio_from`, a file whose sound is carried
    over from `audio_start` seconds on, and `metadata`, kept as JSON in the `comment` tag. An odd height or width gets one line more
    in MP4 (4:2:0 wants even sizes). An existing file is replaced by a complete one or not at all.
    Raises: DiskError (cannot be written), ConfigError (unknown ending), MediaError (`audio_from` cannot be used, or the encoder refuses the
    size), ValueError (frames of a wrong shape or not finite).
    """
    rate, text, path = as_fps(fps), str(path), Path(path)
    ending = "" if text.endswith("/") else path.suffix.lower()
    if ending not in WRITERS:
        raise ConfigError(f"{shown(path)}: want a name ending in .mp4, .gif or .npy, or a folder (no ending, or a / at the end)")
    if not 0 <= audio_start < float("inf"):
        raise ValueError(f"audio_start: want seconds >= 0, got {audio_start!r}")
    with replacing(path, folder=ending == "") as part:
        writer = WRITERS[ending](path, part, rate)
        try:
            if ending == ".mp4":
                writer.prepare(audio_from, audio_start, metadata)
            for chunk in chunks_of(video):
                writer.add(chunk)
            with disk_errors(path):
                writer.finish()
        finally:
            writer.close()
    return path


def chunks_of(video: Tensor | Iterable[Tensor], size: int = CHUNK) -> Iterator[Tensor]:
    """Any video as checked chunks [t, H, W, 3] of float32 in [-1, 1]. Raises: ValueError for wrong shapes, NaN, or no frame at all."""
    count, shape = 0, None
    for chunk in video.split(size) if isinstance(video, Tensor) and video.ndim == 4 else [video] if isinstance(video, Tensor) else video:
        if not isinstance(chunk, Tensor) or chunk.ndim != 4 or chunk.shape[-1] != 3 or not chunk.is_floating_point():
            came = f"{chunk.dtype} {list(chunk.shape)}" if isinstance(chunk, Tensor) else type(chunk).__name__
            raise ValueError(f"video: want float tensors [T, H, W, 3] in [-1, 1], got {came}")
        shape = shape or chunk.shape[1:]
        if chunk.shape[1:] != shape or 0 in shape:
            raise ValueError(f"video: want chunks of one size, {list(shape)}, got {list(chunk.shape[1:])}")
        chunk = chunk.detach().to("cpu", torch.float32)
        if not torch.isfinite(chunk).all():
            raise ValueError("video: want finite values in [-1, 1], got NaN or infinity")
        count += len(chunk)
        if len(chunk):
            yield chunk.clamp(-1, 1)
    if not count:
        raise ValueError("video: want at least one frame, got none")


def to_levels(chunk: Tensor) -> np.ndarray:
    """[t, H, W, 3] in [-1, 1] -> uint8 levels, rounded."""
    return ((chunk + 1) * 127.5).round().to(torch.uint8).numpy()


@contextmanager
def _encoding(path: Path, what: str) -> Iterator[None]:
    """FFmpeg's errors while writing: the disk's become DiskError, the encoder's MediaError."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise DiskError(f"{shown(path)}: cannot be written: {error.strerror}") from error
        raise MediaError(f"{shown(path)}: the encoder refuses{what} ({error.strerror})") from error


class _Mp4:
    """H.264 4:2:0, converted to and tagged BT.709 limited: untagged colours are the player's guess."""

    def __init__(self, path: Path, part: Path, fps: Fraction):
        import av

        self.av, self.path, self.part, self.fps, self.count = av, path, part, fps, 0
        self.out = self.audio = None

    def prepare(self, audio_from, audio_start: float, metadata: dict | None) -> None:
        """All that can be refused without a frame is refused here: the frames may cost hours."""
        from engine.media.audio import AudioTrack

        self.comment = None if metadata is None else json.dumps(metadata, sort_keys=True)
        self.audio = None if audio_from is None else AudioTrack(audio_from, audio_start)

    def _begin(self, height: int, width: int) -> None:
        self.out = self.av.open(f"file:{self.part.absolute()}", "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"})
        if self.comment is not None:
            self.out.metadata["comment"] = self.comment
        self.stream = self.out.add_stream("libx264", rate=self.fps, options={"crf": "12", "preset": "medium", "threads": "1"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = self.stream.codec_context
        context.time_base = 1 / self.fps
        context.color_range = context.colorspace = context.color_primaries = context.color_trc = 1       # limited range; BT.709 thrice
        if self.audio:
            self.audio.attach(self.out)

    def add(self, chunk: Tensor) -> None:
        levels = to_levels(chunk)
        levels = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2), (0, levels.shape[2] % 2), (0, 0)), mode="edge")
        with _encoding(self.path, f" {chunk.shape[2]}x{chunk.shape[1]} pictures"):
            if self.out is None:
                self._begin(*chunk.shape[1:3])
            for picture in levels:
                frame = self.av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=1, dst_color_range=1, interpolation=0x4 | 0x2000 | 0x40000, threads=1
                )                                                    # flags as in video.EXACT
                frame.pts, frame.time_base = self.count, 1 / self.fps
                self.count += 1
                for packet in self.stream.encode(frame):
                    self.out.mux(packet)
            if self.audio:
                self.audio.pump(self.out, self.count / self.fps)

    def finish(self) -> None:
        with _encoding(self.path, " these pictures"):
            for packet in self.stream.encode(None):
                self.out.mux(packet)
            if self.audio:
                self.audio.finish(self.out)
            self.out.close()

    def close(self) -> None:
        if self.audio:
            self.audio.close()
        if self.out is not None:
            try:
                self.out.close()
            except self.av.FFmpegError:                              # after a failure; the part file goes anyway
                pass


class _Gif:
    """A palette of its own per frame, and delays that add up: GIF counts hundredths, so 24 fps alternates 4 and 5."""

    def __init__(self, path: Path, part: Path, fps: Fraction):
        import av
        from PIL import Image

        self.av, self.image, self.path, self.part, self.fps, self.count, self.out = av, Image, path, part, fps, 0, None

    def add(self, chunk: Tensor) -> None:
        with _encoding(self.path, f" {chunk.shape[2]}x{chunk.shape[1]} pictures"):
            if self.out is None:
                last = {"final_delay": str(round(100 / self.fps))}   # else the last frame stays for 1/100 s
                self.out = self.av.open(f"file:{self.part.absolute()}", "w", format="gif", options=last)
                self.stream = self.out.add_stream("gif", rate=100)
                self.stream.width, self.stream.height, self.stream.pix_fmt = chunk.shape[2], chunk.shape[1], "pal8"
                self.stream.codec_context.time_base = Fraction(1, 100)
            for picture in to_levels(chunk):
                indexed = self.image.fromarray(picture).quantize(256)
                palette = np.zeros((256, 4), np.uint8)               # A, R, G, B
                colours = np.array(indexed.getpalette("RGB"), np.uint8).reshape(-1, 3)
                palette[:, 0], palette[: len(colours), 1:] = 255, colours
                frame = self.av.VideoFrame.from_ndarray((np.asarray(indexed), palette), format="pal8")
                begin, end = round(self.count * 100 / self.fps), round((self.count + 1) * 100 / self.fps)
                frame.pts, frame.duration, frame.time_base = begin, end - begin, Fraction(1, 100)
                self.count += 1
                for packet in self.stream.encode(frame):
                    self.out.mux(packet)

    def finish(self) -> None:
        with _encoding(self.path, " these pictures"):
            for packet in self.stream.encode(None):
                self.out.mux(packet)
            self.out.close()

    close = _Mp4.close
    audio = None


class _Npy:
    """float32 as it is. The header is written again at the end, when the number of frames is known: numpy leaves room for that."""

    def __init__(self, path: Path, part: Path, fps: Fraction):
        self.path, self.file, self.shape = path, open(part, "wb"), None

    def _header(self) -> None:
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": self.shape})

    def add(self, chunk: Tensor) -> None:
        with disk_errors(self.path):
            if self.shape is None:
                self.shape = (0, *chunk.shape[1:])
                self._header()
            self.shape = (self.shape[0] + len(chunk), *self.shape[1:])
            self.file.write(chunk.contiguous().numpy().astype("<f4", copy=False).tobytes())

    def finish(self) -> None:
        self._header()
        self.file.close()

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:                                              # a full disk, again; the part file goes anyway
            pass


class _Folder:
    """One PNG per frame, numbered from 00000."""

    def __init__(self, path: Path, part: Path, fps: Fraction):
        from PIL import Image

        self.image, self.path, self.part, self.count = Image, path, part, 0

    def add(self, chunk: Tensor) -> None:
        with disk_errors(self.path):
            for picture in to_levels(chunk):
                self.image.fromarray(picture).save(self.part / f"{self.count:05d}.png", format="PNG")
                self.count += 1

    def finish(self) -> None:
        pass

    close = finish


WRITERS = {".mp4": _Mp4, ".gif": _Gif, ".npy": _Npy, "": _Folder}
