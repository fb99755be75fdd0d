"""The command line: results on stdout, one `error:` line and an exit code for every mistake, nothing half written when it is stopped."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import infer, outputs
from engine.cascade import Cascade
from engine.config import STAGE_ORDER
from engine.media import encode, probe
from engine.runtime.weights import WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moving left over a plain grey background"
LONG = " ".join(["red"] * 60)                                    # more tokens than the tiny cascade's encoder takes


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, own_cache):
    """The current folder is empty and the test's own; the handlers that a test installs go away again."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job starts with it ignored
    yield tmp_path / "here"
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tiny, capsys):
    """run("generate", ...) -> (exit code, stdout, stderr), on the tiny cascade unless another is named."""

    def call(command, *more):
        line = [command, *map(str, more)]
        if command in ("edit", "generate", "demo", "plan") and "--cascade" not in line:
            line += ["--cascade", str(tiny)]
        try:
            code = infer.main(line)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def clip(film, tmp_path):
    return film(tmp_path / "input.mp4", torch.linspace(-0.5, 0.5, 32).tolist(), sound=1.3)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what is said where ---

def test_edit_writes_and_says_where(run, clip, workplace):
    code, out, err = run("edit", "--video", clip, "--prompt", PROMPT, "--stages", "base..tsr1", "--out", "deep/new.mp4", "--seed", 3)
    assert (code, err) == (0, "")                                # no bars: this is no terminal
    assert [line.split() for line in out.splitlines()] == [["video", "deep/new.mp4"], ["comparison", "deep/new.compare.mp4"],
                                                          ["sheet", "deep/new.sheet.png"], ["manifest", "deep/new.json"]]
    assert files(workplace / "deep") == ["new.compare.mp4", "new.json", "new.mp4", "new.sheet.png"]
    record = json.loads((workplace / "deep" / "new.json").read_text())
    assert record["command"] == "edit" and record["config"]["seed"] == 3 and record["config"]["strength"] == 0.8
    assert probe("deep/new.mp4").has_audio and list(record["cascade"]["stages"]) == ["base", "tsr1"]


def test_json(run):
    code, out, err = run("generate", "--prompt", PROMPT, "--stages", "base..ssr1", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [line.get("stage") for line in lines] == ["base", "tsr1", "ssr1", None]
    assert lines[1] | {"seconds": 0} == {"stage": "tsr1", "frames": 8, "height": 8, "width": 12, "steps": 2, "seconds": 0,
                                         "parameters": lines[1]["parameters"]}
    assert lines[-1]["result"]["video"] == "out/generate.mp4" and Path("out/generate.mp4").is_file() and lines[-1]["seconds"] > 0


def test_demo_needs_no_arguments(run):
    code, out, err = run("demo", "--stages", "base", "--strength", 0.5)
    assert code == 0 and "out/demo.mp4" in out and err.count("\n") == err.count("note: ")
    assert json.loads(Path("out/demo.json").read_text())["prompt"] == infer.DEMO_PROMPT


def test_notes_go_to_stderr_and_quiet_is_quiet(run):
    line = ["generate", "--prompt", LONG, "--stages", "base", "--set", "steps.base=1"]
    code, out, err = run(*line)
    assert code == 0 and err.startswith("note: the prompt has") and err.count("\n") == 1 and "note" not in out
    assert json.loads(Path("out/generate.json").read_text())["notes"]
    for flag in ("--quiet", "--json"):
        assert run(*line, flag)[::2] == (0, "")


def test_warnings_of_the_writer_become_notes(run, clip, monkeypatch):
    import warnings

    real = outputs.write_video

    def warning(*args, **more):
        warnings.warn("sound left out: a test", stacklevel=2)
        return real(*args, **more)

    monkeypatch.setattr(outputs, "write_video", warning)
    line = ["edit", "--video", clip, "--prompt", PROMPT, "--stages", "base", "--strength", 0]
    assert "note: sound left out: a test\n" in run(*line)[2] and run(*line, "--quiet")[2] == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("flags", "bars"), [((), True), (("--quiet",), False), (("--json",), False)])
def test_bars_only_on_a_terminal(run, monkeypatch, flags, bars):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("generate", "--prompt", PROMPT, "--stages", "base..tsr1", *flags)[0] == 0
    text = terminal.getvalue()
    assert ("base 4x8x12" in text and "4/4" in text and "tsr1 8x8x12" in text and "2/2" in text) if bars else text == ""


