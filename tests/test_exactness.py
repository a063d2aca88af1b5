"""Every optimization gives the losses of the plain two-pass computation for the same z, batch and dtype."""

import itertools
import random
import warnings

import pytest
import torch
from conftest import FAMILIES, estimate, layer_objective, random_example, tiny_model, tune_layer
from torch.nn import functional as F

from slzo.evaluation.scoring import LossKind
from slzo.models.packing import pack
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel
from slzo.zo.estimators import SPSA, Point

EPS = 1e-3
LAYER = 2


def plain_loss(model, examples, kind):
    """The loss by one forward pass per candidate, full logits, nothing shared, float64 at the end."""
    losses, weights = [], []
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
        if kind is LossKind.ANSWER:
            losses.append(-scores[gold].sum())
            weights.append(len(scores[gold]))
        else:
            means = torch.stack([tokens.mean() for tokens in scores])
            losses.append(F.cross_entropy(means[None], torch.tensor([gold])))
            weights.append(1)
    return float(torch.stack(losses).sum() / sum(weights))


def plain_two_passes(family, examples, direction, kind):
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].clone() for name in direction}
    losses = []
    for sign in (1, -1):
        for name, z in direction.items():
            parameters[name].copy_(before[name] + sign * EPS * z)
        losses.append(plain_loss(model, examples, kind))
    return torch.tensor(losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [LossKind.CANDIDATES, LossKind.ANSWER])
def test_losses_equal_the_plain_computation(family, kind, examples, one_token_examples):
    for rows in (one_token_examples, examples):
        direction = tune_layer(SplitModel(tiny_model(family, scale=1.5)), LAYER).draw(0, 0, 0)
        expected = plain_two_passes(family, rows, direction, kind)
        for packed, onednn in itertools.product((True, False), (True, False)):
            split = SplitModel(
                tiny_model(family, scale=1.5), packed, onednn=onednn and torch.backends.mkldnn.is_available()
            )
            tuned = tune_layer(split, LAYER)
            for shared, grouped, paired, warm in itertools.product((True, False), repeat=4):
                cache = PrefixCache(1.0)
                objective = layer_objective(split, LAYER, cache, candidate_rows=paired, paired=paired)
                batch = pack(rows, share_prompts=shared, group_lengths=grouped)
                if warm:  # states from other batches, in another order
                    for example in reversed(rows):
                        objective.prefix(pack([example], share_prompts=shared))
                points = [Point(direction, EPS), Point(direction, -EPS)]
                sums = objective.losses(batch, objective.prefix(batch), tuned, points, kind)
                torch.testing.assert_close((sums[0] / sums[1]).double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("paired", [True, False])
def test_queries_evaluated_together_give_the_same_gradient(paired, examples):
    split = SplitModel(tiny_model("llama", scale=1.5))
    tuned = tune_layer(split, LAYER)
    objective = layer_objective(split, LAYER, PrefixCache(0), paired=paired)
    batch = pack(examples)

    def evaluate(points):
        calls.append(len(points))
        sums = objective.losses(batch, objective.prefix(batch), tuned, points, LossKind.CANDIDATES)
        return sums[0] / sums[1]

    found = []
    for at_once, expected_calls in ((1, [2] * 5), (2, [4, 4, 2]), (8, [10])):
        calls = []
        found_here = estimate(SPSA(), tuned, evaluate, eps=EPS, num_queries=5, queries_at_once=at_once)
        assert calls == expected_calls
        found.append((torch.tensor(found_here.projected_grad), [master.grad.clone() for master in tuned.masters]))
    for slopes, gradients in found[1:]:
        torch.testing.assert_close(slopes, found[0][0], rtol=1e-2, atol=1e-2)
        for mine, one_by_one in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(mine, one_by_one, rtol=1e-2, atol=1e-2)


def train(plain, steps=50):
    """Loss curve of ``steps`` steps with every optimization off or on."""
    generator = random.Random(7)
    rows = [random_example(generator, i, 4 + i % 9, (1, 1), i % 2) for i in range(40)]
    split = SplitModel(tiny_model("llama", scale=1.5), packed=not plain, onednn=False if plain else None)
    tuned = tune_layer(split, LAYER)
    cache = PrefixCache(0 if plain else 1)
    objective = layer_objective(split, LAYER, cache, candidate_rows=not plain, paired=not plain)
    optimizer = torch.optim.SGD(tuned.masters, lr=3e-4)
    curve = []
    for step in range(steps):
        picked = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = pack(picked, share_prompts=not plain, group_lengths=not plain)

        def evaluate(points, batch=batch):
            sums = objective.losses(batch, objective.prefix(batch), tuned, points, LossKind.CANDIDATES)
            return sums[0] / sums[1]

        result = estimate(SPSA(), tuned, evaluate, step=step, eps=EPS)
        optimizer.step()
        tuned.restore()
        curve.append(result.loss)
    return torch.tensor(curve)


def test_fifty_steps_with_everything_on_equal_the_plain_run():
    plain, fast = train(plain=True), train(plain=False)
    assert (plain[0] - plain[-1]).abs() > 1e-3  # the weights do move
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same_losses_or_falls_back(family, examples):
    split = SplitModel(tiny_model(family, scale=1.5), compile=True)
    tuned = tune_layer(split, LAYER)
    direction = tuned.draw(0, 0, 0)
    expected = plain_two_passes(family, examples, direction, LossKind.CANDIDATES)
    objective = layer_objective(split, LAYER, PrefixCache(0))
    batch = pack(examples)
    points = [Point(direction, EPS), Point(direction, -EPS)]
    sums = objective.losses(batch, objective.prefix(batch), tuned, points, LossKind.CANDIDATES)
    torch.testing.assert_close((sums[0] / sums[1]).double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_failing_compiler_falls_back_with_a_warning(monkeypatch, examples):
    def broken(layer, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    split = SplitModel(tiny_model("llama"), compile=True)
    plain = SplitModel(tiny_model("llama"), onednn=False)
    batch = pack(examples)
    with pytest.warns(UserWarning, match="no compiler here; running uncompiled"):
        split.logits(batch)
    with warnings.catch_warnings():  # said once, then it just runs
        warnings.simplefilter("error")
        logits = split.logits(batch)
    torch.testing.assert_close(logits, plain.logits(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_cache_in_a_mapped_file_and_in_another_dtype(tmp_path, dtype, examples):
    split = SplitModel(tiny_model("llama"))
    batch = pack(examples)
    expected = layer_objective(split, LAYER, PrefixCache(0)).prefix(batch)
    cache = PrefixCache(1e-3, dtype, str(tmp_path / "cache"))
    objective = layer_objective(split, LAYER, cache)
    cold = objective.prefix(batch)
    cached = objective.prefix(batch)
    assert torch.equal(cold, cached)  # the loss must not depend on what is cached
    assert cached.dtype == expected.dtype
    assert cache.num_bytes == expected.numel() * dtype.itemsize
    assert torch.equal(cached, expected.to(dtype).float())
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name
    cache.clear()
    assert batch.example_index[0] not in cache
