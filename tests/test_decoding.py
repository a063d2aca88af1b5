"""Answers at several points of the weights at once, against transformers' own generation at one point after the other."""

import random
from itertools import combinations

import pytest
import torch
from helpers import VOCABULARY, each_family, tiny_model, tuned_layer

from slzo.batches.encoded import EncodedExample, EncodedSequence, prompt_key, prompt_with_gold
from slzo.batches.packing import Block
from slzo.evaluation.decoder import CachedPrompts, VariedLayers
from slzo.evaluation.decoding import decode
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.estimators import Point
from slzo.zo.tuned import UNPERTURBED

pytestmark = pytest.mark.fast

NEW_TOKENS = 8
EPS = 0.01


def make_prompts(seed=0):
    generator = random.Random(seed)
    start = generator.choices(range(3, VOCABULARY), k=5)
    prompts = [generator.choices(range(3, VOCABULARY), k=2 + 3 * number) for number in range(4)]
    return [*prompts, start + prompts[0], start + prompts[1]]


@torch.no_grad()
def plain_answers(family, model, tuned, point, prompts, stops):
    """Each prompt alone, with a model of its own that has the point's weights."""
    tuned.write(point)
    plain = tiny_model(family)
    plain.load_state_dict(model.state_dict())
    tuned.restore()
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": sorted(stops), "pad_token_id": 0}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        answers.append([token for token in made if token not in stops])
    return answers


def joint_answers(tuned_model, points, prompts, prompt_of, stops, budget=10_000, **options):
    options = {"max_new_tokens": NEW_TOKENS, "prefill_tokens": budget, **options}
    span = tuned_model.span
    with tuned_model.tensors.live_points(points) as write:
        varied = VariedLayers(span.start, span.stop, len(points), write)
        return decode(tuned_model.parts, prompts, stops, prompt_of=prompt_of, varied=varied, **options)[0]


@torch.no_grad()
@each_family
def test_answers_at_points_are_those_of_plain_generation(family):
    model, prompts = tiny_model(family), make_prompts()
    layer = {"llama": 0, "qwen2": 3, "mistral": 3}.get(family, 2)
    tuned_model = tuned_layer(ModelParts(model), layer)
    tuned = tuned_model.tensors
    eps = 10 * EPS if family == "opt" else EPS  # its answers part later
    points = [UNPERTURBED, *(Point(tuned.draw(0, 0, 0), scale) for scale in (eps, -eps))]
    stops = {plain_answers(family, model, tuned, points[0], prompts[:1], set())[0][3]}
    expected = [plain_answers(family, model, tuned, point, prompts, stops) for point in points]
    for budget in (1, 10_000):
        # one prompt is not asked for, and one is asked for twice
        prompt_of = [*range(1, len(prompts)), 1]
        found = joint_answers(tuned_model, points, prompts, prompt_of, stops, budget)
        assert found == [of_point[prompt] for of_point in expected for prompt in prompt_of]
    # answers part, some of them after the first token, and some rows end early
    pairs = [(one[n], two[n]) for one, two in combinations(expected, 2) for n in range(len(prompts))]
    assert any(one != two and one[:1] == two[:1] for one, two in pairs)
    assert len({len(answer) for own in expected for answer in own}) > 1


