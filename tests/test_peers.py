"""The processes of a run notice when one of them has ended."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from slzo.callbacks import rank_watch
from slzo.utils import peers
from slzo.utils.peers import Peer, PeerWatch

pytestmark = pytest.mark.skipif(not Peer.here(0).place, reason="processes cannot be watched here")


@pytest.fixture
def watched(monkeypatch):
    """Starts other processes, each with its code, and watches them from a rank; and what the watch has found."""
    monkeypatch.setattr(peers, "_GRACE_S", 0.3)
    children, found, event = [], [], threading.Event()

    def ended(peer, reports):
        found.append((peer.rank, reports))
        event.set()

    def start(rank, *codes):
        children.extend(subprocess.Popen([sys.executable, "-S", "-c", code]) for code in codes)
        own = Peer.here(rank)
        ranks = [number for number in range(len(codes) + 1) if number != rank]
        others = [Peer(number, own.place, child.pid) for number, child in zip(ranks, children, strict=True)]
        return PeerWatch([own, *others], own, ended), children

    start.found, start.event = found, event
    yield start
    for child in children:
        child.kill()
        child.wait()


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(("rank", "killed", "expected"), [(0, 0, (1, True)), (1, 0, (0, True)), (2, 0, (0, False))])
def test_the_lowest_rank_that_is_left_reports_a_killed_one(watched, rank, killed, expected):
    begun = time.monotonic()
    _, children = watched(rank, SLEEP, SLEEP)
    children[killed].kill()
    assert watched.event.wait(20)
    assert watched.found == [expected]
    assert time.monotonic() - begun < 20


def test_one_that_ended_before_the_watch_began_is_found(watched):
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    own = Peer.here(0)
    found = threading.Event()
    PeerWatch([own, Peer(1, own.place, child.pid)], own, lambda *_: found.set())
    assert found.wait(20)


@pytest.mark.parametrize("code", ["", "raise SystemExit(2)"])
def test_one_that_ended_by_itself_leaves_time_to_report_the_common_reason(watched, code):
    watch, children = watched(0, code)
    children[0].wait()
    watch.stop()
    assert not watched.event.wait(0.6)


def test_a_process_whose_launcher_is_gone_does_not_wait_for_it(monkeypatch, capsys):
    launcher = subprocess.Popen([sys.executable, "-S", "-c", ""])
    launcher.wait()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("SLZO_LAUNCHER", str(launcher.pid))
    monkeypatch.setattr(peers, "_GRACE_S", 0.1)
    ended, status = threading.Event(), []
    monkeypatch.setattr(peers.os, "_exit", lambda number: (status.append(number), ended.set()))
    trainer = {"world_size": 2, "global_rank": 1, "local_rank": 1, "callbacks": [], "ckpt_path": None, "global_step": 0}
    rank_watch.RankWatch().watch_launcher(SimpleNamespace(**trainer, state=SimpleNamespace(fn=None)))
    assert ended.wait(20)
    assert status == [2]
    line = f"slzo: error: rank 0 (process {launcher.pid}) has ended, so the others stop at step 0; start the same command again"
    assert capsys.readouterr().err.strip() == line


def test_processes_elsewhere_are_not_watched(watched):
    own = Peer.here(0)
    watch = PeerWatch([own, Peer(1, "elsewhere", 1)], own, lambda *_: pytest.fail("it is not here"))
    watch.stop(5)
