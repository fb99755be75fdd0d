"""Checkpoints that survive: a folder is either complete and its every byte known by sha256, or it is none.

A save is a temporary folder, written and flushed by every rank, sealed by a manifest and renamed; then `LATEST` is replaced. Nothing is
handed to a loader before all of it was verified. Whoever kills a run, at whatever moment, finds the checkpoint before.
"""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import __version__
from engine.errors import ConfigError, DiskError, WeightsError
from engine.media.clip import shown
from engine.strict_yaml import plain, short

from .checkpoint_files import (
    FORMAT,
    MANIFEST,
    Damaged,
    alive,
    config_hash,
    disk_errors,
    file_names,
    folders,
    plain_json,
    remove,
    sealed,
    sha256,
    sync,
    verified,
)
from .ranks import Alone, Processes, Ranks, fault, together

__all__ = ["FAULTS", "Alone", "Checkpoint", "Processes", "Ranks", "check_config", "latest", "save", "together", "versions"]
LATEST = "LATEST"
FAULTS = ("prepared", "written", "synced", "hashed", "manifest", "sealed", "renamed", "latest")     # the named points of a save, in order
PACKAGES = ("torch", "deepspeed", "bitsandbytes", "safetensors")
COMPARED = ("dreamix", "torch")                      # another version of these may give other numbers
HARMLESS = {"keep", "save_every", "preview_every", "preview_prompt", "report_to"}      # settings that change no weight
MAX_DIFFERENCES = 12


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest and every file were verified; `manifest` is what `save` was told and what it added."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def applied_steps(self) -> int:
        return self.manifest.get("applied_steps", self.step)

    @property
    def world(self) -> int:
        return self.manifest["world_size"]


def save(root: Path, step: int, write: Callable[[Path], None], *, meta: dict[str, Any], ranks: Ranks | None = None, keep: int = 2,
         bytes_needed: int = 0) -> Path:
    """Write `root/step-<step>`, a checkpoint that is complete or absent, and remove all but the newest `keep` -> its folder.

    write: puts this rank's files into the folder it is given, which all ranks share; meta: JSON values for the manifest, of which
    `config`, `stage` and `applied_steps` have a meaning here; bytes_needed: what this rank will write, if it is known: then a disk
    without that much room is told before the first byte. Collective: every rank calls it.
    Raises: DiskError (with the bytes needed if the disk is full; older checkpoints are intact, nothing new is left behind),
    ValueError; and a UserError on every rank if it failed on any.
    """
    root, ranks = Path(root), ranks or Alone()
    if keep < 2:
        raise ValueError(f"keep: want at least 2 (while one is written the other must stay), got {keep}")
    head = _head(meta, step, ranks.world)
    told = ranks.gather((os.getpid(), bytes_needed))
    part, needed, first = root / f".tmp-{step}-{told[0][0]}", sum(n for _, n in told), ranks.rank == 0

    def phase(work: Callable[[], Any]) -> list:
        def guarded():
            with disk_errors(root, part, needed):
                return work()
        return together(ranks, guarded)

    def at(point: str) -> None:
        fault(point, ranks.rank, step)

    def prepare() -> None:
        if first:
            _prepare(root, part, needed)
        at("prepared")

    def write_all() -> None:
        if not part.is_dir():
            raise DiskError(f"{shown(part)}: want a folder that all ranks share, this one does not see it")
        write(part)
        at("written")

    def hash_all() -> dict[str, dict]:
        names = file_names(part)
        for name in names:                            # all of them: a rank's own pages are flushed by itself, whichever those are
            sync(part / name)
        at("synced")
        mine = {name: {"bytes": (part / name).stat().st_size, "sha256": sha256(part / name)} for name in names[ranks.rank :: ranks.world]}
        at("hashed")
        return mine

    def commit() -> None:
        if first:
            _write_manifest(part, head, {name: entry for mine in hashed for name, entry in mine.items()})
        at("manifest")
        if first:
            _sync_all(part)
        at("sealed")
        if first:
            _publish(part, root / f"step-{step}")
        at("renamed")
        if first:
            _point(root, step)
        at("latest")
        if first:
            _prune(root, step, keep)

    try:
        phase(prepare)
        phase(write_all)
        hashed = phase(hash_all)
        phase(commit)
    except BaseException:
        if first:
            remove(part)
            remove(root / (LATEST + ".part"))
        raise
    return root / f"step-{step}"


