"""Lines on the console."""

import io
import sys

import pytest

from slzo.utils.console import rank_zero_print

pytestmark = pytest.mark.fast


def test_characters_that_the_output_lacks_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    rank_zero_print("runs/rü")
    assert written.getvalue() == b"runs/r\\xfc\n"


def test_a_closed_output_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    rank_zero_print("nobody reads this")
