"""Video in and out: the only part of the engine that touches media files.

`read_clip` turns any file, folder or array into `[T, H, W, 3]` in [-1, 1]; `write_video` turns such a tensor, or a stream of
chunks, into a file that is either complete or absent. The public names load their module on first use, so that importing this
package costs nothing and a command's `--help` opens no codec library.
"""

from importlib import import_module

_HOME = {
    "Clip": "clip", "MediaLimits": "clip", "SourceInfo": "clip",
    "Fit": "geometry", "fit_geometry": "geometry",
    "probe": "decode", "read_clip": "decode",
    "write_video": "encode",
    "contact_sheet": "compare", "side_by_side": "compare",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
