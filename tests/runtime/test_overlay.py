"""A product over its cascade: finetuned stages are used, the others stay the cascade's, and what is not as it was written is refused."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.cascade import Cascade
from engine.cascade_folder import write_index
from engine.config import FinetuneConfig, SampleConfig
from engine.errors import WeightsError
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.runtime.overlay import LORA_NAME, RECORD, Overlay, layout, sealed
from engine.runtime.weights import WEIGHTS_NAME, fingerprint
from engine.training.product import write

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = "a red circle moving left over a plain grey background"
CPU = torch.device("cpu")
FORMS = {"whole": 0, "low": 2}


@pytest.fixture(scope="module")
def learned(tiny):
    found = {}
    for stage in ("base", "ssr1"):
        generator = torch.Generator().manual_seed(1)
        found[stage] = {name: value + 0.05 * torch.randn(value.shape, generator=generator)
                        for name, value in load_file(tiny / stage / WEIGHTS_NAME).items()}
    return found


@pytest.fixture(scope="module")
def products(tiny, learned, tmp_path_factory):
    """Form -> folder of a product of base and ssr1. Shared: to damage one, copy it."""
    folder, cascade = tmp_path_factory.mktemp("products"), Cascade.load(tiny, "cpu", "fp32")
    return {form: write(folder / form, cascade, FinetuneConfig(stages=("base", "ssr1"), lora_rank=rank, rare_token="zwx"),
                        lambda name: iter(learned[name].items())) for form, rank in FORMS.items()}


@pytest.fixture(params=FORMS)
def copied(request, products, tmp_path):
    return shutil.copytree(products[request.param], tmp_path / "product")


def weights_file(folder, stage):
    return next((folder / stage).glob("*.safetensors"))


def state_of(cascade, stage):
    with cascade.network(cascade.config.stage(stage)) as network:
        return {name: value.clone() for name, value in network.state_dict().items()}


# --- what is used ---

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_weights_take_the_place_of_the_cascades(tiny, products, learned, dtype):
    cascade, plain = (Cascade.load(tiny, "cpu", dtype, overlay=overlay) for overlay in (products["whole"], None))
    for stage in ("base", "ssr1"):
        found = state_of(cascade, stage)
        assert all(torch.equal(found[name], value.bfloat16().to(cascade.dtype)) for name, value in learned[stage].items())
    for stage in ("tsr1", "ssr3"):
        found, want = state_of(cascade, stage), state_of(plain, stage)
        assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_low_rank_differences_are_added_in_fp32(tiny, products, dtype):
    cascade = Cascade.load(tiny, "cpu", dtype, overlay=products["low"])
    for stage in ("base", "ssr1"):
        found, base = state_of(cascade, stage), load_file(tiny / stage / WEIGHTS_NAME)
        parts, thin = load_file(products["low"] / stage / LORA_NAME), 0
        for name, value in base.items():
            if name in parts:
                update = parts[name].float()
            else:
                update, thin = parts[name + ".lora_up"].float() @ parts[name + ".lora_down"].float(), thin + 1
            assert torch.equal(found[name], (value + update.view_as(value)).to(cascade.dtype)), name
        assert thin > 5


def test_a_finetuned_network_is_ready_for_inference(tiny, products):
    for form in FORMS:
        cascade = Cascade.load(tiny, "cpu", "bf16", overlay=products[form])
        with cascade.network(cascade.config.stages[0]) as network:
            convolutions = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.weight[0].numel() > 9]
            assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
            assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(p.is_meta for p in network.parameters())                 # given back


@pytest.mark.parametrize("form", FORMS)
def test_sampling(tiny, products, learned, tmp_path, form):
    """What is sampled with an overlay is what a cascade with those weights in its own folder samples."""
    settings = SampleConfig(seed=3, last_stage="ssr2")
    cascade = Cascade.load(tiny, "cpu", "fp32", overlay=products[form])
    videos = cascade.sample(PROMPT, settings)
    mine = shutil.copytree(tiny, tmp_path / "mine")
    for stage in ("base", "ssr1"):
        save_file({name: value.contiguous() for name, value in state_of(cascade, stage).items()}, mine / stage / WEIGHTS_NAME)
    want = Cascade.load(mine, "cpu", "fp32").sample(PROMPT, settings)
    assert all(torch.equal(videos[name], want[name]) for name in want)
    before = Cascade.load(tiny, "cpu", "fp32").sample(PROMPT, settings)
    assert not any(torch.equal(videos[name], before[name]) for name in want)


def test_many_prompts_from_one_product(tiny, products):
    """Two edits, nothing learned in between, and no byte of the product or of the cascade changes."""
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for root in (tiny, products["whole"]) for path in root.rglob("*.*")
               if path.is_file()}
    cascade = Cascade.load(tiny, "cpu", "fp32", overlay=products["whole"])
    settings, z = SampleConfig(seed=3, last_stage="tsr1"), torch.randn(4, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    first, second = (cascade.sample(prompt, settings, z=z, strength=0.75)["tsr1"] for prompt in (PROMPT, "a blue square"))
    assert not torch.equal(first, second)
    assert torch.equal(cascade.sample(PROMPT, settings, z=z, strength=0.75)["tsr1"], first)
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in digests}


def test_what_it_tells(products):
    overlay = Overlay.open(products["low"])
    data = (products["low"] / RECORD).read_bytes()
    assert overlay.fingerprint == hashlib.sha256(data).hexdigest()
    assert overlay.about() == {"sha256": overlay.fingerprint, "prompt": "zwx", "stages": ["base", "ssr1"]}
    assert "base" in overlay and "tsr1" not in overlay
    assert overlay.weights_sha256("base") == fingerprint_of(products["low"] / "base" / LORA_NAME)


def fingerprint_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_layout():
    shapes = {"bias": (8,), "small": (4, 4), "linear": (64, 32), "conv": (16, 8, 3, 3)}
    assert layout(shapes, 0) == shapes
    assert layout(shapes, 2) == {"bias": (8,), "small": (4, 4), "linear.lora_up": (64, 2), "linear.lora_down": (2, 32),
                                 "conv.lora_up": (16, 2), "conv.lora_down": (2, 72)}


# --- damage ---

def refused(folder, says, cascade=None):
    """Refused when it is opened; with a cascade, when it is laid over that."""
    with pytest.raises(WeightsError, match=says) as error:
        Overlay.open(folder) if cascade is None else Cascade.load(cascade, "cpu", "fp32", overlay=folder)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)


@pytest.mark.fault
def test_a_flipped_byte(copied):
    """Wherever it is: in the record, a config, a header, the numbers."""
    for name in (RECORD, "base/config.json", *(path.relative_to(copied) for path in copied.rglob("*.safetensors"))):
        path = copied / name
        data = path.read_bytes()
        for at in {0, 1, 9, len(data) // 3, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            refused(copied, "product.*(damaged|format)")
        path.write_bytes(data)
    assert Overlay.open(copied)


@pytest.mark.fault
def test_a_truncated_file(copied):
    for name in (RECORD, "ssr1/config.json", weights_file(copied, "base").relative_to(copied)):
        path = copied / name
        data = path.read_bytes()
        for size in (0, 7, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            refused(copied, "product.*(damaged|format)")
        path.write_bytes(data)
    assert Overlay.open(copied)


@pytest.mark.fault
@pytest.mark.parametrize("what", ["stage", "file", "record", "folder", "extra", "extra in stage", "hidden", "link", "link to itself",
                                  "linked record", "pipe"])
def test_files_missing_or_more(copied, what):
    path = weights_file(copied, "ssr1")
    if what == "stage":
        shutil.rmtree(copied / "ssr1")
    elif what == "file":
        path.unlink()
    elif what == "record":
        (copied / RECORD).unlink()
    elif what == "folder":
        shutil.rmtree(copied)
    elif what.startswith("extra"):
        (copied / ("more.txt" if what == "extra" else "ssr1/more.safetensors")).write_text("")
    elif what == "hidden":
        (copied / ".more").write_text("")
    elif what == "link":
        path.rename(copied.parent / "elsewhere")
        path.symlink_to(copied.parent / "elsewhere")
    elif what == "link to itself":
        (copied / "more").symlink_to(copied)
    elif what == "linked record":
        (copied / RECORD).rename(copied.parent / "elsewhere")
        (copied / RECORD).symlink_to(copied.parent / "elsewhere")
    else:
        os.mkfifo(copied / "more")
    refused(copied, {"stage": "ssr1/.*is missing", "file": "ssr1/.*is missing", "extra": "more.txt is not in its record",
                     "extra in stage": "ssr1/more.safetensors is not in its record", "hidden": ".more is not in its record",
                     "link": "is not a regular file", "link to itself": "more is not a regular file",
                     "pipe": "more is not a regular file"}.get(what, "want a product of engine.finetune, got no dreamix.json"))


def resealed(folder, change):
    """A record whose own hash is right: what somebody else's program might write."""
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    change(record)
    (folder / RECORD).write_text(sealed(record))


