"""Files are written completely or not at all, first to a temporary file in the same folder."""

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slzo.utils.errors import SlzoError
from slzo.utils.files import PARTIAL, check_writable, disk_errors, remove_leftovers, replacing, write_json, write_text

pytestmark = pytest.mark.fast


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_replaces_the_former_one(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert names(path.parent) == ["result.json"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5], "b": {"c": (math.inf, "x")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": {"c": [None, "x"]}}


def test_after_an_error_the_former_file_is_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "before")

    def write(failure):
        with replacing(path) as partial:
            partial.write_text("half")
            assert partial.parent.parent == tmp_path  # on the same disk
            raise failure

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    with pytest.raises(SlzoError, match=r"result\.txt': cannot be written \(No space left on device\)"):
        write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert path.read_text() == "before"
    assert names(tmp_path) == ["result.txt"]


def test_a_file_that_is_gone_is_named_as_text():
    """TensorBoard gives the path as bytes."""
    with pytest.raises(SlzoError) as caught, disk_errors():
        os.stat(b"runs/version_0/events")  # noqa: PTH116
    assert str(caught.value).startswith(
        "'runs/version_0/events': does not exist, or was removed while the command ran; check the path"
    )


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    ],
)
def test_an_error_of_the_network_names_no_file(error):
    with pytest.raises(SlzoError) as caught, disk_errors():
        raise error
    assert str(caught.value) == f"network: {error.strerror}; check the connection, and give the command again"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "result.txt", []

    def fsync(number):
        flushed.append((str(Path(f"/proc/self/fd/{number}").readlink()), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "text")
    (file, there_before), (folder, there_after) = flushed
    assert file.endswith("/result.txt")
    assert not there_before
    assert folder == str(tmp_path.resolve())
    assert there_after
    monkeypatch.setattr(os, "fsync", full_disk)  # what cannot be flushed is not renamed
    with pytest.raises(SlzoError, match="No space left"):
        write_text(path, "other")
    assert path.read_text() == "text"


def test_a_folder_is_whole_too(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "weights").write_text("w")
        assert not names(path)
    assert names(path) == ["weights"]
    assert names(tmp_path) == ["model"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"
    write_text("/dev/null", "nothing")
    check_writable("/dev/null")
    assert not Path("/dev/null").is_file()


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    code = (
        "import sys, time; from slzo.utils.files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "result.txt")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        (hidden,) = names(tmp_path)
        assert hidden.endswith(PARTIAL)
        write_text(tmp_path / "other.txt", "whole")  # cleans up before
        assert names(tmp_path) == sorted([hidden, "other.txt"])
        process.kill()
        process.wait()
    assert names(tmp_path) == sorted([hidden, "other.txt"])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["other.txt"]


def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlzoError, match="cannot be written"):
        check_writable(tmp_path / "file" / "result.txt")
    check_writable(tmp_path / "result.txt")
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr("slzo.utils.files.tempfile.mkdtemp", full_disk)
    with pytest.raises(SlzoError, match="No space left"):
        check_writable(tmp_path / "result.txt")


def test_many_writers_of_one_file(tmp_path):
    code = (
        "import sys; from slzo.utils.files import write_text\n"
        "for _ in range(50): write_text(sys.argv[1], sys.argv[2] * 10000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "result.txt"), letter]) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    text = (tmp_path / "result.txt").read_text()
    assert len(set(text)) == 1
    assert len(text) == 10000
    assert names(tmp_path) == ["result.txt"]


def test_an_interrupt_while_the_hidden_folder_is_removed_stays_one(tmp_path, monkeypatch):
    """An interrupted rmtree ends with an error of its own, which looked like a disk that cannot be written."""
    remove = shutil.rmtree

    def interrupted(folder, **options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise OSError(errno.EBADF, "Bad file descriptor") from None
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "a.txt", "whole")
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_pipe_without_a_path_is_written_to():
    out, into = os.pipe()
    check_writable(f"/proc/self/fd/{into}")
    write_text(f"/proc/self/fd/{into}", "a")
    assert os.read(out, 2) == b"a"
    os.close(out)
    os.close(into)
