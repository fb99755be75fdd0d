"""Outputs that are complete or absent: written to `<name>.part` beside the target, flushed to the disk, then renamed over it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import DiskError
from engine.media.clip import shown

FRAME_NAME = re.compile(r"\d{5,}\.png")


@contextmanager
def disk_errors(path) -> Iterator[None]:
    """What the system says about writing becomes a DiskError naming `path`."""
    try:
        yield
    except (OSError, ValueError) as error:                           # ValueError: a NUL in the name
        raise DiskError(f"{shown(path)}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(path: Path, folder: bool) -> None:
    """Only what a former run could have written is replaced: never a device, another kind of thing, or a folder with other files in it."""
    if not os.path.lexists(path) or path.is_symlink() and not path.exists():
        return
    if not folder and not path.is_file():
        raise DiskError(f"{shown(path)}: cannot be written: something that is not a regular file is in its place")
    if folder and (not path.is_dir() or path.is_symlink()):
        raise DiskError(f"{shown(path)}: cannot be written: want a folder for the frames, but something else is in its place")
    if folder and not all(FRAME_NAME.fullmatch(entry.name) for entry in path.iterdir()):
        raise DiskError(f"{shown(path)}: cannot be written: the folder holds other files than frames; want a new or empty one")


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a fresh `.part` file (or folder) to write; on success it takes the place of `path`, on any exception nothing is left.

    Missing parent folders are made. Raises: DiskError naming the path.
    """
    part = path.with_name(path.name + ".part") if path.name else path
    made: list[Path] = []
    try:
        with disk_errors(path):
            check_target(path, folder)
            missing = path.parent
            while not missing.exists():
                made.append(missing)
                missing = missing.parent
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(part)                                            # left by a killed run; also never write through a link
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
        yield part
        with disk_errors(path):
            for file in part.iterdir() if folder else ():
                _sync(file)
            _sync(part)
            if folder and path.exists():
                _swap(part, path)
            else:
                os.replace(part, path)
            _sync(path.parent)
    except BaseException:
        try:
            _remove(part)
            for parent in made:
                parent.rmdir()
        except (OSError, ValueError):                                # the first error is the one to tell
            pass
        raise


def _swap(part: Path, path: Path) -> None:
    """A folder cannot be renamed over a full one: the old steps aside first and comes back if the new cannot take its place."""
    old = path.with_name(path.name + ".old.part")
    _remove(old)
    os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)
