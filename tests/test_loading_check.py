"""A base model is tuned only if its files hold all of its weights."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from helpers import error_line, run_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slzo.models import gguf_folder
from slzo.models.load import load_model, load_tokenizer
from slzo.models.loading_check import reason_of
from slzo.models.original_weights import OriginalWeights
from slzo.models.save import save_model
from slzo.models.shape import model_shape
from slzo.utils.errors import SlzoError
from tiny import make_tokenizer

TENSOR = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(model_dir, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(model_dir, tmp_path / "model")


def change_weights(folder, **changes):
    """Replace tensors of the files by name; ``None`` removes one."""
    file = folder / "model.safetensors"
    changed = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(changed, file, {"format": "pt"})


def change_config(folder, **changes):
    """Replace entries of the configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MODULES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
LOADING = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "device map": {"device_map": {"": "cpu"}},
    "on disk": {"device_map": dict.fromkeys(MODULES, "cpu") | {"model.layers.2": "disk"}},
}


@pytest.mark.parametrize("options", LOADING.values(), ids=LOADING)
def test_a_missing_tensor_is_refused_however_it_is_loaded(folder, options, tmp_path):
    if options.get("quantization") == "nf4":
        pytest.importorskip("bitsandbytes")
    options = options | ({"offload_folder": str(tmp_path)} if "device_map" in options else {})
    load_model(str(folder), **options)
    change_weights(folder, **{TENSOR: None})
    with pytest.raises(SlzoError, match=rf"its files lack {re.escape(TENSOR)}; give a complete model"):
        load_model(str(folder), **options)


def test_a_run_on_an_incomplete_model_ends_in_one_line(folder, options, capsys):
    change_weights(folder, **{TENSOR: None})
    line = error_line(capsys, "fit", *options, f"--model.model={folder}", "--model.layer=1")
    assert f"its files lack {TENSOR};" in line
    assert not run_dir().exists()


def test_more_layers_than_the_files_hold_are_refused(folder):
    change_config(folder, num_hidden_layers=6, layer_types=None)
    with pytest.raises(SlzoError, match=r"lack model\.layers\.4\.input_layernorm\.weight, .* and \d+ more tensors;"):
        load_model(str(folder))


