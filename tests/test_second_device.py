"""The tests of a card, on the device of ``second_device.py``, which needs a compiler but no GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import is_ninja_available

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") and is_ninja_available()), reason="needs a C++ compiler and ninja")
def test_what_runs_on_a_card_runs_on_a_second_device():
    files = [str(HERE / name) for name in ("test_card.py", "test_device_reads.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "second_device", "-m", "cuda", "--numprocesses=0", "-q", *files],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 30
