"""The text encoder and its cache: what changes an embedding, what must not, and what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.errors import NumericError, WeightsError
from engine.models import text
from engine.models.text import TextEmbedding, TextEncoder

BUNDLED = Path(__file__).parents[2] / "configs" / "cascade" / "sprites"
PROMPTS = ["a red circle moving left over a plain grey background", "", "a sks square"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach a network: neither by asking nor by connecting."""
    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked                                     # here, because an error at the call would be taken for a missing network


@pytest.fixture
def forbid_loading(monkeypatch):
    def forbid():
        def loader(*_):
            raise AssertionError("the encoder was loaded")

        monkeypatch.setattr(text, "_load_t5", loader)

    return forbid


@pytest.fixture
def encoder(tmp_path):
    return TextEncoder(BUNDLED, "fp32", cache_dir=tmp_path / "cache")


@pytest.fixture
def copied(tmp_path):
    folder = tmp_path / "cascade"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(BUNDLED / part, folder / part)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cached_prompt_does_not_load_the_encoder_and_is_the_same(tmp_path, precision, forbid_loading):
    first = TextEncoder(BUNDLED, precision, cache_dir=tmp_path).encode(PROMPTS)
    forbid_loading()
    again = TextEncoder(str(BUNDLED), precision, cache_dir=tmp_path).encode(PROMPTS)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.mask, again.mask)
    assert first.tokens.dtype == torch.float32
    with pytest.raises(WeightsError, match="the encoder was loaded"):      # and the guard itself works
        TextEncoder(BUNDLED, precision, cache_dir=tmp_path).encode(["a green circle"])


def test_only_missing_prompts_are_encoded_and_each_once(encoder, monkeypatch):
    encoder.encode(PROMPTS[:1])
    ran, run = [], encoder._run
    monkeypatch.setattr(encoder, "_run", lambda texts: ran.extend(texts) or run(texts))
    embedding = encoder.encode([*PROMPTS, PROMPTS[2]])
    assert sorted(ran) == sorted(PROMPTS[1:])
    assert torch.equal(embedding.tokens[2], embedding.tokens[3])


def test_every_part_of_the_key_counts(tmp_path, copied):
    def name(source=copied, prompt="a red circle", **options):
        return TextEncoder(source, cache_dir=tmp_path, **options).cache_file(prompt).name

    names = [name(), name(prompt="a green circle"), name(precision="fp32"), name(precision="nf4"), name(max_tokens=8),
             name("google/some-t5"), name("google/some-t5@main")]
    tokenizer = copied / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"sks"', '"skq"'))
    names.append(name())
    weights = copied / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1                      # same size, one bit of one weight
    weights.write_bytes(content)
    names.append(name())
    config = copied / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 4', '"num_heads": 2'))
    names.append(name())
    assert len(set(names)) == len(names)
    assert name() == name(str(copied)) == name(prompt="  a red\n circle\0 ")
    moved = copied.rename(tmp_path / "elsewhere")        # the folder's name is not the encoder's
    assert name(moved) == names[-1]


def test_large_files_are_not_read_whole(copied, monkeypatch):
    whole = text._fingerprint(copied / "text_encoder")
    monkeypatch.setattr(text, "SMALL_BYTES", 1 << 10)
    monkeypatch.setattr(text, "EDGE_BYTES", 1 << 10)
    weights = copied / "text_encoder" / "model.safetensors"
    edges = text._fingerprint(copied / "text_encoder")
    assert edges != whole
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(content)
    os.utime(weights, ns=times)                          # size and time are as before: the end itself has to count
    assert text._fingerprint(copied / "text_encoder") != edges


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"not safetensors" * 40,
    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],            # one bit: safetensors itself does not notice
], ids=["empty", "cut", "foreign", "flipped bit"])
def test_a_damaged_cache_file_is_ignored_and_rewritten(encoder, damage, forbid_loading):
    want = encoder.encode(PROMPTS[:1])
    path = encoder.cache_file(PROMPTS[0])
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(encoder.encode(PROMPTS[:1]).tokens, want.tokens)
    forbid_loading()
    assert torch.equal(TextEncoder(BUNDLED, "fp32", cache_dir=encoder.cache_dir).encode(PROMPTS[:1]).tokens, want.tokens)
    assert [p.name for p in encoder.cache_dir.iterdir()] == [path.name]    # nothing temporary stays behind


def test_an_unwritable_cache_does_not_fail_the_run(tmp_path, encoder):
    (tmp_path / "file").write_text("in the way")
    blocked = TextEncoder(BUNDLED, "fp32", cache_dir=tmp_path / "file" / "cache")
    assert torch.equal(blocked.encode(PROMPTS).tokens, encoder.encode(PROMPTS).tokens)


