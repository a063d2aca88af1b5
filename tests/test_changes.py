"""What may change under a run, as the table in docs/reliability.md says: continued exactly, with a warning, or refused."""

import io
import json
import os
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_lines, same_tensors, tuned, write_lines
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.utils.environment import numerics

pytestmark = pytest.mark.slow
CHECKPOINT = "runs/version_0/checkpoints/last.ckpt"


def edited_rows(split):
    """Append a word to the text of every row."""

    def change(folder, monkeypatch):
        file = folder / "rows" / "sst2" / f"{split}.jsonl"
        write_lines(file, [row | {"sentence": row["sentence"] + " indeed"} for row in read_lines(file)])

    return change


def edited_json(name, edit):
    """Edit a JSON file of the model."""

    def change(folder, monkeypatch):
        file = folder / "model" / name
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))

    return change


def swap_two_tokens(tokenizer):
    known = tokenizer["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]


def new_weights(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    model.save_pretrained(folder / "model")


def renamed(old, new):
    return lambda folder, monkeypatch: (folder / old).rename(folder / new)


def environment(name, value):
    """Another processor, version or device than that of the run."""

    def change(folder, monkeypatch):
        monkeypatch.setattr("slzo.training.resume.numerics", lambda *place: numerics(*place) | {name: value})
        if name == "device":
            for module in ("slzo.training.loss_log", "slzo.experiments.replay"):
                monkeypatch.setattr(f"{module}.device_name", lambda device: value)

    return change


# what changes, by the first column of the table: what is done in the working folder of the run, and further options
CHANGES = {
    "training rows": [(edited_rows("train"), {})],
    "held-out rows": [(edited_rows("validation"), {})],
    "`data.num_train` and other options that change training rows": [(None, {"data.num_train": 30})],
    "`data.max_length`": [(None, {"data.max_length": 12})],
    "tokenizer": [(edited_json("tokenizer.json", swap_two_tokens), {})],
    "weights of the base model": [(new_weights, {})],
    "config.json of the base model": [(edited_json("config.json", lambda c: c.update(rms_norm_eps=0.1)), {})],
    "layer, scope, class of the optimizer": [
        (None, {"model.layer": 2}),
        (None, {"model.scope": "LoRA"}),
        (None, {"model.optimizer": "Adam", "model.optimizer.lr": 1e-3}),
    ],
    "options of estimator, optimizer and step, such as `model.optimizer.lr`": [
        (None, {"model.optimizer.lr": 1e-4}),
        (None, {"model.num_queries": 2}),
        (None, {"model.estimator": "OneSided"}),
    ],
    "`model.dtype`, `model.quantization`": [(None, {"model.dtype": "bfloat16"})],
    "`model.engine` options, `model.max_nonfinite`, `model.parallel`": [
        (None, {"model.engine.packed": False}),
        (None, {"model.max_nonfinite": 5}),
        (None, {"model.parallel": "directions"}),
    ],
    "`model.device_map`, `model.offload_folder`": [(None, {"model.device_map": "sequential"})],
    "`data.batch_size`, `data.objective`, `data.reward`": [
        (None, {"data.batch_size": 4}),
        (None, {"data.objective": "metric"}),
    ],
    "`data.tokens_per_pass`, `data.eval_batch_size`, `data.eval_batch_tokens`": [
        (None, {"data.tokens_per_pass": 64}),
        (None, {"data.eval_batch_tokens": 64}),
    ],
    "`data.num_test`, `data.num_demonstrations`": [
        (None, {"data.num_test": 12}),
        (None, {"data.num_demonstrations": 1}),
    ],
    "trainer options that no step depends on": [
        (None, {"trainer.val_check_interval": 1}),
        (None, {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": "runs"}),
    ],
    "folder of the run": [(renamed("runs", "moved"), {"ckpt_path": CHECKPOINT.replace("runs", "moved")})],
    "folder of the model": [(renamed("model", "moved"), {"model.model": "moved"})],
    "number of threads": [(environment("threads", 64), {})],
    "number of processes": [(environment("processes", 2), {})],
    "processor": [(environment("processor", "another"), {})],
    "version of slzo, torch or transformers": [(environment("torch", "9.0"), {}), (environment("slzo", "9.0"), {})],
    "CPU to GPU, or another GPU": [(environment("device", "NVIDIA H100"), {})],
}
# exit status and kinds of messages
OUTCOMES = {"exact": (0, set()), "unchecked": (0, set()), "warning": (0, {"warning"}), "refused": (2, {"error"})}
CASES = [(name, number) for name, variants in CHANGES.items() for number in range(len(variants))]


def table():
    """Outcomes by what changes, for resume, test and replay."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    below = page.partition("| what changes |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines()[2:]]
    return {name: outcomes for name, *outcomes in rows}


@pytest.fixture(scope="module")
def runs(model_dir, data_dir, tmp_path_factory):
    """A working folder with model, rows, a run of two steps, and one of four; its options; what ``slzo test`` prints."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(model_dir, folder / "model")
    shutil.copytree(data_dir, folder / "rows")
    options = {
        "model.model": "model",
        "data.task": "sst2",
        "data.data_dir": "rows",
        "data.num_train": 40,
        "data.num_dev": 16,
        "data.batch_size": 8,
        "model.layer": 1,
        "model.eps": 1e-3,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 1e-3,
        "record.test_before": False,
        "trainer.val_check_interval": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
    }
    before = Path.cwd()
    os.chdir(folder)
    try:
        for steps in (2, 4):
            assert main(["fit", *words(options | {"trainer.max_steps": steps})]) == 0
        with redirect_stdout(io.StringIO()) as printed:
            assert main(["test", f"--ckpt_path={CHECKPOINT}"]) == 0
        shutil.rmtree("runs/version_2")
    finally:
        os.chdir(before)
    return folder, options, printed.getvalue()


def words(options):
    return [f"--{name}={value}" for name, value in options.items()]


def test_every_row_of_the_table_is_tested():
    assert list(table()) == list(CHANGES)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_change_has_the_outcome_of_the_table(runs, tmp_path, monkeypatch, capsys, name, number):
    folder, options, expected = runs
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    change, given = CHANGES[name][number]
    if change is not None:
        change(here, monkeypatch)
    given = {"ckpt_path": CHECKPOINT} | given
    run = given["ckpt_path"].partition("/checkpoints")[0]
    resume, score, replay = table()[name]

    whole = tuned(given["ckpt_path"].replace("version_0", "version_1"))
    check(capsys, resume, ["fit", *words(options | {"trainer.max_steps": 4} | given)])
    if resume == "exact":
        found = max(here.glob("*/version_*/checkpoints/last.ckpt"), key=os.path.getmtime)
        assert same_tensors(tuned(found), whole)

    printed = check(capsys, score, ["test", *words(given)])
    if score == "exact":
        assert metrics(printed) == metrics(expected)
    own = {name: value for name, value in given.items() if name != "ckpt_path"}
    check(capsys, replay, ["replay", f"--run={run}", "--output=replayed.ckpt", *words(own)])
    if replay == "exact":
        assert same_tensors(tuned("replayed.ckpt"), tuned(given["ckpt_path"]))


def check(capsys, outcome, command):
    """Check that a command continues, continues with a warning, or is refused in one line."""
    capsys.readouterr()
    status = main(command)
    printed, errors = capsys.readouterr()
    # rows that are cut are reported in every run
    kinds = re.findall("^slzo: (warning|error): (?!data.max_length)", errors, re.MULTILINE)
    assert (status, set(kinds)) == OUTCOMES[outcome], errors
    return printed


def metrics(printed):
    """The table that ``slzo test`` prints."""
    found = re.findall(r"test/\w+\W+[0-9.e-]+", printed)
    assert found
    return found
