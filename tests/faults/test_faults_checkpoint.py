"""Disks that fill up, go read-only or away, and checkpoints that rot: what was whole stays, what is broken is named, nothing restarts."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from forked_commands import Command, FilesEndAt, command
from safetensors.torch import load_file
from test_faults_kill import train
from training_runs import small_run

from fastcm.errors import InputError, RunError
from fastcm.training.checkpoint import complete_steps, newest_checkpoint, read_checkpoint, save_checkpoint
from fastcm.training.trainer import Trainer

PARTS = {"weights": {"a": torch.arange(1000.0)}, "ema_0": {"a": torch.ones(1000)}}


def saved(folder, *steps):
    for step in steps:
        save_checkpoint(folder, step=step, parts=PARTS, state={"step": step, "nimg": 4 * step})
    return folder


@contextmanager
def mounted(folder, *options):
    """A small file system of its own, where the user may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_that_fills_up(tmp_path):
    """An alien file takes all room but a little; when it goes, the run goes on."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        folder = saved(disk / "checkpoints", 1, 2)
        (disk / "alien").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        with pytest.raises(RunError, match=r"checkpoint not written in .*step-000000003: .*needs 8,000 bytes, [\d,]+ free") as caught:
            saved(folder, 3)
        assert "\n" not in str(caught.value)
        assert complete_steps(folder) == [1, 2] and not list(folder.glob(".tmp-*"))
        assert newest_checkpoint(folder)[1]["step"] == 2
        (disk / "alien").unlink()
        assert complete_steps(saved(folder, 3)) == [1, 2, 3]


def test_a_file_system_that_becomes_read_only(tmp_path):
    with mounted(tmp_path / "disk", "size=256k") as disk:
        folder = saved(disk / "checkpoints", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RunError, match=r"checkpoint not written in .*Read-only file system"):
            saved(folder, 2)
        assert newest_checkpoint(folder)[1]["step"] == 1
        with pytest.raises(InputError, match=r"cannot write in --out: .*Read-only file system"):
            small_run(disk / "run")


def test_a_disk_without_room_for_a_checkpoint_is_noticed_before_the_first_step(tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        with pytest.raises(RunError, match=r"no room for a checkpoint in .*run: needs [\d,]+ bytes, [\d,]+ free"):
            small_run(disk / "run")
        assert not (disk / "run" / "log.jsonl").exists()


@pytest.mark.slow
def test_a_write_that_the_kernel_refuses(tmp_path):
    """The command itself, with a limit on the size of files in the place of a full disk: one line, exit code 1, no half file."""
    out = tmp_path / "run"
    code, text = command(train("ict", out, None), tmp_path / "text", before=FilesEndAt(4096))
    assert code == 1 and "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("fastcm: error:")]
    assert "checkpoint not written" in line and "needs" in line and "free" in line
    assert not list(out.rglob(".tmp-*")) and complete_steps(out / "checkpoints") == []
    code, text = command(train("ict", out, None), tmp_path / "text")
    assert code == 0 and (out / "model" / "model.safetensors").exists(), text


@pytest.mark.parametrize("then", ["save", "sample", "end"])
def test_a_run_folder_that_vanishes(tmp_path, monkeypatch, then):
    out, original = tmp_path / "run", Trainer.train_step

    def vanish(self):
        values = original(self)
        shutil.rmtree(out, ignore_errors=self.step > 1)
        return values

    monkeypatch.setattr(Trainer, "train_step", vanish)
    changes = {"save": {"checkpoint_every_s": 0.0}, "sample": {"sample_every_kimg": 0.016}, "end": {}}[then]
    with pytest.raises(RunError, match=r"run folder gone while training in --out: .*run"):
        small_run(out, kimg=0.064, **changes)
    assert not (out / "checkpoints").exists() and not (out / "model").exists(), "a folder that nobody asked for"


def test_out_that_cannot_be_a_run_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a folder in --out"):
        small_run(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write in --out"):
        small_run(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "cut short": lambda folder: os.truncate(folder / "ema_0.safetensors", 100),
    "a bit flipped": lambda folder: flip(folder / "weights.safetensors"),
    "empty": lambda folder: os.truncate(folder / "weights.safetensors", 0),
    "a file gone": lambda folder: (folder / "ema_0.safetensors").unlink(),
    "state flipped": lambda folder: flip(folder / "state.json"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "manifest of a list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest of numbers": lambda folder: (folder / "manifest.json").write_text('{"files": {"weights.safetensors": 3}}'),
    "manifest that leads outside": lambda folder: (folder / "manifest.json").write_text('{"files": {"../../x": {"bytes": 0}}}'),
    "manifest of nothing": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint_is_damaged(tmp_path, damage):
    """Passed over, with one warning that names it; the one before is taken. Asked for by itself, it is an error."""
    folder = saved(tmp_path / "checkpoints", 1, 2)
    newest = folder / "step-000000002"
    DAMAGES[damage](newest)
    with pytest.warns(UserWarning, match=r"checkpoint passed over: .*step-000000002") as warned:
        parts, state = newest_checkpoint(folder)
    assert len(warned) == 1 and state["step"] == 1 and torch.equal(parts["weights"]["a"], PARTS["weights"]["a"])
    with pytest.raises(InputError, match=r"step-000000002"):
        read_checkpoint(newest)
    DAMAGES[damage](folder / "step-000000001")
    with pytest.warns(UserWarning), pytest.raises(RunError, match="no good checkpoint left in .*: 2 damaged"):
        newest_checkpoint(folder)


def test_a_run_goes_on_from_the_last_good_checkpoint_or_not_at_all(tmp_path):
    out = tmp_path / "run"
    changes = {"checkpoint_every_s": 0.0, "network.channel_mult": (1,), "network.attention_resolutions": ()}
    small_run(tmp_path / "whole", kimg=0.064, **changes)
    assert complete_steps(tmp_path / "whole" / "checkpoints") == [2, 3, 4]
    small_run(out, kimg=0.048, **changes)
    flip(out / "checkpoints" / "step-000000003" / "weights.safetensors")
    with pytest.warns(UserWarning, match="size or sha256 differs"):
        small_run(out, kimg=0.064, **changes)
    assert complete_steps(out / "checkpoints")[-1] == 4
    a, b = (load_file(run / "checkpoints" / "step-000000004" / "weights.safetensors") for run in (tmp_path / "whole", out))
    assert all(a[name].isfinite().all() and a[name].shape == b[name].shape for name in a)
    for path in out.glob("checkpoints/step-*/manifest.json"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(RunError, match="no good checkpoint left"):
        small_run(out, kimg=0.064, **changes)


def test_a_run_without_its_checkpoints_says_that_it_begins_again(tmp_path, capsys):
    out = tmp_path / "run"
    small_run(out, kimg=0.032)
    assert "from the beginning" not in capsys.readouterr().err
    shutil.rmtree(out / "checkpoints")
    small_run(out, kimg=0.032)
    assert f"no checkpoint in {out / 'checkpoints'}: from the beginning" in capsys.readouterr().err


@pytest.mark.slow
def test_two_trainers_on_one_folder(tmp_path):
    out = tmp_path / "run"
    first = Command(train("ict", out, None, steps=4000), tmp_path / "first")
    assert first.until(lambda: complete_steps(out / "checkpoints"))
    code, text = command(train("ict", out, None, steps=4000), tmp_path / "second")
    assert code == 2 and f"another trainer is at work in --out: {out} (pid {first.process.pid} on " in text
    first.process.kill()
    first.wait()
    assert json.loads((out / "config.json").read_text())["format"] == "fastcm-run"
    again = Command(train("ict", out, None, steps=4000), tmp_path / "second")  # kill -9 freed the lock
    assert again.until(lambda: "resumed at" in again.text), again.text
    again.process.kill()
    again.wait()
