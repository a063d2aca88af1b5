"""ZOModule.from_model: a model that the user has loaded with transformers."""

from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, same_tensors, tiny_model, tuned
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from slzo import TaskDataModule, ZOModule, ZOTrainer
from slzo.__main__ import main
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA
from slzo.zo.scopes import LayerScope, LoRA
from slzo.zo.tuned import Point

pytestmark = pytest.mark.usefixtures("own_folder")


def rows(data_dir):
    return TaskDataModule("sst2", data_dir=str(data_dir), num_train=16, num_dev=8, num_test=12, batch_size=4)


def fit(module, data_dir, steps=4, ckpt_path=None):
    trainer = ZOTrainer(max_steps=steps, val_check_interval=2, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, datamodule=rows(data_dir), ckpt_path=ckpt_path)
    return tuned(last_checkpoint())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_loaded_model_is_tuned_in_place_as_one_of_that_name(dtype, model_dir, data_dir, tmp_path, monkeypatch):
    options = {"layer": 2, "seed": 0, "estimator": SPSA()}
    (folder := tmp_path / "by_name").mkdir()
    monkeypatch.chdir(folder)
    expected = fit(ZOModule(str(model_dir), dtype=dtype, **options), data_dir)

    (folder := tmp_path / "loaded").mkdir()
    monkeypatch.chdir(folder)
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).train()
    assert same_tensors(fit(ZOModule.from_model(loaded, **options), data_dir), expected)
    for name, value in loaded.get_decoder().layers[2].named_parameters():
        saved = next(tensor for key, tensor in expected.items() if key.endswith(name))
        assert torch.equal(value, saved.to(dtype))
    assert main(["export", "--ckpt_path", str(last_checkpoint()), "--output", "tuned"]) == 0  # reads the model's folder

    continued = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    after_six = fit(ZOModule.from_model(continued, **options), data_dir, steps=6, ckpt_path="last")
    monkeypatch.chdir(tmp_path / "by_name")
    assert same_tensors(
        fit(ZOModule(str(model_dir), dtype=dtype, **options), data_dir, steps=6, ckpt_path="last"), after_six
    )


def test_a_checkpoint_of_weights_that_were_changed_after_loading_is_refused(model_dir, data_dir, capsys):
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    loaded.get_decoder().layers[0].mlp.up_proj.weight.data.mul_(1.5)
    fit(ZOModule.from_model(loaded, layer=2, seed=0), data_dir)
    assert main(["export", "--ckpt_path", str(last_checkpoint()), "--output", "tuned"]) == 2
    assert "the same shape, different weights" in capsys.readouterr().err


def quantized(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.quantization_config = {"quant_method": "awq"}
    return model


def adapted(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def divided(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


@pytest.mark.parametrize("scope", [LayerScope(), LoRA(rank=2)], ids=lambda scope: scope.describe())
def test_a_fit_that_ends_before_its_first_step_leaves_the_model_as_it_was(scope, model_dir, data_dir, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}

    def interrupted(model, *_):
        model.tensors.write(Point(model.tensors.draw(0, 0, 0), 0.1))
        raise RuntimeError("interrupted")

    monkeypatch.setattr("slzo.fit.auto_rate", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(ZOModule.from_model(loaded, layer=2, scope=scope, seed=0), data_dir)
    assert same_tensors(loaded.state_dict(), before)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda _: torch.nn.Linear(2, 2), {}, "from_model: Linear is not a model of transformers"),
        (lambda _: SimpleNamespace(), {}, "from_model: SimpleNamespace is not a model of transformers"),
        (
            lambda _: tiny_model(),
            {},
            "from_model: this LlamaForCausalLM has no name_or_path, so checkpoints could not name",
        ),
        (quantized, {}, r"from_model: this LlamaForCausalLM is quantized \(awq\)"),
        (
            lambda folder: AutoModelForCausalLM.from_pretrained(folder).to("meta"),
            {},
            "from_model: this LlamaForCausalLM has no values",
        ),
        (divided, {}, "from_model: this LlamaForCausalLM is divided over 0, cpu"),
        (adapted, {}, "from_model: this LlamaForCausalLM has modules of peft, maybe of an earlier fit; load it again"),
        (
            AutoModelForCausalLM.from_pretrained,
            {"dtype": "float16"},
            "from_model: dtype does not apply to a loaded model",
        ),
        (
            lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
            {},
            "model.dtype 'float64': choose one of",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(make, options, message, model_dir):
    with pytest.raises(SlzoError, match=f"^{message}"):
        ZOModule.from_model(make(model_dir), **options)
