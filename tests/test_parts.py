"""A model in parts: packed batches through some of its layers, against the whole model on one candidate at a time."""

import random
import warnings

import pytest
import torch
from helpers import FAMILIES, plain_logits, random_example, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.layout import group_by_length
from slzo.batches.packing import pack
from slzo.models import linear
from slzo.models.decoder_layers import find_decoder_layers
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.models.startup_check import split_and_verify
from slzo.private.modules import has_onednn_linear, onednn_linear
from slzo.utils.errors import SlzoError

pytestmark = pytest.mark.fast


@torch.no_grad()
def logits_in_parts(parts, batch, layer):
    """The same, with the layers before ``layer`` run on their own."""
    hidden = parts.run(batch, 0, layer) if layer else None
    final = parts.run(batch, layer, parts.num_layers, hidden)
    return parts.head(final.index_select(0, batch.logit_positions))[batch.token_logit]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_prefix_and_suffix_equal_the_whole_model(family, packed, examples):
    # eager attention in the reference: an implementation that the parts do not use
    reference = tiny_model(family, attn_implementation="eager")
    assert reference.config._attn_implementation == "eager"
    expected = plain_logits(reference, examples)
    parts = ModelParts(tiny_model(family), packed)
    assert parts.packed == packed
    for layer in (0, 1, 3):
        logits = logits_in_parts(parts, pack(examples), layer)
        assert (logits - expected).abs().max() / expected.abs().max() < 1e-5, layer


def test_an_example_has_the_tokens_of_its_prompt_once():
    assert random_example(random.Random(0), 0, 5, (3, 2, 1)).num_tokens == 5 + 3 + 2 + 1


@torch.no_grad()
def test_candidates_may_change_the_tokens_of_the_prompt():
    """Then they share only the tokens before."""
    sequences = (EncodedSequence((3, 4, 5, 6), 1), EncodedSequence((3, 9, 5, 7), 1), EncodedSequence((3, 4, 5, 8), 1))
    example = EncodedExample(0, sequences, (0,))
    batch = pack([example])
    assert batch.num_tokens == 1 + 3 * 2
    expected = plain_logits(tiny_model("llama", attn_implementation="eager"), [example])
    torch.testing.assert_close(logits_in_parts(ModelParts(tiny_model()), batch, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_selected_head_rows_equal_the_full_head(family, one_token_examples):
    parts, batch = ModelParts(tiny_model(family)), pack(one_token_examples)
    final = parts.run(batch, 0, parts.num_layers).index_select(0, batch.logit_positions)
    few, full = parts.head(final, batch.choice_ids), parts.head(final)
    torch.testing.assert_close(few, full[:, batch.choice_ids], rtol=1e-5, atol=1e-6)


def test_a_group_has_no_sequence_that_is_much_shorter_than_its_longest_one():
    lengths = [4, 8, 6, 5, 7, 3]
    groups = group_by_length(lengths)
    assert [[lengths[number] for number in group] for group in groups] == [[8, 7, 6], [5, 4], [3]]


def test_families_without_the_attention_interface_run_padded(examples):
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=3, n_head=4, vocab_size=320)
    model = AutoModelForCausalLM.from_config(config).eval()
    parts = ModelParts(model, packed=True)
    assert not parts.packed
    logits = logits_in_parts(parts, pack(examples), 1)
    torch.testing.assert_close(logits, plain_logits(model, examples), rtol=1e-4, atol=1e-5)


def test_the_model_is_not_changed_by_its_views(examples):
    model = tiny_model("llama")
    modules = {name: id(module) for name, module in model.named_modules()}
    forwards = {name for name, module in model.named_modules() if "forward" in vars(module)}
    parts = ModelParts(model)
    parts.run(pack(examples), 1, 3, parts.run(pack(examples), 0, 1))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == forwards
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_shared_prompts_are_stored_once(examples):
    candidates = [candidate for example in examples for candidate in example.sequences]
    shared = pack(examples)
    separate = pack([EncodedExample(i, (candidate,), (0,)) for i, candidate in enumerate(candidates)])
    assert separate.num_tokens > shared.num_tokens
    parts = ModelParts(tiny_model("llama"))
    one, other = (needed_logits(parts, batch)[batch.token_logit] for batch in (shared, separate))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_repeated_layout_is_the_batch_twice(examples):
    batch, parts = pack(examples), ModelParts(tiny_model("llama"))
    once = parts.run(batch, 0, 4)
    torch.testing.assert_close(parts.run(batch.repeat(2), 0, 4), torch.cat([once, once]))


@torch.no_grad()
def test_an_example_does_not_see_its_neighbours():
    generator = random.Random(3)
    parts = ModelParts(tiny_model("mistral"))
    first, second = random_example(generator, 0, 9, (2, 2)), random_example(generator, 1, 4, (1, 3))
    alone = needed_logits(parts, pack([first]))
    together = needed_logits(parts, pack([first, second]))[: len(alone)]
    behind = needed_logits(parts, pack([second, first]))[-len(alone) :]
    for found in (together, behind):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model(
        "t5", d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=64, decoder_start_token_id=0
    )
    with pytest.raises(SlzoError, match=r"model\.model: architecture T5ForConditionalGeneration is not supported"):
        find_decoder_layers(AutoModelForSeq2SeqLM.from_config(config))


def test_attention_that_cannot_be_packed_falls_back_to_padding(examples):
    model = tiny_model("stablelm", num_key_value_heads=4)
    attention = model.config._attn_implementation
    with pytest.warns(UserWarning, match="padding is used"):
        parts = split_and_verify(model)
    assert not parts.packed
    assert model.config._attn_implementation == attention
    logits = logits_in_parts(parts, pack(examples), 1)
    torch.testing.assert_close(logits, plain_logits(model, examples), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_split_is_refused(monkeypatch):
    model = given = tiny_model("llama")
    attention = model.config._attn_implementation
    # a layer that mixes tokens of all sequences: neither packing nor padding can be right
    model.model.layers[3].register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 5 * inputs[0].mean(dim=(0, 1), keepdim=True), *inputs[1:])
    )
    tried = []
    original = ModelParts.__init__

    def noting(self, model, packed=True, *args, **kwargs):
        if model is given:  # not its twin
            tried.append(packed)
        original(self, model, packed, *args, **kwargs)

    monkeypatch.setattr(ModelParts, "__init__", noting)
    with (
        warnings.catch_warnings(action="error"),  # nobody is told that padding is used
        pytest.raises(SlzoError, match=r"LlamaForCausalLM is not supported: .* relative error \d"),
    ):
        split_and_verify(model)
    assert tried == [True, False]
    assert model.config._attn_implementation == attention


