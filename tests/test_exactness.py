"""Every optimization gives the losses of the plain two-pass computation for the same z, batch and dtype."""

import itertools
import random
import warnings

import pytest
import torch
from conftest import FAMILIES, estimate, layer_forward, random_example, tiny_model, tune_layer, tuned_layer
from torch.nn import functional as F

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.estimators import SPSA, Point
from slzo.zo.forward import SuffixForward
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.forward import Span
from slzo.zo.stepper import StepOptions

EPS = 1e-3
LAYER = 2


OBJECTIVES = (CandidateCrossEntropy(), AnswerLikelihood())


def plain_losses(model, examples):
    """Both losses by one forward pass per candidate, full logits, nothing shared, float64 at the end."""
    entropies, answers = [], []
    for example in examples:
        scores = []
        for sequence in example.sequences:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0].double()
            log_probs = logits.log_softmax(-1)
            start = len(sequence.ids) - sequence.num_answer
            tokens = torch.stack([log_probs[i - 1, sequence.ids[i]] for i in range(start, len(sequence.ids))])
            scores.append(tokens)
        gold = example.gold[0]
        answers.append(scores[gold])
        means = torch.stack([tokens.mean() for tokens in scores])
        entropies.append(F.cross_entropy(means[None], torch.tensor([gold])))
    return float(torch.stack(entropies).mean()), -float(torch.cat(answers).mean())


