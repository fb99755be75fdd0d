"""What a run leaves behind: the video, a side-by-side, a contact sheet and a manifest, each complete or absent."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from torch import Tensor

from engine import __version__
from engine.cascade import Cascade
from engine.config import SampleConfig
from engine.dreamix import Result
from engine.errors import ConfigError, DiskError
from engine.media import contact_sheet, side_by_side, write_video
from engine.media.atomic import check_target, disk_errors, replacing
from engine.media.encode import WRITERS
from engine.runtime.device import dtype_name
from engine.runtime.weights import fingerprint

PACKAGES = ("torch", "numpy", "av", "transformers", "safetensors")


def check_output(out: Path, video: Path | None = None) -> None:
    """That a result could be written there without losing the input, before hours are spent on it.   Raises: ConfigError, DiskError"""
    if video is not None and out.exists() and Path(video).exists() and out.samefile(video):
        raise ConfigError(f"--out {out}: want another path than the input, which would be lost")
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: want a name ending in .mp4, .gif or .npy, or a folder")
    parent = out.parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DiskError(f"{out}: cannot be written: {parent} is not a folder that can be written to")
    with disk_errors(out):
        check_target(out, folder=not out.suffix)


def video_hash(video: Tensor) -> str:
    """sha256 of a video's float32 values: equal bits, equal hash."""
    return hashlib.sha256(video.contiguous().float().numpy().tobytes()).hexdigest()


def file_hash(path: Path) -> str | None:
    """sha256 of a file; None for a folder of pictures."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest(cascade: Cascade, config: SampleConfig, prompt: str, result: Result, command: str, video: Path | None) -> dict:
    """Everything needed to make the same output again, and to see whether it is the same."""
    last, overlay = cascade.config.stage(config.last_stage), cascade.overlay

    def weights_sha256(stage: str) -> str:
        return overlay.weights_sha256(stage) if overlay is not None and stage in overlay else fingerprint(cascade.folder / stage)

    return {
        "dreamix": __version__, "command": command, "prompt": prompt, "config": config.model_dump(mode="json"),
        "input": None if video is None else {"name": Path(video).name, "sha256": file_hash(video), "seconds": result.duration},
        "output": {"frames": len(result.output), "height": last.height, "width": last.width, "fps": str(result.fps),
                   "sha256": video_hash(result.output)},
        "cascade": {"name": cascade.config.name, "stages": {
            report.stage: {"weights_sha256": weights_sha256(report.stage), "steps": report.steps,
                           "chunk_frames": cascade.config.stage(report.stage).chunk_frames} for report in cascade.reports}},
        "finetuned": None if overlay is None else overlay.about(),
        "device": str(cascade.device), "dtype": dtype_name(cascade.dtype), "notes": list(result.notes),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "seconds": {report.stage: round(report.seconds, 3) for report in cascade.reports}}


def write(result: Result, out: Path, record: dict, video: Path | None) -> dict[str, Path]:
    """The output at `out` and its companions beside it -> their paths: video, comparison, sheet, manifest."""
    base = out.with_suffix("") if out.suffix else Path(str(out).rstrip("/"))
    beside = {name: base.with_name(base.name + ending) for name, ending in
              (("comparison", ".compare.mp4"), ("sheet", ".sheet.png"), ("manifest", ".json"))}
    for path in (out, *beside.values()):
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    sounding = video if video is not None and Path(video).is_file() and out.suffix.lower() == ".mp4" else None
    start = record["config"].get("start", 0.0)
    write_video(out, result.output, result.fps, audio_from=sounding, audio_start=start,
                metadata={key: record[key] for key in ("dreamix", "prompt", "config")} if out.suffix.lower() == ".mp4" else None)
    rows = [(name, stage) for name, stage in result.stages.items()]
    if result.source is not None:
        panels = [("input", result.source), ("output", result.output)]
        rows = [("input", result.source), ("degraded", result.degraded.clamp(-1, 1)), *rows]
    else:
        panels = [("base", result.stages["base"]), ("output", result.output)]
    write_video(beside["comparison"], side_by_side(panels), result.fps)
    contact_sheet(beside["sheet"], [*rows, ("output", result.output)])
    with replacing(beside["manifest"]) as part, disk_errors(beside["manifest"]):
        part.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return {"video": out, **beside}
