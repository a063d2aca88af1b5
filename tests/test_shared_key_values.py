"""A model whose later layers take keys and values from earlier ones; tests of all families have it too."""

import pytest
import torch
from helpers import packed_prompts, tiny_model, tune_scope

from slzo.batches.packing import pack
from slzo.evaluation.prompt_states import PromptStates
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.profile import profile_layers
from slzo.zo.scopes import LayerScope

pytestmark = pytest.mark.fast


@pytest.fixture
def parts():
    return ModelParts(tiny_model("gemma4_text"), onednn=False)


@pytest.mark.parametrize(
    ("layer", "columns"),
    [
        (0, 0),
        (1, 2 * 2 * 8),  # keys and values, heads, size
        (2, 2 * 2 * 8 + 2 * 2 * 16),  # global layers have larger heads
        (3, 2 * 2 * 8 + 2 * 2 * 16),
        (4, 0),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_states_between_layers_have_keys_and_values(packed, layer, columns, examples):
    parts, batch = ModelParts(tiny_model("gemma4_text"), packed, onednn=False), pack(examples)
    assert parts.extra_columns(layer) == columns
    assert parts.run(batch, 0, layer).shape == (batch.num_tokens, parts.width + columns)


def test_the_cache_of_states_counts_all_its_columns(monkeypatch):
    model, planned = tune_scope(LayerScope(), tiny_model("gemma4_text")), []
    monkeypatch.setattr(model.forward.cache, "plan", lambda blocks, token_bytes: planned.append(token_bytes))
    model.plan_prefix([])
    (batch,) = packed_prompts(4)
    assert planned == [model.forward.prefix(batch)[0].nbytes]


def test_the_cache_of_prompts_counts_all_its_columns(parts):
    prompts = PromptStates(parts, PrefixCache(3, 1.0))
    hidden, key_values = prompts.of(*packed_prompts(4), keep=False)
    columns = sum(heads * size for pair in key_values.values() for heads, _, size in (each.shape for each in pair))
    assert prompts.token_bytes == (hidden.shape[1] + columns) * hidden.itemsize


def test_statistics_are_those_of_hidden_states(parts):
    (batch,), outputs = packed_prompts(1), {}
    for number, layer in enumerate(parts.layers):
        layer.register_forward_hook(lambda _, __, output, number=number: outputs.update({number: output}))
    with torch.no_grad():
        parts.model(input_ids=batch.input_ids[None])
    found = profile_layers(parts, [batch])
    for each in found:
        magnitude = outputs[each.index].abs()
        expected = [float(magnitude.max()), float(magnitude.median())]
        assert [each.max_abs, each.median_abs] == pytest.approx(expected, rel=1e-4)
