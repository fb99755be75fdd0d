"""Captions say exactly what is there, in many ways, with a closed vocabulary."""

import itertools

import pytest

from engine.sprites import ATTRIBUTES, VOCABULARY, caption, captions, parse, sample_scenes
from engine.sprites.captions import words

COMBINATIONS = [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]


def test_canonical_captions():
    attributes = dict(zip(ATTRIBUTES, ("circle", "red", "grey", "striped", "normal", "left"), strict=True))
    assert caption(attributes) == "a red circle moving left over a striped grey background"
    assert caption(attributes | {"style": "sketch"}) == "a sketch of a red circle moving left over a striped grey background"
    assert caption(attributes | {"style": "night"}) == "a red circle moving left over a striped grey background at night"
    assert len({caption(a) for a in COMBINATIONS}) == len(COMBINATIONS)


def test_every_caption_parses_back_in_known_words():
    for number, attributes in enumerate(COMBINATIONS):
        for rng in (None, 3 * number, 3 * number + 1, 3 * number + 2):
            text = caption(attributes, rng)
            assert parse(text) == attributes, text
            assert set(words(text)) <= set(VOCABULARY), text


def test_paraphrases_vary_and_repeat():
    attributes = COMBINATIONS[1]
    assert len({caption(attributes, i) for i in range(200)}) > 40
    assert caption(attributes, 17) == caption(attributes, 17)
    scenes = sample_scenes(10, 0)
    assert captions(scenes, 4) == captions(scenes, 4) != captions(scenes, 5)
    assert captions(scenes) == [caption(scenes.attributes(i)) for i in range(10)]


def test_paraphrases_reach_every_word_that_decides():
    seen = {word for i, attributes in enumerate(COMBINATIONS) for word in words(caption(attributes, i))}
    assert set(VOCABULARY) - seen == {"and", "photo", "picture", "video", "sks"}      # for prompts: no caption says them


def test_pictures_need_no_motion():
    text = captions(sample_scenes(1, 0), motion=False)[0]
    assert "motion" not in parse(text) and len(parse(text)) == 5


@pytest.mark.parametrize("attributes", [{"shape": "circle"}, COMBINATIONS[0] | {"colour": "pink"}])
def test_wrong_attributes_are_refused(attributes):
    with pytest.raises(ValueError, match="want"):
        caption(attributes)
