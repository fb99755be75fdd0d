"""What a run leaves behind: every file complete, a manifest from which the same bits come again, and nothing at all when writing fails."""

import errno
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from engine import __version__, dreamix, outputs
from engine.cascade import Cascade
from engine.config import EditConfig, GenerateConfig
from engine.errors import ConfigError, DiskError
from engine.media import compare, encode, probe, read_clip
from engine.runtime.weights import fingerprint

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = "a red circle moving left over a plain grey background"
NAMES = ["clip.compare.mp4", "clip.json", "clip.mp4", "clip.sheet.png"]


@pytest.fixture(scope="module")
def cascade(tiny):
    return Cascade.load(tiny, "cpu", "fp32")


@pytest.fixture(scope="module")
def sounding(film, tmp_path_factory):
    """2 s of pictures and sound, of which the cascade edits 1 1/3."""
    return film(tmp_path_factory.mktemp("film") / "sounding.mp4", torch.linspace(-0.75, 0.75, 48).tolist(), sound=2.0)


@pytest.fixture(scope="module")
def edited(cascade, sounding, own_cache):
    """(config, result, record) of an edit with all seven stages."""
    config = EditConfig(seed=5, strength=0.5, start=0.25, dtype="fp32")
    result = dreamix.edit(cascade, sounding, PROMPT, config)
    return config, result, outputs.manifest(cascade, config, PROMPT, result, "edit", sounding)


@pytest.fixture(scope="module")
def generated(cascade, own_cache):
    config = GenerateConfig(seed=5, last_stage="tsr1")
    result = dreamix.generate(cascade, PROMPT, config)
    return config, result, outputs.manifest(cascade, config, PROMPT, result, "generate", None)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_edit_leaves_four_files(edited, sounding, tmp_path):
    _, result, record = edited
    paths = outputs.write(result, tmp_path / "new" / "clip.mp4", record, sounding)
    assert files(tmp_path / "new") == NAMES == sorted(path.name for path in paths.values())
    assert list(paths) == ["video", "comparison", "sheet", "manifest"]
    info = probe(paths["video"])
    assert (info.width, info.height, info.fps, info.duration) == (48, 32, 24, pytest.approx(32 / 24, abs=2e-3))
    assert read_clip(paths["video"], frames=32, fps=24, height=32, width=48).covered == 32
    with av.open(str(paths["video"])) as file:
        track = file.streams.audio[0]
        sound = sum(frame.samples for frame in file.decode(track)) / track.rate
        assert len(file.streams.video) == 1 and sound == pytest.approx(32 / 24, abs=0.1)
    side = probe(paths["comparison"])
    assert side.fps == 24 and side.duration == pytest.approx(32 / 24, abs=2e-3) and side.width >= 96 and side.height > 32
    with Image.open(paths["sheet"]) as sheet:
        sheet.load()
        cell = 32 + compare.GAP
        assert sheet.format == "PNG" and sheet.height == 10 * cell - compare.GAP         # input, degraded, seven stages, output
    assert json.loads(paths["manifest"].read_text()) == record


def test_the_comparison_shows_the_input_and_then_the_output(edited, tmp_path):
    _, result, record = edited
    paths = outputs.write(result, tmp_path / "clip.mp4", record, None)
    info = probe(paths["comparison"])
    video = read_clip(paths["comparison"], frames=32, fps=24, height=info.height, width=info.width).video[:, -32:]
    assert (video[:, :, :48] - result.source).abs().mean() < 0.05
    assert (video[:, :, 52:100] - result.output).abs().mean() < (video[:, :, 52:100] - result.source).abs().mean()


def test_the_sheets_first_row_is_the_input_and_its_last_the_output(edited, tmp_path):
    _, result, record = edited
    paths = outputs.write(result, tmp_path / "clip.mp4", record, None)
    with Image.open(paths["sheet"]) as sheet:
        pixels = torch.from_numpy(np.array(sheet)).float() / 127.5 - 1
    right = pixels[:, -48:]
    for row, picture in ((0, result.source[-1]), (8, result.stages["ssr3"][-1]), (9, result.output[-1])):
        torch.testing.assert_close(right[36 * row : 36 * row + 32], picture, rtol=0, atol=0.005)


def test_the_manifest(edited, cascade, tiny, sounding):
    config, result, record = edited
    assert record["dreamix"] == __version__ and record["command"] == "edit" and record["prompt"] == PROMPT
    assert EditConfig(**record["config"]) == config and record["config"]["seed"] == 5
    assert record["input"] == {"name": "sounding.mp4", "sha256": outputs.file_hash(sounding), "seconds": pytest.approx(4 / 3)}
    assert record["output"] == {"frames": 32, "height": 32, "width": 48, "fps": "24", "sha256": outputs.video_hash(result.output)}
    stages = record["cascade"]["stages"]
    assert record["cascade"]["name"] == "tiny" and list(stages) == [stage.name for stage in cascade.config.stages]
    for name, stage in stages.items():
        assert stage["weights_sha256"] == fingerprint(tiny / name) and stage["chunk_frames"] == (8 if name == "ssr3" else None)
    assert len({stage["weights_sha256"] for stage in stages.values()}) == 7
    assert [stage["steps"] for stage in stages.values()] == [2, 2, 3, 2, 2, 2, 8]
    assert (record["device"], record["dtype"]) == ("cpu", "fp32") and record["notes"] == list(result.notes) != []
    assert record["versions"].keys() >= {"python", "torch", "numpy", "av", "transformers", "safetensors"}
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"] == torch.__version__
    assert record["seconds"].keys() == stages.keys()


