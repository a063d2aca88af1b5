"""Processes that torchrun or SLURM start: together, differently, preempted, or standing still."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, run_dir, same_tensors, tuned
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistNetworkError, TCPStore

from slzo import TaskDataModule, ZOModule, ZOTrainer
from slzo.__main__ import main
from slzo.callbacks.rank_watch import RankWatch
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.find import checkpoint_of_job
from slzo.lightning.loggers import run_folder
from slzo.training.resume import agreed_settings
from slzo.utils import slurm
from slzo.utils.errors import SlzoError
from slzo.utils.heartbeat import MISSED_BEATS, Heartbeat, send_beat
from slzo.utils.process_group import check_agreement

SECONDS = 240


@pytest.fixture
def fit(options):
    """Options of a run of six steps, whose processes have six rows each."""
    usual = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--model.layer=2", "--data.batch_size=6"]
    return ["fit", *options, *usual, "--trainer.enable_progress_bar=false"]


def start(arguments, folder=None, before=(), **environment):
    """Start slzo, or another module of Python, in a process of its own; ``before`` is a command that runs it."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*before, sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def ranks(commands, folders=(None, None)):
    """Start one process for each command as torchrun does, in a folder of its own if ``folders`` has one."""
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
        "GROUP_RANK": "0",
    }
    started = []
    for rank, command in enumerate(commands):
        own = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        started.append(start(["slzo", *command, *own], folders[rank], **common, RANK=str(rank), LOCAL_RANK=str(rank)))
    return started


def outputs(processes):
    return [process.communicate(timeout=SECONDS)[0] for process in processes]


def errors(texts):
    return [line for text in texts for line in text.splitlines() if line.startswith("slzo: error:")]