def test_settings_file_then_flags_then_set(run, tmp_path):
    file = tmp_path / "edit.yaml"
    file.write_text("seed: 1\nstrength: 0.4\nfit: pad\nsteps: {base: 7, ssr3: 5}\nguidance_weight: 2.0\n")

    def config(*flags):
        code, out, err = run("plan", "--stages", "base", "--json", "--config", file, *flags)
        assert (code, err) == (0, "")
        return json.loads(out)

    plain = config()
    assert plain["config"] | {"seed": 1, "strength": 0.4, "fit": "pad", "steps": {"base": 7, "ssr3": 5}} == plain["config"]
    assert plain["stages"][0]["steps"] == 3 and plain["stages"][0]["passes_per_step"] == 2
    flags = config("--seed", 2, "--strength", 0.5, "--fit", "crop", "--guidance", 1)["config"]
    assert (flags["seed"], flags["strength"], flags["fit"], flags["guidance_weight"], flags["steps"]["ssr3"]) == (2, 0.5, "crop", 1.0, 5)
    last = config("--seed", 2, "--set", "seed=3", "--set", "steps.base=9")["config"]
    assert last["seed"] == 3 and last["steps"] == {"base": 9, "ssr3": 5}


def test_plan(run, monkeypatch):
    monkeypatch.setattr(Cascade, "load", lambda *_: pytest.fail("plan loads nothing"))
    code, out, err = run("plan", "--json")
    plan = json.loads(out)
    assert (code, err) == (0, "") and plan["cascade"] == "tiny" and [stage["stage"] for stage in plan["stages"]] == list(STAGE_ORDER)
    assert all(stage["parameters"] > 0 and stage["flops"] > 0 for stage in plan["stages"]) and plan["stages"][0]["steps"] == 4
    code, out, _ = run("plan", "--strength", 0.5)
    assert code == 0 and "strength: 0.5" in out and "ssr3" in out and "TFLOP" in out
    assert json.loads(run("plan", "--json", "--set", "strength=0.5")[1])["stages"][0]["steps"] == 2
    code, out, err = run("plan", "--json", "--cascade", "imagen_video", "--stages", "base")         # there are no such weights
    assert code == 0 and json.loads(out)["stages"][0]["parameters"] > 5e9