def test_cache_can_be_left_out(encoder):
    encoder.encode(PROMPTS, cache=False)
    assert not encoder.cache_dir.exists()


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TextEncoder(BUNDLED).cache_file("x").parent == tmp_path / "dreamix" / "text"


def test_padding_does_not_change_a_prompt(encoder):
    together = encoder.encode(PROMPTS, batch_size=8, cache=False)
    assert together.tokens.shape[1] == 11 and together.mask.sum(1).tolist() == [11, 1, 4]      # the longest, not max_tokens
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt], cache=False)
        n = alone.tokens.shape[1]
        torch.testing.assert_close(together.tokens[i, :n], alone.tokens[0], rtol=0, atol=1e-5)
        assert not together.tokens[i, n:].any() and not together.mask[i, n:].any() and together.mask[i, :n].all()


def test_one_at_a_time_neighbours_do_not_change_a_bit(encoder):
    together = encoder.encode(PROMPTS, cache=False)
    assert torch.equal(together.tokens[0], encoder.encode(PROMPTS[:1], cache=False).tokens[0])


def test_long_prompts_are_cut_with_a_note_also_from_the_cache(tmp_path):
    for _ in range(2):
        encoder = TextEncoder(BUNDLED, "fp32", max_tokens=4, cache_dir=tmp_path)
        embedding = encoder.encode([PROMPTS[0], "a red circle"])
        assert embedding.mask.sum(1).tolist() == [4, 4]
        assert len(encoder.notes) == 1 and "11 tokens" in encoder.notes[0]
    cut = TextEncoder(BUNDLED, "fp32", cache_dir=tmp_path).encode(["a red circle"])
    torch.testing.assert_close(embedding.tokens[0], cut.tokens[0])         # the end mark survives the cut


@pytest.mark.parametrize("prompts", ["a red circle", [], [None], [b"bytes"], ["fine", 3]], ids=repr)
def test_prompts_are_checked(encoder, prompts):
    with pytest.raises(ValueError, match="prompts: want"):
        encoder.encode(prompts)


@pytest.mark.parametrize("options, name", [({"precision": "fp16"}, "precision"), ({"max_tokens": 0}, "max_tokens")])
def test_options_are_checked(options, name):
    with pytest.raises(ValueError, match=f"{name}: want"):
        TextEncoder(BUNDLED, **options)


def test_lone_surrogates_and_control_characters_are_dropped(encoder):
    assert torch.equal(encoder.encode(["a red\tcircle\0\x1b\udce9"]).tokens, encoder.encode(["a red circle"]).tokens)


def test_null_indexing_cat_and_to(encoder):
    embedding = encoder.encode(PROMPTS)
    null = embedding.null_like()
    assert null.tokens.shape == embedding.tokens.shape and not null.tokens.any() and not null.mask.any()
    assert embedding.mask.any() and len(embedding[1].tokens) == 1 and torch.equal(embedding[-1].mask[0], embedding.mask[2])
    assert torch.equal(embedding[[2, 0]].tokens, embedding.tokens[[2, 0]]) and len(embedding[1:].mask) == 2
    with pytest.raises(IndexError):
        embedding[3]
    short = encoder.encode([""])
    both = TextEmbedding.cat([short, embedding])
    assert both.tokens.shape == (4, 11, 128) and both.mask.sum(1).tolist() == [1, 11, 1, 4]
    assert torch.equal(both.tokens[0, 0], short.tokens[0, 0]) and not both.tokens[0, 1:].any()
    half = embedding.to(dtype=torch.bfloat16)
    assert half.tokens.dtype == torch.bfloat16 and half.mask.dtype == torch.bool
    with pytest.raises(ValueError, match="TextEmbedding: want"):
        TextEmbedding(embedding.tokens, embedding.mask.float())


def test_tokens_can_be_trained_on(encoder):
    layer = torch.nn.Linear(128, 2)
    layer(encoder.encode(PROMPTS, cache=False).tokens).sum().backward()    # inference-mode tensors would refuse here
    assert layer.weight.grad.isfinite().all()


def test_release_frees_and_reloads(encoder):
    first = encoder.encode(PROMPTS, cache=False)
    encoder.release()
    assert encoder._model is None
    assert torch.equal(encoder.encode(PROMPTS, cache=False).tokens, first.tokens)