def latest(root: Path, *, notes: list[str], ranks: Ranks | None = None, trust: bool = False) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; None if there never was one. Rank 0 reads, all are told.

    notes: gets one line for each damaged one that was passed over. trust: take also what another user owns.
    Raises: WeightsError if there are checkpoints and none is whole, or if what is there was not written by this program and user.
    """
    root, ranks = Path(root), ranks or Alone()

    def search():
        if ranks.rank:
            return None
        try:
            return _search(root, notes, trust)
        except OSError as error:
            raise DiskError(f"{shown(root)}: cannot be read: {error.strerror or error}") from error

    found = together(ranks, search)[0]
    return None if found is None else Checkpoint(root / f"step-{found['step']}", found["step"], found)


def check_config(checkpoint: Checkpoint, config: dict[str, Any], allow: bool = False) -> list[str]:
    """That a run goes on with the settings and versions it began with -> the differences that `allow` lets pass, a line each.

    config: as given to `save` in meta["config"]; settings that change no weight (HARMLESS) may differ.
    Raises: ConfigError naming each field that differs, what it was and what it is, unless `allow`.
    """
    was, now = _flat(checkpoint.manifest["config"]), _flat(plain_json(config))
    was |= {f"versions.{name}": checkpoint.manifest["versions"].get(name) for name in COMPARED}
    now |= {f"versions.{name}": versions().get(name) for name in COMPARED}
    differ = [n for n in sorted(was.keys() | now.keys()) if (n in was, was.get(n)) != (n in now, now.get(n))]
    words = [f"{plain(n)} was {short(was[n]) if n in was else 'not set'}, is {short(now[n]) if n in now else 'not set'}"
             for n in differ if n.rpartition(".")[2] not in HARMLESS]
    if words and not allow:
        more = f"; and {len(words) - MAX_DIFFERENCES} more" if len(words) > MAX_DIFFERENCES else ""
        raise ConfigError(f"{shown(checkpoint.folder)}: the run began with other settings: {'; '.join(words[:MAX_DIFFERENCES])}{more} "
                          "(want the same, another --out, or --allow-config-change)")
    return words


def versions() -> dict[str, str]:
    """Of this program and of the packages whose numbers end in a checkpoint."""
    found = {"dreamix": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _head(meta: dict[str, Any], step: int, world: int) -> dict[str, Any]:
    meta = {"stage": None, "applied_steps": step, "config": {}} | plain_json(meta)
    own = {"format": FORMAT, "step": step, "world_size": world, "versions": versions(), "config_sha256": config_hash(meta["config"])}
    if taken := meta.keys() & {*own, "files", "sha256"}:
        raise ValueError(f"meta: want other names than {' '.join(sorted(taken))}, which the manifest fills in itself")
    return meta | own


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def _prepare(root: Path, part: Path, needed: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for entry in root.iterdir():                      # left by runs that were killed; a living process may still be writing its own
        match = re.fullmatch(r"\.tmp-\d+-(\d+)(\.old)?", entry.name)
        if match and not alive(int(match[1])) or entry.name == LATEST + ".part":
            remove(entry)
    if needed > shutil.disk_usage(root).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    part.mkdir()


def _write_manifest(part: Path, head: dict, files: dict) -> None:
    if sorted(files) != file_names(part):
        raise DiskError(f"{shown(part)}: want a folder that all ranks share, some files were not seen by all")
    with open(part / MANIFEST, "x", encoding="ascii") as f:
        f.write(sealed(head | {"files": files}))


def _sync_all(part: Path) -> None:
    sync(part / MANIFEST)
    for folder in (part, *(path for path in part.rglob("*") if path.is_dir())):
        sync(folder)


def _publish(part: Path, folder: Path) -> None:
    """The rename that makes a checkpoint; one of the same step (saved again after a fallback) changes places with it at once."""
    if not os.path.lexists(folder):
        os.rename(part, folder)
    elif not _exchange(part, folder):                 # a file system that cannot: for a moment this step has no folder, and no LATEST
        (folder.parent / LATEST).unlink(missing_ok=True)
        old = part.with_name(part.name + ".old")
        os.rename(folder, old)
        os.rename(part, folder)
        remove(old)
    sync(folder.parent)
    remove(part)                                      # the one it changed places with


def _exchange(a: Path, b: Path) -> bool:
    try:                                              # -100: AT_FDCWD; 2: RENAME_EXCHANGE
        return ctypes.CDLL(None).renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0
    except (AttributeError, OSError):
        return False


def _point(root: Path, step: int) -> None:
    temporary = root / (LATEST + ".part")
    with open(temporary, "w", encoding="ascii") as f:
        f.write(f"step-{step}\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, root / LATEST)
    sync(root)


def _prune(root: Path, step: int, keep: int) -> None:
    """Newer ones are not counted: they were passed over as damaged, or this run would have begun from them."""
    for number, folder in [entry for entry in folders(root) if entry[0] <= step][keep:]:
        aside = root / f".tmp-{number}-{os.getpid()}.old"                # never a half-removed folder under a checkpoint's name
        os.rename(folder, aside)
        remove(aside)
    sync(root)


def _search(root: Path, notes: list[str], trust: bool) -> dict[str, Any] | None:
    if not root.exists():
        return None
    found = folders(root)
    if not found:
        if strange := sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".") and entry.name != LATEST + ".part"):
            raise WeightsError(f"{shown(root)}: no checkpoint of this program, but {plain(strange[0])}; want another folder, or it removed")
        return None
    damage = []
    for step, folder in found:
        try:
            manifest = verified(folder, step, trust)
        except Damaged as error:
            damage.append(str(error))
            continue
        notes += [f"{words}; step-{step} is used" for words in damage]
        _check_pointer(root, found, notes)
        return manifest
    raise WeightsError(f"{'; '.join(damage[:3])}; no checkpoint is whole")


def _check_pointer(root: Path, found: list[tuple[int, Path]], notes: list[str]) -> None:
    """LATEST is for people and scripts. A wrong one hinders nothing, but says that something else has touched the folder."""
    path = root / LATEST
    text = path.read_bytes()[:99] if path.is_file() else None
    if text is None:
        notes.append(f"{shown(path)}: is missing")
    elif text not in [f"step-{step}\n".encode() for step, _ in found]:
        notes.append(f"{shown(path)}: names no checkpoint that is there ({short(text.decode('ascii', 'replace'))})")
