"""The command line from end to end, on a tiny model and made-up rows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import error_line, last_checkpoint, run_dir, run_fit, same_tensors, summary, tiny_model, tuned, write_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo import fit
from slzo.__main__ import main
from slzo.checkpoints import checkpoint_file
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.datamodule import TaskDataModule
from slzo.lightning.trainer import ZOTrainer
from slzo.models import parts as parts_of_models
from slzo.models import views
from slzo.module import ZOModule
from slzo.utils.errors import SlzoError
from slzo.zo.processes import Processes
from slzo.zo.stepper import Stepper
from tiny import make_tokenizer

# ---- start --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "expected"), [("--version", r"slzo \d+\.\d+"), ("--help", "slzo fit --config")])
def test_version_and_help_are_quick_and_import_no_torch(argument, expected):
    code = (
        "import sys, time; start = time.perf_counter(); from slzo.__main__ import main; "
        f"main(['{argument}']); assert not {{'torch', 'lightning', 'transformers'}} & set(sys.modules); "
        "assert time.perf_counter() - start < 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(expected, done.stdout)


def test_the_package_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "slzo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("slzo ")


# ---- fit ----------------------------------------------------------------------------------------------------------------


def test_fit_writes_profile_summary_and_curves(options, model_dir, capsys):
    assert main(["fit", *options]) == 0
    output = capsys.readouterr().out
    assert "<- dominant" in output
    assert "accuracy" in output
    profile, found = json.loads((run_dir() / "outlier_profile.json").read_text()), summary()
    assert len(profile["layers"]) == 4
    assert {"index", "max_abs", "median_abs", "ratio", "token", "channel", "kurtosis"} <= set(profile["layers"][0])
    assert found["dominant_layer"] == profile["dominant_layer"]
    assert (found["metric"], found["num_rows"], found["steps"]) == ("accuracy", 24, 8)
    assert 0 <= found["score_before"] <= 1
    assert found["seconds"] > 0
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    layer = model.model.layers[found["dominant_layer"]]
    assert found["tuned_parameters"] == sum(p.numel() for p in layer.parameters())
    assert found["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert Path(found["best_checkpoint"]).is_file()
    assert (run_dir() / "config.yaml").is_file()
    assert (run_dir() / "hparams.yaml").is_file()
    events = EventAccumulator(str(run_dir()), size_guidance={"images": 10})
    events.Reload()
    names = ("loss_plus", "loss_minus", "projected_grad", "update_norm", "lr", "step_seconds", "tokens_per_second")
    expected = {f"train/{name}" for name in (*names, "peak_memory_gb")} | {"val/accuracy", "val/loss", "test/accuracy"}
    assert expected <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["outlier_profile"]
    assert len(events.Scalars("train/loss_plus")) == 8
    plus, minus = (events.Scalars(f"train/loss_{side}")[3].value for side in ("plus", "minus"))
    assert events.Scalars("train/projected_grad")[3].value == pytest.approx((plus - minus) / 2e-3, rel=1e-3, abs=1e-2)


def test_checkpoint_and_export_hold_the_tuned_layer_and_the_rest_stays(options, model_dir, once):
    once(run_fit, *options)
    checkpoint = read_checkpoint(last_checkpoint()).content
    state, layer = checkpoint["state_dict"], checkpoint["slzo"]["layer"]
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert state
    assert all(name.startswith(f"model.layers.{layer}.") for name in state)
    assert not same_tensors(state, before)
    assert main(["export", "--ckpt_path", "last", "--output", "tuned"]) == 0
    assert same_tensors(AutoModelForCausalLM.from_pretrained("tuned").state_dict(), {**before, **state})
    text = "It was great.\nNo"
    assert AutoTokenizer.from_pretrained("tuned")(text) == AutoTokenizer.from_pretrained(model_dir)(text)


def test_the_seed_decides_the_weights(options):
    for seed in (0, 0, 1):
        assert main(["fit", *options, f"--seed_everything={seed}", "--trainer.max_steps=2"]) == 0
    first, second, third = (tuned(last_checkpoint(i)) for i in range(3))
    assert same_tensors(first, second)
    assert not any(torch.equal(first[name], third[name]) for name in first if first[name].ndim == 2)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_models_train(options, dtype):
    more = [f"--model.dtype={dtype}", "--model.eps=1e-2", "--model.num_queries=2", "--trainer.max_steps=2"]
    assert main(["fit", *options, *more]) == 0
    assert all(tensor.dtype == torch.float32 for tensor in tuned(last_checkpoint()).values())
    assert main(["export", "--ckpt_path=last", "--output=tuned"]) == 0
    assert AutoModelForCausalLM.from_pretrained("tuned").dtype == getattr(torch, dtype)


def test_checkpoints_can_be_switched_off(options):
    assert main(["fit", *options, "--trainer.enable_checkpointing=false", "--trainer.max_steps=2"]) == 0
    assert summary()["best_checkpoint"] is None
    assert not list(run_dir().rglob("*.ckpt"))


def test_fast_dev_run_writes_nothing(options):
    assert main(["fit", *options, "--trainer.fast_dev_run=true"]) == 0
    assert not list(Path("runs").rglob("*.ckpt"))


def test_runs_land_below_the_root_folder(options, tmp_path, capsys):
    """``last`` is looked for there. A folder of the logger's own is kept."""
    below = [*options, "--trainer.default_root_dir=elsewhere", "--trainer.max_steps=2"]
    assert main(["fit", *below]) == 0
    assert main(["fit", *below, "--ckpt_path=last", "--trainer.max_steps=3"]) == 0
    own = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=own"]
    assert main(["fit", *below, *own]) == 0
    assert sorted(path.name for path in Path("elsewhere/runs").iterdir()) == ["version_0", "version_1"]
    assert not Path("runs").exists()
    capsys.readouterr()
    assert main(["test", *options, *own, "--ckpt_path=last"]) == 0
    assert "Using the last checkpoint of the newest run, own" in capsys.readouterr().out
    trainer = ZOTrainer(accelerator="cpu", default_root_dir=tmp_path / "python")
    assert Path(trainer.logger.save_dir) == tmp_path / "python" / "runs"