class Counting:
    """Counts the tokens that run through a layer."""

    def __init__(self, parts, layer):
        self.count = 0
        parts.layers[layer].register_forward_hook(self._add)

    def _add(self, module, inputs, output):
        self.count += inputs[0].shape[1]

    def take(self):
        count, self.count = self.count, 0
        return count


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_kept_prompts_give_the_same_answers_and_are_not_run_again(family):
    prompts = make_prompts()
    tuned_model = tuned_layer(ModelParts(tiny_model(family), onednn=False), 2)
    z = tuned_model.tensors.draw(0, 0, 0)
    points = [Point(z, EPS), Point(z, -EPS)]
    every = range(len(prompts))
    joint_answers(tuned_model, points, prompts, every[:1], set())  # looks at what layers return
    below, above = Counting(tuned_model.parts, 1), Counting(tuned_model.parts, 3)
    plain = joint_answers(tuned_model, points, prompts, every, set())
    tokens = sum(map(len, prompts))
    shared = tokens - 5  # the beginning that two prompts have in common comes once
    decoded = 2 * len(prompts) * (NEW_TOKENS - 1)
    pairs = zip([*every, *every], plain, strict=True)
    histories = {(prompt, *answer[:n]) for prompt, answer in pairs for n in range(1, NEW_TOKENS)}
    assert len(prompts) * (NEW_TOKENS - 1) < len(histories) < decoded
    assert (below.take(), above.take()) == (shared + len(histories), 2 * shared + decoded)

    states = tuned_model.prompt_states
    keys = [prompt_key(n) for n in range(len(prompts))]
    # the last prompt is no part of the plan
    block = Block([prompt_with_gold(key, tuple(p), None) for key, p in list(zip(keys, prompts, strict=True))[:-1]])
    tuned_model.plan_prefix([], [block])
    below.take()
    last = len(prompts[-1])
    for run in (tokens, last):  # all, and only what is not kept
        assert joint_answers(tuned_model, points, prompts, every, set(), kept=CachedPrompts(states, keys)) == plain
        assert (below.take(), above.count > 0) == (run + len(histories), True)
    assert states.cache.num_bytes == block.num_tokens * states.token_bytes
    # nothing is left if the primary cache uses the whole budget
    tuned_model.clear_prefix()
    tuned_model.forward.cache.num_bytes = tuned_model.forward.cache.budget
    tuned_model.plan_prefix([], [block])
    assert not any(states.cache.wants(key) for key in keys)


@torch.no_grad()
def test_sampled_answers_are_those_of_one_point_after_the_other():
    prompts, stops = make_prompts(), {4}
    model = tiny_model()
    tuned_model = tuned_layer(ModelParts(model), 2)
    z = tuned_model.tensors.draw(0, 0, 0)
    points = [Point(z, EPS), Point(z, -EPS)]
    # two samples of each prompt, with the same random numbers at both points
    rows = [n for n in range(len(prompts)) for _ in range(2)]
    keys = [sample_key(0, 3, str(n), number % 2) for number, n in enumerate(rows)]
    found = joint_answers(tuned_model, points, prompts, rows, stops, sampling=Sampling(2.0, (*keys, *keys)))
    expected = []
    for point in points:
        tuned_model.tensors.write(point)
        for n, key in zip(rows, keys, strict=True):
            ids = list(prompts[n])
            for position in range(NEW_TOKENS):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].float()
                ids.append(int(Sampling(2.0, (key,)).with_noise(logits, [0], position).argmax()))
                if ids[-1] in stops:
                    break
            expected.append([token for token in ids[len(prompts[n]) :] if token not in stops])
    assert found == expected
    assert found[0] != found[1]


@torch.no_grad()
def test_kept_prompts_give_the_same_gold_loss():
    prompts, generator = make_prompts(), random.Random(1)
    tuned_model = tuned_layer(ModelParts(tiny_model()), 2)
    gold = []
    for number, prompt in enumerate(prompts):
        answer = generator.choices(range(3, VOCABULARY), k=1 + number % 3)
        own = EncodedSequence((*prompt, *answer), len(answer))
        gold.append(EncodedExample(number, (own,), () if number == 2 else (0,)))
    plain = decode(tuned_model.parts, prompts, {2}, gold=gold, max_new_tokens=NEW_TOKENS)
    kept = CachedPrompts(tuned_model.prompt_states, range(len(prompts)))
    for _ in range(2):
        made = decode(tuned_model.parts, prompts, {2}, gold=gold, max_new_tokens=NEW_TOKENS, kept=kept)
        assert made.answers == plain.answers
        assert made.gold == {number: pytest.approx(pair, rel=1e-5) for number, pair in plain.gold.items()}
    assert all(number in kept.states.cache for number in range(len(prompts)))


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
def test_live_points_are_those_that_are_written(hold):
    tuned_model = tuned_layer(ModelParts(tiny_model()), 2, engine=Engine(onednn=False))
    tuned = tuned_model.tensors
    z = tuned.draw(0, 0, 0)
    points = [UNPERTURBED, Point(z, 0.1), Point(z, -0.1)]
    places = [tensor.live.data_ptr() for _, tensor in tuned.items()]
    tuned.hold_bytes = 2**30 if hold else 0
    with tuned.live_points(points) as write:
        for number in (1, 0, 2, 1, 0):
            write(number)
            for name, tensor in tuned.items():
                assert torch.equal(tensor.live, torch.add(tensor.master, z[name], alpha=points[number].scale))
    assert [tensor.live.data_ptr() for _, tensor in tuned.items()] == places
    tuned.restore()
    assert all(torch.equal(tensor.live, tensor.master) for _, tensor in tuned.items())