def _without_a_weight(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def _pickled(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")


def _cut(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _other_family(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "umt5"}))


@pytest.mark.parametrize("spoil, says", [
    (_without_a_weight, "1 weights are missing"), (_pickled, "pickled weights"), (_cut, "in fp32: "), (_other_family, "model_type t5"),
    (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), "in fp32: "),
    (lambda folder: (folder / "text_encoder" / "config.json").write_text("{"), "in fp32: "),
    (lambda folder: shutil.rmtree(folder), "neither"),
], ids=["weight missing", "pickle", "cut", "other family", "no tokenizer", "bad tokenizer", "bad config", "no folder"])
def test_unusable_encoders_are_one_line(tmp_path, copied, spoil, says):
    spoil(copied)
    with pytest.raises(WeightsError, match=says) as caught:
        TextEncoder(copied, "fp32", cache_dir=tmp_path / "cache").encode(PROMPTS)
    assert "\n" not in str(caught.value)


def test_nan_weights_are_refused_and_not_cached(tmp_path, copied):
    path = copied / "text_encoder" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["encoder.final_layer_norm.weight"][0] = torch.nan
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(NumericError, match="not finite"):
        TextEncoder(copied, "fp32", cache_dir=tmp_path / "cache").encode(PROMPTS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("offline", ["1", "0"])
def test_hub_ids_are_looked_up_with_their_revision_and_offline_only_on_disk(tmp_path, monkeypatch, offline):
    import huggingface_hub

    def snapshot(name, revision, local_files_only, **_):
        assert (name, revision, local_files_only) == ("google/some-t5", "v2", offline == "1")
        return shutil.copytree(BUNDLED / "tokenizer", shutil.copytree(BUNDLED / "text_encoder", tmp_path / "snapshot"), dirs_exist_ok=True)

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert TextEncoder("google/some-t5@v2", cache_dir=tmp_path).encode(PROMPTS).tokens.any()


def test_a_hub_id_that_is_not_here_is_one_line(tmp_path):
    with pytest.raises(WeightsError, match="neither a local folder nor"):
        TextEncoder("google/not-here", cache_dir=tmp_path).encode(PROMPTS)


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch, copied):
    plain = tmp_path / "google" / "t5"                   # a plain transformers folder: encoder and tokenizer in one
    shutil.copytree(copied / "text_encoder", plain)
    shutil.copytree(copied / "tokenizer", plain, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    got, want = (TextEncoder(s, "fp32", cache_dir=tmp_path / "cache").encode(PROMPTS).tokens for s in ("google/t5", BUNDLED))
    assert torch.equal(got, want)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized_is_near_full_precision_and_really_quantized(encoder, precision, tmp_path):
    pytest.importorskip("bitsandbytes", exc_type=Exception)
    small = TextEncoder(BUNDLED, precision, cache_dir=tmp_path / "cache")
    try:
        got = small.encode(PROMPTS, cache=False)
    except WeightsError as error:
        pytest.skip(str(error))
    want = encoder.encode(PROMPTS, cache=False)
    error = ((got.tokens - want.tokens).norm() / want.tokens.norm()).item()
    bf16 = TextEncoder(BUNDLED, "bf16", cache_dir=tmp_path / "cache").encode(PROMPTS, cache=False)
    assert error < (0.03 if precision == "int8" else 0.2) and not torch.equal(got.tokens, bf16.tokens)
    block = small._model.encoder.block[0].layer
    assert block[0].SelfAttention.q.weight.dtype == (torch.int8 if precision == "int8" else torch.uint8)
    assert block[1].DenseReluDense.wo.weight.dtype == torch.bfloat16


def test_without_bitsandbytes_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(WeightsError, match="int8 needs bitsandbytes"):
        TextEncoder(BUNDLED, "int8", cache_dir=tmp_path).encode(PROMPTS)


def _in_a_fresh_process(encoder, precision, then=""):
    code = (f"import sys; from engine.models.text import TextEncoder\n"
            f"TextEncoder({str(BUNDLED)!r}, {precision!r}, cache_dir={str(encoder.cache_dir)!r}).encode({PROMPTS!r})\n{then}")
    done = subprocess.run([sys.executable, "-c", code], cwd=BUNDLED.parents[2], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_a_cached_prompt_imports_no_transformers(encoder):
    encoder.encode(PROMPTS)
    heavy = "print(*{'transformers', 'bitsandbytes', 'huggingface_hub'} & set(sys.modules))"
    assert _in_a_fresh_process(encoder, "fp32", heavy).strip() == ""


def test_loading_is_silent(encoder):
    pytest.importorskip("bitsandbytes", exc_type=Exception)
    assert _in_a_fresh_process(encoder, "nf4") == ""


def test_loading_leaves_settings_alone(encoder):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), warnings.filters[:]
    encoder.encode(PROMPTS)
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), warnings.filters[:])
