"""Quantized frozen layers: what is tuned is in full precision, the rest stays quantized, and nothing else changes."""

import importlib.util
import random
from contextlib import suppress

import pytest
import torch
from helpers import last_checkpoint, random_example, tiny_model, tuned, tuned_layer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.fingerprint import Fingerprint
from slzo.models.full_precision import FullPrecision
from slzo.models.load import load_model
from slzo.models.logits import final_states
from slzo.models.parts import ModelParts
from slzo.models.quantization import quantization_config
from slzo.models.startup_check import split_and_verify
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Point
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import AllParameters, LoRA, PrefixTuning
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel
from tiny import make_tokenizer

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
LAYER = 2


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


BOTH = [pytest.param("int8", marks=needs("torchao")), pytest.param("nf4", marks=needs("bitsandbytes"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose layers are large enough to be quantized, with its tokenizer."""
    path = tmp_path_factory.mktemp("plain")
    tiny_model(scale=1.0, **SIZES).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def quantized_folder(folder, path, quantization):
    """A folder as ``save_pretrained`` writes it of a model that was quantized when it was loaded."""
    load_model(str(folder), quantization=quantization).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def one_layer(model, make=FullPrecision.make):
    return make(model, [f"model.layers.{LAYER}"])


@pytest.mark.parametrize("quantization", BOTH)
def test_the_tuned_layer_has_its_original_weights_and_the_rest_stays_quantized(folder, quantization):
    plain, model = load_model(str(folder)), load_model(str(folder), quantization=quantization)
    before = dict(model.named_modules())
    expected = dict(plain.model.layers[LAYER].named_parameters())
    replaced = one_layer(model)
    assert len(replaced.quantized) == 7
    assert not replaced.dequantized
    found = dict(model.model.layers[LAYER].named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    others = [name for name, module in model.named_modules() if module is not before[name]]
    assert sorted(others) == sorted(replaced.quantized)
    replaced.undo(model)
    assert all(module is before[name] for name, module in model.named_modules())


@pytest.mark.parametrize("quantization", BOTH)
def test_a_model_that_is_quantized_already_is_dequantized_in_the_tuned_layer(folder, tmp_path, quantization):
    model = load_model(str(quantized_folder(folder, tmp_path / "quantized", quantization)))
    replaced = one_layer(model)
    assert replaced.dequantized
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for path, module in replaced.quantized.items():
        own = model.get_submodule(path)
        assert type(own) is nn.Linear
        given = inputs if own.in_features == 64 else inputs.repeat(1, 2)
        # bitsandbytes computes in bfloat16 on some processors
        torch.testing.assert_close(own(given), module(given), rtol=0.02, atol=0.02)


@needs("bitsandbytes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_biases_do_not_hide_the_weights(tmp_path, dtype):
    """Those of Qwen's keys are above 100. In half precision w + b has none of the digits of w."""
    for seed in (0, 1):
        model = tiny_model(scale=1.0, seed=seed, attention_bias=True, **SIZES)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.fill_(100.0)
        model.save_pretrained(tmp_path / str(seed))
    quantized = load_model(str(tmp_path / "0"), dtype=dtype, quantization="nf4")
    quantized.name_or_path = quantized.config._name_or_path = str(tmp_path / "1")  # other weights, equal biases
    assert one_layer(quantized).dequantized
    for name, tensor in load_model(str(tmp_path / "0"), dtype=dtype).model.layers[LAYER].named_parameters():
        found = quantized.model.layers[LAYER].get_parameter(name)
        assert float((found - tensor).float().norm() / tensor.float().norm()) < 0.15, name  # of nf4: about 0.1


@needs("bitsandbytes")
def test_a_map_that_stores_its_weight_transposed(tmp_path):
    tiny_model("gpt2", scale=1.0, n_embd=64, hidden_size=64).save_pretrained(tmp_path)
    plain, model = load_model(str(tmp_path)), load_model(str(tmp_path), quantization="nf4")
    FullPrecision.make(model, ["transformer.h.1"])
    assert type(model.transformer.h[1].mlp.c_fc) is Conv1D
    for name, tensor in plain.transformer.h[1].named_parameters():
        assert torch.equal(model.transformer.h[1].get_parameter(name), tensor), name


@needs("torchao")
def test_files_that_hold_other_weights_are_not_taken(folder, tmp_path):
    """A fine-tuned copy may have been quantized while the folder holds its base."""
    model = load_model(str(folder), quantization="int8")
    tiny_model(scale=1.0, seed=1, **SIZES).save_pretrained(tmp_path)
    model.name_or_path = model.config._name_or_path = str(tmp_path)
    assert one_layer(model).dequantized


@needs("torchao")
def test_the_loss_is_that_of_a_plain_model_with_rounded_frozen_weights(folder):
    generator = random.Random(0)
    examples = [random_example(generator, i, 9 + i, (1, 1), i % 2) for i in range(4)]
    batch = TrainBatch(pack(examples), ())
    quantized = load_model(str(folder), quantization="int8")
    reference = load_model(str(folder))
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and f".{LAYER}." not in name:
            reference.get_submodule(name).weight.copy_(module.weight.dequantize())
    losses = []
    for model in (quantized, reference):
        own = tuned_layer(split_and_verify(model), LAYER)
        direction = own.tensors.draw(0, 0, 0)
        loss = Stepper(own, CandidateCrossEntropy(), SPSA(), StepOptions()).loss(batch)
        losses.append(loss.at([Point(direction, 0.01), Point(direction, -0.01)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert (losses[0][0] - losses[0][1]).abs() > 1e-3


@pytest.mark.parametrize(
    "quantization", [pytest.param("int8", marks=[needs("torchao"), pytest.mark.slow]), BOTH[1]], ids=["int8", "nf4"]
)
def test_a_run_is_continued_scored_and_exported_into_the_plain_base(folder, options, capsys, tmp_path, quantization):
    options = [*options, f"--model.model={folder}", f"--model.quantization={quantization}", f"--model.layer={LAYER}"]
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert main(["test", "--ckpt_path=last"]) == 0
    capsys.readouterr()
    assert main(["export", "--ckpt_path=last", f"--output={tmp_path / 'merged'}"]) == 0
    assert f"merged into the unquantized base {folder}" in capsys.readouterr().out
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    masters = tuned(last_checkpoint(1))
    for name, tensor in load_model(str(folder)).named_parameters():
        assert torch.equal(merged[name], masters.get(name, tensor)), name
        assert (name in masters) == (f"layers.{LAYER}." in name)


@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=[needs("torchao"), pytest.mark.slow]), BOTH[1]])
def test_a_quantized_folder_is_tuned_and_exported_quantized(folder, options, tmp_path, quantization):
    source = quantized_folder(folder, tmp_path / "quantized", quantization)
    options = [*options, f"--model.model={source}", f"--model.layer={LAYER}", "--trainer.max_steps=2"]
    assert main(["fit", *options]) == 0
    assert main(["export", "--ckpt_path=last", f"--output={tmp_path / 'merged'}"]) == 0
    merged = load_model(str(tmp_path / "merged"))
    masters = tuned(last_checkpoint())
    assert all(torch.equal(merged.get_parameter(name), master) for name, master in masters.items())
    expected = load_model(str(source))
    one_layer(expected)
    for name, master in masters.items():
        expected.get_parameter(name).copy_(master)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits)


@needs("torchao")
def test_the_fingerprint_tells_quantized_models_apart(folder, tmp_path):
    tiny_model(scale=1.0, seed=1, **SIZES).save_pretrained(tmp_path)
    own, same, other = (
        Fingerprint.of(load_model(str(path), quantization="int8")) for path in (folder, folder, tmp_path)
    )
    own.check(same.to_dict())
    with pytest.raises(SlzoError, match="different weights"):
        own.check(other.to_dict())
    Fingerprint.of(load_model(str(folder))).check(own.to_dict())  # the base that export merges into


@needs("bitsandbytes")
def test_a_model_that_the_quantization_cannot_run_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)  # narrower than a block of nf4
    model = load_model(str(tmp_path), quantization="nf4")
    with suppress(RuntimeError, AssertionError):
        model(input_ids=torch.tensor([[5]]))
        pytest.skip("this bitsandbytes runs narrow models")
    with pytest.raises(SlzoError, match=r"^model\.quantization: a plain forward pass failed"):
        split_and_verify(model)


@needs("bitsandbytes")
def test_scopes_that_add_to_a_layer_and_those_that_tune_all(folder):
    parts = split_and_verify(load_model(str(folder), quantization="nf4"))
    modules = dict(parts.model.named_modules())
    made = TunedModel.from_scope(parts, LoRA(rank=2, target_modules=["mlp_output"]), LAYER)
    assert len(made.full_precision.quantized) == 7
    made.release()
    assert dict(parts.model.named_modules()) == modules
    batch = pack([random_example(random.Random(0))])
    made = TunedModel.from_scope(parts, PrefixTuning(2), prompts=lambda _: [batch])
    assert not made.full_precision.quantized
    made.release()
    with pytest.raises(SlzoError, match=r"model.scope: tunes all parameters, and model.quantization is for frozen"):
        TunedModel.from_scope(parts, AllParameters())
    assert dict(parts.model.named_modules()) == modules


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int9", "'int9': no such class; choose one of int8, fp8, nf4, fp4, or"),
        ("torch.nn.Linear", "'torch.nn.Linear': .*required positional"),
        ({"class_path": "torch.nn.ReLU"}, ".*ReLU is not a quantization config of transformers"),
        ({"path": "int8"}, ".*a mapping must have class_path and init_args"),
        (
            {"class_path": "transformers.BitsAndBytesConfig", "init_args": {"load_in_8bit": 3}},
            "'transformers.BitsAndBytesConfig': load_in_8bit must be",
        ),
        ("int8", "int8: needs torchao, which is not installed; run: pip install 'slzo"),
    ],
)
def test_wrong_quantizations(folder, monkeypatch, quantization, words):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec(name) if name != "torchao" else None)
    with pytest.raises(SlzoError, match=f"model.quantization {words}"):
        load_model(str(folder), quantization=quantization)


