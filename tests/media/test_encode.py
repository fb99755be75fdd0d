"""What is written comes back, whole or not at all, the same bytes every time."""

import json
import os
import resource
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from engine.errors import ConfigError, DiskError, MediaError
from engine.media import probe, read_clip, write_video

KINDS = ["a.mp4", "a.gif", "a.npy", "a"]


def noise(n=6, h=32, w=48, seed=0):
    return torch.rand(n, h, w, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(n=12, h=32, w=48):
    t, y, x = torch.meshgrid(torch.arange(n) / n, torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([y, x, (y * x + t).clamp(-1, 1)], dim=-1)


def back(path, n, h=32, w=48, fps=24, **more):
    return read_clip(path, frames=n, fps=fps, height=h, width=w, **more)


def content(path):
    return {f.name: f.read_bytes() for f in path.iterdir()} if path.is_dir() else path.read_bytes()


def left(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_colours_survive_mp4(tmp_path):
    """Within 1 level for these; 8-bit limited-range 4:2:0 itself cannot hold every colour better than 1.5 levels."""
    colours = [(0, 0, 0), (255, 255, 255), (200, 50, 100), (128, 128, 128), (30, 200, 60), (20, 40, 220), (90, 164, 61), (12, 240, 200)]
    video = (torch.tensor(colours) / 127.5 - 1).view(-1, 1, 1, 3).expand(-1, 32, 48, 3)
    got = back(write_video(tmp_path / "a.mp4", video.contiguous(), 24), len(colours))
    assert ((got.video - video).abs() * 127.5).max() < 1.5 and got.source.matrix == "bt709 limited" and got.notes == []
    torch.manual_seed(0)
    video = ((torch.rand(40, 1, 1, 3) * 255).round() / 127.5 - 1).expand(-1, 32, 48, 3)
    off = (back(write_video(tmp_path / "b.mp4", video.contiguous(), 24), 40).video - video).abs() * 127.5
    assert off.max() < 2.5 and off.mean() < 0.8


def test_mp4_is_tagged_seekable_from_the_start_and_plain(tmp_path):
    path = write_video(tmp_path / "a.mp4", smooth(), Fraction(24000, 1001), metadata={"prompt": "a bear", "seed": 7})
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", Fraction(24000, 1001))
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        assert stream.frames == 12
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")                              # plays while it loads
    assert json.loads(probe(path).comment) == {"prompt": "a bear", "seed": 7}
    assert (back(path, 12, fps=Fraction(24000, 1001)).video - smooth()).abs().mean() * 127.5 < 2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fps", [3, 24, Fraction(30000, 1001)], ids=str)
def test_every_frame_comes_back_in_its_place(tmp_path, name, fps):
    video = (torch.linspace(-0.9, 0.9, 9).view(9, 1, 1, 1).expand(9, 32, 48, 3)).contiguous()
    path = write_video(tmp_path / name, video, fps)
    clip = back(path, 9, fps=fps, source_fps=fps)
    assert clip.source.duration == pytest.approx(9 / fps, abs=0.011)              # the last frame stays as long as the others
    assert clip.covered == 9 and (clip.video - video).abs().max() * 127.5 < (0.51 if name != "a.mp4" else 1.6)


def test_npy_and_folder_are_exact(tmp_path):
    video = noise()
    assert torch.equal(back(write_video(tmp_path / "a.npy", video, 24), 6).video, video)
    eight = (((video + 1) * 127.5).round() / 127.5 - 1)
    folder = write_video(f"{tmp_path}/v1.2/", eight, 24)
    assert left(folder) == [f"0000{i}.png" for i in range(6)]
    assert (back(folder, 6).video - eight).abs().max() < 1e-6


@pytest.mark.parametrize("h, w", [(31, 47), (32, 47), (33, 48)])
def test_odd_sizes_get_one_line_more(tmp_path, h, w):
    video = noise(4, h, w)[..., :1].expand(-1, -1, -1, 3)                         # grey: chroma has half the lines anyway
    path = write_video(tmp_path / "a.mp4", video, 24)
    info = probe(path)
    assert (info.height, info.width) == (h + h % 2, w + w % 2)
    got = back(path, 4, info.height, info.width).video
    assert (got[:, :h, :w] - video).abs().mean() * 127.5 < 3                      # a resize to the even size: 20 and more
    gif = back(write_video(tmp_path / "a.gif", smooth(4, h, w), 24), 4, h, w).video
    assert (gif - smooth(4, h, w)).abs().mean() * 127.5 < 6


@pytest.mark.parametrize("name", KINDS)
def test_same_frames_same_bytes_whole_or_in_chunks(tmp_path, name):
    video = smooth(40)
    whole = content(write_video(tmp_path / "1" / name, video, 24))
    chunks = content(write_video(tmp_path / "2" / name, iter(video.split([1, 20, 0, 19])), 24))
    assert whole == chunks

    if name == "a.mp4":                                                           # else the bytes depend on the number of cores
        tall = write_video(tmp_path / "tall.mp4", smooth(2, 384, 64), 24)         # x264 gives small pictures one thread by itself
        assert b"threads=1 lookahead_threads=1 " in tall.read_bytes()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over-old"])
def test_failure_in_the_stream_leaves_the_old_file_or_none(tmp_path, name, old):
    before = None
    if old:
        before = content(write_video(tmp_path / name, noise(3), 24))

    def frames():
        yield noise(20)
        raise RuntimeError("the sampler stopped")

    with pytest.raises(RuntimeError, match="the sampler stopped"):
        write_video(tmp_path / name, frames(), 24)
    assert left(tmp_path) == ([name] if old else [])
    assert before is None or content(tmp_path / name) == before


@pytest.mark.parametrize("name", KINDS)
def test_replaces_an_older_result_and_a_stale_part(tmp_path, name):
    write_video(tmp_path / name, noise(5), 24)
    (tmp_path / f"{name}.part").write_bytes(b"left by a killed run")
    write_video(tmp_path / name, smooth(3), 24)
    assert left(tmp_path) == [name] and back(tmp_path / name, 9).covered == 3


def test_a_part_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.mp4.part").symlink_to(tmp_path / "precious")
    write_video(tmp_path / "a.mp4", smooth(2), 24)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", KINDS)
def test_full_disk(tmp_path, name):
    """A file size limit stands in for it: the write fails in the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(DiskError, match=f"{name}: cannot be written") as caught:
            write_video(tmp_path / name, noise(30), 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5 and left(tmp_path) == []


def test_hard_output_paths(tmp_path):
    video = smooth(2, 16, 16)
    for name in ("fil\u00e9 \U0001f43b.mp4", "new\nline.mp4", "-dash %d:colon?.mp4", "deep/er/a.mp4", "x" * 240 + ".mp4"):
        path = write_video(tmp_path / name, video, 24)
        assert back(path, 2, 16, 16).covered == 2
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "thesis.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe.mp4")
    before = left(tmp_path)
    for name in ("x" * 300 + ".mp4", "a\0b.mp4", "loop/a.mp4", "file/a.mp4", "folder.mp4", "mixed", "file/", "file", "pipe.mp4",
                 "/dev/null/a.mp4", "/proc/nowhere/a.mp4"):
        with pytest.raises(DiskError) as caught:
            write_video(f"{tmp_path}/{name}" if name[0] != "/" else name, video, 24)
        assert "\n" not in str(caught.value) and "cannot be written" in str(caught.value), name
    assert left(tmp_path) == before and (tmp_path / "mixed" / "thesis.txt").read_text() == "mine"


def test_parents_made_for_a_failed_write_are_removed(tmp_path):
    with pytest.raises(ValueError):
        write_video(tmp_path / "new" / "er" / "a.mp4", torch.zeros(0, 8, 8, 3), 24)
    assert left(tmp_path) == []


def test_wrong_arguments_are_named(tmp_path):
    good = smooth(2)
    for video, said in [(good[0], "want float tensors"), (good[..., :2], "want float tensors"), (good.long(), "want float tensors"),
                        ([1], "got int"), (good * float("nan"), "finite"), ([], "at least one frame"),
                        ([good, good[:, :8]], "chunks of one size")]:
        with pytest.raises(ValueError, match=f"^video: .*{said}"):
            write_video(tmp_path / "a.mp4", video, 24)
    for fps in (0, -1, "fast", float("inf")):
        with pytest.raises(ValueError, match="^fps: "):
            write_video(tmp_path / "a.mp4", good, fps)
    for name in ("a.avi", "a.png", "a.mp5"):
        with pytest.raises(ConfigError, match=".mp4, .gif or .npy"):
            write_video(tmp_path / name, good, 24)
    with pytest.raises(MediaError, match="encoder refuses 32768x2"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 2, 32768, 3), 24)
    assert left(tmp_path) == []


def heard(path):
    """Codec, begin and end in seconds of the sound in a file, and its samples from time 0 on."""
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        frames = [f for f in file.decode(stream)]
    begin = frames[0].pts * frames[0].time_base
    end = frames[-1].pts * frames[-1].time_base + Fraction(frames[-1].samples, frames[-1].sample_rate)
    return stream.codec_context.name, float(begin), float(end), np.concatenate([f.to_ndarray()[0] for f in frames])


SOUNDS = [("mp4", "aac", "aac"), ("mkv", "aac", "aac"), ("ts", "aac", "aac"), ("mkv", "libmp3lame", "mp3float"),
          ("webm", "libopus", "opus"), ("mkv", "flac", "flac"), ("mov", "pcm_s16le", "aac"), ("avi", "pcm_s16le", "aac")]


@pytest.mark.parametrize("ending, codec, kept", SOUNDS)
def test_sound_is_kept_and_trimmed(tmp_path, make_video, uniform, ending, codec, kept):
    picture = dict(codec="libvpx-vp9", options={"cpu-used": "8"}) if ending == "webm" else {}
    source = make_video(tmp_path / f"in.{ending}", uniform(48), sound=2.0, sound_codec=codec, **picture)
    out = write_video(tmp_path / "out.mp4", smooth(24), 24, audio_from=source)
    name, begin, end, wave = heard(out)
    # within a packet: AAC 23 ms, MP3 24 ms, FLAC and Opus 20 to 100 ms
    assert name == kept and -0.03 <= begin <= 0.03 and 0.95 <= end <= 1.11
    assert 0.15 < np.abs(wave[len(wave) // 4 : -len(wave) // 4].astype(np.float64)).max() / (1 if wave.dtype.kind == "f" else 32768) < 0.6
    assert back(out, 24).covered == 24
    if kept == "aac" and codec == "aac":                                          # copied, not encoded again: the packets are the source's

        def packets(path):
            with av.open(str(path)) as file:
                return [bytes(p)[-40:] for p in file.demux(audio=0) if p.size]

        mine = packets(out)
        assert len(mine) > 40 and set(mine) <= set(packets(source))


def test_sound_from_a_later_start_is_in_step(tmp_path, make_video, uniform):
    """A source silent for a second, then a tone: from 0.5 s on the tone must set in at 0.5 s."""
    source = tmp_path / "in.mp4"
    make_video(source, uniform(48))
    with av.open(str(source)) as given, av.open(str(tmp_path / "in2.mp4"), "w") as out:
        video, sound = out.add_stream_from_template(given.streams.video[0]), out.add_stream("aac", rate=48000)
        sound.codec_context.layout = "mono"
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = video
                out.mux(packet)
        t = np.arange(96000) / 48000
        wave = np.where(t < 1, 0, 0.5 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
        for k in range(0, 96000, 1024):
            block = av.AudioFrame.from_ndarray(wave[None, k : k + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 48000, k, Fraction(1, 48000)
            for packet in sound.encode(block):
                out.mux(packet)
        for packet in sound.encode(None):
            out.mux(packet)
    path = write_video(tmp_path / "out.mp4", smooth(24), 24, audio_from=tmp_path / "in2.mp4", audio_start=0.5)
    _, begin, _, samples = heard(path)
    onset = begin + int(np.argmax(np.abs(samples) > 0.25)) / 48000
    assert onset == pytest.approx(0.5, abs=0.005)
    with av.open(str(path)) as file:                                              # 47 packets of 1024 samples a second, two to warm up
        assert sum(p.size > 0 for p in file.demux(audio=0)) <= 50


def test_sources_without_sound(tmp_path, make_video, uniform):
    write_video(tmp_path / "pic.npy", noise(2), 24)
    for source in (make_video(tmp_path / "in.mp4", uniform(4)), tmp_path / "pic.npy"):
        assert not probe(write_video(tmp_path / "out.mp4", smooth(4), 24, audio_from=source)).has_audio
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(MediaError, match="text.mp4"):                             # before any frame is asked for
        write_video(tmp_path / "new.mp4", (pytest.fail("a frame was computed") for _ in range(1)), 24, audio_from=tmp_path / "text.mp4")
    for name in ("missing.mp4", "x" * 300 + ".mp4", "nul\0.mp4"):
        with pytest.raises(MediaError):
            write_video(tmp_path / "new.mp4", smooth(4), 24, audio_from=tmp_path / name)
    assert not (tmp_path / "new.mp4").exists()


def test_damaged_sound_costs_the_sound_only(tmp_path, make_video, uniform):
    source = make_video(tmp_path / "in.mkv", uniform(24), sound=1.0, sound_codec="pcm_s16le")
    from engine.media import audio

    def broken(self):
        yield Fraction(0), lambda: []
        raise av.InvalidDataError(1, "damaged")

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="sound left out"):
        patch.setattr(audio.AudioTrack, "_samples", broken)
        write_video(tmp_path / "out.mp4", smooth(24), 24, audio_from=source)
    assert back(tmp_path / "out.mp4", 24).covered == 24
