"""What a scene is called: canonical captions, paraphrases of them, and the way back from a text to attributes.

Every word belongs to at most one value of one attribute, so `parse` is a look-up and `parse(caption(a)) == a` for every combination
and every paraphrase. `all_words()` is the closed vocabulary from which the bundled cascade's tokenizer is built.
"""

import random
import re

from engine.sprites.world import ATTRIBUTES, Scenes

RARE_TOKEN = "sks"
_SHAPES = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle", "wedge"), "cross": ("cross", "plus")}
_COLOURS = {
    "red": ("red", "scarlet"), "green": ("green", "emerald"), "blue": ("blue",), "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"), "cyan": ("cyan", "turquoise"),
}
_BACKGROUND_COLOURS = {"grey": ("grey", "gray"), "brown": ("brown",), "navy": ("navy",), "olive": ("olive",), "rose": ("rose", "pink")}
# a kind of background: before the word "background", and as a phrase of its own
_KINDS = {
    "plain": (("plain", "uniform"), "{a} {bg} wall"),
    "striped": (("striped",), "{bg} stripes"),
    "checkered": (("checkered", "chequered"), "{a} {bg} checkerboard"),
}
# a motion: as a participle, and as a verb
_MOTIONS = {
    "still": (("standing still", "staying still", "that does not move"), ("stands still", "stays still", "does not move", "rests")),
    "left": (("moving left", "sliding left", "gliding to the left", "drifting to the left"),
             ("moves left", "slides left", "glides to the left", "drifts to the left")),
    "right": (("moving right", "sliding right", "gliding to the right", "drifting to the right"),
              ("moves right", "slides right", "glides to the right", "drifts to the right")),
    "up": (("moving up", "sliding up", "rising", "drifting upwards"), ("moves up", "slides up", "rises", "climbs", "drifts upwards")),
    "down": (("moving down", "sliding down", "sinking", "drifting downwards"),
             ("moves down", "slides down", "sinks", "falls", "drifts downwards")),
}
_BEFORE = {"sketch": ("a sketch of ", "a line drawing of ", "an outline of "), "normal": ("",), "night": ("",)}
_AFTER = {"night": (" at night", " in the dark"), "normal": ("",), "sketch": ("",)}
_WORDS = {                                               # the word that decides, per attribute's value
    "shape": _SHAPES, "colour": _COLOURS, "background_colour": _BACKGROUND_COLOURS,
    "background_kind": {"plain": ("plain", "uniform", "wall"), "striped": ("striped", "stripes"),
                        "checkered": ("checkered", "chequered", "checkerboard")},
    "style": {"sketch": ("sketch", "drawing", "outline"), "night": ("night", "dark")},
    "motion": {"still": ("still", "not", "rests"), "left": ("left",), "right": ("right",),
               "up": ("up", "upwards", "rising", "rises", "climbs"), "down": ("down", "downwards", "sinking", "sinks", "falls")},
}
_LOOKUP = {word: (name, value) for name, values in _WORDS.items() for value, words in values.items() for word in words}
_GLUE = "a an the of that over on against in front background , and photo picture video"


def caption(attributes: dict[str, str], rng: "random.Random | int | None" = None) -> str:
    """The caption of a scene: canonical if rng is None, else a paraphrase drawn from rng (an int is its seed).

    attributes: names as `Scenes.attributes` gives them; without "motion" (a single picture) the caption does not mention it.
    """
    for name, values in ATTRIBUTES.items():
        if name in attributes and attributes[name] not in values:
            raise ValueError(f"{name}: want one of {values}, got {attributes[name]!r}")
    missing = [name for name in ATTRIBUTES if name not in attributes and name != "motion"]
    if missing:
        raise ValueError(f"attributes: want every one of {[*ATTRIBUTES]} (motion may be left out), got none for {missing}")
    rng = random.Random(rng) if isinstance(rng, int) else rng
    pick = rng.choice if rng is not None else (lambda options: options[0])
    style, motion = attributes["style"], attributes.get("motion")
    before, after = pick(_BEFORE[style]), pick(_AFTER[style])
    sprite = f"{pick(_COLOURS[attributes['colour']])} {pick(_SHAPES[attributes['shape']])}"
    bg, (adjectives, phrase) = pick(_BACKGROUND_COLOURS[attributes["background_colour"]]), _KINDS[attributes["background_kind"]]
    place = f"a {pick(adjectives)} {bg} background"
    if rng is not None and rng.random() < 0.25:
        place = phrase.format(a="an" if bg == "olive" else "a", bg=bg)
    preposition = pick(("over", "on", "against", "in front of"))
    participle, verb = (pick(ways) for ways in _MOTIONS[motion]) if motion else ("", "")
    moving = f" {participle}" if participle else ""
    template = pick((0, 1, 2))
    if template == 2:
        return f"{preposition} {place}, {before}a {sprite}{moving}{after}"
    if template == 1 and motion and not before:
        return f"a {sprite} {verb} {preposition} {place}{after}"
    return f"{before}a {sprite}{moving} {preposition} {place}{after}"


def captions(scenes: Scenes, seed: int | None = None, *, motion: bool = True) -> list[str]:
    """One caption per scene: canonical if seed is None, else paraphrases. motion=False leaves the motion out (single pictures)."""
    rng = None if seed is None else random.Random(seed)
    named = (scenes.attributes(i) for i in range(len(scenes)))
    return [caption(a if motion else {k: v for k, v in a.items() if k != "motion"}, rng) for a in named]


def parse(text: str) -> dict[str, str]:
    """The attributes a text names. A style is named by its word; a text that names a shape and no style is "normal"."""
    found = {}
    for word in words(text):
        name, value = _LOOKUP.get(word, (None, None))
        if name and name not in found:
            found[name] = value
    if "shape" in found:
        found.setdefault("style", "normal")
    return found


def words(text: str) -> list[str]:
    """The words of a text, lower case; a comma is a word."""
    return re.findall(r"[a-z']+|,", text.lower())


def all_words() -> list[str]:
    """Every word a caption can contain, sorted, and the rare token."""
    pieces = [_GLUE, RARE_TOKEN, *_LOOKUP]
    for participles, verbs in _MOTIONS.values():
        pieces += [*participles, *verbs]
    for adjectives, phrase in _KINDS.values():
        pieces += [*adjectives, phrase.format(a="", bg="")]
    for options in (*_BEFORE.values(), *_AFTER.values()):
        pieces += options
    return sorted({word for piece in pieces for word in words(piece)})


VOCABULARY = tuple(all_words())
