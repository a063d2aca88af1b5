"""Several processes take the steps of one. A signal stops all at the same place, and any number of them goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import last_checkpoint, read_lines, run_dir, same_tensors, summary, tuned

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.step_log import read_step_log

ROWS = 12  # of a step, over all processes


@pytest.fixture
def fit(options):
    """Options of a run of three epochs of three steps."""
    usual = ["--trainer.max_steps=9", "--trainer.val_check_interval=4", "--model.layer=2", "--data.eval_batch_size=4"]
    return ["fit", *options, *usual, "--trainer.enable_progress_bar=false", f"--data.batch_size={ROWS}"]


def on(processes, fit, rows=None, callback=None, strategy="ddp", **arguments):
    """Exit status and output of a run on some processes, with a callback of ``signal_sender.py``."""
    more = [f"--data.batch_size={ROWS // processes if rows is None else rows}"]
    if processes > 1:
        more += [f"--trainer.devices={processes}", f"--trainer.strategy={strategy}"]
    if callback is not None:
        more.append(f"--trainer.callbacks=signal_sender.{callback}")
        more += [f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "slzo", *fit, *more],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        # a job in the background of a shell ignores the signal otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def assert_close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_hold_the_same_weights_and_take_the_steps_of_one(fit):
    status, output = on(2, fit, callback="WeightWriter")
    assert status == 0, output
    first, second = (torch.load(f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same_tensors(first, second)
    assert main(fit) == 0
    assert_close(first, tuned(last_checkpoint(1)))
    two, one = summary(0), summary(1)
    assert two["num_rows"] == 24
    assert two["score_change_paired"]  # over the rows of both
    assert one["score_before"] == pytest.approx(two["score_before"])
    assert one["score_after"] == pytest.approx(two["score_after"], abs=1 / 24 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_signal_to_one_of_two_stops_both_and_one_process_goes_on(fit, strategy):
    sent = {"place": "on_train_batch_end", "step": 5, "number": "SIGTERM", "rank": 1}
    status, output = on(2, fit, callback="SignalSender", strategy=strategy, **sent)
    assert status == 143, output
    assert "Traceback" not in output, output
    assert read_checkpoint(last_checkpoint()).content["global_step"] == 5
    assert main([*fit, "--ckpt_path=last"]) == 0
    assert main(fit) == 0
    assert_close(tuned(last_checkpoint(1)), tuned(last_checkpoint(2)))


@pytest.mark.slow
def test_processes_that_share_layers_plan_for_a_limited_time(fit):
    """The first of two scores five dev rows in two batches, the second four in one."""
    time = ["--trainer.max_steps=3", "--trainer.max_time=00:00:30:00", "--data.num_dev=9"]
    status, output = on(2, [*fit, *time], strategy="sharded")
    assert status == 0, output
    assert read_checkpoint(last_checkpoint()).content["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_population_over_two_processes_is_that_of_one(fit, strategy):
    """Six members on the same rows. From the log of losses one process makes the same weights again, bit by bit."""
    population = ["--model.parallel=directions", "--model.estimator=EvolutionStrategy", "--model.num_queries=3"]
    fit = [*fit, *population, "--model.eps=1e-2", "--trainer.max_steps=6"]
    status, output = on(2, fit, rows=ROWS, strategy=strategy)
    assert status == 0, output
    assert main(fit) == 0
    divided = tuned(last_checkpoint(0))
    assert_close(divided, tuned(last_checkpoint(1)))
    logs = [read_step_log(run_dir(number) / "zo_log").steps for number in (0, 1)]
    assert list(logs[0]) == list(logs[1]) == list(range(6))
    for step, record in logs[1].items():
        assert logs[0][step].losses == pytest.approx(record.losses, rel=1e-4)
    assert main(["replay", "--run=runs/version_0", "--output=again.ckpt"]) == 0
    again = tuned("again.ckpt")
    assert same_tensors(again, divided)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "weights"),
    [("SPSA", ["--model.num_queries=4", "--model.engine.queries_at_once=2"]), ("LayerOutputPerturbation", [])],
    ids=["SPSA", "LayerOutputPerturbation"],
)
def test_a_grid_of_two_by_two_processes_takes_the_steps_of_one(fit, estimator, weights):
    """Two processes have the first half of the rows and two the second half; of each pair, each evaluates half of the points."""
    if not weights:
        fit = [option for option in fit if not option.startswith("--model.eps")]
    fit = [*fit, f"--model.estimator={estimator}", *weights]
    status, output = on(4, [*fit, "--model.parallel=2"], rows=ROWS // 2, callback="WeightWriter")
    assert status == 0, output
    first, *others = (torch.load(f"weights-{rank}.pt", weights_only=True) for rank in range(4))
    assert all(same_tensors(first, other) for other in others)
    assert main(fit) == 0
    assert_close(first, tuned(last_checkpoint(1)))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--model.layer=9", "--model.model=missing"])
def test_an_error_of_all_processes_is_printed_once(fit, option):
    status, output = on(2, [*fit, option])
    assert status == 2, output
    assert output.count("slzo: error: ") == 1, output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.parallel=2", "model.parallel 2: cannot be combined with trainer.strategy sharded"),
        ("--model.engine.paired=false", "model.engine.paired false: with trainer.strategy sharded"),
    ],
)
def test_options_that_shared_layers_exclude_are_refused(fit, option, message):
    status, output = on(2, [*fit, option], strategy="sharded")
    assert status == 2, output
    assert f"slzo: error: {message}" in output
    assert "Traceback" not in output


LENGTH = """
def length(completions, **columns): return [sum(map(ord, text)) % 13 / 13 for text in completions]
"""
ANSWERS = [
    "--data.task=slzo.tasks.template.TemplateTask",
    "--data.task.name=free",
    "--data.task.prompt={sentence}",
    "--data.task.max_new_tokens=5",
    "--data.reward=length.py:length",
]
FEATURES = {
    "output perturbation": ["--model.estimator=LayerOutputPerturbation"],
    "first order": ["--model.estimator=Backprop"],
    "LoRA": ["--model.scope=LoRA"],
    "prefix tuning": ["--model.scope=PrefixTuning"],
    "virtual tokens of a population": ["--model.scope=PrefixTuning", "--model.estimator=EvolutionStrategy"],
    "all parameters": ["--model.scope=AllParameters"],
    "rewards at two points": [*ANSWERS, "--model.estimator=SPSA"],
    "rewards by policy gradient": [*ANSWERS, "--model.estimator=LayerOutputPerturbation"],
    "quantized layers": ["--model.quantization=int8"],
    "parts of batches": ["--data.tokens_per_pass=40"],
}


NOT_SHARDED = {
    "first order": "model.estimator Backprop: differentiates layers that are divided over processes",
    "all parameters": "trainer.strategy sharded: the processes share the frozen layers, and model.scope tunes all",
    "quantized layers": "model.quantization 'int8': quantized layers cannot be divided over processes",
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_on_two_processes_takes_the_steps_of_one(fit, feature, strategy, data_dir):
    more = FEATURES[feature]
    fit = [
        *fit,
        "--trainer.max_steps=4",
        "--data.num_dev=9",
        "--data.num_test=15",
        *more,
    ]  # rows that two cannot divide evenly
    if any("Layer" in option or "Backprop" in option for option in more):
        fit = [option for option in fit if not option.startswith("--model.eps")]
    if "--data.reward=length.py:length" in more:
        Path("length.py").write_text(LENGTH, encoding="utf-8")
        fit = [option for option in fit if not option.startswith(("--data.task=sst2", "--data.data_dir"))]
        fit += [
            f"--data.task.train_file={data_dir}/sst2/train.jsonl",
            f"--data.task.test_file={data_dir}/sst2/validation.jsonl",
        ]
    status, output = on(2, fit, callback="WeightWriter", strategy=strategy)
    if strategy == "sharded" and feature in NOT_SHARDED:
        assert status != 0
        assert f"slzo: error: {NOT_SHARDED[feature]}" in output
        assert "Traceback" not in output
        return
    assert status == 0, output
    first, second = (torch.load(f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same_tensors(first, second)
    assert main(fit) == 0
    assert_close(first, tuned(last_checkpoint(1)))
    two, one = (json.loads((run_dir(number) / "history.json").read_text(encoding="utf-8")) for number in (0, 1))
    for of_two, of_one in zip(two["points"], one["points"], strict=True):
        assert of_two["metrics"] == pytest.approx(of_one["metrics"], abs=1 / 9 + 1e-6)
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-3) if of_one["loss"] else of_two["loss"] is None
    assert summary(0)["num_rows"] == summary(1)["num_rows"] == 15
    assert summary(0)["score_after"] == pytest.approx(summary(1)["score_after"], abs=1 / 15 + 1e-6)


@pytest.mark.slow
def test_a_run_with_shared_layers_goes_on_with_any_number_of_processes_and_without_sharing(fit):
    assert on(3, fit, strategy="sharded")[0] == 0
    whole = tuned(last_checkpoint(0))
    sent = {"place": "on_validation_batch_start", "step": 4, "number": "SIGTERM"}
    assert on(3, fit, callback="SignalSender", strategy="sharded", **sent)[0] == 143
    resume = [*fit, f"--ckpt_path={last_checkpoint(1)}"]
    for number, (processes, strategy) in enumerate(((3, "sharded"), (3, "ddp"), (2, "sharded"), (1, "")), start=2):
        status, output = on(processes, resume, strategy=strategy)
        assert status == 0, output
        resumed = tuned(last_checkpoint(number))
        if processes == 3:
            assert same_tensors(resumed, whole)
        else:
            assert_close(resumed, whole)


@pytest.mark.slow
def test_shared_layers_are_profiled_scored_and_predicted(fit, options):
    """The layer is chosen from a profile. Scores and predictions of the checkpoint are those of one process."""
    fit = [option for option in fit if not option.startswith("--model.layer")]
    assert on(2, fit, strategy="sharded")[0] == 0
    assert main(fit) == 0
    two, one = summary(0), summary(1)
    assert two["dominant_layer"] == one["dominant_layer"]
    assert two["score_after"] == pytest.approx(one["score_after"], abs=1 / 24 + 1e-6)
    scored = [*options, f"--ckpt_path={last_checkpoint(0)}", "--data.eval_batch_size=4"]
    shared = ["--trainer.devices=2", "--trainer.strategy=sharded"]
    command = [sys.executable, "-m", "slzo", "predict", *scored, *shared, "--output=two.jsonl"]
    subprocess.run(command, check=True, timeout=240)
    alone = ["--trainer.devices=1", "--trainer.strategy=auto"]  # the run's own config has two
    assert main(["predict", *scored, *alone, "--output=one.jsonl"]) == 0
    rows = [read_lines(name) for name in ("one.jsonl", "two.jsonl")]
    assert len(rows[0]) == len(rows[1])
    for of_one, of_two in zip(*rows, strict=True):
        assert of_one["prediction"] == of_two["prediction"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        {"place": "on_validation_batch_start", "step": 4, "number": "SIGTERM"},
        {"place": "on_validation_batch_start", "step": 8, "number": "SIGINT", "rank": 0},
        {"place": "on_before_optimizer_step", "step": 2, "number": "SIGTERM"},
        {"place": "on_train_batch_end", "step": 6, "number": "SIGINT"},
        {"place": "on_train_batch_end", "step": 9, "number": "SIGTERM", "rank": 1},
    ],
    ids=lambda sent: f"{sent['number']} {sent['place']} {sent['step']}",
)
def test_a_resume_on_as_many_is_exact_and_on_others_close(fit, sent):
    assert on(2, fit)[0] == 0
    whole = tuned(last_checkpoint(0))
    status, output = on(2, fit, callback="SignalSender", **sent)
    assert status == 128 + getattr(signal, sent["number"]), output
    resume = f"--ckpt_path={last_checkpoint(1)}"
    assert on(2, [*fit, resume])[0] == 0
    resumed = tuned(last_checkpoint(2))
    assert same_tensors(whole, resumed)
    for number, processes in ((3, 1), (4, 3)):
        status, output = on(processes, [*fit, resume])
        assert status == 0, output
        assert_close(tuned(last_checkpoint(number)), whole)


@pytest.mark.slow
def test_a_second_signal_to_one_of_two_ends_both_at_once(fit):
    sent = {"place": "on_before_optimizer_step", "step": 6, "number": "SIGTERM", "times": 2, "rank": 0}
    status, output = on(2, fit, callback="SignalSender", **sent)
    assert status == 143, output
    assert read_checkpoint(last_checkpoint()).content["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("place", ["on_before_optimizer_step", "on_validation_batch_start", "on_train_end"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_when_a_rank_is_killed_the_other_names_it_and_the_checkpoint(fit, strategy, rank, place):
    step = {"on_before_optimizer_step": 6, "on_validation_batch_start": 4, "on_train_end": 9}[place]
    sent = {"place": place, "step": step, "number": "SIGKILL", "rank": rank}
    status, output = on(2, fit, callback="SignalSender", strategy=strategy, **sent)
    assert status == (-signal.SIGKILL if rank == 0 else 2), output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("slzo: error:")]
    assert line.startswith(f"slzo: error: rank {rank} (process ")
    assert line.endswith(f"continue with the same command and --ckpt_path {last_checkpoint()}")
    assert "Interrupted" not in output
    assert main([*fit, f"--ckpt_path={last_checkpoint()}"]) == 0
    assert main(fit) == 0
    assert_close(tuned(last_checkpoint(1)), tuned(last_checkpoint(2)))