@needs("bitsandbytes")
def test_a_quantized_model_is_not_quantized_again(folder, tmp_path, monkeypatch):
    source = quantized_folder(folder, tmp_path / "quantized", "nf4")
    with pytest.raises(SlzoError, match=r"model.quantization 'nf4': model .* is already quantized \(bitsandbytes\)"):
        load_model(str(source), quantization="nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlzoError, match="its quantization needs bitsandbytes, which is not installed"):
        load_model(str(source))


@needs("bitsandbytes")
def test_a_config_by_class_path():
    made = quantization_config(
        {"class_path": "transformers.BitsAndBytesConfig", "init_args": {"load_in_8bit": True}}, torch.float32
    )
    assert isinstance(made, BitsAndBytesConfig)
    assert made.load_in_8bit


def test_what_cannot_be_dequantized_is_refused(folder):
    class Packed(nn.Module):
        pass

    model = load_model(str(folder))
    model.model.layers[LAYER].input_layernorm = packed = Packed()
    with pytest.raises(SlzoError, match=f"model.layers.{LAYER}.input_layernorm is a quantized Packed, which cannot"):
        one_layer(model)
    assert model.model.layers[LAYER].input_layernorm is packed


def test_a_quantized_head_gives_chosen_logits_too():
    model = tiny_model()
    batch = pack([random_example(random.Random(0))])
    states, chosen = final_states(ModelParts(model), batch, 0, None)[0], torch.tensor([5, 7])
    expected = ModelParts(model).head(states, chosen)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().as_subclass(_Packed), requires_grad=False)
    torch.testing.assert_close(torch.Tensor(ModelParts(model).head(states, chosen)), expected)


class _Packed(torch.Tensor):
    """Stands for a quantized tensor."""
