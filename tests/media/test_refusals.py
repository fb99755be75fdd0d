"""What is not a video, or too much of one, ends in one line; nothing else on the disk or the network is touched by it."""

import ctypes
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from engine.errors import MediaError
from engine.media import MediaLimits, probe, read_clip, write_video

PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"
MPD = ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"><Period>'
       '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="64" height="64">'
       '<BaseURL>{target}</BaseURL></Representation>'
       "</AdaptationSet></Period></MPD>")
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
FFCONCAT = "ffconcat version 1.0\nfile {target}\n"


def refused(path, said="", **more):
    """read_clip and probe both end in one MediaError line that names the file."""
    for call in (lambda: read_clip(path, frames=4, fps=8, height=16, width=16, **more), lambda: probe(path, **more)):
        with pytest.raises(MediaError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and os.path.basename(str(path)).split("\n")[0][:20] in message and said in message, message
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"Dear reader,\nthis is no video.\n" * 50, "not a readable video"),
        ("random.mp4", np.random.default_rng(1).bytes(20000), ""),
        ("random.mkv", np.random.default_rng(2).bytes(20000), ""),
        ("page.webm", b"<!DOCTYPE html><html><body><video src='a.mp4'></video></body></html>" * 20, "not a readable video"),
        ("zeros.mp4", bytes(5000), ""),
        ("header.mp4", b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom", ""),
        ("picture.png", b"not a picture", "not a readable picture"),
        ("empty.png", b"", "empty"),
        ("empty.gif", b"", "empty"),
        ("text.gif", b"GIF89b", "not a readable video"),
        ("text.npy", b"0123456789", "not a readable .npy"),
        ("empty.npy", b"", "not a readable .npy"),
        ("movie.ffconcat", FFCONCAT.format(target="neighbour.mp4").encode(), "not a readable video"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v else "",
)
def test_not_a_video(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, said)
    with pytest.raises(MediaError):
        write_video(tmp_path / "out.mp4", iter([]), 24, audio_from=tmp_path / "text.mp4")
    assert [f.name for f in tmp_path.iterdir()] == [name]                          # neither an output nor a .part


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "a.txt").write_text("")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "pictures.png").mkdir()
    for name in ("pipe.mp4", "pipe.png", "pipe.npy"):
        refused(tmp_path / name, "not a regular file")                             # and does not wait for a writer
    refused(tmp_path / "folder.mp4", "a folder without pictures")
    refused(tmp_path / "pictures.png", "a folder without pictures")
    for path in (tmp_path / "loop.mp4", tmp_path / "missing.mp4", tmp_path / "missing.png", tmp_path / "missing.npy",
                 tmp_path / "a\nb.mp4"):
        refused(path)
    for path in ("/dev/zero", "/dev/null", "x" * 300 + ".mp4", "nul\0.mp4", "http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "-", ""):
        with pytest.raises(MediaError) as caught:
            read_clip(path, frames=1, fps=24, height=8, width=8)
        assert "\n" not in str(caught.value)


def test_sound_only_and_renamed_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        stream.codec_context.layout = "mono"
        block = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        block.sample_rate, block.pts = 48000, 0
        for packet in [*stream.encode(block), *stream.encode(None)]:
            out.mux(packet)
    refused(tmp_path / "sound.mp4", "no video in it")
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{kind}.mp4", format=kind)
        refused(tmp_path / f"{kind}.mp4", "not a readable video")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.eps", format="EPS")
    os.rename(tmp_path / "a.eps", tmp_path / "eps.png")
    refused(tmp_path / "eps.png", "not a readable picture")                        # Pillow would start Ghostscript for it


class Watch:
    """Which files are opened, by anyone in C or Python: inotify, because FFmpeg does not go through Python's open."""

    def __init__(self, *paths):
        libc = ctypes.CDLL(None, use_errno=True)
        self.handle = libc.inotify_init1(os.O_NONBLOCK)
        for path in paths:
            assert libc.inotify_add_watch(self.handle, os.fsencode(path), 0x20) >= 0          # IN_OPEN

    def opened(self) -> bool:
        try:
            return bool(os.read(self.handle, 4096))
        except BlockingIOError:
            return False


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
@pytest.mark.parametrize("ending", ["mp4", "mkv", "txt", "m3u8"])
@pytest.mark.parametrize("text", [FFCONCAT, PLAYLIST, MPD], ids=["ffconcat", "m3u8", "mpd"])
def test_no_other_file_is_opened(tmp_path, make_video, uniform, monkeypatch, ending, text):
    neighbour = make_video(tmp_path / "neighbour.mp4", uniform(4))
    monkeypatch.chdir(tmp_path)
    for i, target in enumerate(("neighbour.mp4", str(neighbour), f"file:{neighbour}")):
        bait = tmp_path / f"bait{i}.{ending}"
        bait.write_text(text.format(target=target))
        watch = Watch(neighbour)
        refused(bait, "not a readable video")
        with pytest.raises(MediaError):
            write_video(tmp_path / "out.mp4", iter([]), 24, audio_from=bait)
        assert not watch.opened()
    watch = Watch(neighbour)                                                       # the canary sings: without the whitelist it is opened
    if text == FFCONCAT:
        with av.open(str(tmp_path / f"bait0.{ending}")) as container:
            next(container.decode(video=0))
        assert watch.opened()


def test_no_connection_is_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        url = f"http://127.0.0.1:{port}/a.mp4"
        for name, text in (("a.m3u8", PLAYLIST), ("a.mp4", PLAYLIST), ("b.mp4", FFCONCAT), ("c.mp4", MPD), ("d.mp4", SDP), ("e.sdp", SDP)):
            (tmp_path / name).write_text(text.format(target=url, port=port))
            refused(tmp_path / name)
        for path in (url, f"tcp://127.0.0.1:{port}", f"file:{url}"):
            with pytest.raises(MediaError):
                read_clip(path, frames=1, fps=24, height=8, width=8)
        with pytest.raises(TimeoutError):
            server.accept()


def test_pickles_are_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "canary"),))

    (tmp_path / "a.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "b.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    refused(tmp_path / "a.npy")
    refused(tmp_path / "b.npy")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((4, 8, 8), np.uint8), "want [T, H, W, 3]"),
        (np.zeros((4, 8, 8, 4), np.uint8), "want [T, H, W, 3]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "want [T, H, W, 3]"),
        (np.zeros((4, 8, 8, 3), np.int64), "want uint8 levels or floats"),
        (np.full((4, 8, 8, 3), 200, np.float32), "floats from 200 to 200"),
        (np.full((4, 8, 8, 3), np.nan, np.float32), "floats from nan"),
        (np.full((4, 8, 8, 3), 0.5, np.float32), "could mean [0, 1] or [-1, 1]"),
    ],
    ids=["3d", "rgba", "empty", "int64", "0-255", "nan", "ambiguous"],
)
def test_arrays_that_cannot_be_meant(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy", said)


def test_an_array_shorter_than_its_header(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 8, 3), np.uint8))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-100])
    refused(tmp_path / "a.npy", "not a readable .npy")


