"""Output of a run: a progress bar in a terminal, otherwise a line per validation, nothing after the summary."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from slzo.__main__ import main
from slzo.utils.duration import duration


def test_without_a_terminal_there_is_a_line_for_each_validation(options, capsys):
    assert main(["fit", *options, "--trainer.val_check_interval=4"]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("Step ")]
    assert [line.split()[1] for line in lines] == ["4", "8"]
    assert all(re.search(r"val/accuracy \d\.?\d*  val/loss \d+\.?\d*  loss \d", line) for line in lines)
    assert re.search(r"\(\d+ s, \d+ s left\)$", lines[0])
    assert re.search(r"\(\d+ s\)$", lines[1])
    assert "\r" not in printed.out + printed.err
    assert "%|" not in printed.out + printed.err
    assert main(["fit", *options, "--trainer.enable_progress_bar=false"]) == 0
    assert "Step " not in capsys.readouterr().out
    bar = "--trainer.callbacks=slzo.callbacks.progress_bar.StepProgressBar"
    assert main(["fit", *options, bar, "--trainer.callbacks.refresh_rate=0", "--trainer.max_steps=1"]) == 0


@pytest.mark.slow
def test_in_a_terminal_the_bar_shows_the_dev_score_and_ends_before_the_summary(options):
    """The standard error is a terminal of 80 columns; the standard output too, so that the order can be seen."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    code = "import sys; from slzo.__main__ import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, "fit", *options, "--trainer.max_steps=6"],
        stdout=writer, stderr=writer, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writer)
    seen = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(reader)
    assert run.wait() == 0
    text = re.sub(r"\x1b\[\w", "", seen.decode("utf-8", "replace"))
    bars = [piece for piece in re.split(r"[\r\n]", text) if "6/6 |" in piece]
    assert any(re.search(r"val/accuracy=\d", bar) for bar in bars), bars
    assert max(map(len, bars)) <= 80, max(bars, key=len)
    after = text[text.index("Scope ") :]
    assert "/6 |" not in after
    assert "Validation" not in after


def test_durations_have_two_units_at_most():
    assert [duration(seconds) for seconds in (59.4, 200, 7500)] == ["59 s", "3 min 20 s", "2 h 5 min"]
