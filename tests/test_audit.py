"""tools/audit.py never reports a package as clean that it could not look up."""

import subprocess

import pytest

import audit as audit_tool

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1)"}
CLEAN = {"name": "b", "version": "2", "vulns": []}
FIXES = [{"id": "CVE-1", "fix_versions": ["3.1"]}, {"id": "CVE-2", "fix_versions": []}]
BAD = {"name": "c", "version": "3", "vulns": FIXES}
NONE_FOUND = "was found in the database; it may be out of reach"


BAD_LINES = ["warning: c 3: CVE-1, fixed in 3.1", "warning: c 3: CVE-2, not fixed yet"]


@pytest.mark.parametrize(
    ("packages", "lines", "passed"),
    [
        ([SKIPPED], [f"warning: not audited: none of 1 packages {NONE_FOUND}"], False),
        ([], [f"warning: not audited: none of 0 packages {NONE_FOUND}"], False),
        ([CLEAN], ["audit: 1 packages looked up, 0 known vulnerabilities, 0 skipped"], True),
        ([CLEAN, SKIPPED], ["audit: 1 packages looked up, 0 known vulnerabilities, 1 skipped (a)"], True),
        ([BAD], [*BAD_LINES, "audit: 1 packages looked up, 2 known vulnerabilities, 0 skipped"], False),
    ],
)
def test_the_answer_says_what_was_looked_up(packages, lines, passed):
    assert audit_tool.summarize({"dependencies": packages}) == (tuple(lines), passed)


def test_what_pip_audit_cannot_do_is_not_audited(monkeypatch, capsys):
    failed = subprocess.CompletedProcess((), 1, stdout="", stderr="Traceback\nrequests.ConnectionError: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    for arguments, status in (([], 0), (["--strict"], 1)):
        monkeypatch.setattr("sys.argv", ["audit.py", *arguments])
        assert audit_tool.main() == status
        line = "not audited: pip-audit ended with status 1: requests.ConnectionError: no network"
        assert line in capsys.readouterr().out
