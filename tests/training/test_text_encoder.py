"""What the bundled cascade's own text encoder promises, and that its training writes what loads."""

from pathlib import Path

import pytest
import torch

from engine.models.text import TextEncoder
from engine.sprites.captions import VOCABULARY, captions
from engine.sprites.world import ATTRIBUTES, sample_scenes
from engine.training.text_encoder import train

BUNDLED = Path(__file__).parents[2] / "configs" / "cascade" / "sprites"


def test_bundled_tokenizer_knows_every_caption_word_and_the_ids_of_t5(tmp_path):
    encoder = TextEncoder(BUNDLED, cache_dir=tmp_path)
    encoder.encode([""], cache=False)
    ids = {word: encoder._tokenizer(word)["input_ids"] for word in VOCABULARY if word.isalpha()}
    assert all(len(i) == 2 and i[0] > 2 and i[1] == 1 for i in ids.values()), "retrain: python -m engine.training.text_encoder"
    assert (encoder._tokenizer.pad_token_id, encoder._tokenizer.eos_token_id, encoder._tokenizer.unk_token_id) == (0, 1, 2)
    assert encoder._tokenizer("A RED, circle!")["input_ids"] == [*ids["a"][:1], *ids["red"][:1], *ids["circle"]]
    assert encoder._tokenizer("zebra")["input_ids"] == [2, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bundled_embeddings_follow_attributes_not_wording(precision, tmp_path):
    encoder = TextEncoder(BUNDLED, precision, cache_dir=tmp_path)
    scenes = sample_scenes(40, 5, "held_out")

    def mean(texts):
        embedding = encoder.encode(texts, batch_size=64, cache=False)
        return embedding.tokens.sum(1) / embedding.mask.sum(1, keepdim=True)

    here = mean(captions(scenes, 1))
    paraphrases = (here - mean(captions(scenes, 2))).norm(dim=1)
    for name, values in ATTRIBUTES.items():
        edited = scenes.replace(**{name: (getattr(scenes, name) + 1) % len(values)})
        changed = (here - mean(captions(edited, 3))).norm(dim=1)
        assert changed.mean() > 3 * paraphrases.mean() and changed.min() > paraphrases.max(), name


def test_training_writes_what_the_engine_loads_and_the_seed_decides(tmp_path, capsys):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train(tmp_path / name, seed=seed, steps=2, scenes=4, judged=8)
    assert "attributes from the mean" in capsys.readouterr().out
    one, again, other = (TextEncoder(tmp_path / name, cache_dir=tmp_path / "cache").encode(["a red circle", ""], cache=False).tokens
                         for name in ("one", "again", "other"))
    assert one.shape == (2, 4, 128) and torch.equal(one, again) and not torch.equal(one, other)
    assert (tmp_path / "one" / "tokenizer" / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer" / "tokenizer.json").read_bytes()
