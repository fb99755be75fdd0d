"""Small videos made on the spot with PyAV, so that no test depends on a file in the repository."""

from fractions import Fraction

import av
import numpy as np
import pytest

EXACT = 0x4 | 0x2000 | 0x40000


KR_KB = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def to_yuv(picture, pix_fmt, matrix, full):
    """RGB levels to a planar YUV frame by the definition (ITU-R BT.709 sec. 3): the reader is judged by something other than swscale."""
    (kr, kb), bits = KR_KB[matrix], 10 if "10" in pix_fmt else 8
    r, g, b = np.moveaxis(picture.astype(np.float64) / 255, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale, top = 2 ** (bits - 8), 2**bits - 1
    y = y * top if full else (16 + 219 * y) * scale
    u, v = (2 ** (bits - 1) + c * (top if full else 224 * scale) for c in (u, v))
    down, right = (2, 2) if "420" in pix_fmt else (1, 2) if "422" in pix_fmt else (1, 1)
    h, w = y.shape
    u, v = (c.reshape(h // down, down, w // right, right).mean((1, 3)) for c in (u, v))
    frame = av.VideoFrame(w, h, pix_fmt)
    for plane, values in zip(frame.planes, (y, u, v)):
        kind = np.dtype(np.uint16 if bits > 8 else np.uint8)
        rows = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
        rows[:, : values.shape[1]] = np.round(values).clip(0, top)
        plane.update(rows.tobytes())
    return frame


def levels(i: int) -> tuple[int, int, int]:
    """The uniform colour of test picture i: far enough apart to tell pictures from one another through any codec."""
    return (40 + 16 * (i % 10), 200 - 12 * (i % 10), 60 + 50 * (i // 10 % 3))


@pytest.fixture(scope="session")
def make_video():
    """make_video(path, pictures, ...): pictures are [h, w, 3 or 4] uint8 arrays; returns the path."""

    def make(path, pictures, *, codec="libx264", pix_fmt="yuv420p", rate=24, pts=None, time_base=None, options=None, matrix=1, full=False,
             tagged=True, rotation=0, aspect=None, sound=0.0, sound_codec="aac", container_options=None, disposition=None):
        rate = Fraction(rate)
        base = time_base or 1 / rate
        with av.open(str(path), "w", options=container_options or {}) as out:
            h, w = pictures[0].shape[:2]
            defaults = {"crf": "4", "threads": "1"} if codec == "libx264" else {}
            stream = out.add_stream(codec, rate=rate, options={**defaults, **(options or {})})
            stream.width, stream.height, stream.pix_fmt = w, h, pix_fmt
            context = stream.codec_context
            context.time_base = base
            if aspect:
                context.sample_aspect_ratio = Fraction(aspect)
            if tagged and "yuv" in pix_fmt:
                context.colorspace = context.color_primaries = context.color_trc = matrix
                context.color_range = 2 if full else 1
            if rotation:
                stream.set_display_rotation(rotation)
            if disposition is not None:
                stream.disposition = disposition
            audio = out.add_stream(sound_codec, rate=48000) if sound else None
            if audio is not None:
                audio.codec_context.layout = "mono"
            for i, picture in enumerate(pictures):
                if pix_fmt in ("yuv420p", "yuv444p", "yuv422p10le") and not picture.shape[0] % 2 and not picture.shape[1] % 2:
                    frame = to_yuv(picture, pix_fmt, matrix, full)
                else:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgba" if picture.shape[2] == 4 else "rgb24")
                    frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=2 if full else 1, interpolation=EXACT)
                frame.pts, frame.time_base = (i if pts is None else pts[i]), base
                for packet in stream.encode(frame):
                    out.mux(packet)
            for packet in stream.encode(None):
                out.mux(packet)
            if audio is not None:
                t = np.arange(int(sound * 48000)) / 48000
                wave = (0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
                for k in range(0, len(wave), 1024):
                    block = av.AudioFrame.from_ndarray(wave[None, k : k + 1024], format="fltp", layout="mono")
                    block.sample_rate, block.pts, block.time_base = 48000, k, Fraction(1, 48000)
                    for packet in audio.encode(block):
                        out.mux(packet)
                for packet in audio.encode(None):
                    out.mux(packet)
        return path

    return make


@pytest.fixture(scope="session")
def uniform():
    """uniform(n, h, w): n pictures, picture i all of colour levels(i)."""

    def make(n=10, h=32, w=48):
        return [np.full((h, w, 3), levels(i), np.uint8) for i in range(n)]

    return make


@pytest.fixture(scope="session")
def shows():
    """shows(video, i, n): frame i of a clip holds picture n (its colour within `within` levels of 255)."""

    def check(video, i, n, within=1.0):
        off = ((video[i] + 1) * 127.5 - video.new_tensor(levels(n))).abs().max().item()
        assert off <= within + 0.5, f"frame {i}: picture {n} wanted, colour off by {off:.1f} levels"      # 0.5: the codec's 8 bits

    return check
