"""Full and read-only disks, files in the place of folders, runs that start at once: one line, nothing half-written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import error_line, last_checkpoint, run_dir, run_fit
from torch.utils.tensorboard import SummaryWriter

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.find import newest_checkpoint

LOGGER = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.name="]
ON_DISK = [*LOGGER, "--trainer.logger.save_dir=disk"]


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk at ``disk``, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for _ in mounted:
        subprocess.run(["umount", str(folder)], check=True)  # fails where a file is still open


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.plots
@pytest.mark.parametrize(
    "size", ["4k", "64k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("100k", "400k"))]
)
def test_a_disk_that_becomes_full_leaves_whole_checkpoints_only(options, disk, capsys, size):
    folder = disk(size)
    line = error_line(capsys, "fit", *options, *ON_DISK)
    assert "No space left on device" in line
    left = files(folder)
    assert not [path for path in left if "partial" in path]
    for path in left:
        if path.endswith(".ckpt"):
            read_checkpoint(folder / path)
    if size == "4k":
        assert left == []
    if size == "400k":
        assert "resume from the checkpoint before it with --ckpt_path last" in line
        step = newest_checkpoint(folder).step
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        assert main(["fit", *options, *ON_DISK, "--ckpt_path=last"]) == 0
        assert 0 < step < newest_checkpoint(folder).step == 8


@pytest.mark.slow
def test_no_command_writes_to_a_full_or_read_only_disk_or_in_the_temporary_folder(options, disk, capsys, monkeypatch):
    assert main(["fit", *options]) == 0
    checkpoint = f"--ckpt_path={last_checkpoint()}"
    folder = disk("4k")
    assert "disk/out': cannot be written" in error_line(capsys, "export", checkpoint, "--output=disk/out")
    assert files(folder) == []
    (folder / "fill").write_bytes(b"x" * 4096)
    monkeypatch.setenv("TMPDIR", str(folder))
    assert main(["fit", *options]) == 0
    assert main(["export", checkpoint, "--output=out"]) == 0
    monkeypatch.delenv("TMPDIR")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for command in (["predict", checkpoint], ["export", checkpoint], ["sweep", *options]):
        assert "Read-only file system" in error_line(capsys, *command, "--output=disk/out"), command
    for command in ("fit", "profile", "test"):
        line = error_line(capsys, command, *options, *ON_DISK)
        assert "save_dir 'disk': cannot make a folder for the run there (Read-only file system)" in line
    assert files(folder) == ["fill"]


def test_a_full_cache_folder_is_one_line(options, disk, capsys):
    folder = disk("16k")
    line = error_line(capsys, "fit", *options, "--model.layer=2", "--model.engine.cache_dir=disk")
    assert "model.engine.cache_dir 'disk': no room for 64 MiB more (No space left on device)" in line
    assert files(folder) == []


@pytest.mark.parametrize("folder", ["file", "file/runs"])
def test_a_file_in_the_place_of_the_runs_is_one_line(options, capsys, folder):
    Path("file").write_text("")
    line = error_line(capsys, "fit", *options, *LOGGER, f"--trainer.logger.save_dir={folder}")
    assert f"trainer.logger.save_dir '{folder}': cannot make a folder for the run there" in line
    assert Path("file").read_text() == ""


OTHERS = [pytest.param(code, marks=pytest.mark.slow) for code in (errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)]


@pytest.mark.parametrize("code", [errno.ENOSPC, *OTHERS])
@pytest.mark.parametrize("command", ["fit", "predict", "export"])
def test_a_write_that_fails_is_one_line(options, capsys, monkeypatch, code, command, once):
    """Whatever the disk says, wherever: permission bits prove nothing for root."""
    given = options
    if command != "fit":
        once(run_fit, *options, "--trainer.max_steps=2")
        given = ["--ckpt_path=last", *(["--output=out"] if command == "export" else options)]

    def fail(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    assert os.strerror(code) in error_line(capsys, command, *given)
    assert not Path("out").exists()
    assert not list(Path.cwd().rglob("*partial"))


def test_a_fault_of_the_logger_is_one_line(options, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/version_0/events")

    monkeypatch.setattr(SummaryWriter, "__init__", fail)
    line = error_line(capsys, "fit", *options)
    assert "'runs/version_0/events': cannot be used (Permission denied)" in line
    assert not list(Path("runs").glob("*"))


@pytest.mark.slow
def test_runs_that_start_at_once_get_a_version_each(options):
    command = [sys.executable, "-m", "slzo", "fit", *options, "--trainer.max_steps=2"]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    for number in range(2):
        assert (run_dir(number) / "summary.json").is_file()
        read_checkpoint(last_checkpoint(number))


def test_the_next_run_removes_what_a_killed_one_left(options):
    hidden = run_dir() / "checkpoints" / ".last.ckpt-abc.slzo-partial"
    hidden.mkdir(parents=True)
    (hidden / "last.ckpt").write_bytes(b"half")
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert not hidden.exists()
    assert (run_dir(1) / "summary.json").is_file()