def test_prompts_are_cut_to_what_the_model_takes(tmp_path, options, capsys):
    tiny_model("gpt2", n_positions=64, max_position_embeddings=None, scale=1.0).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    long = tmp_path / "long" / "sst2"
    for name in ("train", "validation"):
        rows = [{"idx": i, "sentence": f"{name} {i} " + "very " * 60 + "good", "label": i % 2} for i in range(60)]
        write_lines(long / f"{name}.jsonl", rows)
    assert main(["fit", *options, f"--model.model={tmp_path / 'short'}", f"--data.data_dir={long.parent}"]) == 0
    assert "Prompts are cut to 64 tokens" in capsys.readouterr().out


def test_custom_data_needs_no_python(options):
    rows = [{"review": f"a {w} one {i}", "stars": s} for i in range(30) for w, s in (("nice", "up"), ("sad", "down"))]
    for name in ("train", "test"):
        write_lines(f"{name}.jsonl", [row | {"review": f"{name} {row['review']}"} for row in rows])
    arguments = {
        "train_file": "train.jsonl",
        "test_file": "test.jsonl",
        "prompt": "{review} It was",
        "candidates": [" terrible", " great"],
        "label_field": "stars",
        "labels": ["down", "up"],
    }
    task = {"class_path": "slzo.tasks.template.TemplateTask", "init_args": arguments}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": {"task": task}}), encoding="utf-8")
    kept = [option for option in options if not option.startswith(("--data.task", "--data.data_dir"))]
    assert main(["fit", "--config=mine.yaml", *kept]) == 0
    assert summary()["num_rows"] == 60
    assert main(["predict", "--ckpt_path=last", "--output=found.jsonl"]) == 0
    found = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert [line["prediction_label"] for line in found] == [("down", "up")[line["prediction"]] for line in found]


