"""The input's sound beside the new picture: packets are copied as they are and cut to the video's length.

Only a codec that MP4 cannot hold is encoded again, to AAC. Time zero is the first picture of the source, as in decode.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from engine.media.clip import DEFAULT_LIMITS, shown
from engine.media.container import READ_ERRORS, first_video, open_container, reason
from engine.media.folders import PICTURE_SUFFIXES

COPIED = {"aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "flac"}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


class AudioTrack:
    """The first audio stream of `path`, from `start` seconds on. Without sound in the source every call does nothing."""

    def __init__(self, path, start: float):
        self.path, self.stream, self.container = Path(path), None, None
        self.start = Fraction(start).limit_denominator(1_000_000)
        if self.path.suffix.lower() in (*PICTURE_SUFFIXES, ".npy", ".gif") or os.path.isdir(path):
            return
        self.container = open_container(self.path, DEFAULT_LIMITS.max_pixels)
        self.stream = next(iter(self.container.streams.audio), None)
        if self.stream is not None and self.stream.codec_context is None:
            self._give_up("its codec is unknown here")
        self.copied = self.stream is not None and self.stream.codec_context.name in COPIED
        if self.stream is not None and not self.copied:
            try:                                                     # before any frame is computed, not after
                self._set_up(av.CodecContext.create("aac", "w")).open()
            except READ_ERRORS as error:
                self._give_up(f"no AAC of this kind ({reason(error)})")

    def close(self) -> None:
        if self.container is not None:
            self.container.close()

    def attach(self, out) -> None:
        """Add the track to an output container; before its first packet."""
        if self.stream is None:
            return
        picture = first_video(self.container)
        zero = Fraction(0) if picture is None or picture.start_time is None else picture.start_time * picture.time_base
        self.zero = zero + self.start
        if self.copied:
            self.track = out.add_stream_from_template(self.stream)
        else:
            self.track = out.add_stream("aac")
            self._set_up(self.track.codec_context)
        self._waiting = None
        self._units = self._packets() if self.copied else self._samples()

    def _set_up(self, encoder):
        given = self.stream.codec_context
        encoder.sample_rate = given.sample_rate if given.sample_rate in AAC_RATES else 48000
        encoder.layout = LAYOUTS.get(given.layout.nb_channels, "stereo")          # by number: AVI and Matroska PCM do not name theirs
        encoder.format, encoder.bit_rate, encoder.time_base = "fltp", 192_000, Fraction(1, encoder.sample_rate)
        return encoder

    def pump(self, out, until: Fraction) -> None:
        """Write the sound that begins before `until` (seconds of output)."""
        while self.stream is not None:
            if self._waiting is None:
                try:
                    self._waiting = next(self._units, None)
                except READ_ERRORS as error:                         # hours of sampling are worth more than the rest of the sound
                    self._give_up(f"damaged after {float(until):.1f} s ({reason(error)})")
                if self._waiting is None:
                    return
            if self._waiting[0] >= until:
                return
            for packet in self._waiting[1]() if callable(self._waiting[1]) else [self._waiting[1]]:
                out.mux(packet)
            self._waiting = None

    def finish(self, out) -> None:
        if self.stream is not None and not self.copied:
            for packet in self.track.encode(None):
                out.mux(packet)

    def _give_up(self, why: str) -> None:
        warnings.warn(f"{shown(self.path)}: sound left out: {why}", stacklevel=2)
        self.stream = None

    def _packets(self) -> Iterator[tuple[Fraction, av.Packet]]:
        """From the packet before time zero on: decoders need one to warm up, and MP4's edit list hides it."""
        base = Fraction(self.stream.time_base)
        offset = round(self.zero / base)
        for packet in self.container.demux(self.stream):
            if not packet.size or packet.pts is None:
                continue
            time = (packet.pts - offset) * base
            if time < -2 * (packet.duration or 0) * base:
                continue
            packet.pts -= offset
            packet.dts = packet.pts
            packet.stream = self.track
            yield time, packet

    def _samples(self):
        for packet in self.container.demux(self.stream):
            for frame in packet.decode():
                if frame.pts is None:
                    continue
                time = frame.pts * frame.time_base - self.zero
                if time + Fraction(frame.samples, 2 * frame.sample_rate) < 0:
                    continue
                frame.pts, frame.time_base = round(max(time, 0) * frame.sample_rate), Fraction(1, frame.sample_rate)
                yield time, lambda frame=frame: self.track.encode(frame)
