"""The last layer runs for the last tokens of each sequence alone, and gives the logits of the whole model."""

import random

import pytest
import torch
from helpers import FAMILIES, batch_loss, plain_logits, random_example, tiny_model, tuned_layer

from slzo.batches.packing import pack
from slzo.batches.sharing import share_beginnings
from slzo.models import linear
from slzo.models.attention import packed_attention_forward
from slzo.models.logits import final_states, needed_logits
from slzo.models.parts import ModelParts
from slzo.private.modules import has_onednn_linear, onednn_linear
from slzo.zo.objectives import AnswerLikelihood

pytestmark = pytest.mark.fast


@pytest.fixture
def rows():
    generator = random.Random(5)
    return [
        random_example(generator, number, length, candidates)
        for number, (length, candidates) in enumerate(
            [(19, (2, 3)), (7, (1, 1)), (23, (4,)), (1, (1,)), (18, (1, 2, 1))]
        )
    ]


def tokens_by_layer(parts, batch, start, hidden):
    """The final states, and the numbers of tokens that each layer returned."""
    parts.prepare()
    found = {}

    def count(layer, _, output):
        hidden = output[0] if isinstance(output, tuple) else output
        found.setdefault(number[layer], []).append(hidden.shape[1])

    number = {layer: index for index, layer in enumerate(parts.layers)}
    hooks = [layer.register_forward_hook(count) for layer in parts.layers]
    try:
        return final_states(parts, batch, start, hidden), found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0, 2, 3])
def test_the_logits_are_those_of_the_whole_model(family, start, rows):
    model = tiny_model(family)
    expected = plain_logits(tiny_model(family, attn_implementation="eager"), rows)
    parts, batch = ModelParts(model, onednn=False), pack(rows)
    hidden = parts.run(batch, 0, start) if start else None
    final, ran = tokens_by_layer(parts, batch, start, hidden)
    logits = parts.head(final[0])[batch.token_logit]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5
    assert ran.pop(3) == [len(batch.last_tokens.positions)]
    assert 2 * len(batch.last_tokens.positions) < batch.num_tokens
    assert ran == {layer: [batch.num_tokens] for layer in range(start, 3)}


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 3])
def test_states_of_several_points_run_together(start, rows):
    parts, batch = ModelParts(tiny_model("gemma2")), pack(rows)
    once = parts.run(batch, 0, start)
    points = [once, once + 0.1 * torch.randn(once.shape, generator=torch.Generator().manual_seed(0))]
    together = final_states(parts, batch, start, torch.cat(points), num_points=2)
    assert together.shape == (2, len(batch.logit_positions), once.shape[1])
    for found, states in zip(together, points, strict=True):
        torch.testing.assert_close(found, final_states(parts, batch, start, states)[0], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


@torch.no_grad()
def test_rows_with_common_beginnings(rows):
    rows = [*rows, rows[0]]
    parts, batch = ModelParts(tiny_model("llama")), pack(rows)
    shared, _ = share_beginnings(batch)
    assert shared.num_tokens < batch.num_tokens
    torch.testing.assert_close(needed_logits(parts, shared), needed_logits(parts, batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_tokens_run_if_most_are_needed():
    generator = random.Random(1)
    batch, parts = pack([random_example(generator, number, 4, (12,)) for number in range(3)]), ModelParts(tiny_model())
    final, ran = tokens_by_layer(parts, batch, 0, None)
    assert ran[3] == [batch.num_tokens]
    assert torch.equal(final[0], parts.run(batch, 0, 4)[batch.logit_positions])


@torch.no_grad()
def test_a_model_of_one_layer(rows):
    parts, batch = ModelParts(tiny_model(num_hidden_layers=1), onednn=False), pack(rows)
    expected = parts.run(batch, 0, 1)[batch.logit_positions]
    for hidden in (None, parts.run(batch, 0, 0)):
        torch.testing.assert_close(final_states(parts, batch, 0, hidden)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_runs_padded(rows):
    batch = pack(rows)
    padded, packed = (
        needed_logits(ModelParts(tiny_model("llama"), packed, onednn=False), batch) for packed in (False, True)
    )
    torch.testing.assert_close(padded, packed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_gradient_is_that_of_the_whole_model(rows):
    """The reference is autograd with attention over all tokens."""
    parts, batch = ModelParts(tiny_model("qwen3"), onednn=False), pack(rows)
    weights = [weight.requires_grad_() for layer in (2, 3) for weight in parts.layers[layer].parameters()]
    weight = torch.randn(
        len(batch.logit_positions), parts.model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )

    def whole(layer, query, key, value, options):
        return packed_attention_forward(layer, query, key, value, None, packed_layout=batch.layout, **options)

    with torch.enable_grad():
        found = torch.autograd.grad((final_states(parts, batch, 0, None)[0] * weight).sum(), weights)
        plain = parts.run(batch, 0, 4, attend=whole)[batch.logit_positions]
        expected = torch.autograd.grad((plain * weight).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.skipif(not has_onednn_linear(), reason="this build of torch has no oneDNN product")
def test_onednn_runs_where_no_derivative_is_needed(rows, monkeypatch):
    """Below the tuned layer, and torch's own product from there on, with the same gradient."""
    batch, model, calls = pack(rows), tiny_model("llama"), []
    monkeypatch.setattr(linear, "onednn_linear", lambda *args: calls.append(args) or onednn_linear(*args))
    gradients = []
    for onednn in (False, True):
        tuned = tuned_layer(ModelParts(model, onednn=onednn), 2)
        loss = batch_loss(tuned, batch, AnswerLikelihood())
        below = len(calls)
        gradients.append(loss.gradient()[1])
        assert len(calls) == below
    assert calls  # two layers below
    for name, one in gradients[0].items():
        assert (one - gradients[1][name]).norm() < 1e-5 * one.norm()