@pytest.mark.slow
def test_torchrun_takes_the_steps_of_ddp(fit):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "slzo"]
    run = start([*launcher, *fit, "--trainer.devices=2", "--trainer.strategy=ddp"])
    (text,) = outputs([run])
    assert run.returncode == 0, text
    own = start(["slzo", *fit, "--trainer.devices=2", "--trainer.strategy=ddp"])
    (text,) = outputs([own])
    assert own.returncode == 0, text
    assert same_tensors(tuned(last_checkpoint(0)), tuned(last_checkpoint(1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--data.batch_size=5"], "data.batch_size: 6 -> 5; start all with the same command"),
        (["--model.optimizer.lr=2e-3"], "model.optimizer.lr: "),
        (["--model.seed=1"], "model.seed: "),
        ("rows", "train rows: "),
        ("weights", "weights: "),
    ],
)
def test_a_rank_that_was_started_differently_is_named_before_the_first_step(fit, change, named):
    places = {name: next(o for o in fit if o.startswith(f"--{name}=")) for name in ("data.data_dir", "model.model")}
    for machine in ("first", "second"):  # of two machines, each has its own files under the same names
        Path(machine).mkdir()
        for name, option in places.items():
            shutil.copytree(option.partition("=")[2], Path(machine) / name)
    if change == "rows":
        for file in Path("second").rglob("train*"):
            file.write_text(file.read_text(encoding="utf-8").replace("good", "fine"), encoding="utf-8")
    if change == "weights":
        change_weights(Path("second/model.model"))
    command = [*fit, *(f"--{name}={name}" for name in places)]
    other = [*command, *change] if isinstance(change, list) else command
    texts = outputs(started := ranks([command, other], folders=["first", "second"]))
    assert [process.returncode for process in started] == [2, 2], texts
    (line, *rest) = errors(texts)
    assert line.startswith("slzo: error: the processes of this run differ, rank 0 -> rank 1: ")
    assert named in line
    assert all(each == line for each in rest)
    assert "Traceback" not in "".join(texts)


def change_weights(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_named_and_the_other_ends(fit, rank):
    watch = ["--trainer.callbacks=slzo.callbacks.rank_watch.RankWatch", "--trainer.callbacks.interval=0.5"]
    sent = {"place": "on_train_batch_end", "step": 4, "number": "SIGSTOP", "rank": rank}
    sender = ["--trainer.callbacks+=signal_sender.SignalSender"]
    sender += [f"--trainer.callbacks.{name}={value}" for name, value in sent.items()]
    stopped, other = (started := ranks([[*fit, *watch, *sender]] * 2))[rank], started[1 - rank]
    begun = time.monotonic()
    (text,) = outputs([other])
    assert other.returncode == 2, text
    assert time.monotonic() - begun < SECONDS / 2
    (line,) = errors([text])
    assert line.startswith(
        f"slzo: error: rank {rank} (process {stopped.pid}) has not answered for {MISSED_BEATS // 2} s"
    )
    assert line.endswith(f"continue with the same command and --ckpt_path {last_checkpoint()}")
    assert stopped.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_is_suspended_as_a_whole_goes_on(fit):
    watch = ["--trainer.callbacks=slzo.callbacks.rank_watch.RankWatch", "--trainer.callbacks.interval=0.5"]
    sender = ["--trainer.callbacks+=signal_sender.SignalSender", "--trainer.callbacks.place=on_train_batch_end"]
    sender += ["--trainer.callbacks.step=4", "--trainer.callbacks.number=SIGSTOP"]
    started = ranks([[*fit, *watch, *sender]] * 2)
    for process in started:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(1.5 * MISSED_BEATS * 0.5)
    for process in started:
        process.send_signal(signal.SIGCONT)
    texts = outputs(started)
    assert [process.returncode for process in started] == [0, 0], texts


@pytest.fixture
def nodes():
    """Two network namespaces, each with one end of a cable: name of the end, and the command that enters the namespace."""
    names = [f"slzo-{os.getpid()}-{node}" for node in "ab"]
    ends = [f"v{os.getpid()}{node}" for node in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0

    try:
        works = shutil.which("ip") and all(ip("netns", "add", name) for name in names)
        works = works and ip(
            "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1]
        )
        if not works:
            pytest.skip("network namespaces need Linux, ip and root")
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            assert ip("-n", name, "link", "set", end, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [(end, ["ip", "netns", "exec", name]) for name, end in zip(names, ends, strict=True)]
    finally:
        for name in names:
            ip("netns", "del", name)


def on_nodes(nodes, fit, *more):
    """Start a process on each of two nodes, which reach each other at their own addresses only."""
    port, started = free_port(), []
    own = ["--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp", *more]
    for node, (end, enter) in enumerate(nodes):
        environment = {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "RANK": str(node),
            "GROUP_RANK": str(node),
            "GLOO_SOCKET_IFNAME": end,
        }
        started.append(start(["slzo", *fit, *own], before=enter, **environment))
    return started


def test_a_second_machine_makes_no_run_folder(tmp_path, monkeypatch):
    """Also before there is a process group; otherwise the run would get another number."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    trainer = ZOTrainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", default_root_dir=tmp_path)
    with run_folder(trainer, set()):
        assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_nodes_take_the_steps_of_two_processes_and_a_node_that_returns_continues(fit, nodes):
    texts = outputs(started := on_nodes(nodes, fit))
    assert [process.returncode for process in started] == [0, 0], texts
    whole = tuned(last_checkpoint(0))
    watch = ["--trainer.callbacks=slzo.callbacks.rank_watch.RankWatch", "--trainer.callbacks.interval=0.5"]
    sent = {"place": "on_train_batch_end", "step": 4, "number": "SIGSTOP", "rank": 1}
    sender = ["--trainer.callbacks+=signal_sender.SignalSender"]
    sender += [f"--trainer.callbacks.{name}={value}" for name, value in sent.items()]
    first, second = on_nodes(nodes, fit, *watch, *sender)
    (text,) = outputs([first])
    second.kill()
    outputs([second])
    assert first.returncode == 2, text
    (line,) = errors([text])
    assert "rank 1 (process " in line
    texts = outputs(started := on_nodes(nodes, fit, f"--ckpt_path={last_checkpoint(1)}"))
    assert [process.returncode for process in started] == [0, 0], texts
    assert same_tensors(whole, tuned(last_checkpoint(2)))


@pytest.fixture
def job(monkeypatch, tmp_path):
    """The environment of a SLURM job of one task, and a scontrol that writes its arguments to a file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n', encoding="utf-8")
    (tools / "scontrol").chmod(0o755)
    task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    variables = {f"SLURM_{name}": value for name, value in {**task, "JOB_ID": "42", "JOB_NAME": "tune"}.items()}
    return {**variables, "SLURM_NODELIST": "127.0.0.1", "PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_a_preempted_job_goes_back_into_the_queue_and_continues_its_own_run(fit, job, tmp_path):
    sent = {"place": "on_before_optimizer_step", "step": 3, "number": "SIGUSR1"}
    sender = ["--trainer.callbacks=signal_sender.SignalSender"]
    sender += [f"--trainer.callbacks.{name}={value}" for name, value in sent.items()]
    first = start(["slzo", *fit, *sender], **job)
    (text,) = outputs([first])
    assert first.returncode == 128 + signal.SIGUSR1, text
    assert "SLURM job 42 is in the queue again, and will continue this run" in text
    assert (tmp_path / "scontrol.txt").read_text(encoding="utf-8") == "requeue 42\n"
    assert not list(Path().rglob("hpc_ckpt*"))  # Lightning would save in the middle of a step
    assert main(fit) == 0  # a run of another job, which is newer
    second = start(["slzo", *fit, *sender], **job, SLURM_RESTART_COUNT="1")
    (text,) = outputs([second])
    assert second.returncode == 0, text
    assert f"SLURM job 42 was restarted and continues {run_dir(0)}/checkpoints/last.ckpt" in text
    assert same_tensors(tuned(last_checkpoint(1)), tuned(last_checkpoint(2)))


@pytest.mark.slow
def test_a_job_that_is_preempted_before_the_first_step_starts_anew(fit, job, tmp_path):
    sender = ["--trainer.callbacks=signal_sender.SignalSender", "--trainer.callbacks.place=setup"]
    sender += ["--trainer.callbacks.step=0", "--trainer.callbacks.number=SIGUSR1"]
    first = start(["slzo", *fit, *sender], **job)
    (text,) = outputs([first])
    assert first.returncode == 128 + signal.SIGUSR1, text
    assert "SLURM job 42 is in the queue again, and will start anew" in text
    assert (tmp_path / "scontrol.txt").read_text(encoding="utf-8") == "requeue 42\n"
    second = start(["slzo", *fit], **job, SLURM_RESTART_COUNT="1")
    (text,) = outputs([second])
    assert second.returncode == 0, text
    assert "was restarted and continues" not in text


@pytest.mark.slow
def test_slurm_options_that_do_not_fit_end_in_one_line(fit, job):
    wrong = start(["slzo", *fit, "--trainer.devices=2"], **{**job, "SLURM_NTASKS": "2"})
    (text,) = outputs([wrong])
    assert wrong.returncode == 2, text
    (line,) = errors([text])
    assert "--ntasks-per-node=1" in line


def test_a_process_that_sends_no_more_beats_is_lost_and_one_that_never_did_is_not():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lost, found = [], threading.Event()

    def note(rank):
        lost.append(rank)
        found.set()

    watching = Heartbeat(store, 0, 3, note, interval=0.05)
    other = Heartbeat(TCPStore("127.0.0.1", store.port), 2, 3, lambda _: None, interval=0.05)
    assert not found.wait(2 * MISSED_BEATS * 0.05)  # rank 2 beats, and rank 1 never did
    other.stop()
    assert found.wait(30)
    watching.stop()
    assert lost == [2]


def test_a_process_that_hangs_right_after_the_start_is_lost():
    """It has sent the first beat only."""
    store, lost, found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), [], threading.Event()
    send_beat(store, 1)
    watching = Heartbeat(store, 0, 2, lambda rank: (lost.append(rank), found.set()), interval=0.05)
    assert found.wait(30)
    watching.stop()
    assert lost == [1]


def test_no_thread_is_in_a_call_of_the_store_after_the_end():
    """Python would end with SIGABRT."""

    class SlowStore:
        calls = 0

        def add(self, key, amount):
            self.calls += 1
            time.sleep(0.1)
            self.calls -= 1
            return 1

    store = SlowStore()
    watching = Heartbeat(store, 0, 2, lambda _: None, interval=0.01)
    while not store.calls:
        time.sleep(0.001)
    watching.stop()
    assert not store.calls


def test_a_rank_that_cannot_reach_the_first_one_goes_on_with_a_warning(monkeypatch, capsys):
    class Strategy:
        def broadcast(self, value):
            return 1

        def barrier(self):
            pass

    def refuse(*_, **__):
        raise DistNetworkError("no route")

    monkeypatch.setattr("slzo.callbacks.rank_watch.TCPStore", refuse)
    trainer = SimpleNamespace(global_rank=1, world_size=2, strategy=Strategy())
    assert RankWatch()._begin_heartbeat(trainer, []) is None
    assert "rank 1 cannot reach port 1 of " in capsys.readouterr().err


def test_requeue_that_fails_says_what_to_run(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.requeue("7").endswith("run: scontrol requeue 7")


def test_requeue_that_hangs_says_what_to_run(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no controller >&2\nexec sleep 20\n", encoding="utf-8")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_PATIENCE_S", 0.5)
    assert slurm.requeue("7") == "SLURM job 7 could not be requeued (no controller); run: scontrol requeue 7"


def test_a_task_of_an_array_has_a_name_of_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm.job_id() == "8_3"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert slurm.job_id() == "9"


def test_only_a_command_continues_the_run_of_a_restarted_job(tmp_path, monkeypatch):
    """A script may fit several times."""
    monkeypatch.setattr("slzo.lightning.trainer.is_restarted", lambda: True)
    monkeypatch.setattr("slzo.lightning.trainer.job_id", lambda: "42")
    asked = []
    monkeypatch.setattr("slzo.lightning.trainer.checkpoint_of_job", lambda root, job: asked.append(job))
    trainer = ZOTrainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    for program in ("script.py", "slzo"):
        monkeypatch.setattr(sys, "argv", [program, "fit"])
        assert trainer._find(None, to_continue=True) is None
    assert asked == ["42"]


def test_processes_agree_on_all_that_their_steps_depend_on():
    rows = TaskDataModule("sst2", seed=5)
    first = agreed_settings(ZOModule(seed=0).options, rows)
    for option in (
        {"seed": 1},
        {"model": "gemma3-270m"},
        {"parallel": "directions"},
        {"optimizer": partial(torch.optim.AdamW, weight_decay=0.5)},
    ):
        assert agreed_settings(ZOModule(**{"seed": 0, **option}).options, rows) != first
    assert agreed_settings(ZOModule(seed=0).options, TaskDataModule("sst2", seed=6)) != first


def test_agreement_names_rank_and_value(monkeypatch):
    found = [{"lr": 1, "layer": 2}, {"lr": 1, "layer": 2}, {"lr": 1, "layer": 3}]
    monkeypatch.setattr("slzo.utils.process_group.gather_from_processes", lambda _: found)
    with pytest.raises(SlzoError, match="rank 0 -> rank 2: layer: 2 -> 3; give all the same files"):
        check_agreement({}, "give all the same files")
    monkeypatch.setattr("slzo.utils.process_group.gather_from_processes", lambda _: found[:2])
    check_agreement({}, "")


def test_a_restarted_job_continues_the_run_of_its_own_command(tmp_path, monkeypatch):
    for number, command in enumerate(("slzo fit --a", "slzo fit --b", "slzo fit --c")):
        folder = tmp_path / f"version_{number}" / "checkpoints"
        folder.mkdir(parents=True)
        content = {"slurm_job": "42", "command": command}
        (folder.parent / "environment.json").write_text(json.dumps(content))
        (folder.parent / "zo_start.ckpt").touch()
        if number < 2:
            (folder / "last.ckpt").touch()
    monkeypatch.setattr(
        "slzo.checkpoints.find.newest_checkpoint", lambda folder: Checkpoint(f"{folder.name}/last.ckpt", {})
    )
    found = {}
    for option in "abc":
        monkeypatch.setattr(sys, "argv", ["slzo", "fit", f"--{option}"])
        found[option] = checkpoint_of_job(tmp_path, "42")
    assert [found["a"].path, found["b"].path, found["c"]] == ["version_0/last.ckpt", "version_1/last.ckpt", None]
    assert checkpoint_of_job(tmp_path, "43") is None
