"""What a checkpoint holds, how long it stays, and that what is another's, or of another config, is not loaded."""

import json
import os
import pickle
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, WeightsError
from engine.training import checkpoint
from engine.training.checkpoint import check_config, latest, save

CONFIG = {"lr": 6e-6, "alpha": 0.35, "stages": ("base", "ssr1"), "seed": 0, "data": {"sha256": "ab", "frames": 16}, "loss_space": "x",
          "weight_decay": 0.0, "save_every": 50}


def content(step):
    return random.Random(step).randbytes(3000)


def write_rank(step):
    def write(folder):
        (folder / "state.bin").write_bytes(content(step))
        (folder / "data").mkdir()
        (folder / "data" / "cursor.json").write_text(json.dumps({"step": step}))
    return write


def whole(root):
    """The checkpoint that loads, seen to hold what was written; LATEST names it."""
    found = latest(root, notes=[])
    assert (found.folder / "state.bin").read_bytes() == content(found.step) and (root / "LATEST").read_text() == f"step-{found.step}\n"
    return found


def temporaries(root):
    return sorted(path.name for path in root.rglob("*") if ".tmp" in path.name or path.name.endswith(".part"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


def test_one_save(root):
    notes = []
    assert latest(root, notes=notes) is None
    for step in (10, 20, 30):
        folder = save(root, step, write_rank(step),
                      meta={"config": CONFIG, "stage": "base", "applied_steps": step - 1, "guard": [1e-300]})
        assert folder == root / f"step-{step}" and (root / "LATEST").read_text() == f"step-{step}\n"
    assert sorted(os.listdir(root)) == ["LATEST", "step-20", "step-30"]
    found = latest(root, notes=notes)
    assert (found.step, found.applied_steps, found.world, found.folder) == (30, 29, 1, root / "step-30") and notes == []
    assert found.manifest["guard"] == [1e-300] and set(found.manifest["files"]) == {"state.bin", "data/cursor.json"}
    assert found.manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    from pydantic import RootModel

    from engine.config_io import config_hash
    assert found.manifest["config_sha256"] == config_hash(RootModel[dict](found.manifest["config"]))


def test_what_a_name_promises_is_on_the_disk_first(root, monkeypatch):
    """Power may go at any moment: every file and folder is flushed before the rename that makes it count."""
    save(root, 1, write_rank(1), meta={})
    events, fsync = [], os.fsync

    def recorded(name):
        real = getattr(os, name)

        def call(source, target):
            events.append(f"{name} {Path(target).name}")
            real(source, target)
        monkeypatch.setattr(os, name, call)

    def flush(handle):
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    recorded("rename")
    recorded("replace")
    monkeypatch.setattr(os, "fsync", flush)
    save(root, 2, write_rank(2), meta={})
    part = f".tmp-2-{os.getpid()}"
    assert sorted(events[:2]) == ["fsync cursor.json", "fsync state.bin"] and events[2] == "fsync manifest.json"
    assert sorted(events[3:5]) == [f"fsync {part}", "fsync data"] and events[5:7] == ["rename step-2", "fsync checkpoints"]
    assert events[7:] == ["fsync LATEST.part", "replace LATEST", "fsync checkpoints", "fsync checkpoints"]


def test_wrong_arguments(root):
    for wrong in ({"keep": 1}, {"meta": {"files": {}}}, {"meta": {"loss": float("nan")}}, {"meta": {"config": {1j: object()}}}):
        with pytest.raises(ValueError, match="^(keep|meta|Out of range)"):
            save(root, 1, write_rank(1), **{"meta": {}, **wrong})
    assert not root.exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_the_same_step_again_takes_its_place(root, exchange, monkeypatch):
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    if not exchange:
        monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    elif not checkpoint._exchange(root / "a", root / "b"):
        pytest.skip("a file system that cannot exchange two folders")
    (root / "a").rmdir()
    (root / "b").rmdir()
    save(root, 1, write_rank(1), meta={})
    save(root, 2, write_rank(7), meta={})
    if exchange:
        monkeypatch.setattr(os, "rename", None)                             # two renames would leave a moment without the step
    save(root, 2, write_rank(2), meta={})
    assert whole(root).step == 2 and sorted(os.listdir(root)) == ["LATEST", "step-1", "step-2"]


def test_a_damaged_newer_one_does_not_push_out_good_ones(root):
    for step in (1, 2, 9):
        save(root, step, write_rank(step), meta={})
    (root / "step-9" / "state.bin").write_bytes(b"")
    assert latest(root, notes=[]).step == 2
    save(root, 3, write_rank(3), meta={})
    assert whole(root).step == 3 and latest(root, notes=[]).step == 3 and (root / "step-2").exists()


def test_temporaries_of_the_dead_are_removed_and_of_the_living_stay(root):
    dead = subprocess.Popen(["true"])
    dead.wait()
    zombie = subprocess.Popen(["true"])
    while Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    (root / ".tmp-other").mkdir(parents=True)
    for name in (f".tmp-5-{dead.pid}", f".tmp-5-{dead.pid}.old", f".tmp-3-{zombie.pid}", f".tmp-4-{os.getpid()}", f".tmp-6-{os.getppid()}"):
        (root / name / "x").mkdir(parents=True)
    (root / "LATEST.part").touch()
    save(root, 1, write_rank(1), meta={})
    zombie.wait()
    assert temporaries(root) == [f".tmp-6-{os.getppid()}", ".tmp-other"]


def test_a_manifest_with_one_changed_number_is_damaged(root):
    save(root, 5, write_rank(5), meta={"applied_steps": 4})
    path = root / "step-5" / "manifest.json"
    path.write_text(path.read_text().replace('"applied_steps": 4', '"applied_steps": 5'))
    with pytest.raises(WeightsError, match="manifest.json is not as it was written"):
        latest(root, notes=[])


def test_another_format_is_refused_and_not_passed_over(root, monkeypatch):
    save(root, 5, write_rank(5), meta={})
    monkeypatch.setattr(checkpoint, "FORMAT", "dreamix-checkpoint-2")
    save(root, 6, write_rank(6), meta={})
    with pytest.raises(WeightsError, match="step-6/manifest.json: want a checkpoint in the format dreamix-checkpoint-1, got '.*-2'"):
        latest(root, notes=[])


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["global_step5/mp_rank_00_model_states.pt", "step-5/mp_rank_00_model_states.pt", "latest"])
def test_what_this_program_did_not_write_is_refused(root, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(WeightsError) as caught:
        latest(root, notes=[])
    assert caught.value.exit_code == 4 and not (tmp_path / "canary").exists()


def test_a_file_too_many_or_a_link_is_damage(root, tmp_path):
    save(root, 5, write_rank(5), meta={})
    (root / "step-5" / "extra.pt").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(WeightsError, match="extra.pt is not in its manifest"):
        latest(root, notes=[])
    (root / "step-5" / "extra.pt").unlink()
    state = root / "step-5" / "state.bin"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="not a regular file"):
        latest(root, notes=[])


def test_another_users_needs_trust(root, monkeypatch):
    save(root, 5, write_rank(5), meta={})
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(WeightsError, match="another user.*--trust-checkpoint"):
        latest(root, notes=[])
    assert latest(root, notes=[], trust=True).step == 5


CHANGES = {"lr": 1e-5, "alpha": 1.0, "stages": ("base",), "seed": 1, "data": {"sha256": "cd", "frames": 16}, "loss_space": "v",
           "clip": 1.0, "weight_decay": None, "versions.torch": "1.0"}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_config_is_refused_with_the_difference(root, field, monkeypatch):
    save(root, 5, write_rank(5), meta={"config": CONFIG})
    found = latest(root, notes=[])
    assert check_config(found, CONFIG | {"save_every": 7}) == []
    torch_was = found.manifest["versions"]["torch"]
    now = CONFIG | {field: CHANGES[field]}
    if field == "versions.torch":
        monkeypatch.setattr(checkpoint, "versions", lambda: found.manifest["versions"] | {"torch": "1.0"})
        now = CONFIG
    if field == "weight_decay":
        del now[field]
    with pytest.raises(ConfigError) as caught:
        check_config(found, now)
    was = {"clip": "not set", "data": "'ab'", "stages": "['base', 'ssr1']", "versions.torch": repr(torch_was)}.get(field)
    new = {"weight_decay": "not set", "data": "'cd'", "stages": "['base']"}.get(field)
    name = "data.sha256" if field == "data" else field
    assert f"settings: {name} was {was or repr(CONFIG[field])}, is {new or repr(CHANGES[field])} (want" in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(check_config(found, now, allow=True)) == 1
