"""A GGUF file computes what the merged model does, and its tokenizer makes the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, run_dir, tiny_model
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.__main__ import main
from slzo.models.gguf_folder import gguf_to_folder
from slzo.models.gguf_writer import interleaved, why_not, write_file

IDS = torch.arange(3, 40)[None]
TEXT = "It was great.\n 12 terrible <s> films"


def loaded(path, **options):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "rope_theta": 5e3}])
def test_a_file_loads_again_with_the_same_weights(tmp_path, dtype, changes):
    model = tiny_model("llama", **changes).to(dtype)
    assert why_not(model, make_tokenizer()) == ""
    write_file(model, make_tokenizer(), tmp_path / "model.gguf", "tiny")
    found, own = loaded(tmp_path / "model.gguf", dtype=torch.float32), tiny_model("llama", **changes)
    own.load_state_dict(model.state_dict())  # rounded; converted back, its rotary frequencies would be too
    weights = found.state_dict()
    assert weights.keys() == own.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in own.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, own(IDS).logits)
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {"F32", {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]}


def test_rows_are_in_the_order_of_neighbouring_pairs():
    """Two heads of six rows: row i and row i + 3 of a head become rows 2i and 2i + 1."""
    weight = torch.arange(12.0)[:, None].expand(12, 5)
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_tokenizer_goes_with_it(tmp_path):
    own = make_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    write_file(tiny_model("llama", vocab_size=330), own, tmp_path / "model.gguf", "tiny")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert found(TEXT)["input_ids"] == own(TEXT)["input_ids"]
    assert (found.bos_token_id, found.eos_token_id) == (own.bos_token_id, own.eos_token_id)
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == own.chat_template
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 330  # rows without a token are filled up


def test_the_command_writes_what_was_tuned(options, model_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "cache"))
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    best = json.loads((run_dir() / "summary.json").read_text())["best_checkpoint"]
    assert main(["export", f"--ckpt_path={best}", "--output=merged"]) == 0
    assert main(["export", f"--ckpt_path={best}", "--output=one", "--format=gguf"]) == 0
    merged, base = (AutoModelForCausalLM.from_pretrained(folder)(IDS).logits for folder in ("merged", model_dir))
    assert not torch.equal(merged, base)
    assert torch.equal(loaded(Path("one/model.gguf"))(IDS).logits, merged)
    again = AutoModelForCausalLM.from_pretrained(gguf_to_folder(Path("one/model.gguf")), dtype=torch.float32)
    assert torch.equal(again(IDS).logits, merged)
    assert "llama-cli -m PATH/model.gguf" in Path("one/README.md").read_text()
    assert main(["test", *options, "--model.model=one/model.gguf"]) == 0


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen2", {}, "only Llama models are written, and this one is called qwen2"),
        ("llama", {"attention_bias": True}, "its layers have biases"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings are scaled (linear)",
        ),
    ],
)
def test_other_models_are_refused(family, changes, reason):
    assert reason in why_not(tiny_model(family, **changes), make_tokenizer())


def test_another_architecture_is_one_line(options, tmp_path, capsys):
    own = tmp_path / "qwen"
    tiny_model("qwen2", scale=1.0).save_pretrained(own)
    make_tokenizer().save_pretrained(own)
    assert main(["fit", *options, f"--model.model={own}", "--trainer.max_steps=2"]) == 0
    capsys.readouterr()
    last = run_dir() / "checkpoints" / "last.ckpt"
    assert main(["export", f"--ckpt_path={last}", "--output=no", "--format=gguf"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "format gguf: only Llama models are written" in line
    assert "use --format merged, and run llama.cpp's convert_hf_to_gguf.py on the folder it writes" in line
    assert not Path("no").exists()


def test_a_tokenizer_of_another_kind_is_refused():
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "byte-level BPE" in why_not(tiny_model("llama"), tokenizer)