def test_in_python_the_tokenizer_must_fit_the_model(model_dir, data_dir, tmp_path, capsys):
    """On the command line it is the model's own."""
    for name, more in (("other", []), ("larger", [f"<{n}>" for n in range(400)])):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(more)
        tokenizer.save_pretrained(tmp_path / name)
        shutil.copy(model_dir / "config.json", tmp_path / name)
    settings = {"max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}

    def train(name):
        trainer = ZOTrainer(accelerator="cpu", default_root_dir=tmp_path, **settings)
        rows = TaskDataModule("sst2", str(tmp_path / name), str(data_dir), num_train=8, num_dev=4, batch_size=4)
        trainer.fit(ZOModule(str(model_dir), 1), datamodule=rows)

    train("other")
    assert re.search(r"data\.tokenizer '.*other' is not that of model\.model", capsys.readouterr().err)
    with pytest.raises(SlzoError, match=r"data\.tokenizer '.*larger': has \d+ tokens, but model '.*' has \d+"):
        train("larger")


# ---- resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/test_exact_resume.py has the usual cases
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("stop", [3, 5, 10])
def test_a_resumed_run_equals_one_that_was_not_stopped(options, optimizer, stop, monkeypatch, capsys):
    """Stops inside an epoch of 5 batches, at its end and in the next one; with a scheduler, and without a second profile."""
    options = [*options, "--trainer.enable_progress_bar=false"]
    options += [f"--model.optimizer={optimizer}", "--model.optimizer.lr=1e-3", "--model.lr_scheduler=LinearLR"]
    assert main(["fit", *options, "--trainer.max_steps=12"]) == 0
    assert main(["fit", *options, f"--trainer.max_steps={stop}"]) == 0
    monkeypatch.setattr(fit, "profile_model", None)
    capsys.readouterr()
    assert main(["fit", *options, "--trainer.max_steps=12", "--ckpt_path=last"]) == 0
    assert "Using the last checkpoint of the newest run" in capsys.readouterr().out
    assert same_tensors(tuned(last_checkpoint(0)), tuned(last_checkpoint(2)))
    profiles = [json.loads((run_dir(i) / "outlier_profile.json").read_text()) for i in (1, 2)]
    assert profiles[0] == profiles[1]
    first, second = summary(0), summary(2)
    assert Path(first["best_checkpoint"]).name == Path(second["best_checkpoint"]).name
    same = ("score_before", "score_after", "layer_reason", "steps", "seed")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_a_resume_keeps_the_choice_of_kernels(options, monkeypatch):
    """The trial of oneDNN may end otherwise on a busy machine; the steps must not."""
    kernels = []
    fastest = {"onednn": True}
    monkeypatch.setattr(parts_of_models, "onednn_is_faster", lambda layer: fastest["onednn"])
    monkeypatch.setattr(views, "with_onednn", lambda layer: kernels.append("onednn") or layer)
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert kernels
    assert read_checkpoint(last_checkpoint()).metadata["onednn"] is True
    fastest["onednn"] = False
    for more, uses in (([], True), (["--model.engine.onednn=false"], False)):
        kernels.clear()
        assert (
            main(["fit", *options, "--trainer.max_steps=3", "--ckpt_path=runs/version_0/checkpoints/last.ckpt", *more])
            == 0
        )
        assert bool(kernels) == uses


@pytest.mark.parametrize("of_first", [True, False])
def test_all_processes_use_the_kernels_of_the_first(of_first, options, monkeypatch):
    """Each measures which are faster, and the measurements may differ."""
    monkeypatch.setattr(parts_of_models, "onednn_is_faster", lambda layer: not of_first)
    first = Processes(broadcast=lambda value: of_first if isinstance(value, bool) else value)
    monkeypatch.setattr(TaskDataModule, "processes", property(lambda _: first))
    assert main(["fit", *options, "--trainer.max_steps=1"]) == 0
    assert read_checkpoint(last_checkpoint()).metadata["onednn"] is of_first


def test_a_resume_reads_the_checkpoint_to_find_it_and_to_load_it(options, monkeypatch, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    read = []
    original = checkpoint_file.read
    monkeypatch.setattr(checkpoint_file, "read", lambda path, *entry: read.append(str(path)) or original(path, *entry))
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last", "--trainer.val_check_interval=9"]) == 0
    assert [path for path in read if "version_0" in path] == ["runs/version_0/checkpoints/last.ckpt"] * 2


def test_epochs_can_be_resumed_and_a_finished_run_is_left_alone(options, capsys):
    options = [*options, "--trainer.max_steps=-1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *options, "--trainer.max_epochs=1"]) == 0
    assert main(["fit", *options, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    assert [summary(i)["steps"] for i in (0, 1)] == [5, 10]
    capsys.readouterr()
    assert main(["fit", *options, "--trainer.max_steps=10", "--ckpt_path=last"]) == 0
    assert "already has all 10 steps" in capsys.readouterr().out
    assert not run_dir(2).exists()


def test_a_resumed_run_says_what_differs_and_keeps_its_seed(options, capsys, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    more = ["--seed_everything=5", "--model.optimizer.lr=7", "--model.eps=2e-3"]
    assert "row 0 of the train rows" in error_line(
        capsys, "fit", *options, "--ckpt_path=last", *more
    )  # drawn by the seed
    more.append("--data.allow_changed_rows=true")
    assert main(["fit", *options, "--ckpt_path=last", *more]) == 0
    text = capsys.readouterr().err
    for expected in ("model.optimizer.lr: 0.001 -> 7", "model.eps: 0.001 -> 0.002", "data.seed: 0 -> 5"):
        assert expected in text
    assert summary(1)["seed"] == 0


def test_a_full_gpu_ends_in_one_line(options, monkeypatch, capsys):
    original = Stepper.step

    def step(self, batch, number, *args, **kwargs):
        if number == 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 4 GiB"
            )
        return original(self, batch, number, *args, **kwargs)

    monkeypatch.setattr(Stepper, "step", step)
    assert main(["fit", *options]) == 2
    output, error = capsys.readouterr()
    assert "continue from step" in output
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): slzo plan" in error
    assert "Traceback" not in error


def test_an_interrupt_while_the_best_checkpoint_is_scored_loses_nothing(options, monkeypatch, once):
    original = fit.score_test_rows

    def score(prepared, rows, when, **more):
        if when.startswith("after"):
            raise KeyboardInterrupt
        return original(prepared, rows, when, **more)

    once(run_fit, *options)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "score_test_rows", score)
        assert main(["fit", *options]) == 130
    assert not (run_dir(1) / "summary.json").exists()
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert same_tensors(tuned(last_checkpoint(0)), tuned(last_checkpoint(2)))
    assert summary(0)["score_after"] == summary(2)["score_after"]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(options):
    """The run can be continued and its checkpoint scored."""
    process = subprocess.Popen(
        [sys.executable, "-m", "slzo", "fit", *options, "--trainer.max_steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a job in the background of a shell ignores the signal otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 90
    while not last_checkpoint().is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    step = int(
        re.search(r"Stopped at step (\d+); continue from step \1 with the same command and --ckpt_path", output)[1]
    )
    assert read_checkpoint(last_checkpoint()).content["global_step"] == step
    assert main(["test", "--ckpt_path=last"]) == 0


# ---- other commands -----------------------------------------------------------------------------------------------------


def test_test_scores_the_checkpoint_and_says_when_there_is_none(options, capsys, once):
    def accuracy(*args):
        capsys.readouterr()
        assert main(["test", *args]) == 0
        output = capsys.readouterr().out
        return "scoring the untuned model" in output, float(re.search(r"test/accuracy\W+([\d.]+)", output)[1])

    once(run_fit, *options)
    found = summary()
    tuned_score = accuracy("--ckpt_path", found["best_checkpoint"])  # options from the run's config.yaml
    assert tuned_score == (False, pytest.approx(found["score_after"], abs=1e-4))
    assert accuracy(*options) == (True, pytest.approx(found["score_before"], abs=1e-4))
    assert "fit does not read the config of the run" in error_line(capsys, "fit", "--ckpt_path=runs/version_0")
    Path("runs/version_0/config.yaml").unlink()
    assert "has no config.yaml, as those from Python" in error_line(capsys, "test", "--ckpt_path=runs/version_0")


def test_a_layer_that_is_set_is_drawn_in_the_profile(options, capsys):
    assert main(["fit", *options, "--model.layer=2", "--trainer.max_steps=1"]) == 0
    assert "<- dominant" not in capsys.readouterr().out
    assert (summary()["dominant_layer"], summary()["layer_reason"]) == (2, "set by model.layer")
    profile = json.loads((run_dir() / "outlier_profile.json").read_text())
    assert (profile["dominant_layer"], profile["rule"]) == (2, "set by model.layer")
    assert (run_dir() / "outlier_profile.png").read_bytes().startswith(b"\x89PNG")


def profile_of_lines(options, capsys, lines):
    """What is printed after the table, and the file."""
    Path("text.txt").write_text("\n".join(lines), encoding="utf-8")
    assert main(["profile", *options, "--profiler.text_file=text.txt"]) == 0
    printed = capsys.readouterr().out
    assert "<- dominant" in printed
    assert not (run_dir() / "checkpoints").exists()
    return printed.partition("Dominant layer ")[2], json.loads((run_dir() / "outlier_profile.json").read_text())


def test_a_file_of_lines_may_have_a_mark_and_other_separators(options, capsys):
    """One line is one sequence, whatever editor saved the file."""
    lines = [f"Sentence\u2028number {i} of a text." for i in range(12)]
    found = []
    for text in ("\n".join(lines), "\ufeff" + "\r\n".join(lines)):
        Path("text.txt").write_text(text, encoding="utf-8", newline="")
        assert main(["profile", *options, "--profiler.text_file=text.txt"]) == 0
        found.append(capsys.readouterr().out.partition("Files")[0].partition("runs/")[0])
    assert found[0] == found[1]
    assert "Averaged over all 12 sequences" in found[0]


def test_a_profile_of_fewer_sequences_than_asked_for_says_so(options, capsys):
    printed, profile = profile_of_lines(options, capsys, [f"Sentence number {i} of a text." for i in range(11)] + ["x"])
    assert "Averaged over all 12 sequences; 16 were requested (profiler.num_sequences)." in printed
    assert "Left out 1 of 12 sequences, which have only one token." in printed
    assert profile["num_sequences"] == 11
    assert re.search(r"^(Clear for prompts like these|Not clear): layer \d's growth", printed, re.MULTILINE)
    assert profile["margin"] > 0
    assert len(profile["notes"]) == 2


def test_equal_prompts_have_no_standard_error(options, capsys):
    printed, profile = profile_of_lines(options, capsys, ["The very same text."] * 20)
    assert "All 16 prompts are equal: standard errors would be meaningless and are left out" in printed
    assert profile["margin"] is None
    assert profile["layers"][0]["ratio_se"] is None


def test_a_profile_needs_one_device(options, capsys):
    error = error_line(capsys, "profile", *options, "--trainer.devices=2")
    assert "trainer.devices, trainer.num_nodes: make 2 processes, and slzo profile runs on one device" in error


def test_every_layer_over_the_thresholds_is_told(options, capsys):
    rule = ["--profiler.rule=FirstOutlierLayer", "--profiler.rule.max_abs=0", "--profiler.rule.ratio=0"]
    assert main(["profile", *options, *rule, "--model.layer=1"]) == 0
    printed = capsys.readouterr()
    assert "All 4 layers are above the thresholds" in printed.out
    assert "model.layer 1: is not used, because slzo profile chooses a layer by profiler.rule" in printed.err


def test_what_export_refuses(options, capsys, once):
    assert "ckpt_path: is required; give --ckpt_path VALUE: " in error_line(capsys, "export", "--output=x")
    once(run_fit, *options, "--trainer.max_steps=2")
    Path("full").mkdir()
    Path("full/file").touch()
    assert "output 'full': exists" in error_line(capsys, "export", "--ckpt_path=last", "--output=full")
    assert [path.name for path in Path("full").iterdir()] == ["file"]
    # foreign code runs only where that is allowed
    content = read_checkpoint(last_checkpoint()).content
    content["slzo"]["trust_remote_code"] = True
    checkpoint_file.write(content, last_checkpoint())
    args = ["export", f"--ckpt_path={last_checkpoint()}", "--output=out"]
    assert "give --trust_remote_code true" in error_line(capsys, *args)
    assert main([*args, "--trust_remote_code=true"]) == 0


def test_a_checkpoint_of_another_model_is_refused(options, model_dir, capsys, tmp_path, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    line = error_line(capsys, "test", *options, f"--model.model={tmp_path / 'other'}", "--ckpt_path=last")
    assert f"was trained on another base model, called {str(model_dir)!r} (" in line


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["left out", "a number", "a policy"],
)
def test_waiting_threads_sleep_soon_unless_the_user_decides(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "--model.lyer=1"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == expected