def test_info(run):
    code, out, err = run("info", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found.keys() >= {"versions", "devices", "kernels", "attention", "default_dtype"}
    assert found["versions"]["torch"] and found["devices"][0]["device"] == "cpu"
    code, out, err = run("info")
    assert (code, err) == (0, "") and "versions" in out and "attention" in out


def test_help_of_every_command_needs_no_torch():
    script = """
import contextlib, io, sys
from engine.infer import parser
for command in ([], ["edit"], ["generate"], ["demo"], ["plan"], ["info"]):
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            parser().parse_args([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert "usage: python -m engine.infer" in text.getvalue() and "--help" in text.getvalue()
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "av", "transformers", "pydantic", "safetensors"}))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


# --- mistakes ---

def refused(result, code, says, workplace):
    got, out, err = result
    assert got == code, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err and "Traceback" not in err
    assert files(workplace) == []


@pytest.mark.parametrize(("flags", "says"), [
    (["--set", "strenth=0.5"], "did you mean strength?"),
    (["--set", "steps.ssr2=0"], "steps.ssr2: want at least 1"),
    (["--set", "steps.ssr9=1"], "want stages base"),
    (["--set", "seed"], "want field=value"),
    (["--seed", "-1"], "seed"),
    (["--strength", "1.5"], "strength"),
    (["--strength", "nan"], "strength"),
    (["--start", "-1"], "start"),
    (["--stages", "tsr1..ssr1"], "want a range that begins at base"),
    (["--stages", "base..ssr9"], "last_stage"),
    (["--cascade", "sprits"], "did you mean sprites?"),
    (["--config", "none.yaml"], "none.yaml"),
    (["--device", "gpu"], "device"),
    (["--dtype", "fp64"], "dtype"),
    (["--out", "clip.avi"], "want a name ending in"),
    (["--cascade", "two\nlines"], "two lines"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage_is_2(run, clip, workplace, flags, says):
    refused(run("edit", "--video", clip, "--prompt", PROMPT, *flags), 2, says, workplace)


@pytest.mark.parametrize("line", [
    ["edit", "--sed", "3"], ["edit"], ["edit", "--prompt", "x"], ["animate"], [], ["generate", "--prompt", "x", "--strength", "1"],
    ["demo", "--fit", "zoom"], ["demo", "--seed", "x"]], ids=" ".join)
def test_what_argparse_refuses_is_2_too(line, capsys, workplace):
    with pytest.raises(SystemExit) as stop:
        infer.main(line)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "error: " in err and "Traceback" not in err and files(workplace) == []


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "folder", "start"])
def test_media_is_3(run, clip, tmp_path, workplace, kind):
    path = tmp_path / "bad.mp4"
    if kind == "text":
        path.write_text("not a video")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "start":
        path = clip
    refused(run("edit", "--video", path, "--prompt", PROMPT, "--start", 5 if kind == "start" else 0), 3, path.name, workplace)


@pytest.mark.parametrize("kind", ["none", "truncated", "shape", "no stage", "no encoder", "no cascade"])
def test_weights_are_4(run, tiny, tmp_path, workplace, kind):
    folder = shutil.copytree(tiny, tmp_path / "mine")
    path = folder / "tsr1" / WEIGHTS_NAME
    if kind == "none":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "shape":
        save_file(load_file(path) | {"head.bias": torch.zeros(5)}, path)
    elif kind == "no stage":
        shutil.rmtree(folder / "tsr1")
    elif kind == "no encoder":
        (folder / "text_encoder" / "model.safetensors").unlink()
    else:
        (folder / "model_index.json").unlink()
    says = {"no encoder": "text encoder", "no cascade": "model_index.json"}.get(kind, "tsr1")
    refused(run("generate", "--prompt", "never seen " + kind, "--cascade", folder), 4, says, workplace)


def test_disk_is_5_before_anything_is_computed(run, clip, workplace, monkeypatch):
    monkeypatch.setattr(Cascade, "load", lambda *_: pytest.fail("loaded before the place was looked at"))
    Path(workplace.parent, "file").write_text("x")
    for out in ("../file/clip.mp4", "../file/deep/clip.mp4", "../file"):
        refused(run("edit", "--video", clip, "--prompt", PROMPT, "--out", out), 5, "cannot be written", workplace)
    assert (workplace.parent / "file").read_text() == "x"


def test_disk_is_5_when_it_fills_up(run, workplace, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode._Mp4, "finish", full)
    result = run("generate", "--prompt", PROMPT, "--stages", "base", "--out", "clip.mp4")
    refused(result, 5, "clip.mp4: cannot be written: No space left", workplace)


def test_numbers_are_6(run, tiny, tmp_path, workplace):
    folder = shutil.copytree(tiny, tmp_path / "mine")
    path = folder / "base" / WEIGHTS_NAME
    state = load_file(path)
    state["head.bias"].fill_(float("nan"))
    save_file(state, path)
    result = run("generate", "--prompt", PROMPT, "--stages", "base", "--cascade", folder)
    refused(result, 6, "base: the sampled video is not finite", workplace)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")], ids=lambda e: type(e).__name__)
def test_memory_is_8(run, workplace, monkeypatch, error):
    def sample(*_, **__):
        raise error

    monkeypatch.setattr(Cascade, "sample", sample)
    refused(run("generate", "--prompt", PROMPT), 8, "not enough memory", workplace)


def test_a_fault_of_the_program_is_not_dressed_up(run, monkeypatch):
    def sample(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Cascade, "sample", sample)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", "--prompt", PROMPT)


# --- being stopped ---

@pytest.mark.parametrize("at", ["sampling", "writing"])
@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_stopped(run, workplace, monkeypatch, at, how):
    """Ctrl-C is 130, SIGTERM is 143; wherever it comes, no part of an output stays, and the output of the run before does."""
    Path("clip.mp4").write_bytes(b"old")

    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGTERM)

    if at == "sampling":
        monkeypatch.setattr(infer.Console, "on_step", stop)
    else:
        monkeypatch.setattr(encode._Mp4, "finish", stop)
    code, out, err = run("generate", "--prompt", PROMPT, "--stages", "base", "--out", "clip.mp4")
    assert code == (130 if how == "interrupt" else 143) and out == ""
    assert err == ("error: interrupted\n" if how == "interrupt" else "")
    assert files(workplace) == ["clip.mp4"] and Path("clip.mp4").read_bytes() == b"old"


def test_a_reader_that_has_gone_is_no_traceback(run, monkeypatch):
    class Gone(io.StringIO):
        def fileno(self):
            return spare

        def flush(self):
            raise BrokenPipeError

    spare = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert run("plan", "--stages", "base")[0] == 141
    os.close(spare)


def test_terminated_as_a_program(tiny, workplace):
    """`python -m engine.infer`, stopped in the middle of sampling its second stage."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "engine.infer", "generate", "--prompt", PROMPT, "--cascade", str(tiny), "--stages", "base..tsr1",
               "--set", "steps.tsr1=1000000", "--json", "--out", "clip.mp4"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert json.loads(process.stdout.readline())["stage"] == "base"
            process.terminate()
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (143, "", "") and files(workplace) == []


def test_the_input_is_never_the_output(run, clip):
    before = clip.read_bytes()
    code, out, err = run("edit", "--video", clip, "--prompt", PROMPT, "--out", clip)
    assert code == 2 and "input" in err and not out and clip.read_bytes() == before


# --- with what a finetuning left ---

@pytest.fixture(scope="module")
def product(tiny, tmp_path_factory):
    """A product of the base: its weights, each a little off."""
    from engine.config import FinetuneConfig
    from engine.training.product import write

    def learned(stage):
        for name, value in load_file(tiny / stage / WEIGHTS_NAME).items():
            yield name, value + 0.05

    return write(tmp_path_factory.mktemp("run") / "product", Cascade.load(tiny, "cpu", "fp32"), FinetuneConfig(stages=("base",)), learned)


def record_of(name):
    return json.loads(Path("out", name).read_text())


def test_finetuned(run, clip, product):
    """Both edits come from the one product; the manifest says which, and of which weights each stage was; s stays the paper's default."""
    line = ["edit", "--video", clip, "--stages", "base..tsr1", "--finetuned", product]
    assert run(*line, "--prompt", "sks")[::2] == (0, "")
    first = record_of("edit.json")
    assert run(*line, "--prompt", PROMPT)[0] == 0
    second = record_of("edit.json")
    assert run(*line[:-2], "--prompt", PROMPT)[0] == 0
    plain = record_of("edit.json")
    assert len({record["output"]["sha256"] for record in (first, second, plain)}) == 3
    assert first["finetuned"] == second["finetuned"] == {
        "sha256": outputs.file_hash(product / "dreamix.json"), "prompt": "sks", "stages": ["base"]} and plain["finetuned"] is None
    hashes = {name: stage["weights_sha256"] for name, stage in second["cascade"]["stages"].items()}
    before = {name: stage["weights_sha256"] for name, stage in plain["cascade"]["stages"].items()}
    assert hashes["base"] == outputs.file_hash(product / "base" / WEIGHTS_NAME) != before["base"] and hashes["tsr1"] == before["tsr1"]
    assert second["config"] == plain["config"] and second["config"]["strength"] == 0.8


def test_finetuned_demo_and_generate(run, product):
    for line in (["demo"], ["generate", "--prompt", PROMPT]):
        seen = []
        for flags in ([], ["--finetuned", product]):
            assert run(*line, "--stages", "base", *flags)[0] == 0
            seen.append(record_of(f"{line[0]}.json")["output"]["sha256"])
        assert seen[0] != seen[1]


def test_help_names_the_token(capsys):
    from engine.config import FinetuneConfig

    for command in ("edit", "generate", "demo"):
        with pytest.raises(SystemExit):
            infer.main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "--finetuned DIR" in said and f"({FinetuneConfig().rare_token} by default)" in said


@pytest.mark.parametrize("kind", ["none", "flipped", "truncated", "no stage", "extra", "other cascade", "traversal", "format"])
def test_a_damaged_product_is_4(run, tiny, tmp_path, workplace, product, kind):
    from engine.runtime.overlay import sealed

    folder, cascade = shutil.copytree(product, tmp_path / "damaged"), tiny
    path, record = folder / "base" / WEIGHTS_NAME, json.loads((folder / "dreamix.json").read_text())
    if kind == "none":
        shutil.rmtree(folder)
    elif kind == "flipped":
        data = bytearray(path.read_bytes())
        data[-9] ^= 64
        path.write_bytes(data)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "no stage":
        shutil.rmtree(folder / "base")
    elif kind == "extra":
        (folder / "base" / "more.safetensors").write_bytes(b"")
    elif kind == "other cascade":
        cascade = shutil.copytree(tiny, tmp_path / "mine")
        save_file(load_file(tiny / "base" / WEIGHTS_NAME), cascade / "base" / WEIGHTS_NAME, {"made": "by another"})
    else:
        del record["sha256"]
        if kind == "traversal":
            record["files"]["../../x"] = record["files"].pop(f"base/{WEIGHTS_NAME}")
        record["format"] += "0" * (kind == "format")
        (folder / "dreamix.json").write_text(sealed(record))
    says = {"flipped": "bytes of base/", "other cascade": record["base"]["stages"]["base"], "traversal": "'../../x' is unknown",
            "format": "want a product in the format"}.get(kind, "damaged")
    refused(run("generate", "--prompt", PROMPT, "--cascade", cascade, "--finetuned", folder), 4, says, workplace)
