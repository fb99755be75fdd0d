"""The procedural captioned world that the bundled cascade is trained and judged on: renderer, captions, readout."""

from engine.sprites.captions import VOCABULARY, all_words, caption, captions, parse
from engine.sprites.world import ATTRIBUTES, Scenes, is_held_out, render, render_frames, sample_scenes, scene_from_attributes

__all__ = [
    "ATTRIBUTES", "VOCABULARY", "Scenes", "all_words", "caption", "captions", "is_held_out", "parse", "render", "render_frames",
    "sample_scenes", "scene_from_attributes",
]
