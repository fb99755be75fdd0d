"""A video file as a stream of timed pictures.

What the file says about itself is honoured: timestamps, rotation, pixel aspect, colour matrix and range, interlacing, alpha.
Header limits are checked before any decoding, and each picture again, because a header may lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np

from engine.errors import MediaError
from engine.media.clip import MediaLimits, Picture, SourceInfo, shown
from engine.media.container import READ_ERRORS, WANTED, first_video, open_container, reason

# BICUBIC | FULL_CHROMA_INT | ACCURATE_RND: a uniform BT.709 patch comes back within 0.4 of 255 levels; swscale's default: 1.8 off.
EXACT = 0x4 | 0x2000 | 0x40000
# AVColorSpace -> (name, swscale's coefficients); 2 is "unspecified", 3 reserved.
MATRICES = {1: ("bt709", 1), 4: ("fcc", 4), 5: ("bt601", 5), 6: ("bt601", 5), 7: ("smpte240m", 7), 9: ("bt2020", 9), 10: ("bt2020", 9)}
SEEK_FROM = 10                                                       # seconds: below, decoding from the first picture costs little


class VideoSource:
    """One opened video. `info` and `notes` grow while pictures are read; `cut` tells that the file ended in an error."""

    def __init__(self, path: Path, limits: MediaLimits):
        self.path, self.limits, self.notes, self.cut = path, limits, [], False
        # Containers round timestamps (GIF to 10 ms, Matroska to 1): a picture due at 41.67 ms and stamped 42 is the one shown at 1/24 s.
        self.clock_error = Fraction(1, 200) if path.suffix.lower() == ".gif" else Fraction(1, 2000)
        self._described = False
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._open()
        try:
            self._read_header()
        except READ_ERRORS as error:
            self.close()
            raise MediaError(f"{shown(path)}: damaged header ({reason(error)})") from error
        except MediaError:
            self.close()
            raise

    def close(self) -> None:
        self.container.close()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _open(self) -> None:
        self.container = open_container(self.path, self.limits.max_pixels)
        self.stream = first_video(self.container)
        if self.stream is None:
            self.container.close()
            raise MediaError(f"{shown(self.path)}: no video in it (audio or cover art only): {WANTED}")

    def _read_header(self) -> None:
        stream, context = self.stream, self.stream.codec_context
        if context is None:
            raise MediaError(f"{shown(self.path)}: its video codec is unknown here: want H.264, HEVC, VP9, AV1, ProRes, ...")
        if context.width < 1 or context.height < 1:
            raise MediaError(f"{shown(self.path)}: no picture size in the header")
        fps = stream.average_rate or stream.guessed_rate
        fps = fps if fps and fps > 0 else None
        frames, duration = stream.frames or None, self._header_duration()
        if self.container.format.name == "gif":                      # no header to ask: count without decoding
            frames, duration = self._scan()
            fps = Fraction(frames) / duration if duration else None
        self.limits.check_picture(self.path, context.width, context.height)
        if self.container.format.name == "avi" and frames and fps:   # of a cut AVI FFmpeg shortens the duration, not the count
            duration = max(duration or 0, frames / fps)
        # browsers record WebM "at 1000 fps": only a rate that comes from a count of frames is believed
        counted = Fraction(frames) / duration if frames and duration else None
        self.limits.check_length(self.path, float(duration) if duration else None, frames, counted)
        self.decoder, self.step = self._make_decoder(), 1 / fps if fps else None
        aspect = stream.sample_aspect_ratio
        self.info = SourceInfo(
            "video", context.width, context.height, fps, float(duration) if duration else None, context.codec.name,
            pixel_aspect=aspect if aspect and Fraction(1, 16) <= aspect <= 16 else Fraction(1),
            has_audio=bool(self.container.streams.audio), comment=self.container.metadata.get("comment"),
        )

    def _header_duration(self) -> Fraction | None:
        """Seconds of the video stream by the header; the container's figure, which audio may stretch, only where there is no other."""
        if self.stream.duration and self.stream.duration > 0:
            return self.stream.duration * self.stream.time_base
        tag = {key.upper(): value for key, value in self.stream.metadata.items()}.get("DURATION", "")     # Matroska
        try:
            hours, minutes, seconds = tag.strip("\0 ").split(":")
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        except (ValueError, ZeroDivisionError):
            duration = self.container.duration
            return Fraction(duration, 1_000_000) if duration and duration > 0 and not self.container.streams.audio else None

    def _scan(self) -> tuple[int, Fraction]:
        count, end = 0, 0
        for packet in self.container.demux(self.stream):
            if packet.size:
                count, end = count + 1, max(end, (packet.pts or 0) + (packet.duration or 0))
            if count > self.limits.max_frames:
                break
        self.container.close()
        self._open()
        return count, end * self.stream.time_base

    def _make_decoder(self):
        """FFmpeg's own VP8 and VP9 decoders drop alpha; libvpx keeps it."""
        context, decoder = self.stream.codec_context, self.stream.codec_context
        tags = {key.lower(): value for key, value in self.stream.metadata.items()}
        if context.codec.name in ("vp8", "vp9") and tags.get("alpha_mode") == "1":
            try:
                decoder = av.CodecContext.create("libvpx-vp9" if context.codec.name == "vp9" else "libvpx", "r")
            except READ_ERRORS:
                self.note("alpha ignored: this FFmpeg has no libvpx")
        decoder.options = {"max_pixels": str(self.limits.max_pixels)}
        return decoder

    def pictures(self, start: Fraction = Fraction(0)) -> Iterator[Picture]:
        """Pictures in display order, timed from the stream's first one. May begin late, with the last key picture before `start`."""
        if start >= SEEK_FROM and self.stream.start_time is not None and self.info.kind == "video":
            found = self._after_seek(start)
            if found is not None:
                yield from found
                return
            self.container.close()
            self._open()
            self.decoder = self._make_decoder()
        yield from self._timed(None)

    def _after_seek(self, start: Fraction) -> Iterator[Picture] | None:
        zero = self.stream.start_time * self.stream.time_base
        try:
            self.container.seek(int((start + zero) / self.stream.time_base), stream=self.stream)
            rest = self._timed(zero)
            first = next(rest, None)
        except (*READ_ERRORS, MediaError):
            return None
        if first is None or first.time > start:                      # an index that lies: decode from the beginning instead
            return None
        return _chain(first, rest)

    def _timed(self, zero: Fraction | None) -> Iterator[Picture]:
        last = None
        for frame in self._progressive(self._frames()):
            if frame.pts is not None:
                time = frame.pts * Fraction(frame.time_base)
                zero = time if zero is None else zero
                time -= zero
            elif self.step is None:
                raise MediaError(f"{shown(self.path)}: neither timestamps nor a frame rate in it")
            else:
                time = Fraction(0) if last is None else last + self.step
            time = time if last is None else max(time, last)         # a damaged clock does not run backwards
            length = frame.duration * Fraction(frame.time_base) if frame.duration and frame.duration > 0 else 0
            aspect = self.info.pixel_aspect if self.info.rotation % 180 == 0 else 1 / self.info.pixel_aspect
            yield Picture(time, length or self.step or Fraction(1, 24), lambda frame=frame: self._pixels(frame), aspect)
            last = time

    def _frames(self) -> Iterator:
        """Decoded frames. An error with more of the video behind it is damage; an error at the very end is a cut file."""
        failed, packets = None, self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except READ_ERRORS as error:
                failed = error
                break
            if not packet.size:
                continue
            if failed:
                raise MediaError(f"{shown(self.path)}: damaged after picture {self.info.frames_decoded} ({reason(failed)})") from failed
            try:
                frames = self.decoder.decode(packet)
            except READ_ERRORS as error:
                failed = error
                continue
            yield from map(self._checked, frames)
        try:
            frames = self.decoder.decode(None)
        except READ_ERRORS as error:
            failed, frames = failed or error, []
        yield from map(self._checked, frames)
        self.cut = failed is not None
        if failed and not self.info.frames_decoded:
            raise MediaError(f"{shown(self.path)}: no picture in it can be decoded ({reason(failed)})") from failed

    def _checked(self, frame):
        if not frame.time_base:                                      # PyAV sets none on the frames a flush brings out
            frame.time_base = self.stream.time_base
        self.info.frames_decoded += 1
        self.limits.check_picture(self.path, frame.width, frame.height)
        self.limits.check_length(self.path, None, self.info.frames_decoded, None)
        if frame.is_corrupt:
            self.note("damaged: some pictures were repaired by the decoder")
        if not self._described:
            self._described = True
            self._describe(frame)
        return frame

    def _describe(self, frame) -> None:
        """Rotation, matrix and range by the first picture; they are properties of the file, only PyAV shows them per picture."""
        turn = round(frame.rotation / 90) * 90
        if turn != frame.rotation:
            self.note(f"rotation of {frame.rotation} degrees taken as {turn}")
        self.info.rotation = turn % 360
        self._matrix = self._range = None                            # RGB and palettes: nothing to choose
        if frame.format.is_rgb or frame.format.has_palette:
            return
        full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        if frame.format.name.startswith("gray"):
            self.info.matrix = "gray"
            self._range = frame.color_range or None                  # swscale takes untagged grey as full range, as players do
            return
        name, self._matrix = MATRICES.get(frame.colorspace, (None, None))
        if name is None:
            name, self._matrix = ("bt709", 1) if frame.height >= 720 else ("bt601", 5)
            what = "not tagged" if frame.colorspace in (2, 3) else f"of a kind not handled ({frame.colorspace})"
            self.note(f"colour matrix {what}: {name} assumed from the height of {frame.height}")
        self._range = 2 if full else 1
        self.info.matrix = f"{name} {'full' if full else 'limited'}"
        if frame.color_trc in (16, 18):                              # PQ, HLG
            self.note("HDR video: its brightness is not tone-mapped")

    def _progressive(self, frames: Iterator) -> Iterator:
        """Pass progressive frames through; from the first interlaced one on, yadif (which leaves progressive ones alone)."""
        graph, shape = None, None
        for frame in frames:
            if graph is None and not frame.interlaced_frame:
                yield frame
                continue
            if shape != (frame.width, frame.height, frame.format.name):
                yield from self._drain(graph)
                self.note("interlaced: deinterlaced with yadif")
                shape, graph = (frame.width, frame.height, frame.format.name), self._yadif(frame)
            yield from self._drain(graph, frame)
        yield from self._drain(graph)

    def _yadif(self, frame):
        graph = av.filter.Graph()
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        yadif, sink = graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
        source.link_to(yadif)
        yadif.link_to(sink)
        graph.configure()
        return graph

    def _drain(self, graph, frame=None) -> Iterator:
        if graph is None:
            return
        try:
            graph.vpush(frame)
            while True:
                yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        except READ_ERRORS as error:
            raise MediaError(f"{shown(self.path)}: cannot deinterlace ({reason(error)})") from error

    def _pixels(self, frame) -> np.ndarray:
        parts = frame.format.components
        alpha = frame.format.has_palette or any(part.is_alpha for part in parts)
        # 16-bit RGB only where the source is not YUV: swscale's YUV to RGB48 comes out 0.4 % too dark (FFmpeg 8.1)
        deep = max(part.bits for part in parts) > 8 and self._matrix is None
        try:
            rgb = self._reformatter.reformat(
                frame, format={(0, 0): "rgb24", (1, 0): "rgba", (0, 1): "rgb48le", (1, 1): "rgba64le"}[alpha, deep], interpolation=EXACT,
                src_colorspace=self._matrix, src_color_range=self._range, dst_color_range=2, threads=1,
            ).to_ndarray()
        except READ_ERRORS as error:
            raise MediaError(f"{shown(self.path)}: pictures of format {frame.format.name} cannot be read ({reason(error)})") from error
        return np.rot90(rgb, self.info.rotation // 90)


def _chain(first, rest):
    yield first
    yield from rest
