"""Checkpoints know what they are: damaged, broken, or of another model they are refused in one line."""

import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_dir, tiny_model, tuned
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slzo.checkpoints import checkpoint_file
from slzo.__main__ import main
from slzo.checkpoints.checkpoint import CHECKPOINT_FORMAT, newest_checkpoint, read_checkpoint, write_checkpoint
from slzo.utils.errors import SlzoError
from slzo.models.fingerprint import Fingerprint

FIXTURES = Path(__file__).parent / "fixtures"
FORMER = FIXTURES / "format_2" / "run" / "checkpoints" / "last.ckpt"
ZIPPED = FIXTURES / "format_3" / "run" / "checkpoints" / "last.ckpt"
PRESENT = FIXTURES / "format_4" / "run" / "checkpoints" / "last.ckpt"


def refused(capsys, *args):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(list(args)) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n")
    (line,) = [line for line in error.splitlines() if line.startswith("slzo: error:")]
    assert "Traceback" not in error
    return line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run of format 4 with its model and rows, in a folder of its own."""
    for name in ("model", "data"):
        shutil.copytree(FIXTURES / "format_2" / name, tmp_path / name)
    shutil.copytree(FIXTURES / "format_4" / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return "run/checkpoints/last.ckpt"


def change(path, function):
    """Change a checkpoint by hand."""
    content = checkpoint_file.read(path)
    function(content)
    checkpoint_file.write(content, Path(path))


# ---- formats -------------------------------------------------------------------------------------------------------------


def test_a_fixture_of_each_format_is_kept():
    assert read_checkpoint(FORMER).note["format"] == 2
    assert read_checkpoint(ZIPPED).note["format"] == 3
    assert read_checkpoint(PRESENT).note["format"] == CHECKPOINT_FORMAT == 4


@pytest.mark.parametrize("source", [ZIPPED, PRESENT])
def test_a_run_of_each_format_is_continued_scored_and_exported(run, capsys, source):
    shutil.copytree(source.parents[1], "run", dirs_exist_ok=True)
    assert main(["fit", "--config=run/config.yaml", f"--ckpt_path={run}", "--trainer.max_steps=8"]) == 0
    found, start = tuned(run_dir() / "checkpoints" / "last.ckpt"), tuned(run)
    for name, expected in load_file(source.parents[2] / "expected.safetensors").items():
        assert (found[name] - expected).abs().max() < 1e-3 * (expected - start[name]).abs().max(), name
    assert main(["test", f"--ckpt_path={run}"]) == 0
    assert "without a fingerprint" not in capsys.readouterr().out
    assert main(["export", f"--ckpt_path={run}", "--output=out"]) == 0
    state = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in start.items())


def test_a_former_format_is_read_and_said_to_have_no_fingerprint_once(run, capsys):
    shutil.copy(FORMER, run)
    assert main(["fit", "--config=run/config.yaml", f"--ckpt_path={run}", "--trainer.max_steps=6"]) == 0
    assert capsys.readouterr().out.count("without a fingerprint") == 1
    assert read_checkpoint(run_dir() / "checkpoints" / "last.ckpt").note["base"]["tuned"]


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


@pytest.mark.parametrize(
    ("become", "told"),
    [
        (other_weights, "other weights"),
        (other_frozen_weights, "other weights"),
        (one_tuned_weight, "other weights"),
        (other_config, "rms_norm_eps: 1e-06 -> 1e-05"),
    ],
)
def test_a_folder_that_holds_another_model_of_the_same_shape_is_refused(run, capsys, become, told):
    model = AutoModelForCausalLM.from_pretrained("model")
    become(model)
    model.save_pretrained("model")
    commands = {
        "fit": ["--config=run/config.yaml", "--trainer.max_steps=8"],
        "validate": [],
        "test": [],
        "predict": ["--output=p.jsonl"],
        "export": ["--output=out"],
    }
    for command, more in commands.items():
        line = refused(capsys, command, *more, f"--ckpt_path={run}")
        assert "does not fit model.model" in line, command
        assert told in line, command
    assert not Path("out").exists()
    assert not Path("p.jsonl").exists()
    assert not list(Path("runs").rglob("*.ckpt"))


def test_another_type_of_the_same_weights_is_the_same_model(run):
    assert main(["test", f"--ckpt_path={run}", "--model.dtype=bfloat16"]) == 0
    assert main(["test", f"--ckpt_path={run}", "--model.dtype=float16"]) == 0


def test_another_type_of_other_weights_is_not(run, capsys):
    model = AutoModelForCausalLM.from_pretrained("model")
    other_weights(model)
    model.save_pretrained("model")
    assert "other weights" in refused(capsys, "test", f"--ckpt_path={run}", "--model.dtype=bfloat16")


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_fingerprint_does_not_depend_on_how_the_model_is_loaded(tmp_path, saved):
    tiny_model().to(saved).save_pretrained(tmp_path)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    found = [Fingerprint.of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind)) for kind in kinds]
    for one in found:
        for other in found:
            one.check(other.to_dict())
    other_weights(model := AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    for one in found:
        with pytest.raises(SlzoError, match="other weights"):
            one.check(Fingerprint.of(model).to_dict())


def test_the_fingerprint_is_that_of_the_untuned_model(options):
    """After training as before it: a resumed run compares with the base model."""
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    first, second = (read_checkpoint(run_dir(i) / "checkpoints" / "last.ckpt") for i in (0, 1))
    assert first.note["base"] == second.note["base"]
    name = next(iter(first.content["state_dict"]))
    assert not torch.equal(first.content["state_dict"][name], second.content["state_dict"][name])


@pytest.mark.parametrize(
    "scope", ["LoRA", "PrefixTuning", "ActivationSubspace", "OutlierChannels", "SmallestWeights", "AllParameters"]
)
def test_every_scope_knows_its_base_model(options, capsys, tmp_path, model_dir, scope):
    options = [*options, f"--model.scope={scope}", "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    assert main(["test", *options, "--ckpt_path=last"]) == 0
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tiny_model("llama", scale=1.0, seed=1).save_pretrained(other)
    line = refused(capsys, "test", *options, f"--model.model={other}", "--ckpt_path=last")
    assert "the same shape, other weights" in line


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
    with pytest.raises(SlzoError, match="other weights in what is tuned"):
        found().check(before)


def test_the_fingerprint_of_a_large_model_takes_no_time():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64, "vocab_size": 8192}
    model = tiny_model("llama", num_attention_heads=9, num_key_value_heads=3, **sizes)
    layer = {name: p for name, p in model.named_parameters() if ".layers.3." in name}
    started = time.process_time()
    Fingerprint.of(model).with_tuned(layer)
    assert time.process_time() - started < 1


# ---- damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [FORMER, ZIPPED, PRESENT])
def test_flipped_bytes_are_never_taken_for_weights(tmp_path, source):
    """Wherever a byte is flipped, the file is refused or its content is what it was."""
    whole, path = source.read_bytes(), tmp_path / "last.ckpt"
    expected = read_checkpoint(source).content
    refused = 0
    for place in range(0, len(whole), 101):
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


def test_every_tensor_of_the_former_formats_has_a_checksum():
    with zipfile.ZipFile(ZIPPED) as archive:
        sizes = {entry.filename: (entry.file_size, entry.CRC) for entry in archive.infolist()}
    assert all(crc != 0 for size, crc in sizes.values() if size)


def test_a_damaged_file_is_refused_by_every_command(run, capsys):
    whole = Path(run).read_bytes()
    place = whole.index(tuned(run)["model.layers.0.mlp.up_proj.weight"].numpy().tobytes())
    Path(run).write_bytes(whole[:place] + b"\x00\x01\x02\x03" + whole[place + 4 :])
    for command in ("fit", "test", "export"):
        more = ["--config=run/config.yaml"] if command == "fit" else ["--output=out"] if command == "export" else []
        line = refused(capsys, command, *more, f"--ckpt_path={run}")
        assert "damaged" in line
    Path(run).write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in refused(capsys, "test", f"--ckpt_path={run}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_neither_read_nor_written(run, capsys, value):
    def spoil(content):
        content["state_dict"]["model.layers.0.mlp.up_proj.weight"][0, 0] = value

    change(run, spoil)
    assert "infinite or not a number" in refused(capsys, "export", f"--ckpt_path={run}", "--output=out")
    assert not Path("out").exists()
    with pytest.raises(SlzoError, match="training diverged: at step 4"):
        write_checkpoint(checkpoint_file.read(run), "new.ckpt")
    assert not Path("new.ckpt").exists()


def test_last_falls_back_to_the_newest_whole_file_and_says_so(run, capsys):
    folder = Path("runs/version_0/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy("run/config.yaml", folder.parent)
    for age, name in enumerate(("last.ckpt", "step=4.ckpt", "step=2.ckpt")):
        shutil.copy(run, folder / name)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert newest_checkpoint("runs").name == "last.ckpt"
    assert capsys.readouterr().err == ""
    for name in ("last.ckpt", "step=4.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    assert main(["test", "--ckpt_path=last"]) == 0
    printed = capsys.readouterr()
    assert "last.ckpt': not a readable checkpoint" in printed.err
    assert "step=2.ckpt is the newest checkpoint that is whole" in printed.err
    (folder / "step=2.ckpt").write_bytes(b"")
    assert "no checkpoint below 'runs' is whole" in refused(capsys, "test", "--ckpt_path=last")


# ---- what is in it --------------------------------------------------------------------------------------------------------


def drop(*names):
    def function(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return function


def put(value, *names):
    def function(content):
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return function


UP = "model.layers.0.mlp.up_proj.weight"
NOTE_FIELDS = "scope adapter tensors layer num_evaluations model layer_origin dtype trust_remote_code noise_seed"
NOTE_FIELDS += " num_nonfinite base optimizer onednn"
BROKEN = [
    *(drop("slzo", name) for name in NOTE_FIELDS.split()),
    *(put((0.5,), "slzo", name) for name in NOTE_FIELDS.split()),
    drop("state_dict"),
    drop("global_step"),
    put({}, "state_dict"),
    put([1], "state_dict"),
    put({UP: 1.0}, "state_dict"),
    drop("slzo", "format"),
    put("3", "slzo", "format"),
    put(9, "slzo", "format"),
    put([], "slzo"),
    put(None, "slzo", "tensors", UP),
    drop("slzo", "tensors", UP),
    drop("slzo", "tensors", UP, "kind"),
    put("half", "slzo", "tensors", UP, "kind"),
    put("subspace", "slzo", "tensors", UP, "kind"),
    put("masked", "slzo", "tensors", UP, "kind"),
    drop("slzo", "tensors", UP, "shape"),
    put([3, 5], "slzo", "tensors", UP, "shape"),
    put("32", "slzo", "tensors", UP, "shape"),
    put(torch.ones(2), "slzo", "tensors", UP, "index"),
    put({"kind": "masked", "shape": [32, 16], "index": torch.tensor([9999])}, "slzo", "tensors", UP),
    put({"kind": "masked", "shape": [32, 16], "index": torch.tensor([-1])}, "slzo", "tensors", UP),
    put({"kind": "masked", "shape": [32, 16], "index": torch.tensor([0.5])}, "slzo", "tensors", UP),
    put({"kind": "masked", "shape": [32, 16], "index": torch.tensor([3])}, "slzo", "tensors", UP),
    put({"kind": "subspace", "shape": [32, 16], "basis": torch.ones(3, 2)}, "slzo", "tensors", UP),
    put({"kind": "subspace", "shape": [32, 16], "basis": torch.ones(16)}, "slzo", "tensors", UP),
    put({"kind": "whole", "shape": [32, 16]}, "slzo", "tensors", "model.layers.7.mlp.up_proj.weight"),
    put(torch.ones(1), "state_dict", UP),
    put({"kind": "lora"}, "slzo", "adapter"),
    put({"kind": "sand"}, "slzo", "adapter"),
    put({}, "slzo", "adapter"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_checkpoint_that_was_changed_by_hand_is_one_line(run, capsys, number):
    change(run, BROKEN[number])
    assert refused(capsys, "export", f"--ckpt_path={run}", "--output=out")
    assert not Path("out").exists()


@pytest.mark.parametrize("number", range(0, len(BROKEN), 5))
def test_fit_refuses_it_too(run, capsys, number):
    change(run, BROKEN[number])
    assert refused(capsys, "fit", "--config=run/config.yaml", f"--ckpt_path={run}")
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
        assert main(["test", f"--ckpt_path={run}"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert "not a readable checkpoint" not in capsys.readouterr().err


def test_weights_alone_can_be_scored_but_not_continued(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--checkpoint.save_weights_only=true"]) == 0
    best = run_dir() / "checkpoints" / "step=2.ckpt"
    line = refused(capsys, "fit", *options, f"--ckpt_path={best}")
    assert "holds weights only" in line
    assert main(["test", *options, f"--ckpt_path={best}"]) == 0
    assert main(["export", f"--ckpt_path={best}", "--output=out"]) == 0
    (run_dir() / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert "is whole" in refused(capsys, "fit", *options, "--ckpt_path=last")


def test_another_optimizer_on_resume_is_one_line(run, capsys):
    args = ["fit", "--config=run/config.yaml", f"--ckpt_path={run}", "--trainer.max_steps=8"]
    line = refused(capsys, *args, "--model.optimizer=SGD", "--model.optimizer.lr=1e-3")
    assert "model.optimizer SGD: the checkpoint was trained with Adam" in line
    shutil.copy(FORMER, run)
    line = refused(capsys, *args, "--model.optimizer=SGD", "--model.optimizer.lr=1e-3")
    assert "model.optimizer SGD: the checkpoint was trained with Adam" in line
    assert not list(Path("runs").glob("*"))


def test_another_scheduler_on_resume_is_one_line(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.lr_scheduler=LinearLR"]) == 0
    line = refused(capsys, "fit", *options, "--ckpt_path=last", "--model.lr_scheduler=ConstantLR")
    assert "model.lr_scheduler ConstantLR: the checkpoint was trained with LinearLR" in line


def test_a_checkpoint_runs_no_code(run, capsys):
    class Payload:
        def __reduce__(self):
            return (open, ("payload", "w"))

    content = torch.load(ZIPPED, weights_only=True)
    torch.save(content | {"payload": Payload()}, run)
    assert "not a readable checkpoint" in refused(capsys, "test", f"--ckpt_path={run}")
    assert not Path("payload").exists()