def test_the_hash_is_of_the_bits(tmp_path):
    video = torch.rand(2, 4, 4, 3) * 2 - 1
    other = video.clone()
    other[1, 3, 3, 2] = torch.nextafter(other[1, 3, 3, 2], torch.tensor(2.0))
    assert outputs.video_hash(video) == outputs.video_hash(video.transpose(1, 2).contiguous().transpose(1, 2))
    assert outputs.video_hash(video) != outputs.video_hash(other)
    (tmp_path / "x").write_bytes(b"abc")
    assert outputs.file_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert outputs.file_hash(tmp_path) is None


def test_the_same_bits_come_from_the_manifest(edited, tiny, sounding):
    record = json.loads(json.dumps(edited[2]))
    cascade = Cascade.load(tiny, record["device"], record["dtype"])
    again = dreamix.edit(cascade, sounding, record["prompt"], EditConfig(**record["config"]))
    assert outputs.video_hash(again.output) == record["output"]["sha256"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.MP4"])
def test_the_video_says_how_it_was_made(edited, tmp_path, name):
    _, result, record = edited
    outputs.write(result, tmp_path / name, record, None)
    with av.open(str(tmp_path / name)) as file:
        comment = json.loads(file.metadata["comment"])
    assert comment == {"dreamix": __version__, "prompt": PROMPT, "config": record["config"]}


@pytest.mark.parametrize(("out", "names"), [
    ("clip.gif", ["clip.compare.mp4", "clip.gif", "clip.json", "clip.sheet.png"]),
    ("clip.npy", ["clip.compare.mp4", "clip.json", "clip.npy", "clip.sheet.png"]),
    ("clip", ["clip", *(f"clip/{i:05d}.png" for i in range(8)), "clip.compare.mp4", "clip.json", "clip.sheet.png"]),
    ("a.b.npy", ["a.b.compare.mp4", "a.b.json", "a.b.npy", "a.b.sheet.png"]),
])
def test_other_endings(generated, tmp_path, out, names):
    _, result, record = generated
    outputs.write(result, tmp_path / out, record, None)
    assert files(tmp_path) == sorted(names)
    if out.endswith(".npy"):
        assert np.array_equal(np.load(tmp_path / out), result.output.numpy())
        assert outputs.video_hash(torch.from_numpy(np.load(tmp_path / out))) == record["output"]["sha256"]
    with Image.open(tmp_path / names[-1]) as sheet:
        assert sheet.height == 3 * (8 + compare.GAP) - compare.GAP                                       # base, tsr1, output


def test_a_folder_is_no_file_to_hash_and_no_sound(edited, cascade, generated, tmp_path):
    config, result, _ = edited
    (tmp_path / "frames").mkdir()
    record = outputs.manifest(cascade, config, PROMPT, result, "edit", tmp_path / "frames")
    assert record["input"]["sha256"] is None and record["input"]["name"] == "frames"
    outputs.write(generated[1], tmp_path / "clip.mp4", generated[2], tmp_path / "frames")
    assert not probe(tmp_path / "clip.mp4").has_audio


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURES = {
    "video": (lambda patch: patch.setattr(encode._Mp4, "finish", full), []),
    "comparison": (lambda patch: patch.setattr(outputs, "side_by_side", full_chunks), ["clip.mp4"]),
    "sheet": (lambda patch: patch.setattr(Image.Image, "save", full), ["clip.compare.mp4", "clip.mp4"]),
    "manifest": (lambda patch: patch.setattr(Path, "write_text", full), ["clip.compare.mp4", "clip.mp4", "clip.sheet.png"]),
}


def full_chunks(panels):
    yield panels[0][1][:1]
    full()


@pytest.mark.parametrize("old", [False, True], ids=["new", "over old files"])
@pytest.mark.parametrize("at", FAILURES)
def test_what_cannot_be_written_is_absent_or_old(generated, tmp_path, monkeypatch, at, old):
    """A disk that fills up at any file: what was written before is whole, the rest is absent or of the run before, nothing is half done."""
    _, result, record = generated
    if old:
        for name in NAMES:
            (tmp_path / name).write_bytes(b"old")
    fail, complete = FAILURES[at]
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises((DiskError, OSError)):
            outputs.write(result, tmp_path / "clip.mp4", record, None)
    assert files(tmp_path) == (NAMES if old else sorted(complete))
    assert all((tmp_path / name).read_bytes() == b"old" for name in NAMES if old and name not in complete)
    assert all((tmp_path / name).stat().st_size > 100 for name in complete)


def test_an_interrupted_write_leaves_nothing(generated, tmp_path, monkeypatch):
    _, result, record = generated

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode._Mp4, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs.write(result, tmp_path / "clip.mp4", record, None)
    assert files(tmp_path) == []


def test_places_that_cannot_be_written_are_known_before_the_run(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for name in ("file/clip.mp4", "file/deep/clip.mp4", "folder.mp4", "file", "mine"):
        with pytest.raises(DiskError, match="cannot be written"):
            outputs.check_output(tmp_path / name)
    with pytest.raises(ConfigError, match="want a name ending in .mp4, .gif or .npy"):
        outputs.check_output(tmp_path / "clip.avi")
    for name in ("clip.mp4", "CLIP.MP4", "deep/er/clip.gif", "clip.npy", "frames"):
        outputs.check_output(tmp_path / name)
    shutil.rmtree(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    outputs.check_output(tmp_path / "mine")
    assert files(tmp_path) == ["file", "folder.mp4", "mine"]                                            # looking writes nothing


def test_the_rate_of_the_output_is_the_results(generated, tmp_path):
    _, result, record = generated
    outputs.write(result, tmp_path / "clip.mp4", record, None)
    assert probe(tmp_path / "clip.mp4").fps == Fraction(6) == result.fps and record["output"]["fps"] == "6"