def png_bomb(path, w, h):
    """A PNG whose header says w x h; its data is one deflate block of zeros."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head, body = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0), zlib.compress(bytes(1 << 20), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def patched(path, find: bytes, offset: int, value: bytes):
    data = bytearray(path.read_bytes())
    at = data.index(find) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def test_lengths_by_the_header(tmp_path, make_video, uniform):
    ten_hours = make_video(tmp_path / "hours.mp4", uniform(3), rate=1, pts=[0, 1, 36000], options={"bf": "0"})
    refused(ten_hours, "max_duration")
    refused(make_video(tmp_path / "fast.mp4", uniform(40), rate=1000), "max_fps")
    count = make_video(tmp_path / "count.mp4", uniform(3))
    refused(patched(count, b"stsz", 12, struct.pack(">I", 2**31 - 1)))             # a lying number of frames
    pictures = tmp_path / "many"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(pictures / f"{i}.png")
    refused(pictures, "max_frames", limits=MediaLimits(max_frames=3))
    frames = [Image.new("RGB", (8, 8), (i * 20, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:], duration=50)
    refused(tmp_path / "many.gif", "max_frames", limits=MediaLimits(max_frames=3))
    refused(make_video(tmp_path / "a.mkv", uniform(6)), "max_duration", limits=MediaLimits(max_duration=0.1))


def test_sizes_by_the_header(tmp_path, make_video, uniform):
    png_bomb(tmp_path / "bomb.png", 16384, 16384)
    refused(tmp_path / "bomb.png", "268435456 pixels")                             # Pillow's own limit is met first
    png_bomb(tmp_path / "worse.png", 2**31 - 1, 2**31 - 1)
    refused(tmp_path / "worse.png")
    (tmp_path / "folder").mkdir()
    png_bomb(tmp_path / "folder" / "0.png", 8192, 8192)
    with pytest.raises(MediaError, match="8192x8192.*max_pixels"):
        read_clip(tmp_path / "folder", frames=1, fps=24, height=8, width=8)
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    refused(tmp_path / "one.png", "1x1")
    refused(make_video(tmp_path / "one.mkv", uniform(3, 1, 1), codec="ffv1", pix_fmt="bgra"), "1x1")
    np.save(tmp_path / "a.npy", np.zeros((1, 1, 1, 3), np.uint8))
    refused(tmp_path / "a.npy", "1x1")


BOMB = """
import resource, sys
import av, numpy as np
from engine.errors import MediaError
from engine.media import read_clip
read_clip(sys.argv[1], frames=2, fps=24, height=8, width=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_clip(sys.argv[2], frames=2, fps=24, height=8, width=8)
except MediaError as error:
    print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sep="|")
