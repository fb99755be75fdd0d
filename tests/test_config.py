"""Settings: what the strict YAML reader refuses, how files and overrides meet the models, and the paper's cascade file."""

import json
import math
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from engine import strict_yaml
from engine.config import STAGE_ORDER, CascadeConfig, DiffusionConfig, EditConfig, Strict, UNetConfig
from engine.config_io import apply_overrides, config_hash, dump_yaml, load_config, nearest, read_yaml
from engine.diffusion.schedule import CosineSchedule
from engine.errors import ConfigError
from engine.paths import config_root

IMAGEN_VIDEO = config_root() / "cascade" / "imagen_video.yaml"


class Optimizer(Strict):
    lr: float = Field(6e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = True


class Finetune(Strict):
    """Stands for any config with groups, lists and a default group that is not its class's default."""

    steps: int = Field(300, gt=0)
    stages: tuple[str, ...] = ("base", "ssr1", "ssr2")
    optimizer: Optimizer = Optimizer(lr=1e-4)
    edit: EditConfig | None = None
    out: Path = Path("runs")


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize("text, value", [
    ("6e-6", 6e-6), ("6E-6", 6e-6), ("1.", 1.0), (".5", 0.5), ("-1.5e+3", -1500.0), ("1e3", 1000.0), ("10", 10), ("010", 10), ("+3", 3),
    ("0o17", 15), ("0x1F", 31), ("-.inf", -math.inf), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("12:30:00", "12:30:00"), ("1_000", "1_000"),
    ("2022-01-01", "2022-01-01"), ("0b1", "0b1"), ("nan", "nan"), ("'6e-6'", "6e-6"), ("!!str 3", "3"),
    ("[1, a, {b: 2.0}]", [1, "a", {"b": 2.0}]),
    ("<<", "<<"), ("=", "="), ("é", "é"),
])  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(write, text, value):
    got = read_yaml(write(f"x: {text}\n"))["x"]
    assert got == value and type(got) is type(value)


def test_nan_is_read_and_keys_are_names(write):
    assert math.isnan(read_yaml(write("x: .nan"))["x"])
    assert read_yaml(write("1: a\ntrue: b\nno: c\n~: d")) == {"1": "a", "true": "b", "no": "c", "~": "d"}
    assert read_yaml(write("")) == read_yaml(write("# nothing\n")) == read_yaml(write("\ufeff{}")) == {}


def bomb(levels=9):
    return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels))