def plain_two_passes(family, examples, direction):
    """The losses of both objectives at both ends of the direction, shape (objectives, 2)."""
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].clone() for name in direction}
    losses = []
    for sign in (1, -1):
        for name, z in direction.items():
            parameters[name].copy_(before[name] + sign * EPS * z)
        losses.append(plain_losses(model, examples))
    return torch.tensor(losses, dtype=torch.float64).T


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_plain_computation(family, examples, one_token_examples):
    for rows in (one_token_examples, examples):
        direction = tune_layer(ModelParts(tiny_model(family, scale=1.5)), LAYER).draw(0, 0, 0)
        points = [Point(direction, EPS), Point(direction, -EPS)]
        expected = plain_two_passes(family, rows, direction)
        for packed, onednn in itertools.product((True, False), (True, False)):
            parts = ModelParts(
                tiny_model(family, scale=1.5), packed, onednn=onednn and torch.backends.mkldnn.is_available()
            )
            tuned = tune_layer(parts, LAYER)
            for shared, warm in itertools.product((True, False), repeat=2):
                cache = PrefixCache(LAYER, 1.0)
                if warm:  # states from other batches, in another order
                    filling = SuffixForward(parts, Span(LAYER, LAYER + 1), cache)
                    for example in reversed(rows):
                        filling.prefix(pack([example], share_prompts=shared))
                for grouped, paired in itertools.product((True, False), repeat=2):
                    forward = SuffixForward(parts, Span(LAYER, LAYER + 1), cache, paired, paired)
                    batch = pack(rows, share_prompts=shared, group_lengths=grouped)
                    hidden = forward.prefix(batch, keep=warm)
                    for objective, losses in zip(OBJECTIVES, expected, strict=True):
                        sums = forward.losses(batch, hidden, tuned, points, objective)
                        torch.testing.assert_close((sums[0] / sums[1]).double(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("paired", [True, False])
def test_queries_evaluated_together_give_the_same_gradient(paired, examples):
    parts = ModelParts(tiny_model("llama", scale=1.5))
    tuned = tune_layer(parts, LAYER)
    forward = layer_forward(parts, LAYER, cache_gb=0, paired=paired)
    batch = pack(examples)

    def evaluate(points):
        calls.append(len(points))
        sums = forward.losses(batch, forward.prefix(batch), tuned, points, CandidateCrossEntropy())
        return sums[0] / sums[1]

    found = []
    for at_once, expected_calls in ((1, [2] * 5), (2, [4, 4, 2]), (8, [10])):
        calls = []
        found_here = estimate(SPSA(), tuned, evaluate, eps=EPS, num_queries=5, queries_at_once=at_once)
        assert calls == expected_calls
        found.append((torch.tensor(found_here.projected_grad), found_here.gradient))
    for slopes, gradient in found[1:]:
        torch.testing.assert_close(slopes, found[0][0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-2, atol=1e-2)


def train(plain, steps=50):
    """Loss curve of ``steps`` steps with every optimization off or on."""
    generator = random.Random(7)
    rows = [random_example(generator, i, 4 + i % 9, (1, 1), i % 2) for i in range(40)]
    parts = ModelParts(tiny_model("llama", scale=1.5), packed=not plain, onednn=False if plain else None)
    engine = Engine(candidate_logits=not plain, paired=not plain, cache_gb=0 if plain else 1)
    model = tuned_layer(parts, LAYER, engine=engine)
    optimizer = torch.optim.SGD(model.tensors.masters, lr=3e-4)
    curve = []
    for step in range(steps):
        picked = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = TrainBatch(pack(picked, share_prompts=not plain, group_lengths=not plain), ())
        loss = model.loss(batch, CandidateCrossEntropy())
        result = model.step(loss, SPSA(), optimizer, StepOptions(EPS), seed=0, step=step)
        curve.append(result.estimate.loss)
    return torch.tensor(curve)


def test_fifty_steps_with_everything_on_equal_the_plain_run():
    plain, fast = train(plain=True), train(plain=False)
    assert (plain[0] - plain[-1]).abs() > 1e-3  # the weights do move
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same_losses_or_falls_back(family, examples):
    parts = ModelParts(tiny_model(family, scale=1.5), compile=True)
    tuned = tune_layer(parts, LAYER)
    direction = tuned.draw(0, 0, 0)
    expected = plain_two_passes(family, examples, direction)[0]
    forward = layer_forward(parts, LAYER, cache_gb=0)
    batch = pack(examples)
    points = [Point(direction, EPS), Point(direction, -EPS)]
    sums = forward.losses(batch, forward.prefix(batch), tuned, points, CandidateCrossEntropy())
    torch.testing.assert_close((sums[0] / sums[1]).double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_failing_compiler_falls_back_with_a_warning(monkeypatch, examples):
    def broken(layer, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    parts = ModelParts(tiny_model("llama"), compile=True)
    plain = ModelParts(tiny_model("llama"), onednn=False)
    batch = pack(examples)
    with pytest.warns(UserWarning, match="no compiler here; running uncompiled"):
        parts.logits(batch)
    with warnings.catch_warnings():  # said once, then it just runs
        warnings.simplefilter("error")
        logits = parts.logits(batch)
    torch.testing.assert_close(logits, plain.logits(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_cache_in_a_mapped_file_and_in_another_dtype(tmp_path, dtype, examples):
    parts = ModelParts(tiny_model("llama"))
    batch = pack(examples)
    expected = layer_forward(parts, LAYER, cache_gb=0).prefix(batch)
    cache = PrefixCache(LAYER, 1e-3, dtype, str(tmp_path / "cache"))
    forward = SuffixForward(parts, Span(LAYER, LAYER + 1), cache)
    cold = forward.prefix(batch)
    cached = forward.prefix(batch)
    assert torch.equal(cold, cached)  # the loss must not depend on what is cached
    assert cached.dtype == expected.dtype
    assert cache.num_bytes == expected.numel() * dtype.itemsize
    assert torch.equal(cached, expected.to(dtype).float())
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name
    cache.clear()
    assert batch.example_index[0] not in cache


def test_a_prefix_cache_takes_over_what_fits_of_another(examples):
    batch = pack(examples)
    states = torch.randn(batch.num_tokens, 4)
    cache = PrefixCache(LAYER, 1.0)
    cache.put(batch.example_index, batch.example_tokens, states)
    keys = batch.example_index
    taken = PrefixCache(LAYER, 1.0)
    taken.take_over(cache)
    assert torch.equal(taken.gather(keys, {}, states.device, states.dtype), states)
    assert taken.num_bytes == cache.num_bytes == states.numel() * 4
    small = PrefixCache(LAYER, batch.example_tokens[0] * 4 * 4 / 2**30)
    small.take_over(cache)
    assert keys[0] in small
    assert keys[1] not in small
    for other in (PrefixCache(LAYER + 1, 1.0), PrefixCache(LAYER, 1.0, torch.bfloat16)):
        other.take_over(cache)
        assert keys[0] not in other