def test_fewer_layers_than_the_files_hold_are_refused(folder):
    change_config(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(SlzoError, match=r"decoder layers that its config\.json does not have: model\.layers\.3\."):
        load_model(str(folder))


def test_layers_that_predict_further_tokens_are_left_out(folder, capsys):
    change_config(folder, num_hidden_layers=3, layer_types=None, num_nextn_predict_layers=1)
    load_model(str(folder))
    assert "that the model does not use: model.layers.3." in capsys.readouterr().err


def test_a_tensor_of_another_shape_is_refused(folder):
    change_weights(folder, **{TENSOR: torch.zeros(3, 32)})
    with pytest.raises(SlzoError, match=rf"{re.escape(repr(TENSOR))} has shape \(3, 32\) in its files and \(64, 32\)"):
        load_model(str(folder))


def test_weights_that_the_model_does_not_use_are_named(folder, capsys):
    change_weights(folder, **{"vision.layers.7.weight": torch.zeros(2)})
    load_model(str(folder))
    assert "that the model does not use: vision.layers.7.weight" in capsys.readouterr().err


def test_tied_weights_are_not_missing(folder, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(str(folder))
    assert "slzo: warning" not in capsys.readouterr().err


def test_a_gguf_file_without_a_tensor_is_refused(folder, tmp_path, monkeypatch):
    """transformers reads it as it does other files; here it is given such files."""
    change_weights(folder, **{TENSOR: None})
    original = AutoModelForCausalLM.from_pretrained

    def from_folder(where, gguf_file, **kwargs):
        return original(folder, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_folder)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(SlzoError, match="its files lack"):
        gguf_folder.convert(tmp_path / "model.gguf", tmp_path / "converted", "model.gguf")
    assert not (tmp_path / "converted").exists()


BROKEN = [
    ({"num_hidden_layers": 0}, "num_hidden_layers 0 in its config.json: must be at least 1"),
    ({"hidden_size": -1}, "hidden_size -1 in its config.json: must be at least 1"),
    ({"hidden_size": "a"}, "cannot be loaded (config.json: Field 'hidden_size' expected int, got str (value: 'a'));"),
    (
        {"num_attention_heads": 5},
        "(config.json: The hidden size (32) is not a multiple of the number of attention heads (5).);",
    ),
    ({"hidden_act": "nope"}, "cannot be loaded (config.json: hidden_act 'nope' is not known to transformers);"),
    ({"rope_parameters": [1]}, "cannot be loaded (config.json: Field 'rope_parameters' with value [1]"),
    ([1, 2], "its config.json holds a JSON list; it must be an object"),
    (None, "its config.json cannot be read (Expecting value"),
]


@pytest.mark.parametrize(("changes", "expected"), BROKEN, ids=[str(changes) for changes, _ in BROKEN])
def test_a_broken_config_is_one_line(folder, sst2_options, capsys, changes, expected):
    if isinstance(changes, dict):
        change_config(folder, **changes)
    else:
        (folder / "config.json").write_text("" if changes is None else json.dumps(changes))
    line = error_line(capsys, "profile", *sst2_options, f"--model.model={folder}")
    assert f"model.model '{folder}': " in line
    assert expected in line


@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_damaged_files_of_weights_are_one_line(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(SlzoError, match=r"cannot be loaded \(its \.bin files are damaged\); the folder must hold"):
        load_model(str(folder))


def test_the_plan_of_a_broken_config_names_its_entry(folder):
    change_config(folder, hidden_act="nope")
    with pytest.raises(SlzoError, match=r"no model can be made .*: hidden_act 'nope' is not known .*; correct its"):
        model_shape(str(folder))


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": null}}', "{"])
def test_a_damaged_index_is_one_line(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert OriginalWeights(str(folder), "").dtype is None
    with pytest.raises(SlzoError, match="cannot be loaded"):
        load_model(str(folder))


def test_a_damaged_shard_is_one_line(folder, sst2_options, capsys):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors", {"format": "pt"})
    (folder / "b.safetensors").write_bytes(b"x" * 100)
    files = {name: f"{'b' if name == TENSOR else 'a'}.safetensors" for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert OriginalWeights(str(folder), "").dtype == torch.float32
    options = [*sst2_options, f"--model.model={folder}", "--model.layer=1", "--trainer.max_steps=1"]
    assert "slzo: error: model.model" in error_line(capsys, "fit", *options)


def test_weights_that_are_nan_are_named(folder, sst2_options, capsys):
    change_weights(folder, **{TENSOR: load_file(folder / "model.safetensors")[TENSOR] * torch.nan})
    line = error_line(capsys, "fit", *sst2_options, f"--model.model={folder}", "--model.layer=1")
    assert "the logits of a plain forward pass are infinite or NaN; its weights may be damaged" in line


def test_an_unknown_quantization_and_a_folder_that_is_no_model_are_named(folder):
    change_config(folder, quantization_config={"quant_method": "foo"})
    with pytest.raises(SlzoError, match="transformers does not know its quantization 'foo'"):
        load_model(str(folder))
    change_config(folder, quantization_config={"bits": 4})
    with pytest.raises(SlzoError, match=r"quantization_config of its config.json has no quant_method; correct it, or"):
        load_model(str(folder))
    (folder / "config.json").rename(folder / "slzo.json")
    with pytest.raises(SlzoError, match="the folder has an adapter or a delta, not a whole model; give its base model"):
        load_model(str(folder))


def test_a_folder_with_a_tokenizer_alone_is_a_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(make_tokenizer())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SlzoError, match="it has no tokenizer files"):
        load_tokenizer(str(tmp_path))


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    error = FileNotFoundError(f"No such file or directory: {file}")  # of safetensors, also if there is no permission
    assert reason_of(error) == f"{file} cannot be opened; check its permissions"
    file.unlink()
    assert reason_of(error) == str(error)


def test_an_adapter_in_the_folder_of_a_model_is_not_added_silently(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))
    with pytest.raises(SlzoError, match=r"contains a model and an adapter \(adapter_config.json\); merge them with"):
        load_model(str(folder))
    load_tokenizer(str(folder))


@pytest.mark.skipif(
    find_spec("kernels") is not None, reason="transformers takes the attention from the package kernels"
)
def test_an_attention_that_is_not_installed_names_its_entries(folder):
    change_config(folder, _attn_implementation="flash_attention_2")
    with pytest.raises(SlzoError, match=r"remove attn_implementation and _attn_implementation from its config.json"):
        load_model(str(folder))


def test_a_config_that_transformers_does_not_write_is_one_line(folder, tmp_path):
    change_config(folder, output_attentions=True)
    with pytest.raises(
        SlzoError, match=r"^output: transformers cannot write this model .*output_attentions.* --format delta"
    ):
        save_model(load_model(str(folder)), make_tokenizer(), tmp_path / "saved")