def moved(name):
    def change(record):
        record["files"][name] = record["files"].pop("base/config.json")
    return change


@pytest.mark.fault
@pytest.mark.parametrize("change, says", [
    (lambda r: r.update(format="dreamix-product-2"), "want a product in the format dreamix-product-1, got 'dreamix-product-2'"),
    (lambda r: r.pop("format"), "want a product in the format"),
    (lambda r: r.update(more=1), "more: Extra inputs"),
    (lambda r: r.pop("prompt"), "prompt: Field required"),
    (lambda r: r["stages"].update({"../ssr1": r["stages"].pop("ssr1")}), "stages.*ssr1"),
    (lambda r: r["stages"].update(ssr9=r["stages"].pop("ssr1")), "stages.ssr9"),
    (lambda r: r["stages"].pop("ssr1"), "base.stages: want those of stages"),
    (lambda r: r["base"]["stages"].update(base="0" * 63), "base.stages.base: "),
    (lambda r: r["stages"]["base"].update(lora_rank=3 - 3 * bool(r["stages"]["base"]["lora_rank"])), "files: want base/config.json"),
    (lambda r: r["files"].pop("base/config.json"), "'base/config.json' is missing"),
    (lambda r: r["files"].update({"more.py": r["files"]["base/config.json"]}), "'more.py' is unknown"),
    (lambda r: r["files"]["base/config.json"].update(bytes=-1), "bytes: "),
    (moved("../secret.json"), "'../secret.json' is unknown"),
    (moved("base/../../secret.json"), "secret.json' is unknown"),
    (moved("/etc/passwd"), "'/etc/passwd' is unknown"),
    (moved("base/config.json\n"), "is unknown"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_other_records(copied, change, says):
    """Names are never followed out of the folder, and nothing unknown is guessed at."""
    (copied.parent / "secret.json").write_text("{}")
    resealed(copied, change)
    refused(copied, says)


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '"x"', "{", "{}", "[" * 100_000, "\udcff", '{"format": NaN}'],
                         ids=["empty", "null", "list", "number", "string", "open", "object", "deep", "bytes", "nan"])
def test_no_record_at_all(copied, text):
    (copied / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(copied, RECORD)


def test_the_runs_folder_is_taken_for_what_it_is(copied):
    refused(copied.parent, "got no dreamix.json .did you mean .*product.*")


def replaced(folder, stage, name, data):
    """Another file in its place, with its size and hash in the record: only its contents can tell."""
    (folder / stage / name).write_bytes(data)
    resealed(folder, lambda r: r["files"].update({f"{stage}/{name}": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))


@pytest.mark.fault
@pytest.mark.parametrize("what, says", [("garbage", "not a complete safetensors file"), ("missing", "want BF16 .*got nothing"),
                                        ("more", "more: want nothing, got BF16"), ("shape", "head.bias: want BF16 .*got BF16 .9."),
                                        ("dtype", "head.bias: want BF16 .*got F32")])
def test_other_tensors(copied, tiny, what, says):
    path = weights_file(copied, "base")
    state = load_file(path)
    if what == "missing":
        del state["head.bias"]
    elif what == "more":
        state["more"] = torch.zeros(1, dtype=torch.bfloat16)
    elif what == "shape":
        state["head.bias"] = torch.zeros(9, dtype=torch.bfloat16)
    elif what == "dtype":
        state["head.bias"] = state["head.bias"].float()
    save_file(state, copied.parent / "state")
    replaced(copied, "base", path.name, b"garbage" if what == "garbage" else (copied.parent / "state").read_bytes())
    assert Overlay.open(copied)
    refused(copied, says, tiny)


@pytest.mark.parametrize("what, says", [("unet", "another network"), ("prediction", "another network"), ("unknown", "not a stage"),
                                        ("list", "not a stage"), ("text", "not a stage")])
def test_another_config(copied, tiny, what, says):
    data = json.loads((copied / "base" / "config.json").read_text())
    if what == "unet":
        data["unet"]["groups"] = 2                                          # no weight's shape tells it
    elif what == "prediction":
        data["diffusion"]["prediction"] = "eps"
    elif what == "unknown":
        data["more"] = 1
    replaced(copied, "base", "config.json", {"list": b"[]", "text": b"not json"}.get(what, json.dumps(data).encode()))
    refused(copied, says, tiny)


def test_how_a_stage_is_sampled_may_be_changed_afterwards(copied, tiny, tmp_path):
    mine = shutil.copytree(tiny, tmp_path / "mine")
    config = Cascade.load(tiny, "cpu", "fp32").config
    guided = config.stages[0].diffusion.model_copy(update={"guidance_weight": 3.0})
    base = config.stages[0].model_copy(update={"steps": 9, "diffusion": guided})
    write_index(mine, config.model_copy(update={"stages": (base, *config.stages[1:])}))
    assert Cascade.load(mine, "cpu", "fp32", overlay=copied).config.stages[0].steps == 9


def test_another_cascade(copied, tiny, tmp_path):
    """Refused with both hashes; stages that are not used, or were not finetuned, may be others."""
    mine = shutil.copytree(tiny, tmp_path / "mine")
    for stage in ("ssr1", "ssr3"):
        state = load_file(mine / stage / WEIGHTS_NAME)
        state["head.bias"] += 1
        save_file(state, mine / stage / WEIGHTS_NAME)
    was, now = fingerprint(tiny / "ssr1"), fingerprint(mine / "ssr1")
    assert was != now
    refused(copied, f"from cascade tiny, whose ssr1 has the sha256 {was}; that of tiny has {now}", mine)
    assert Cascade.load(mine, "cpu", "fp32", ("base", "tsr1"), overlay=copied)
    shutil.copy(tiny / "ssr1" / WEIGHTS_NAME, mine / "ssr1" / WEIGHTS_NAME)
    assert Cascade.load(mine, "cpu", "fp32", overlay=copied)


def test_memory_is_the_module_and_one_tensor(products, tiny, monkeypatch):
    """The differences are added to a loaded module in place: nothing holds a second copy of it."""
    overlay, config = Overlay.open(products["low"]), Cascade.load(tiny, "cpu", "fp32").config.stages[0]
    real, loaded = weights.load, []

    def load(*args):
        module = real(*args)
        loaded.append({name: value.data_ptr() for name, value in module.state_dict().items()})
        return module

    monkeypatch.setattr(weights, "load", load)
    with overlay.resident("base", lambda: VideoUNet(config.unet), tiny / "base", CPU, torch.bfloat16) as module:
        assert [{name: value.data_ptr() for name, value in module.state_dict().items()}] == loaded
