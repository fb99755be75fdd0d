"""`metrics.jsonl`: one line per step, on the disk's side as soon as it is written, and never a line that a resumed run will write again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import DiskError
from engine.media.clip import shown


class Metrics:
    """`Metrics(path, {"base": 300, "ssr1": 50})` keeps the lines of those stages up to those steps and appends to them.

    resume: the last step of each stage that counts; lines after it, of other stages, or torn in the middle are cut off. {} begins anew.
    Rank 0's. Raises: DiskError with the bytes needed; a line that did not fit is taken back, so the file stays whole.
    """

    def __init__(self, path: Path, resume: Mapping[str, int]):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            kept = b"".join(line for line in text.splitlines(keepends=True) if _counts(line, resume))
            part = self.path.with_name(self.path.name + ".part")
            part.unlink(missing_ok=True)              # left by a run that was killed
            if not text.startswith(kept):             # a stage fell back to an older checkpoint, and a later stage's lines stay
                part.write_bytes(kept)
                os.replace(part, self.path)
            self.file = open(self.path, "ab", buffering=0)
            os.ftruncate(self.file.fileno(), len(kept))
        except OSError as error:
            raise DiskError(f"{shown(self.path)}: cannot be written: {error.strerror or error}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """One line. Values that JSON has no word for (a loss that is not a number) are written as Python's json does: NaN, Infinity."""
        line = (json.dumps(dict(record)) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            os.ftruncate(self.file.fileno(), size)
            raise DiskError(f"{shown(self.path)}: cannot be written: {error.strerror or error}: want {len(line)} bytes") from error

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _counts(line: bytes, resume: Mapping[str, int]) -> bool:
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and int(record["step"]) <= resume.get(record["stage"], -1)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