HOSTILE = {                                                # what the file holds: where in it, and a word of the complaint
    "duplicate key": ("a: 1\nb: 2\na: 3\n", ":3:1:", "duplicate key 'a', first at"),
    "duplicate key inside": ("s:\n  - {x: 1, x: 1}\n", ":2:12:", "duplicate key 'x'"),
    "duplicate by quoting": ("a: 1\n'a': 2\n", ":2:1:", "duplicate"),
    "python object": ("a: !!python/object/apply:os.system ['touch canary']\n", ":1:4:", "tag"),
    "python name": ("a: !!python/name:os.system\n", ":1:4:", "tag"),
    "python tuple": ("a: !!python/tuple [1]\n", ":1:4:", "tag"),
    "python tag at the top": ("!!python/object/new:os.system [ls]\n", ":1:1:", "tag"),
    "own tag": ("a: !include other.yaml\n", ":1:4:", "tag"),
    "timestamp": ("a: !!timestamp 2022-01-01\n", ":1:4:", "tag"),
    "binary": ("a: !!binary aGk=\n", ":1:4:", "tag"),
    "set": ("a: !!set {x}\n", ":1:4:", "tag"),
    "bool that is none": ("a: !!bool maybe\n", ":1:4:", "tag"),
    "int that is none": ("a: !!int 1.5\n", ":1:4:", "tag"),
    "tagged key": ("!!python/name:os.system : 1\n", "", ""),
    "alias": ("a: &x 1\nb: *x\n", ":2:4:", "alias"),
    "alias bomb": (bomb(), ":2:10:", "alias"),
    "merge key": ("a: &x {y: 1}\nb:\n  <<: *x\n", ":3:7:", "alias"),
    "alias to itself": ("a: &x [*x]\n", ":1:8:", "alias"),
    "10k flow levels": ("a: " + "[" * 10_000, ":1:", "levels"),
    "10k closed levels": ("a: " + "[" * 10_000 + "]" * 10_000, ":1:", "levels"),
    "10k mappings": ("{a: " * 10_000 + "}" * 10_000, ":1:", "levels"),
    "10k block levels": ("".join(" " * i + "a:\n" for i in range(1000)), ":32:32:", "levels"),
    "10k dashes": ("a: \n" + "- " * 10_000 + "1\n", ":2:", "levels"),
    "many values": ("a: [" + "1," * 20_000 + "]", ":1:", "10000 values"),
    "huge file": ("a: " + "x" * (1 << 20), "", "1048576 bytes"),
    "huge comment": ("#" * (50 << 20), "", "1048576 bytes"),
    "long number": ("a: " + "9" * 5000, ":1:4:", "4300"),
    "list at the top": ("- 1\n", ":1:1:", "mapping"),
    "text at the top": ("hello\n", ":1:1:", "mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2:1:", "single document"),
    "list as key": ("? [a]\n: 1\n", ":1:3:", "plain name"),
    "open bracket": ("a: [1, 2\nb: 3\n", ":2:", "expected"),
    "tab": ("a:\n\tb: 1\n", ":2:1:", "\\t"),
    "control character": ("a: 1\nb: \x01\n", ":2:4:", "0x1 "),
    "nul": ("a: \x00", ":1:4:", "0x0 "),
    "not utf-8": (b"a: \xff\xfe", "", "utf-8"),
    "escape beyond unicode": ('a: "\\UFFFFFFFF"', "", ""),
    "image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(write, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, place, complaint = HOSTILE[name]
    path = write(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(Finetune, path)
    assert time.process_time() - start < 1
    message = str(error.value)
    assert error.value.exit_code == 2
    assert message.isprintable() and len(message) < 500 and str(path) in message
    assert f"config.yaml{place}" in message and complaint in message
    assert not (tmp_path / "canary").exists()


def test_the_alias_bomb_takes_no_memory(write):
    path = write(bomb())
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError):
            read_yaml(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(10)                                   # opening a pipe waits for its writer
def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "missing.yaml",
                 tmp_path / ("x" * 300), tmp_path / "a\nb", "a\0b"):
        with pytest.raises(ConfigError) as error:
            read_yaml(path)
        assert str(error.value).isprintable()


def test_layers_of_a_config(write):
    path = write("steps: 50\noptimizer: {lr: 6e-6}\n")
    config = load_config(Finetune, path, ["steps=7", "out=/tmp/x"])
    assert config == Finetune(steps=7, optimizer=Optimizer(lr=6e-6), out=Path("/tmp/x"))
    assert load_config(Finetune) == Finetune()
    assert load_config(Finetune, None, ["steps=1", "steps=2"]).steps == 2


def test_one_field_of_a_group_keeps_the_groups_own_defaults(write):
    for config in (load_config(Finetune, write("optimizer: {fused: false}")), load_config(Finetune, None, ["optimizer.fused=false"])):
        assert config.optimizer == Optimizer(lr=1e-4, fused=False)
    assert load_config(Finetune, None, ["stages.1=tsr1"]).stages == ("base", "tsr1", "ssr2")
    assert load_config(Finetune, None, ["edit.strength=0.5"]).edit == EditConfig(strength=0.5)
    assert load_config(Finetune, write("edit: {strength: 0.5}"), ["edit=null"]).edit is None


WRONG = {                                                  # YAML text: the sentence, after "config.yaml:"
    "steps: '8'": "1:1: steps: want a valid integer, got '8'",
    "steps: 8.5": "1:1: steps: want a valid integer, got 8.5",
    "steps: true": "1:1: steps: want a valid integer, got True",
    "steps: 0": "1:1: steps: want greater than 0, got 0",
    "steps: -3": "1:1: steps: want greater than 0, got -3",
    "steps: [1]": "1:1: steps: want a valid integer, got [1]",
    "steps: .inf": "1:1: steps: want a",
    "optimizer:\n  lr: .nan": "2:3: optimizer.lr: want a finite number, got nan",
    "optimizer:\n  lr: .inf": "2:3: optimizer.lr: want a finite number, got inf",
    "optimizer:\n  lr: -6e-6": "2:3: optimizer.lr: want greater than 0, got -6e-06",
    "optimizer: {lr: 1e-4, fused: no}": "1:23: optimizer.fused: want a valid boolean, got 'no'",
    "optimizer: {betas: [0.9]}": "1:13: optimizer.betas",
    "optimizer: 3": "1:1: optimizer: want ",
    "stages: base": "1:1: stages: want a valid array, got 'base'",
    "stages: [base, 3]": "1:16: stages.1: want a valid string, got 3",
    "edit: {strength: 1.5}": "1:8: edit.strength: want less than or equal to 1, got 1.5",
    "edit: {steps: {ssr9: 4}}": "1:1: edit.steps: want stages base tsr1",
    "step: 3": "1:1: step: unknown key; did you mean steps?",
    "STEPS: 3": "1:1: STEPS: unknown key; did you mean steps?",
    "seed: 1\nsteps: 3": "1:1: seed: unknown key; ",
    "qqq: 3": "1:1: qqq: unknown key; want one of steps stages optimizer edit out",
    "steps: 1\noptimizer:\n  lrr: 1e-3": "3:3: optimizer.lrr: unknown key; did you mean lr?",
    "edit: {strenght: 0.5}": "1:8: edit.strenght: unknown key; did you mean strength?",
    '"a\\nb": 3': "1:1: a\\nb: unknown key",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_values_name_field_place_wanted_and_got(write, text):
    with pytest.raises(ConfigError) as error:
        load_config(Finetune, write(text))
    message = str(error.value)
    assert error.value.exit_code == 2 and message.isprintable()
    assert f"config.yaml:{WRONG[text]}" in message


def test_several_errors_in_one_line(write):
    with pytest.raises(ConfigError) as error:
        load_config(Finetune, write("steps: 0\nstage: [base]\n"), ["optimizer.lr=0"])
    message = str(error.value)
    assert "config.yaml:1:1: steps: want greater than 0, got 0; " in message and "config.yaml:2:1: stage: unknown key" in message
    assert "--set: optimizer.lr: want greater than 0, got 0" in message
    with pytest.raises(ConfigError, match=r"; and 15 more$"):
        load_config(Finetune, write("".join(f"k{i}: 1\n" for i in range(20))))
    with pytest.raises(ConfigError, match=r"^name: want a value, got none"):
        load_config(CascadeConfig)


def test_overrides_reach_stages_by_name_and_index():
    data = {"stages": [{"name": "base", "steps": 1}, {"name": "ssr2", "steps": 1}], "text": None}
    before = json.dumps(data)
    result = apply_overrides(data, ["stages.ssr2.steps=8", "stages.0.steps=6e1", "stages.base.unet.groups=4", "text.encoder=a=b", "x="])
    assert result == {"stages": [{"name": "base", "steps": 60.0, "unet": {"groups": 4}}, {"name": "ssr2", "steps": 8}],
                      "text": {"encoder": "a=b"}, "x": None}
    assert json.dumps(data) == before
    config = load_config(CascadeConfig, IMAGEN_VIDEO, ["stages.ssr2.steps=8", "stages.6.diffusion.threshold=dynamic"])
    assert config.stage("ssr2").steps == 8 and config.stage("ssr3").diffusion == DiffusionConfig(threshold="dynamic")


@pytest.mark.parametrize("override, complaint", [
    ("steps", "want field=value"), ("=3", "want field=value"), ("a..b=3", "want field=value"), 
    (".".join("a" * 40) + "=1", "want field=value"), ("stages.7.steps=8", "want one of"), ("stages.-1.steps=8", "want one of"),
    ("stages.ssr9.steps=8", "want one of base tsr1 ssr1 ssr2 tsr2 tsr3 ssr3, got 'ssr9'; did you mean"),
    ("stages.ssr2.stepz=8", "--set: stages.ssr2.stepz: unknown key; did you mean steps?"),
    ("stages.ssr2.steps=0", "--set: stages.ssr2.steps: want greater than 0, got 0"),
    ("stages.ssr2.unet.chanels=8", "did you mean channels?"),
    ("name.x=3", "has no field 'x'"), ("stagez.ssr2=1", "--set: stagez: unknown key; did you mean stages?"), ("name=[", "--set name:1:2: "),
    ("name=!!python/name:os.system", "tag"), ("name=" + "[" * 10_000, "levels"), ("name={a: 1, a: 2}", "duplicate"),
    ("stages.ssr2.unet.channels=100", "100 wide, which 32 groups do not divide"), ("stages=[]", "stages: want base tsr1"),
    ("stages.base.fps=.nan", "finite number"), ("stages.base.fps=-3", "want greater than 0, got -3"),
])  # fmt: skip
def test_wrong_overrides(override, complaint):
    with pytest.raises(ConfigError) as error:
        load_config(CascadeConfig, IMAGEN_VIDEO, [override])
    assert complaint in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 500


def test_nearest():
    assert nearest("strenght", ["steps", "strength", "start"]) == "strength"
    assert nearest("SEED", ["seed"]) == "seed"
    assert nearest("qqq", ["seed", "steps"]) is None and nearest("x", []) is None


def test_dump_reads_back_equal(write):
    cascade = load_config(CascadeConfig, IMAGEN_VIDEO)
    for config in (cascade, Finetune(optimizer=Optimizer(lr=6e-6), edit=EditConfig(steps={"base": 3}), out=Path("6e-6"))):
        assert load_config(type(config), write(dump_yaml(config))) == config


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.sampled_from(
    ["6e-6", "no", "12:30", "0o7", "~", "", " a", "- x", "a: b", "1_0", "2022-01-01", "<<", "#", "'", "é\n\nb", "\x85", "&a", "*a", "!t"])
keys = st.text(max_size=5)
tree = st.dictionaries(keys, st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=8))


@settings(max_examples=200, deadline=None)
@given(tree)
def test_any_data_survives_writing_and_reading(data):
    assert strict_yaml.parse(strict_yaml.dump(data), "text")[0] == data


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("ab:-[]{},&*!?|>'\"%#\n\t 1.e", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        strict_yaml.parse(text, "text")
        load_config(Finetune, None, [f"steps={text}"])
    except ConfigError as error:
        assert str(error).isprintable()


def test_hash_follows_values_only(write):
    a = load_config(Finetune, write("steps: 5\noptimizer: {lr: 6e-6, fused: true}\n"))
    b = load_config(Finetune, write("# same\noptimizer:\n    fused: true\n    lr: 0.000006\nsteps: 5\n"))
    assert config_hash(a) == config_hash(b) and len(config_hash(a)) == 64
    assert config_hash(a) != config_hash(load_config(Finetune, None, ["steps=6"]))
    known = "9c2f5411eeccb748ce8ced393a746dbad8a57dd1f4f22db0c2a018e543633166"
    assert config_hash(Optimizer()) == known, "the canonical form changed: checkpoints made before would be refused"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_models_refuse_nan_inf_and_negative(value):
    for field in ("strength", "start", "guidance_weight"):
        with pytest.raises(ValidationError):
            EditConfig(**{field: value})
    with pytest.raises(ValidationError):
        DiffusionConfig(residual_scale=value)
    with pytest.raises(ValidationError):
        UNetConfig(channels=-32, channel_mults=(1,), num_blocks=(1,))


PAPER = {   # frames, height, width, fps, steps, channels, mults, blocks, space to depth, attention levels
    "base": (16, 24, 40, 3, 64, 768, (1, 2, 4, 4), (3, 4, 4, 4), 1, (0, 1, 2, 3)),
    "tsr1": (32, 24, 40, 6, 8, 512, (1, 2, 3, 4), (3, 3, 4, 4), 1, (1, 2, 3)),
    "ssr1": (32, 48, 80, 6, 128, 384, (1, 2, 4, 4), (3, 3, 5, 5), 1, (1, 2, 3)),
    "ssr2": (32, 192, 320, 6, 128, 256, (1, 2, 4, 6), (2, 2, 4, 8), 2, (2, 3)),
    "tsr2": (64, 192, 320, 12, 8, 128, (1, 2, 4, 8), (2, 4, 6, 14), 2, (2, 3)),
    "tsr3": (128, 192, 320, 24, 8, 128, (1, 2, 4, 8), (2, 4, 8, 10), 2, (2, 3)),
    "ssr3": (128, 768, 1280, 24, 8, 128, (1, 2, 4, 8), (2, 2, 6, 5), 2, ()),
}


def test_imagen_video_is_the_papers_cascade():
    cascade = load_config(CascadeConfig, IMAGEN_VIDEO)
    assert tuple(PAPER) == STAGE_ORDER and cascade.fps == 24 and cascade.text.encoder.endswith("t5-v1_1-xxl")
    for s in cascade.stages:
        u = s.unet
        assert (s.frames, s.height, s.width, s.fps, s.steps, u.channels, u.channel_mults, u.num_blocks, u.space_to_depth,
                u.attention_levels) == PAPER[s.name]
        base = s.name == "base"
        assert (u.temporal, u.attention_every_block, u.lowres) == (("attention", True, False) if base else ("conv", False, True))
        assert (u.head_dim, u.groups, u.text_dim, u.context_dim) == (64, 32, 4096, 1024)
        assert s.diffusion == DiffusionConfig() and s.diffusion.guidance_weight == 1 and s.diffusion.prediction == "v"
        assert s.chunk_frames == (32 if s.name == "ssr3" else None)
        assert s.aug_level == 0 if base else math.exp(CosineSchedule().logsnr(s.aug_level)) == pytest.approx(5, rel=1e-3)


def test_every_bundled_cascade_loads():
    for path in (config_root() / "cascade").glob("*.yaml"):
        assert load_config(CascadeConfig, path).name == path.stem


def test_pyyaml_still_has_the_traps_this_reader_is_for():
    assert yaml.safe_load("a: 6e-6\nb: no\nb: 12:30:00") == {"a": "6e-6", "b": 45000}
