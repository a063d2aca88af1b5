"""Damaged and invalid checkpoints, and those of another model, are refused in one line."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line, last_checkpoint, run_dir, run_fit, tiny_model, tuned
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.callbacks.checkpoints import BestCheckpoint
from slzo.checkpoints import checkpoint_file, find
from slzo.checkpoints.checkpoint import Checkpoint, read_checkpoint, read_tuned, write_checkpoint
from slzo.checkpoints.find import RUNS, best_file, find_checkpoint, newest_checkpoint
from slzo.checkpoints.metadata import CHECKPOINT_FORMAT
from slzo.models.fingerprint import Fingerprint
from slzo.utils.errors import SlzoError

CHECKPOINT = "run/checkpoints/last.ckpt"
FIT = ["fit", "--config=run/config.yaml", f"--ckpt_path={CHECKPOINT}", "--trainer.max_steps=8"]
EXPORT = ["export", f"--ckpt_path={CHECKPOINT}", "--output=out"]
UP = "model.layers.0.mlp.up_proj.weight"


def train(model_dir, data_dir):
    """A run of four steps, with its model and rows."""
    shutil.copytree(model_dir, "model")
    shutil.copytree(data_dir, "data")
    options = (
        "--model.model=model --data.task=sst2 --data.data_dir=data --data.num_train=12 --data.num_dev=4 --data.num_test=4 "
        "--data.batch_size=4 --trainer.accelerator=cpu --trainer.max_steps=4 --trainer.val_check_interval=2 --model.layer=0 "
        "--model.eps=1e-3 --model.optimizer=Adam --model.optimizer.lr=1e-3 --model.engine.onednn=false"
    )
    run_fit(*options.split())
    run_dir().rename("run")
    Path("runs").rmdir()


@pytest.fixture
def run(once, model_dir, data_dir, own_folder):
    """The run, its model and its rows in the current folder."""
    once(train, model_dir, data_dir)


def change(function):
    """Change the checkpoint by hand."""
    content = checkpoint_file.read(CHECKPOINT)
    function(content)
    checkpoint_file.write(content, Path(CHECKPOINT))


LAYOUT = {
    "metadata": "adapter auto_step base candidates chat chat_template data dtype environment format hub layer layer_reason "
    "max_length max_new_tokens metrics model noise_seed nonfinite_in_row num_appended_tokens num_demonstrations num_evaluations "
    "num_nonfinite onednn prompt_length quantization scope settings stop system_prompt task tensors trust_remote_code",
    "OutlierProfiler": "profile",
    "LossGuard": "first good lowest rollbacks",
    "StepWatch": "size_at_start zeros",
    "RunRecord": "before peak_memory_gb points samples seconds train_seconds",
}
"""Keys of the metadata and of the callbacks' states."""


def test_a_new_layout_needs_a_new_format(run):
    content = read_checkpoint(CHECKPOINT).content
    states = {name.partition("{")[0]: state for name, state in content["callbacks"].items()}
    del states["BestCheckpoint"]  # Lightning's own
    found = {name: " ".join(sorted(keys)) for name, keys in {"metadata": content["slzo"], **states}.items()}
    assert (CHECKPOINT_FORMAT, found) == (3, LAYOUT)


def test_another_format_is_refused(run, capsys):
    change(put(1, "slzo", "format"))
    assert "has format 1, and this slzo reads 3" in error_line(capsys, *EXPORT)


# ---- the base model --------------------------------------------------------------------------------------------------------


def other_weights(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def other_frozen_weights(model):
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)