"""


def test_a_large_picture_in_a_small_file_costs_no_memory(tmp_path, make_video, uniform):
    small = make_video(tmp_path / "small.mp4", uniform(3))
    bomb = tmp_path / "bomb.mp4"
    with av.open(str(bomb), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width = stream.height = 8192
        frame = av.VideoFrame(8192, 8192, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    assert bomb.stat().st_size < 400_000
    done = subprocess.run([sys.executable, "-c", BOMB, small, bomb], capture_output=True, text=True, timeout=60)
    message, grown_kib = done.stdout.strip().split("|")
    assert "8192x8192" in message and "max_pixels" in message and done.stderr == ""
    assert int(grown_kib) < 100_000                                                # one decoded picture alone is 98 MB


def test_zero_frames_per_second(tmp_path, make_video, uniform):
    """FFmpeg takes 25 for a rate of zero; a clock that stands still gives its last picture. Neither divides by zero or waits."""
    (tmp_path / "a.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F0:0 C420jpeg\n" + (b"FRAME\n" + bytes(384)) * 3)
    still = make_video(tmp_path / "still.mp4", uniform(4), options={"bf": "0"})
    stts = still.read_bytes().index(b"stts")
    delta = struct.unpack(">I", still.read_bytes()[stts + 16 : stts + 20])[0]
    patched(still, struct.pack(">II", 4, delta), 4, bytes(4))
    for path in (tmp_path / "a.y4m", still):
        clip = read_clip(path, frames=6, fps=24, height=16, width=16)
        assert 1 <= clip.covered < 6 and 0 <= clip.duration < 1 and any("past the end" in note for note in clip.notes)


def test_a_command_that_reads_nothing_loads_no_codec():
    code = "import sys, engine.media; engine.media.__all__; print([m for m in ('av', 'PIL', 'torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_memory_does_not_grow_with_the_source(tmp_path, make_video):
    """200 pictures of 512x512 are 157 MB; reading 16 of them small must not hold more than a few."""
    path = make_video(tmp_path / "a.mp4", [np.zeros((512, 512, 3), np.uint8)] * 200, pix_fmt="yuv422p", options={"preset": "ultrafast"})
    read_clip(path, frames=2, fps=24, height=24, width=40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clip = read_clip(path, frames=16, fps=2, height=24, width=40)
    assert clip.source.frames_decoded > 150 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
