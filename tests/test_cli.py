"""The command line end to end on a tiny model and made-up rows; main([...]) runs in process."""

import json
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
from conftest import run_dir, tuned
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.checkpoints import checkpoint_file
from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.datamodule import TaskDataModule
from slzo.utils.errors import SlzoError
from slzo.models import parts as parts_of_models
from slzo.module import ZOModule
from slzo.run_trainer import run_trainer
from slzo.trainer import ZOTrainer
from tiny import make_tokenizer

ROOT = Path(__file__).parents[1]


def test_version_and_help_are_quick_and_import_no_torch():
    for argument, expected in (("--version", r"slzo \d+\.\d+"), ("--help", "slzo fit --config")):
        code = (
            "import sys, time; start = time.perf_counter(); from slzo.__main__ import main; "
            f"main(['{argument}']); assert not {{'torch', 'lightning', 'transformers'}} & set(sys.modules); "
            "assert time.perf_counter() - start < 1"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert re.search(expected, done.stdout)


def test_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "slzo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("slzo ")


def test_fit_writes_profile_summary_checkpoints_and_tensorboard(options, model_dir, capsys):
    assert main(["fit", *options]) == 0
    output = capsys.readouterr().out
    assert "<- dominant" in output
    assert "accuracy" in output
    profile = json.loads((run_dir() / "outlier_profile.json").read_text())
    assert {"dominant_layer", "rule", "layers"} <= set(profile)
    assert {"index", "max_abs", "median_abs", "ratio", "token", "channel", "kurtosis"} <= set(profile["layers"][0])
    assert len(profile["layers"]) == 4
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert summary["dominant_layer"] == profile["dominant_layer"]
    assert summary["metric"] == "accuracy"
    assert summary["num_rows"] == 24
    assert summary["steps"] == 8
    assert 0 <= summary["score_before"] <= 1
    assert summary["seconds"] > 0
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    layer = model.model.layers[summary["dominant_layer"]]
    assert summary["tuned_parameters"] == sum(p.numel() for p in layer.parameters())
    assert summary["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert (run_dir() / "config.yaml").is_file()
    assert Path(summary["best_checkpoint"]).is_file()


def test_tensorboard_has_every_curve_the_picture_and_the_hyperparameters(options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["fit", *options]) == 0
    events = EventAccumulator(str(run_dir()), size_guidance={"images": 10})
    events.Reload()
    tags = events.Tags()
    expected = {
        "loss_plus", "loss_minus", "projected_grad", "update_norm", "lr", "step_seconds", "tokens_per_second",
        "peak_memory_gb",
    }  # fmt: skip
    assert {f"train/{name}" for name in expected} | {"val/accuracy", "val/loss", "test/accuracy"} <= set(
        tags["scalars"]
    )
    assert tags["images"] == ["outlier_profile"]
    assert len(events.Scalars("train/loss_plus")) == 8
    assert (run_dir() / "hparams.yaml").is_file()
    plus, minus = (events.Scalars(f"train/loss_{side}")[3].value for side in ("plus", "minus"))
    assert events.Scalars("train/projected_grad")[3].value == pytest.approx((plus - minus) / 2e-3, rel=1e-3, abs=1e-2)


def test_checkpoints_hold_the_tuned_layer_only_and_the_frozen_weights_stay(options, model_dir):
    assert main(["fit", *options]) == 0
    checkpoint = read_checkpoint(run_dir() / "checkpoints" / "last.ckpt").content
    layer = checkpoint["slzo"]["layer"]
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert checkpoint["state_dict"]
    assert all(name.startswith(f"model.layers.{layer}.") for name in checkpoint["state_dict"])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in checkpoint["state_dict"].items())
    assert main(["export", "--ckpt_path", "last", "--output", "tuned"]) == 0
    after = AutoModelForCausalLM.from_pretrained("tuned").state_dict()
    for name, tensor in after.items():
        expected = checkpoint["state_dict"].get(name, before[name])
        assert torch.equal(tensor, expected), name


def test_same_seed_same_weights_other_seed_other_weights(options):
    for seed in (0, 0, 1):
        assert main(["fit", *options, f"--seed_everything={seed}"]) == 0
    first, second, third = (tuned(run_dir(i) / "checkpoints" / "last.ckpt") for i in range(3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first if first[name].ndim == 2)


@pytest.mark.parametrize(
    "stop", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow), 10]
)
def test_a_run_resumed_at_any_step_equals_one_that_was_not_stopped(options, stop):
    """Stops inside an epoch of 5 batches, at its end and in the next one, between validations and on one."""
    options = [*options, "--trainer.enable_progress_bar=false", "--data.length_buckets=true"]
    assert main(["fit", *options, "--trainer.max_steps=12"]) == 0
    assert main(["fit", *options, f"--trainer.max_steps={stop}"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=12", "--ckpt_path=last"]) == 0
    whole, resumed = (tuned(run_dir(i) / "checkpoints" / "last.ckpt") for i in (0, 2))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (json.loads((run_dir(i) / "summary.json").read_text()) for i in (0, 2))
    assert Path(first["best_checkpoint"]).name == Path(second["best_checkpoint"]).name
    same = ("score_before", "score_after", "layer_chosen_by", "steps", "seed")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_a_resume_keeps_the_choice_of_kernels(options, monkeypatch):
    """The trial of oneDNN may end otherwise on a busy machine; the steps must not."""
    kernels = []
    fastest = {"onednn": True}
    monkeypatch.setattr(parts_of_models, "onednn_is_faster", lambda layer: fastest["onednn"])
    monkeypatch.setattr(parts_of_models, "with_onednn", lambda layer: kernels.append("onednn") or layer)
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert kernels
    assert read_checkpoint(run_dir() / "checkpoints" / "last.ckpt").content["slzo"]["onednn"] is True
    kernels.clear()
    fastest["onednn"] = False
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert kernels
    kernels.clear()
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last", "--model.engine.onednn=false"]) == 0
    assert not kernels


def test_a_resume_reads_the_checkpoint_once(options, monkeypatch):
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    read = []
    original = checkpoint_file.read

    def noting(path):
        read.append(str(path))
        return original(path)

    monkeypatch.setattr(checkpoint_file, "read", noting)
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last", "--trainer.val_check_interval=9"]) == 0
    assert [path for path in read if "version_0" in path] == ["runs/version_0/checkpoints/last.ckpt"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.layer=9"],
        ["--profiler.rule=FirstOutlierLayer"],
        ["--model.eps_end=1e-4", "--trainer.max_steps=-1", "--trainer.max_epochs=1"],
        ["--model.estimator=SPSA", "--model.estimator.divide_rows=true", "--model.num_queries=9"],
        ["--model.scope=ActivationSubspace", "--model.scope.rank=1000"],
    ],
)
def test_a_fit_that_is_refused_leaves_no_run_folder(options, wrong):
    assert main(["fit", *options, *wrong]) == 2
    assert not list(Path("runs").glob("*"))


def test_rows_without_a_label_do_not_train(options, data_dir, tmp_path, capsys):
    def write(change):
        folder = tmp_path / "rows" / "sst2"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation"):
            rows = [json.loads(line) for line in (data_dir / "sst2" / f"{name}.jsonl").read_text().splitlines()]
            rows = [change(row) if name == "train" else row for row in rows]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f"--data.data_dir={folder.parent}"

    nothing = write(lambda row: {**row, "label": -1})
    assert main(["fit", *options, nothing]) == 2
    assert "none of the 40 training rows has a label" in capsys.readouterr().err
    some = write(lambda row: {**row, "label": row["label"] if row["idx"] % 4 else -1})
    assert main(["fit", *options, some, "--trainer.max_steps=20"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"Left out \d+ training rows without a label", printed.out + printed.err)
    assert json.loads((run_dir() / "summary.json").read_text())["skipped_steps"] == 0


def test_epochs_can_be_resumed(options):
    options = [*options, "--trainer.max_steps=-1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *options, "--trainer.max_epochs=2"]) == 0
    assert main(["fit", *options, "--trainer.max_epochs=4", "--ckpt_path=last"]) == 0
    assert [json.loads((run_dir(i) / "summary.json").read_text())["steps"] for i in (0, 1)] == [10, 20]


def test_a_resumed_run_says_what_differs_and_keeps_its_seed(options, recwarn):
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert (
        main(["fit", *options, "--ckpt_path=last", "--seed_everything=5", "--model.optimizer.lr=7", "--model.eps=2e-3"])
        == 0
    )
    text = " ".join(str(warning.message) for warning in recwarn)
    for expected in ("model.lr: 0.001 -> 7", "model.eps: 0.001 -> 0.002", "data.seed: 0 -> 5"):
        assert expected in text
    assert json.loads((run_dir(1) / "summary.json").read_text())["seed"] == 0


def test_an_interrupt_while_scoring_keeps_the_last_weights(options, monkeypatch):
    from slzo.callbacks import run_summary

    original = run_summary._score

    def score(module, when):
        if when.startswith("after"):
            raise KeyboardInterrupt
        return original(module, when)

    assert main(["fit", *options]) == 0
    monkeypatch.setattr(run_summary, "_score", score)
    assert main(["fit", *options]) == 130
    whole, interrupted = (tuned(run_dir(i) / "checkpoints" / "last.ckpt") for i in (0, 1))
    assert all(torch.equal(whole[name], interrupted[name]) for name in whole)


def test_checkpoints_can_be_switched_off(options):
    assert main(["fit", *options, "--trainer.enable_checkpointing=false"]) == 0
    assert json.loads((run_dir() / "summary.json").read_text())["best_checkpoint"] is None
    assert not list(run_dir().rglob("*.ckpt"))


def test_models_that_cannot_be_split_are_refused_in_one_line(options, tmp_path, capsys):
    from transformers import AutoConfig, AutoModel

    bert = AutoConfig.for_model(
        "bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=320
    )
    AutoModel.from_config(bert).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "is not supported" in bad(capsys, "fit", *options, f"--model.model={tmp_path / 'bert'}")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in bad(capsys, "fit", *options, f"--model.model={tmp_path / 'bert'}")


def test_fast_dev_run_writes_nothing(options):
    assert main(["fit", *options, "--trainer.fast_dev_run=true"]) == 0
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


def test_prompts_are_cut_to_what_the_model_takes(tmp_path, options, capsys):
    from conftest import tiny_model

    tiny_model("gpt2", n_positions=64, max_position_embeddings=None, scale=1.0).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    long = tmp_path / "long" / "sst2"
    long.mkdir(parents=True)
    for name in ("train", "validation"):
        rows = [{"idx": i, "sentence": f"{name} {i} " + "very " * 60 + "good", "label": i % 2} for i in range(60)]
        (long / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["fit", *options, f"--model.model={tmp_path / 'short'}", f"--data.data_dir={long.parent}"]) == 0
    assert "Prompts are cut to 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", [pytest.param("SGD", marks=pytest.mark.slow), "Adam"])
def test_resume_equals_an_uninterrupted_run_and_does_not_profile_again(options, optimizer, monkeypatch, capsys):
    options = [*options, f"--model.optimizer={optimizer}", "--model.optimizer.lr=1e-3"]
    options += ["--model.lr_scheduler=LinearLR", "--model.lr_scheduler.total_iters=8"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=3", "--trainer.val_check_interval=3"]) == 0
    monkeypatch.setattr("slzo.callbacks.outlier_profiler.profile_layers", None)  # a second profile would fail
    capsys.readouterr()
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert "Using the last checkpoint of the newest run" in capsys.readouterr().out
    whole, resumed = (read_checkpoint(run_dir(i) / "checkpoints" / "last.ckpt").content for i in (0, 2))
    assert whole["global_step"] == resumed["global_step"] == 8
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(tensor, resumed["state_dict"][name], rtol=0, atol=0)
    assert json.loads((run_dir(2) / "outlier_profile.json").read_text()) == json.loads(
        (run_dir(1) / "outlier_profile.json").read_text()
    )
    summaries = [json.loads((run_dir(i) / "summary.json").read_text()) for i in (0, 2)]
    assert summaries[0]["score_before"] == summaries[1]["score_before"]


def test_runs_land_below_the_root_folder(options, tmp_path):
    """As Lightning's do; last is looked for there, and a folder of the logger's own stays."""
    below = [*options, "--trainer.default_root_dir=elsewhere"]
    assert main(["fit", *below]) == 0
    assert main(["fit", *below, "--ckpt_path=last", "--trainer.max_steps=9"]) == 0
    assert main(["fit", *below, "--trainer.logger.save_dir=own"]) == 0
    assert sorted(path.name for path in Path("elsewhere/runs").iterdir()) == ["version_0", "version_1"]
    assert Path("own/version_0/summary.json").is_file()
    assert not Path("runs").exists()
    trainer = run_trainer(accelerator="cpu", default_root_dir=tmp_path / "python")
    assert Path(trainer.logger.save_dir) == tmp_path / "python" / "runs"


def test_ckpt_path_last_without_a_run_is_an_error(options, capsys):
    assert main(["fit", *options, "--ckpt_path=last"]) == 2
    assert "ckpt_path 'last': no run below 'runs'" in capsys.readouterr().err


def test_test_scores_the_checkpoint_and_says_when_there_is_none(options, capsys):
    assert main(["fit", *options]) == 0
    summary = json.loads((run_dir() / "summary.json").read_text())
    capsys.readouterr()
    assert main(["test", "--ckpt_path", summary["best_checkpoint"]]) == 0  # options from the run's config.yaml
    output = capsys.readouterr().out
    assert "untuned" not in output
    assert shown_accuracy(output) == pytest.approx(summary["score_after"], abs=1e-4)
    assert main(["test", *options]) == 0
    output = capsys.readouterr().out
    assert "No --ckpt_path given: scoring the untuned model." in output
    assert shown_accuracy(output) == pytest.approx(summary["score_before"], abs=1e-4)


def shown_accuracy(output):
    return float(re.search(r"test/accuracy\W+([\d.]+)", output)[1])


def test_profile_writes_only_the_profile(options, capsys):
    assert main(["profile", *options]) == 0
    assert "<- dominant" in capsys.readouterr().out
    assert (run_dir() / "outlier_profile.json").is_file()
    assert not (run_dir() / "checkpoints").exists()


def test_a_layer_that_is_set_is_drawn_in_the_profile(options, capsys):
    assert main(["fit", *options, "--model.layer=2"]) == 0
    assert "<- dominant" not in capsys.readouterr().out
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert summary["dominant_layer"] == 2
    assert summary["layer_chosen_by"] == "set by model.layer"
    profile = json.loads((run_dir() / "outlier_profile.json").read_text())
    assert (profile["dominant_layer"], profile["rule"]) == (2, "set by model.layer")
    assert (run_dir() / "outlier_profile.png").read_bytes().startswith(b"\x89PNG")


def test_profile_of_a_text_file(options, tmp_path):
    (tmp_path / "text.txt").write_text(
        "\n".join(f"Sentence number {i} of a text." for i in range(20)), encoding="utf-8"
    )
    assert main(["profile", *options, "--profiler.text_file=text.txt", "--profiler.num_sequences=12"]) == 0
    assert json.loads((run_dir() / "outlier_profile.json").read_text())["num_sequences"] == 12


def profile_of_lines(options, capsys, lines):
    """The printed lines after the table, and the file, of a profile of some text."""
    Path("text.txt").write_text("\n".join(lines), encoding="utf-8")
    assert main(["profile", *options, "--profiler.text_file=text.txt"]) == 0
    printed = capsys.readouterr().out
    return printed.partition("Dominant layer ")[2], json.loads((run_dir() / "outlier_profile.json").read_text())


def test_a_profile_of_fewer_sequences_than_asked_for_says_so(options, capsys):
    printed, profile = profile_of_lines(options, capsys, [f"Sentence number {i} of a text." for i in range(11)] + ["x"])
    assert "Asked for 16 sequences (profiler.num_sequences), there were 12: averaged over those." in printed
    assert "1 of 12 sequences have one token only: they are left out." in printed
    assert profile["num_sequences"] == 11
    assert re.search(r"^(Clear for prompts like these|Not clear): layer \d's growth", printed, re.MULTILINE)
    assert profile["margin"] > 0
    assert len(profile["notes"]) == 2


def test_equal_prompts_have_no_standard_error(options, capsys):
    printed, profile = profile_of_lines(options, capsys, ["The very same text."] * 20)
    assert "All 16 prompts are equal: standard errors would mean nothing and are left out" in printed
    assert profile["margin"] is None
    assert profile["layers"][0]["ratio_se"] is None


def test_too_few_sequences_of_two_tokens_are_an_error(options, capsys):
    Path("text.txt").write_text("x\n" * 12 + "two tokens and more\n", encoding="utf-8")
    line = bad(capsys, "profile", *options, "--profiler.text_file=text.txt")
    assert "only 1 sequences of two tokens or more to profile, at least 10 are needed" in line


def test_every_layer_over_the_thresholds_is_told(options, capsys):
    rule = ["--profiler.rule=FirstOutlierLayer", "--profiler.rule.max_abs=0", "--profiler.rule.ratio=0"]
    assert main(["profile", *options, *rule]) == 0
    assert (
        "All 4 layers are over the thresholds: the rule's answer carries no information here" in capsys.readouterr().out
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_train(options, dtype):
    assert main(["fit", *options, f"--model.dtype={dtype}", "--model.eps=1e-2", "--model.num_queries=2"]) == 0
    checkpoint = read_checkpoint(run_dir() / "checkpoints" / "last.ckpt").content
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint["state_dict"].values())
    assert main(["export", "--ckpt_path=last", "--output=tuned"]) == 0
    assert AutoModelForCausalLM.from_pretrained("tuned").dtype == getattr(torch, dtype)


def test_two_ranks_hold_identical_weights_and_match_one_process(options):
    """Two processes with 4 rows each take the steps of one process with 8."""
    code = (
        "import sys, torch; from slzo.__main__ import main; "
        "from slzo.callbacks import run_summary; "
        "original = run_summary.RunSummary.on_train_end\n"
        "def on_train_end(self, trainer, module):\n"
        "    torch.save({k: v.clone() for k, v in module.state_dict().items()}, f'rank{trainer.global_rank}.pt')\n"
        "    original(self, trainer, module)\n"
        "run_summary.RunSummary.on_train_end = on_train_end\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    Path("two.py").write_text(code, encoding="utf-8")
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    done = subprocess.run(
        [sys.executable, "two.py", "fit", *options, *ranks], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert summary["num_rows"] == 24
    assert summary["score_change_paired"]  # over the rows of both
    assert main(["fit", *options]) == 0
    single = tuned(run_dir(1) / "checkpoints" / "last.ckpt")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, single[name], rtol=1e-4, atol=1e-5)
    other = json.loads((run_dir(1) / "summary.json").read_text())
    assert other["score_before"] == pytest.approx(summary["score_before"])
    assert other["score_after"] == pytest.approx(summary["score_after"], abs=1 / 24 + 1e-6)


def test_ctrl_c_saves_and_says_how_to_go_on(options):
    """An interrupt loses no step; the run can be continued and its checkpoint scored."""
    command = [sys.executable, "-m", "slzo", "fit", *options, "--trainer.max_steps=100000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a job in the background of a shell ignores the signal otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    last = run_dir() / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 90
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    step = int(re.search(r"Interrupted at step (\d+); continue with the same command and --ckpt_path", output)[1])
    assert read_checkpoint(last).content["global_step"] == step
    assert main(["test", "--ckpt_path=last"]) == 0


def test_export_refuses_a_full_folder_and_needs_a_checkpoint(options, capsys):
    assert main(["export", "--output=x"]) == 2
    assert "export needs a checkpoint" in capsys.readouterr().err
    assert main(["fit", *options]) == 0
    Path("full").mkdir()
    (Path("full") / "file").touch()
    assert main(["export", "--ckpt_path=last", "--output=full"]) == 2
    assert "output 'full': exists" in capsys.readouterr().err
    assert [path.name for path in Path("full").iterdir()] == ["file"]


def test_exported_tokenizer_is_the_models(options, model_dir):
    assert main(["fit", *options]) == 0
    assert main(["export", "--ckpt_path=last", "--output=tuned"]) == 0
    text = "It was great.\nNo"
    assert AutoTokenizer.from_pretrained("tuned")(text) == AutoTokenizer.from_pretrained(model_dir)(text)


def test_custom_data_needs_no_python(options, tmp_path):
    rows = [{"review": f"a {w} one {i}", "stars": s} for i in range(30) for w, s in (("nice", "up"), ("sad", "down"))]
    for name in ("train", "test"):
        lines = (json.dumps(row | {"review": f"{name} {row['review']}"}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = {
        "data": {
            "task": {
                "class_path": "slzo.tasks.template.TemplateTask",
                "init_args": {
                    "train_file": "train.jsonl",
                    "test_file": "test.jsonl",
                    "prompt": "{review} It was",
                    "candidates": [" terrible", " great"],
                    "label_field": "stars",
                    "labels": ["down", "up"],
                },
            }
        }
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    kept = [option for option in options if not option.startswith(("--data.task", "--data.data_dir"))]
    assert main(["fit", "--config=mine.yaml", *kept]) == 0
    assert json.loads((run_dir() / "summary.json").read_text())["num_rows"] == 60


def bad(capsys, *args):
    assert main(list(args)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("slzo: error:")]
    assert len(lines) == 1
    assert error[-1] == lines[0]
    assert "Traceback" not in "\n".join(error)
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.task=sst9"], r"data\.task 'sst9': unknown task; choose one of .*sst2"),
        (["--model.model=./nope"], r"model\.model '\./nope': no such folder"),
        (["--model.model=nope.gguf"], r"model\.model 'nope\.gguf': no such GGUF file"),
        (["--model.layer=99"], r"model\.layer 99: the model has 4 decoder layers, choose 0 to 3"),
        (["--model.layer=-1"], r"model\.layer -1: "),
        (["--model.eps=0"], r"model\.eps 0"),
        (["--model.eps=-1"], r"model\.eps -1"),
        (["--model.eps=abc"], r"model\.eps 'abc': expected a number or auto"),
        (["--model.num_queries=0"], r"model\.num_queries 0"),
        (["--model.engine.queries_at_once=0"], r"model\.engine\.queries_at_once 0"),
        (["--model.epz=1"], r"model\.epz: unknown option; did you mean model\.eps\?"),
        (["--model.dtype=float64"], r"model\.dtype 'float64': choose one of float32, bfloat16, float16"),
        (["--ckpt_path=nope.ckpt"], r"ckpt_path 'nope\.ckpt': no such file"),
        (["--config=nope.yaml"], r"--config: file does not exist: .*nope\.yaml"),
        (["--trainer.precision=16-mixed"], r"trainer\.precision '16-mixed': .*model\.dtype"),
        (["--trainer.gradient_clip_val=1"], r"trainer\.gradient_clip_val 1"),
        (["--trainer.accumulate_grad_batches=2"], r"trainer\.accumulate_grad_batches 2"),
        (["--model.lr_scheduler=ReduceLROnPlateau"], r"model\.lr_scheduler 'ReduceLROnPlateau': cannot be used: it needs"),
        (["--profiler.rule=FixedLayer"], r"profiler\.rule: the chosen class needs index; set profiler\.rule\.index"),
        (["--data.task.class_path=slzo.Foo"], r"data\.task 'slzo\.Foo': no such class; choose one of .*TemplateTask|Sst2"),
        (["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=1"], r"model\.lr_scheduler: .*total_steps"),
        (["--model.scope=LoRA", "--model.scope.layers=3"], r"model\.scope\.layers '3': expected a list like \[1, 2\] or all"),
        (["--model.scope=LayerScope", "--model.scope.part=mpl"], r"model\.scope\.part 'mpl': choose one of layer"),
        (["--model.scope=LoRA", "--model.scope.rank=abc"], r"model\.scope\.rank 'abc': expected a whole number"),
        (["--model.scope.rank=4", "--model.scope=LoRA"], r"model\.scope\.rank: the class comes before its options, one of A"),
        (["--model.scope=LoRA", "--model.scope.layer=3"], r"model\.scope\.layer: unknown option of .*--model\.scope\.help"),
        (["--model.estimator=SPSA", "--model.estimator.noise=x"], r"model\.estimator\.noise 'x': choose one of gaussian, r"),
        (["--model.engine.cache_dir=/proc/nope"], r"model\.engine\.cache_dir '/proc/nope': cannot be written"),
        (["--model.optimizer.lrr=1"], r"lrr: unknown option of the chosen class"),
        (["--seed_everything=-1"], r"seed_everything: -1 is not in bounds"),
        (["--ckpt_path=nothing"], r"ckpt_path 'nothing': no such file; .*, last or best"),
        (["--trainer.val_check_interval=0"], r"trainer\.val_check_interval 0"),
        (["--trainer.strategy=foo"], r"trainer: .*strategy='foo'"),
        (["--model.optimizer=torch.optim.SDG"], r"model\.optimizer 'torch\.optim\.SDG': no such class; did you mean SGD\?"),
        (["--model.optimizer=LBFGS"], r"model\.optimizer LBFGS: cannot take"),
        (["--model.optimizer=Muon"], r"model\.optimizer Muon: cannot take"),
        (["--profiler.rule=MaxRatioJmp"], r"profiler\.rule 'MaxRatioJmp': no such class; did you mean MaxRatioJump\?"),
        (["--profiler.rule=FirstOutlierLayer"], r"profiler\.rule: no layer has max > 100"),
        (["--profiler.num_sequences=3"], r"profiler\.num_sequences 3"),
        (["--profiler.text_file=no.txt"], r"profiler\.text_file 'no\.txt': no such file"),
        (["--data.num_train=0"], r"data\.num_train 0"),
        (["--data.batch_size=0"], r"data\.batch_size 0"),
        (["--data.data_dir=nowhere"], r"data\.data_dir 'nowhere'"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line_and_status_2(options, capsys, arguments, expected):
    assert re.search(expected, bad(capsys, "fit", *options, *arguments))


def test_unknown_key_in_a_config(options, capsys):
    Path("bad.yaml").write_text("model:\n  layr: 3\n", encoding="utf-8")
    assert re.search(
        r"model\.layr: unknown option; did you mean model\.layer\?", bad(capsys, "fit", "--config=bad.yaml")
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", r"train\.jsonl:3"),
        ('{"sentence": "x", "label": 7}', r"train\.jsonl:3.*7"),
        ('{"sentence": "x"}', r"train\.jsonl:3.*label"),
        ("[1]", r"train\.jsonl:3"),
    ],
)
def test_a_broken_row_is_named(options, data_dir, tmp_path, capsys, line, expected):
    broken = tmp_path / "broken" / "sst2"
    broken.mkdir(parents=True)
    (broken / "validation.jsonl").write_text((data_dir / "sst2" / "validation.jsonl").read_text())
    lines = (data_dir / "sst2" / "train.jsonl").read_text().splitlines()
    (broken / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    assert re.search(expected, bad(capsys, "fit", *options, f"--data.data_dir={broken.parent}"))


def test_an_empty_file_is_named(options, data_dir, tmp_path, capsys):
    empty = tmp_path / "empty" / "sst2"
    empty.mkdir(parents=True)
    (empty / "validation.jsonl").write_text("")
    (empty / "train.jsonl").write_text("")
    assert re.search(r"\.jsonl.*(empty|no rows)", bad(capsys, "fit", *options, f"--data.data_dir={empty.parent}"))


def test_a_checkpoint_that_is_not_ours_is_refused(options, capsys):
    torch.save({"state_dict": {}}, "other.ckpt")
    assert "not a checkpoint written by slzo" in bad(capsys, "fit", *options, "--ckpt_path=other.ckpt")
    Path("text.ckpt").write_text("hello")
    assert "not a readable checkpoint" in bad(capsys, "fit", *options, "--ckpt_path=text.ckpt")


def test_a_checkpoint_of_another_model_is_refused(options, capsys, tmp_path):
    from conftest import tiny_model

    assert main(["fit", *options]) == 0
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    capsys.readouterr()
    line = bad(capsys, "test", *options, f"--model.model={tmp_path / 'other'}", "--ckpt_path=last")
    assert "does not fit model" in line


def test_divergence_stops_the_run_and_says_so(options, capsys):
    options = [*options, "--guard.factor=null"]  # it would take the run back
    line = bad(capsys, "fit", *options, "--model.optimizer.lr=1e38", "--model.max_nonfinite=2")
    assert "training diverged" in line


def test_export_runs_foreign_code_only_if_told_to(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    path = run_dir() / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path).content
    checkpoint["slzo"]["trust_remote_code"] = True
    checkpoint_file.write(checkpoint, path)
    assert main(["export", f"--ckpt_path={path}", "--output=out"]) == 2
    assert "give --model.trust_remote_code true" in capsys.readouterr().err
    assert main(["export", f"--ckpt_path={path}", "--output=out", "--model.trust_remote_code=true"]) == 0


def test_in_python_the_tokenizer_must_fit_the_model(model_dir, data_dir, tmp_path):
    """On the command line it is the model's own."""
    for name, more in (("other", []), ("larger", [f"<{n}>" for n in range(400)])):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(more)
        tokenizer.save_pretrained(tmp_path / name)
        shutil.copy(model_dir / "config.json", tmp_path / name)
    settings = {"max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    trainer = ZOTrainer(accelerator="cpu", default_root_dir=tmp_path, **settings)

    def fit(name):
        rows = TaskDataModule("sst2", str(tmp_path / name), str(data_dir), num_train=8, num_dev=4, batch_size=4)
        trainer.fit(ZOModule(str(model_dir), 1), datamodule=rows)

    with pytest.warns(UserWarning, match=r"data\.tokenizer '.*other' is not that of model\.model"):
        fit("other")
    with pytest.raises(SlzoError, match=r"data\.tokenizer '.*larger': has \d+ tokens, model '.*' knows \d+"):
        fit("larger")


def test_the_last_run_of_another_folder(options, capsys):
    options = [*options, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=elsewhere"]
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert main(["test", *options, "--ckpt_path=last"]) == 0
    assert "Using the last checkpoint of the newest run, elsewhere" in capsys.readouterr().out