def one_tuned_weight(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 1e-3


def other_config(model):
    model.config.rms_norm_eps = 1e-5


GIVEN = f"--ckpt_path={CHECKPOINT}"
COMMANDS = (FIT, EXPORT, ["validate", GIVEN], ["test", GIVEN], ["predict", GIVEN, "--output=p.jsonl"])


@pytest.mark.parametrize(
    ("become", "told", "commands"),
    [
        pytest.param(other_weights, "different weights", COMMANDS, marks=pytest.mark.slow),
        (other_frozen_weights, "different weights", COMMANDS),
        pytest.param(one_tuned_weight, "different weights", COMMANDS, marks=pytest.mark.slow),
        (other_config, "rms_norm_eps: 1e-06 -> 1e-05", COMMANDS[:1]),
    ],
)
def test_a_folder_that_holds_another_model_of_the_same_shape_is_refused(run, capsys, become, told, commands):
    model = AutoModelForCausalLM.from_pretrained("model")
    become(model)
    model.save_pretrained("model")
    for command in commands:
        line = error_line(capsys, *command)
        assert "was trained on another base model" in line, command
        assert told in line, command
    assert not Path("out").exists()
    assert not Path("p.jsonl").exists()
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_command_without_an_option_for_the_model_says_where_it_must_be(run, capsys):
    shutil.move("model", "elsewhere")
    for command in (EXPORT, ["generate", GIVEN, "--prompt=It"]):
        line = error_line(capsys, *command)
        assert line.startswith(
            f"slzo: error: ckpt_path '{CHECKPOINT}': needs its base model 'model' where the run found it"
        ), line
    Path("model").symlink_to("elsewhere")
    assert main(EXPORT) == 0


def test_another_type_of_the_same_weights_is_the_same_model(run, capsys):
    assert main(["test", f"--ckpt_path={CHECKPOINT}", "--model.dtype=bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained("model")
    other_weights(model)
    model.save_pretrained("model")
    line = error_line(capsys, "test", f"--ckpt_path={CHECKPOINT}", "--model.dtype=bfloat16")
    assert "different weights" in line


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_fingerprint_does_not_depend_on_how_the_model_is_loaded(tmp_path, saved):
    tiny_model().to(saved).save_pretrained(tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    found = [Fingerprint.of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind)) for kind in kinds]
    other_weights(model := AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    for one in found:
        for other in found:
            one.check(other.to_dict())
        with pytest.raises(SlzoError, match="different weights"):
            one.check(Fingerprint.of(model).to_dict())


def test_a_fingerprint_samples_all_columns_of_a_matrix():
    """With a stride that the width divides, only the first column would be compared."""
    model = tiny_model(vocab_size=4096, hidden_size=32)
    before = Fingerprint.of(model)
    weight = model.get_input_embeddings().weight
    assert weight.numel() // 1024 % weight.shape[1] == 0
    with torch.no_grad():
        weight[:, 1:] += 1
    with pytest.raises(SlzoError, match="the same shape, different weights"):
        Fingerprint.of(model).check(before.to_dict())


def test_the_fingerprint_is_that_of_the_untuned_model(run):
    """After training as before it: a resumed run compares with the base model."""
    assert main(FIT) == 0
    first, second = read_checkpoint(CHECKPOINT), read_checkpoint(last_checkpoint())
    assert first.metadata["base"] == second.metadata["base"]
    assert not torch.equal(first.content["state_dict"][UP], second.content["state_dict"][UP])


@pytest.mark.parametrize(
    "scope",
    [
        "LoRA",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("OutlierChannels", "PrefixTuning", "ActivationSubspace", "SmallestWeights")
        ),
        pytest.param("AllParameters", marks=pytest.mark.slow),
    ],
)
def test_every_scope_knows_its_base_model(options, capsys, tmp_path, model_dir, scope):
    options = [*options, f"--model.scope={scope}", "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    assert main(["test", *options, "--ckpt_path=last"]) == 0
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tiny_model("llama", scale=1.0, seed=1).save_pretrained(other)
    line = error_line(capsys, "test", *options, f"--model.model={other}", "--ckpt_path=last")
    assert "the same shape, different weights" in line


def test_all_of_what_is_tuned_and_a_sample_of_the_rest_is_compared():
    model = tiny_model(hidden_size=64, head_dim=16)
    tuned, frozen = (model.model.layers[layer].mlp.up_proj.weight.data for layer in (1, 2))

    def found():
        return Fingerprint.of(model).with_tuned({"up": tuned})

    before = found().to_dict()
    found().check(before)
    frozen[0, 1] += 1  # not in the sample
    found().check(before)
    tuned[0, 1] += 1
    with pytest.raises(SlzoError, match="different weights in the tuned tensors"):
        found().check(before)


def test_the_fingerprint_of_a_large_model_takes_no_time():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 15, "head_dim": 64, "vocab_size": 8192}
    model = tiny_model("llama", num_attention_heads=9, num_key_value_heads=3, **sizes)
    layer = {name: p for name, p in model.named_parameters() if ".layers.3." in name}
    started = time.process_time()
    Fingerprint.of(model).with_tuned(layer)
    assert time.process_time() - started < 0.5


# ---- damage --------------------------------------------------------------------------------------------------------------


def test_flipped_bytes_are_never_taken_for_weights(run):
    """Wherever a byte is flipped, the file is refused or its content is what it was."""
    path = Path(CHECKPOINT)
    whole, expected = path.read_bytes(), read_checkpoint(path).content
    refused = 0
    for place in range(0, len(whole), 307):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = read_checkpoint(path).content
        except SlzoError:
            refused += 1
            continue
        for name, tensor in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], tensor)
        assert repr(found["loops"]) == repr(expected["loops"])
    assert refused > 100