def test_a_full_gpu_is_not_the_fault_of_the_model():
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        split_and_verify(model)


@pytest.mark.skipif(not has_onednn_linear(), reason="this build of torch has no oneDNN")
def test_the_head_runs_through_onednn_where_it_is_faster(monkeypatch):
    parts, seen = ModelParts(tiny_model(), onednn=True), []

    def recorded(inputs, weight, bias):
        seen.append(len(weight))
        return onednn_linear(inputs, weight, bias)

    monkeypatch.setattr(linear, "onednn_linear", recorded)
    hidden, vocabulary = torch.randn(5, parts.width), parts.model.config.vocab_size
    many, few = torch.arange(100, 200), torch.arange(2)
    with torch.no_grad():
        logits = [parts.head(hidden), parts.head(hidden, many), parts.head(hidden, few)]
    assert seen == [vocabulary, 100]  # two columns are too few
    expected = hidden @ parts.model.get_output_embeddings().weight.T
    for found, wanted in zip(logits, (expected, expected[:, many], expected[:, few]), strict=True):
        torch.testing.assert_close(found, wanted.detach())
    parts.head(hidden)  # with a derivative
    parts = parts.rebuilt(onednn=False)
    with torch.no_grad():
        parts.head(hidden)
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_onednn_changes_nothing(dtype, examples):
    """Few processors have oneDNN's product for float16; elsewhere it raises an error."""
    batch = pack(examples)
    with torch.no_grad():
        plain, asked = (
            needed_logits(split_and_verify(tiny_model(scale=1.0).to(dtype), onednn=onednn), batch)
            for onednn in (False, True)
        )
    assert torch.equal(plain, asked)
