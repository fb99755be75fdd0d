"""The files of a checkpoint: flushed, hashed, listed in a manifest that knows its own hash, and read back only as they were written."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import DiskError, UserError, WeightsError
from engine.media.clip import shown
from engine.strict_yaml import plain, short

FORMAT = "dreamix-checkpoint-1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
FULL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what safetensors and torch.save say of a full disk, whose own exceptions carry no errno
FULL_WORDS = re.compile(r"os error (27|28|122)\b|no space left|unexpected pos|failed writing", re.IGNORECASE)


class Damaged(WeightsError):
    """Not as it was written: an older checkpoint may serve."""


def folders(root: Path) -> list[tuple[int, Path]]:
    """The checkpoints by name, newest first."""
    found = [(int(match[1]), entry) for entry in root.iterdir() if (match := re.fullmatch(r"step-(0|[1-9]\d{0,17})", entry.name))]
    return sorted(found, reverse=True)


def file_names(folder: Path) -> list[str]:
    """Every file under the folder but its manifest, sorted, with / between the parts.   Raises: Damaged for a link or anything else."""
    names = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise Damaged(f"{shown(folder)}: damaged: {plain(path.relative_to(folder).as_posix())} is not a regular file")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return sorted(name for name in names if name != MANIFEST)


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """File or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Gone if that is possible; what stays has a temporary's name, and the next save tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def alive(pid: int) -> bool:
    """Whether another process has this id. A temporary with our own is ours, or of a run before us with the same id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:                                              # a zombie writes nothing, and in a container without an init it stays for ever
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def plain_json(value: Any) -> Any:
    """As it will come back from the file: tuples are lists, keys are strings.   Raises: ValueError if JSON has no word for it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"meta: want JSON values, got {error}") from error


def config_hash(config: Any) -> str:
    """As engine.config_io.config_hash, of a mapping."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with the hash of its own contents: one form for one content, so that no changed byte goes unnoticed."""
    return _text(manifest | {"sha256": hashlib.sha256(_text(manifest).encode()).hexdigest()})


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises: Damaged unless every byte is as `sealed` gave it; WeightsError if that was another program or format."""
    wrong = Damaged(f"{shown(path.parent)}: damaged: {MANIFEST} is not as it was written")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise wrong
        text = path.read_text("ascii")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or sealed({k: v for k, v in manifest.items() if k != "sha256"}) != text:
            raise wrong
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if manifest.get("format") != FORMAT:
        raise WeightsError(f"{shown(path)}: want a checkpoint in the format {FORMAT}, got {short(manifest.get('format'))}")
    return manifest


def verified(folder: Path, step: int, trust: bool) -> dict[str, Any]:
    """The manifest, once everything it says was seen to be so.   Raises: Damaged; WeightsError if it is not ours and not `trust`."""
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise Damaged(f"{shown(folder)}: damaged: {MANIFEST} is missing")
    manifest, names = read_manifest(path), file_names(folder)
    if manifest["step"] != step:
        raise Damaged(f"{shown(folder)}: damaged: its manifest is of step {manifest['step']}")
    owners = {(folder / name).lstat().st_uid for name in (".", MANIFEST, *names)} - {os.geteuid()}
    if owners and not trust:
        raise WeightsError(f"{shown(folder)}: belongs to another user (uid {min(owners)}); --trust-checkpoint if you know who wrote it")
    files = manifest["files"]
    for name in sorted(files.keys() | set(names)):
        if name not in names or name not in files:
            raise Damaged(f"{shown(folder)}: damaged: {plain(name)} {'is missing' if name in files else 'is not in its manifest'}")
        size = (folder / name).stat().st_size
        if size != files[name]["bytes"]:
            raise Damaged(f"{shown(folder)}: damaged: {plain(name)} has {size} bytes, want {files[name]['bytes']}")
    with ThreadPoolExecutor(8) as pool:               # after the sizes, which cost nothing; hashing lets other threads run
        digests = list(pool.map(lambda name: sha256(folder / name), names))
    for name, digest in zip(names, digests):
        if digest != files[name]["sha256"]:
            raise Damaged(f"{shown(folder)}: damaged: the bytes of {plain(name)} have changed")
    return manifest


def bytes_before(root: Path) -> int:
    """What the newest checkpoint takes: the best guess of what the next one will."""
    try:
        manifest = read_manifest(folders(root)[0][1] / MANIFEST)
        return sum(entry["bytes"] for entry in manifest["files"].values())
    except (OSError, IndexError, WeightsError):
        return 0


@contextmanager
def disk_errors(root: Path, part: Path, needed: int) -> Iterator[None]:
    """What the system, safetensors or torch say about writing under `root` becomes a DiskError, with the bytes needed if it is full.

    part: the unfinished checkpoint, whose files count; needed: the bytes it will have, 0 if nobody knows.
    """
    try:
        yield
    except (UserError, ConnectionError, TimeoutError):            # a lost peer is an OSError too, but no disk
        raise
    except Exception as error:
        chain, at = [], error
        while at is not None and at not in chain:
            chain.append(at)
            at = at.__cause__ or at.__context__
        codes = [one.errno for one in chain if isinstance(one, OSError)]
        words = None if isinstance(error, OSError) else FULL_WORDS.search(str(error))
        full = [code for code in codes if code in FULL_ERRNO] or words and [int(words[1] or errno.ENOSPC)]
        if not full and not isinstance(error, OSError):
            raise
        where = f"{shown(root)}: the checkpoint cannot be written"
        if not full:
            raise DiskError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
        try:
            written = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
            room = written + shutil.disk_usage(root).free
        except OSError:
            written = room = 0
        want = f"{needed}" if needed else f"at least {max(bytes_before(root), written + 1)}"
        raise DiskError(f"{where}: {os.strerror(full[0])}: want {want} bytes, {room} can be had; older checkpoints are intact") from error