def test_a_damaged_file_is_refused_by_every_command(run, capsys):
    path = Path(CHECKPOINT)
    whole = path.read_bytes()
    place = whole.index(tuned(path)[UP].numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x00\x01\x02\x03" + whole[place + 4 :])
    for command in (FIT, EXPORT, ["test", f"--ckpt_path={path}"]):
        assert "damaged" in error_line(capsys, *command)
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in error_line(capsys, "test", f"--ckpt_path={path}")


def test_weights_that_look_like_the_end_of_a_zip_file_are_read(run):
    end = torch.frombuffer(bytearray(b"PK\x05\x06" + bytes(18)), dtype=torch.uint8)
    change(put(end, "state_dict", "end"))
    assert torch.equal(read_checkpoint(CHECKPOINT).content["state_dict"]["end"], end)
    assert torch.equal(read_tuned(CHECKPOINT)["end"], end)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_neither_read_nor_written(run, capsys, value):
    def spoil(content):
        content["state_dict"][UP][0, 0] = value

    change(spoil)
    assert "infinite or not a number" in error_line(capsys, *EXPORT)
    assert not Path("out").exists()
    with pytest.raises(SlzoError, match="training diverged: at step 4"):
        write_checkpoint(checkpoint_file.read(CHECKPOINT), "new.ckpt")
    assert not Path("new.ckpt").exists()


def test_last_falls_back_to_the_newest_whole_file_and_says_so(run, capsys, monkeypatch):
    folder = Path("runs/version_0/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy("run/config.yaml", folder.parent)
    for age, name in enumerate(("last.ckpt", "step=4.ckpt", "step=2.ckpt")):
        shutil.copy(CHECKPOINT, folder / name)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert Path(newest_checkpoint("runs").path).name == "last.ckpt"
    assert capsys.readouterr().err == ""
    for name in ("last.ckpt", "step=4.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    assert main(["test", "--ckpt_path=last"]) == 0
    printed = capsys.readouterr()
    assert "last.ckpt': not a readable checkpoint" in printed.err
    assert "step=2.ckpt is the newest intact checkpoint" in printed.err
    monkeypatch.setenv("RANK", "1")
    newest_checkpoint("runs")
    assert capsys.readouterr().err == ""  # only the first process reports it
    monkeypatch.delenv("RANK")
    (folder / "step=2.ckpt").write_bytes(b"")
    assert "no checkpoint below 'runs' is intact" in error_line(capsys, "test", "--ckpt_path=last")


def test_a_checkpoint_is_found_while_another_process_writes_files(run, monkeypatch):
    """The hidden folder of a file that is being written is gone a moment later."""
    hidden, scandir = Path("run/.history.json-1.slzo-partial"), os.scandir
    hidden.mkdir()

    def late(path):
        if Path(path) == hidden:
            hidden.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert newest_checkpoint("run").path == CHECKPOINT
    assert not hidden.exists()


def test_a_run_with_weights_alone_is_scored_and_not_continued(run, capsys):
    """Such as one of a plain Trainer with save_weights_only, or whose last.ckpt was removed."""
    whole = read_checkpoint(CHECKPOINT).content
    folder = Path("runs/version_1/checkpoints")
    folder.mkdir(parents=True)
    write_checkpoint({name: whole[name] for name in ("state_dict", "global_step", "slzo")}, folder / "step=4.ckpt")
    shutil.copytree("run", "runs/version_0")
    for path in Path("runs/version_0/checkpoints").iterdir():
        os.utime(path, (1e9, 1e9))  # an earlier run, which is another one
    for given in ("runs/version_1", "last"):
        assert find_checkpoint(given, RUNS).path == str(folder / "step=4.ckpt")
        assert "step=4.ckpt is the newest intact checkpoint" in capsys.readouterr().err
    refused = error_line(capsys, *FIT, "--ckpt_path=runs/version_1")
    assert "step=4.ckpt': holds weights only" in refused
    for given, told in (("run", "raise trainer.max_steps"), ("runs/version_1", "it holds weights only, which cannot")):
        assert main([*FIT, f"--ckpt_path={given}", "--trainer.max_steps=4"]) == 0
        assert f"has all 4 steps (trainer.max_steps 4); {told}" in capsys.readouterr().out
    write_checkpoint(whole, folder / "step=2.ckpt")
    os.utime(folder / "step=2.ckpt", (1.1e9, 1.1e9))
    assert find_checkpoint("last", RUNS).path == str(folder / "step=2.ckpt")


def test_the_best_state_is_never_that_of_another_project(run):
    """A folder of the same name in the current folder holds runs of something else."""
    callbacks = read_checkpoint(CHECKPOINT).content["callbacks"]
    state = next(state for name, state in callbacks.items() if name.startswith("BestCheckpoint"))
    foreign = Path(state["best_model_path"])
    assert not foreign.is_absolute()
    foreign.parent.mkdir(parents=True)
    shutil.copy(CHECKPOINT, foreign)
    own = Path("run/checkpoints", foreign.name)
    assert find_checkpoint("run", RUNS).path == str(own)
    best = BestCheckpoint()
    best.on_load_checkpoint(SimpleNamespace(ckpt_path=CHECKPOINT, state=SimpleNamespace(fn="fit")), None, {})
    best.load_state_dict(state)
    assert [best.best_model_path, *best.best_k_models] == [str(own.absolute())] * 2
    shutil.copytree("run", "moved/version_1")  # a resumed run and the one that it continued, in another place
    (foreign := Path("moved").joinpath(*foreign.parts[-3:])).parent.mkdir(parents=True)
    shutil.move(Path("moved/version_1/checkpoints", own.name), foreign)
    assert find_checkpoint(Path("moved/version_1").absolute(), RUNS).path == str(foreign.absolute())


@pytest.mark.fast
def test_the_best_state_is_that_of_the_first_callback_that_saves(tmp_path):
    """Another one may watch another metric, and save what the guard has rolled back."""
    other = tmp_path / "step=2.ckpt"
    other.touch()
    for saved, expected in (("", None), ("gone.ckpt", None), (str(other), other)):
        states = {"guard": {}, "first": {"best_model_path": saved}, "second": {"best_model_path": str(other)}}
        assert find._best_of(Checkpoint(str(tmp_path / "last.ckpt"), {"callbacks": states})) == expected


@pytest.mark.usefixtures("own_folder")
def test_a_renamed_run_has_its_own_best_state_and_a_copied_checkpoint_finds_it(tmp_path):
    saved = Path("runs/version_0/checkpoints/step=4.ckpt")
    for place in (saved, Path("runs/good/checkpoints/step=4.ckpt")):  # version_0 is a new run
        place.parent.mkdir(parents=True)
        place.touch()
    renamed = Path("runs/good/checkpoints/last.ckpt")
    assert best_file(str(saved), renamed) == renamed.with_name("step=4.ckpt")
    assert best_file(str(saved), tmp_path / "backup" / "last.ckpt") == saved
    assert best_file(str(saved), renamed.parents[2] / "other" / "checkpoints" / "last.ckpt") == saved
    assert best_file(str(saved.absolute()), renamed) == saved.absolute()


# ---- what is in it --------------------------------------------------------------------------------------------------------


def put(value, *names):
    def function(content):
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return function


def drop(*names):
    def function(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return function


def put_tensor(**entry):
    return put({"kind": "masked", "shape": [64, 32], **entry}, "slzo", "tensors", UP)


METADATA_FIELDS = "scope adapter tensors layer num_evaluations model layer_reason dtype trust_remote_code noise_seed"
METADATA_FIELDS += " num_nonfinite auto_step nonfinite_in_row base onednn data settings"
BROKEN = [
    *(drop("slzo", name) for name in METADATA_FIELDS.split()),
    drop("state_dict"),
    drop("global_step"),
    put({}, "state_dict"),
    put([1], "state_dict"),
    put({UP: 1.0}, "state_dict"),
    put(torch.ones(1), "state_dict", UP),
    drop("slzo", "format"),
    put("3", "slzo", "format"),
    put([], "slzo"),
    drop("slzo", "tensors", UP),
    *(put(kind, "slzo", "tensors", UP, "kind") for kind in ("half", "subspace", "masked")),
    put([3, 5], "slzo", "tensors", UP, "shape"),
    put(torch.ones(2), "slzo", "tensors", UP, "index"),
    *(put_tensor(index=torch.tensor([value])) for value in (9999, -1, 0.5, 3)),
    *(put_tensor(kind="subspace", basis=torch.ones(size)) for size in ((3, 2), (32,))),
    put({"kind": "whole", "shape": [64, 32]}, "slzo", "tensors", "model.layers.7.mlp.up_proj.weight"),
    *(put(adapter, "slzo", "adapter") for adapter in ({"kind": "lora"}, {"kind": "sand"}, {})),
]


# a quarter of them, of all kinds, without -m slow
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n % 4 == 0 else pytest.mark.slow) for n in range(len(BROKEN))]
)
def test_a_checkpoint_that_was_changed_by_hand_is_one_line(run, capsys, number):
    change(BROKEN[number])
    assert error_line(capsys, *EXPORT)
    assert not Path("out").exists()
    if number % 5 == 0:
        assert error_line(capsys, *FIT)
        assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_read_is_no_broken_checkpoint(run, capsys, monkeypatch, number):
    """Compiled readers make a ValueError of what a signal's handler raises."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    original = checkpoint_file.read

    def interrupted(path):
        try:
            os.kill(os.getpid(), number)
            time.sleep(0)
        except BaseException as error:
            raise ValueError("of a compiled reader") from error
        return original(path)

    monkeypatch.setattr(checkpoint_file, "read", interrupted)
    try:
        assert main(["test", f"--ckpt_path={CHECKPOINT}"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert "not a readable checkpoint" not in capsys.readouterr().err


def test_too_little_memory_is_no_broken_checkpoint(run, monkeypatch):
    """Otherwise a run would continue from an older checkpoint."""

    def out_of_memory(path):
        raise MemoryError

    monkeypatch.setattr(checkpoint_file, "read", out_of_memory)
    with pytest.raises(MemoryError):
        read_checkpoint(CHECKPOINT)


def test_weights_alone_can_be_scored_but_not_continued(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--checkpoint.save_weights_only=true"]) == 0
    best = run_dir() / "checkpoints" / "step=2.ckpt"
    assert "holds weights only" in error_line(capsys, "fit", *options, f"--ckpt_path={best}")
    assert main(["test", *options, f"--ckpt_path={best}"]) == 0
    assert main(["export", f"--ckpt_path={best}", "--output=out"]) == 0
    last_checkpoint().write_bytes(b"")
    assert "step=2.ckpt': holds weights only" in error_line(capsys, "fit", *options, "--ckpt_path=last")


def test_another_optimizer_or_scheduler_on_resume_is_refused(run, capsys):
    line = error_line(capsys, *FIT, "--model.optimizer=SGD", "--model.optimizer.lr=1e-3")
    assert "model.optimizer SGD: the checkpoint was trained with Adam" in line
    change(put("LinearLR", "slzo", "settings", "model.lr_scheduler"))
    line = error_line(capsys, *FIT, "--model.lr_scheduler=ConstantLR")
    assert "model.lr_scheduler ConstantLR: the checkpoint was trained with LinearLR" in line
    assert not list(Path("runs").glob("*"))


def test_a_checkpoint_runs_no_code(run, capsys):
    class Payload:
        def __reduce__(self):
            return (open, ("payload", "w"))

    torch.save(checkpoint_file.read(CHECKPOINT) | {"payload": Payload()}, CHECKPOINT)
    assert "not a readable checkpoint" in error_line(capsys, "test", f"--ckpt_path={CHECKPOINT}")
    assert not Path("payload").exists()
