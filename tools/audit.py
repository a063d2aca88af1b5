"""Check the installed packages for known vulnerabilities with pip-audit.

Usage: ``python tools/audit.py``.

A package counts as clean only if the database has it. Skipped packages are counted. If no package could be looked up, the result
is "not audited". With ``--strict`` the exit status is 1 for findings and for "not audited", otherwise it is always 0.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_OPTIONS = ("--format", "json", "--progress-spinner", "off", "--local", "--skip-editable")
_COMMAND = (sys.executable, "-m", "pip_audit", *_OPTIONS)
_TIMEOUT_S = 300


class Report(NamedTuple):
    """Result of an audit.

    Attributes:
        lines: Lines to print.
        passed: Whether packages were looked up and no vulnerability was found.
    """

    lines: tuple[str, ...]
    passed: bool


def summarize(found: Mapping[str, Any]) -> Report:
    """Read the output of ``pip-audit --format json``."""
    packages = found["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return not_audited(f"none of {len(packages)} packages was found in the database; it may be out of reach")
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, {_fix(vulnerability['fix_versions'])}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    last = f"audit: {len(audited)} packages looked up, {len(lines)} known vulnerabilities, {len(skipped)} skipped"
    if skipped:
        names = sorted(package["name"] for package in skipped)
        last += f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
    return Report((*(f"warning: {line}" for line in lines), last), not lines)


def _fix(versions: Sequence[str]) -> str:
    return f"fixed in {', '.join(versions)}" if versions else "not fixed yet"


def not_audited(reason: str) -> Report:
    """Return the result if no package could be looked up."""
    return Report((f"warning: not audited: {reason}",), False)


def audit() -> Report:
    """Run pip-audit on this environment."""
    try:
        done = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_TIMEOUT_S)
        return summarize(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return not_audited(f"pip-audit took more than {_TIMEOUT_S} s")
    except (ValueError, KeyError, TypeError):
        errors = done.stderr.strip().splitlines()
        return not_audited(f"pip-audit ended with status {done.returncode}: {errors[-1] if errors else 'no output'}")


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 unless packages were looked up and are clean"
    )
    strict = parser.parse_args().strict
    report = audit()
    print("\n".join(report.lines))
    return int(strict and not report.passed)


if __name__ == "__main__":
    sys.exit(main())
