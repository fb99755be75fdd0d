"""What the file says about itself is honoured: time, orientation, shape, colour, alpha, depth, interlacing."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import MediaError
from engine.media import MediaLimits, probe, read_clip

SIZE = dict(height=32, width=48)


def corners(h=32, w=48, n=4):
    """Four quadrants: red, green / blue, white."""
    picture = np.zeros((h, w, 3), np.uint8)
    picture[: h // 2, : w // 2], picture[: h // 2, w // 2 :] = (200, 30, 30), (30, 200, 30)
    picture[h // 2 :, : w // 2], picture[h // 2 :, w // 2 :] = (30, 30, 200), (220, 220, 220)
    return [picture] * n


def names(frame):
    """The colours at the four corners, clockwise from the top left: r, g, b, w or k."""
    h, w = frame.shape[:2]
    found = ""
    for y, x in ((h // 8, w // 8), (h // 8, -w // 8), (-h // 8, -w // 8), (-h // 8, w // 8)):
        colour = frame[y, x]
        found += "w" if colour.min() > 0.3 else "k" if colour.max() < -0.8 else "rgb"[int(colour.argmax())]
    return found


@pytest.mark.parametrize("matrix, full", [(1, False), (1, True), (5, False), (9, False)], ids=["709", "709-full", "601", "2020"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv422p10le"])
def test_uniform_colours_within_a_level(tmp_path, make_video, uniform, shows, matrix, full, pix_fmt):
    path = make_video(tmp_path / "a.mp4", uniform(10), matrix=matrix, full=full, pix_fmt=pix_fmt)
    clip = read_clip(path, frames=10, fps=24, **SIZE)
    for i in range(10):
        shows(clip.video, i, i)
    assert clip.covered == 10 and clip.notes == [] and clip.source.frames_decoded == 10
    assert clip.source.matrix == f"{ {1: 'bt709', 5: 'bt601', 9: 'bt2020'}[matrix]} {'full' if full else 'limited'}"


@pytest.mark.parametrize("height, name, matrix", [(718, "bt601", 5), (720, "bt709", 1)])
def test_untagged_colours_go_by_height_and_are_told(tmp_path, make_video, uniform, shows, height, name, matrix):
    path = make_video(tmp_path / "a.mp4", uniform(1, height, 64), matrix=matrix, tagged=False)
    clip = read_clip(path, frames=1, fps=24, **SIZE)
    shows(clip.video, 0, 0)
    assert any(f"{name} assumed" in note for note in clip.notes)


CODECS = [("ffv1", "gray", "mkv"), ("ffv1", "bgra", "mkv"), ("mjpeg", "yuvj420p", "avi"), ("libvpx-vp9", "yuv420p", "webm"),
          ("mpeg4", "yuv420p", "avi"), ("qtrle", "rgb24", "mov")]


@pytest.mark.parametrize("codec, pix_fmt, ending", CODECS)
def test_codecs_and_containers(tmp_path, make_video, codec, pix_fmt, ending):
    grey = [np.full((32, 48, 3), v, np.uint8) for v in (30, 120, 220)]
    path = make_video(tmp_path / f"a.{ending}", grey, codec=codec, pix_fmt=pix_fmt, full=pix_fmt == "yuvj420p", tagged=codec != "mpeg4")
    video = read_clip(path, frames=3, fps=24, **SIZE).video
    for i, level in enumerate((30, 120, 220)):
        assert ((video[i] + 1) * 127.5 - level).abs().max() < 3


def test_same_file_at_two_rates_and_sizes(tmp_path, make_video, uniform, shows):
    path = make_video(tmp_path / "a.mp4", uniform(30), rate=24)
    slow = read_clip(path, frames=3, fps=3, height=24, width=40)
    assert slow.video.shape == (3, 24, 40, 3) and slow.video.is_contiguous() and slow.video.dtype == torch.float32
    for i in range(3):
        shows(slow.video, i, 8 * i)
    fast = read_clip(path, frames=30, fps=24, height=96, width=160)
    for i in range(30):
        shows(fast.video, i, i)


@pytest.mark.parametrize("ending, base", [("mp4", None), ("mkv", Fraction(1, 1000)), ("webm", Fraction(1, 1000))])
@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 60], ids=str)
def test_own_rate_gives_every_picture_once(tmp_path, make_video, uniform, shows, ending, base, rate):
    """Matroska rounds to milliseconds: picture 1 of 24 fps is stamped 42 ms, later than 1/24 s."""
    options = dict(codec="libvpx-vp9", options={"crf": "4", "cpu-used": "8"}) if ending == "webm" else {}
    path = make_video(tmp_path / f"a.{ending}", uniform(20), rate=rate, **options)
    clip = read_clip(path, frames=20, fps=rate, **SIZE)
    for i in range(20):
        shows(clip.video, i, i, within=2)
    assert clip.covered == 20


def test_variable_rate_by_timestamp(tmp_path, make_video, uniform, shows):
    pts = [0, 100, 900, 1000, 1500]                                               # ms: pictures 1 and 3 are brief or long
    path = make_video(tmp_path / "a.mkv", uniform(5), rate=10, pts=pts, time_base=Fraction(1, 1000))
    clip = read_clip(path, frames=16, fps=10, **SIZE)
    for i, n in enumerate([0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4]):
        shows(clip.video, i, n)


def test_start_and_held_frames(tmp_path, make_video, uniform, shows):
    path = make_video(tmp_path / "a.mp4", uniform(10), rate=10)
    clip = read_clip(path, frames=8, fps=10, start=0.5, **SIZE)
    for i in range(8):
        shows(clip.video, i, min(5 + i, 9))
    assert clip.covered == 5 and clip.duration == pytest.approx(0.5) and "3 of 8 frames lie past the end" in clip.notes[0]
    with pytest.raises(MediaError, match="start 2 s"):
        read_clip(path, frames=1, fps=10, start=2.0, **SIZE)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_far_start_seeks_to_the_same_picture(tmp_path, make_video, uniform, shows, ending):
    path = make_video(tmp_path / f"a.{ending}", uniform(150), rate=10, options={"g": "12"})
    clip = read_clip(path, frames=4, fps=10, start=12.3, **SIZE)
    for i in range(4):
        shows(clip.video, i, 123 + i)
    assert clip.source.frames_decoded < 60                                        # not the 127 from the beginning


def test_negative_and_late_first_timestamps(tmp_path, make_video, uniform, shows):
    for first in (-20, 500):
        path = make_video(tmp_path / f"a{first}.mkv", uniform(6), rate=10, pts=[first + i for i in range(6)])
        clip = read_clip(path, frames=6, fps=10, **SIZE)
        for i in range(6):
            shows(clip.video, i, i)


@pytest.mark.parametrize("rotation, want", [(0, "rgwb"), (90, "gwbr"), (180, "wbrg"), (270, "brgw"), (-90, "brgw")])
def test_rotation(tmp_path, make_video, rotation, want):
    path = make_video(tmp_path / "a.mp4", corners(), rotation=rotation)
    size = dict(height=32, width=48) if rotation % 180 == 0 else dict(height=48, width=32)
    clip = read_clip(path, frames=1, fps=24, **size)
    assert names(clip.video[0]) == want and clip.source.rotation == rotation % 360


def test_pixel_aspect(tmp_path, make_video):
    """48x32 stored with 2:1 pixels is shown 96x32: padded to 96x96 it fills a third of the height."""
    path = make_video(tmp_path / "a.mp4", corners(), aspect="2/1")
    frame = read_clip(path, frames=1, fps=24, height=96, width=96, fit="pad").video[0]
    assert (frame[:31] == -1).all() and (frame[-31:] == -1).all() and names(frame[32:64]) == "rgwb"
    assert probe(path).pixel_aspect == 2


def test_pixel_aspect_turns_with_the_picture(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", corners(), aspect="2/1", rotation=90)
    frame = read_clip(path, frames=1, fps=24, height=96, width=96, fit="pad").video[0]
    assert (frame[:, :31] == -1).all() and (frame[:, -31:] == -1).all() and names(frame[:, 32:64]) == "gwbr"


@pytest.mark.parametrize("h, w", [(31, 47), (2, 2), (33, 128)])
def test_odd_sizes(tmp_path, make_video, uniform, shows, h, w):
    path = make_video(tmp_path / "a.mkv", uniform(3, h, w), codec="ffv1", pix_fmt="yuv444p")
    clip = read_clip(path, frames=3, fps=24, **SIZE)
    assert (clip.source.height, clip.source.width) == (h, w)
    shows(clip.video, 2, 2)


@pytest.mark.parametrize("codec, pix_fmt, ending", [("libvpx-vp9", "yuva420p", "webm"), ("qtrle", "argb", "mov"), ("png", "rgba", "mov")])
def test_alpha_over_background(tmp_path, make_video, codec, pix_fmt, ending):
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[..., 0], picture[:, 24:, 3] = 200, 255                                # left half transparent red, right half solid
    options = {"crf": "4", "auto-alt-ref": "0", "cpu-used": "8"} if codec == "libvpx-vp9" else {}
    path = make_video(tmp_path / f"a.{ending}", [picture] * 3, codec=codec, pix_fmt=pix_fmt, options=options)
    clip = read_clip(path, frames=3, fps=24, background=(0, 0, 255), **SIZE)
    for at, want in ((8, (0, 0, 255)), (40, (200, 0, 0))):
        assert ((clip.video[1, 16, at] + 1) * 127.5 - torch.tensor(want)).abs().max() < 4
    assert "alpha composited over (0, 0, 255)" in clip.notes


def test_ten_bits(tmp_path, make_video):
    """Written plane by plane, so that the reader alone answers for the colours: black to white, half a level at most."""
    ramp = np.linspace(0, 255, 320, dtype=np.float32)
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 16, "yuv444p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        luma = np.round((16 + ramp / 255 * 219) * 4).astype(np.uint16)
        planes = np.stack([np.tile(luma, (16, 1)), np.full((16, 320), 512, np.uint16), np.full((16, 320), 512, np.uint16)])
        frame = av.VideoFrame(320, 16, "yuv444p10le")
        for plane, values in zip(frame.planes, planes):
            padded = np.zeros((16, plane.line_size // 2), np.uint16)
            padded[:, :320] = values
            plane.update(padded.tobytes())
        frame.pts, frame.time_base = 0, Fraction(1, 24)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    video = read_clip(tmp_path / "a.mkv", frames=1, fps=24, height=16, width=320).video
    assert ((video[0, 8, :, 1] + 1) * 127.5 - torch.from_numpy(ramp)).abs().max() < 0.65


def test_interlaced_is_deinterlaced(tmp_path, make_video):
    """Fields half a frame apart: every other line is of another time. The comb must go, the times must stay."""
    pictures = []
    for i in range(8):
        picture = np.full((64, 96, 3), 30, np.uint8)
        picture[0::2, 8 * i : 8 * i + 16], picture[1::2, 8 * i + 4 : 8 * i + 20] = 220, 220
        pictures.append(picture)
    path = make_video(tmp_path / "a.mp4", pictures, options={"flags": "+ildct", "x264-params": "tff=1"}, rate=25)
    clip = read_clip(path, frames=8, fps=25, height=64, width=96)
    assert "interlaced: deinterlaced with yadif" in clip.notes and clip.covered == 8
    raw = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1

    def comb(video):
        return (video[:, 2:-2:2] - video[:, 3:-1:2]).abs().mean()

    assert comb(clip.video) < 0.3 * comb(raw)
    bright = (clip.video[..., 0] > 0).float().mean(dim=1)                         # the bar moves 8 pixels a frame
    where = (bright * torch.arange(96.0)).sum(1) / bright.sum(1)
    assert (where.diff() - 8).abs().max() < 2


def test_cover_art_is_not_the_video(tmp_path, make_video, uniform):
    path = make_video(tmp_path / "a.mp4", uniform(1), codec="mjpeg", pix_fmt="yuvj420p", full=True, sound=0.5,
                      disposition=av.stream.Disposition.attached_pic)
    with pytest.raises(MediaError, match="no video in it"):
        read_clip(path, frames=1, fps=24, **SIZE)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi"])
def test_truncation_is_told(tmp_path, make_video, ending):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8)
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    whole = make_video(tmp_path / f"a.{ending}", list(noise), container_options=options, options={"bf": "0"})
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    clip = read_clip(cut, frames=48, fps=24, **SIZE)
    assert 10 < clip.covered < 40 and any(note.startswith("truncated") for note in clip.notes), clip.notes
    assert not any(note.startswith("truncated") for note in read_clip(whole, frames=60, fps=24, **SIZE).notes)
    assert read_clip(cut, frames=5, fps=24, **SIZE).covered == 5                  # what is asked for is there: nothing to tell


def test_sound_longer_than_the_picture_is_no_truncation(tmp_path, make_video, uniform):
    for ending in ("mp4", "mkv", "flv", "ts"):
        path = make_video(tmp_path / f"a.{ending}", uniform(12), sound=3.0)
        clip = read_clip(path, frames=12, fps=12, **SIZE)
        assert clip.covered == 6 and not any("truncated" in note for note in clip.notes) and clip.source.has_audio


def test_gif_delays_are_timestamps(tmp_path, uniform, shows):
    pictures = [Image.fromarray(p) for p in uniform(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 300, 100, 200], loop=0)
    clip = read_clip(tmp_path / "a.gif", frames=8, fps=10, **SIZE)
    for i, n in enumerate([0, 1, 1, 1, 2, 3, 3, 3]):
        shows(clip.video, i, n)
    assert clip.covered == 7 and clip.duration == pytest.approx(0.7)


def test_folder_in_natural_order(tmp_path, uniform, shows):
    for i, picture in enumerate(uniform(12)):
        Image.fromarray(picture).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture")
    clip = read_clip(tmp_path, frames=12, fps=24, **SIZE)
    for i in range(12):
        shows(clip.video, i, i, within=0)
    half = read_clip(tmp_path, frames=4, fps=6, source_fps=12, **SIZE)
    shows(half.video, 3, 6, within=0)
    assert clip.source.kind == "pictures" and half.source.duration == 1.0


def test_pictures(tmp_path):
    red = np.zeros((32, 48, 4), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "clear.png")
    clip = read_clip(tmp_path / "clear.png", frames=5, fps=24, background=(0, 255, 0), **SIZE)
    assert clip.video.shape == (5, 32, 48, 3) and (clip.video[..., 1] == 1).all() and clip.covered == 1 and clip.source.kind == "picture"
    turned = Image.fromarray(corners()[0])
    exif = turned.getexif()
    exif[0x0112] = 6                                                              # "rotate 90 clockwise to view"
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert names(read_clip(tmp_path / "turned.jpg", frames=1, fps=1, height=48, width=32).video[0]) == "brgw"
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert read_clip(tmp_path / "deep.png", frames=1, fps=1, height=8, width=8).video.abs().max() < 0.01


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.random((3, 32, 48, 3), np.float32)
    cases = {"u8": ((values * 255).astype(np.uint8), None), "signed": (values * 2 - 1, None), "unit": (values, "unit"),
             "f64": ((values * 2 - 1).astype(np.float64), None), "bright": (values, "signed")}
    for name, (array, value_range) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        got = read_clip(tmp_path / f"{name}.npy", frames=3, fps=24, value_range=value_range, **SIZE).video.numpy()
        want = values if name == "bright" else (values * 255).astype(np.uint8) / np.float32(127.5) - 1 if name == "u8" else values * 2 - 1
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)


def test_wrong_arguments_are_named(tmp_path):
    good = dict(frames=1, fps=24, height=8, width=8)
    for name, value in [("frames", 0), ("fps", 0), ("fps", float("nan")), ("height", -1), ("width", 1.5), ("fit", "zoom"), ("start", -1.0),
                        ("start", float("inf")), ("background", (0, 0, 300)), ("source_fps", 0), ("value_range", "half")]:
        with pytest.raises(ValueError, match=f"^{name}: want"):
            read_clip(tmp_path / "none.png", **{**good, name: value})


def test_limits_before_decoding(tmp_path, make_video, uniform, monkeypatch):
    path = make_video(tmp_path / "a.mp4", uniform(24))
    from engine.media import video

    monkeypatch.setattr(video.VideoSource, "_frames", lambda self: pytest.fail("decoded before the limits were checked"))
    for field, value, said in [("max_pixels", 1000, "48x32"), ("max_duration", 0.5, "1 s long"), ("max_frames", 20, "24 frames"),
                               ("max_fps", 20, "24 frames per")]:
        with pytest.raises(MediaError, match=f"{said}.*{field}"):
            read_clip(path, frames=1, fps=24, limits=MediaLimits(**{field: value}), **SIZE)
