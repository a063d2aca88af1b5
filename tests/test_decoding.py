"""Answers at several points of the weights at once, against transformers' own generation at one point after the other."""

import random
from itertools import combinations

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model, tuned_layer

from slzo.evaluation.decoding import VariedLayers, Wanted, decode
from slzo.models.parts import ModelParts
from slzo.zo.estimators import Point
from slzo.zo.live_points import live_points

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
    tuned.write(point.direction, point.scale)
    plain = tiny_model(family)
    plain.load_state_dict(model.state_dict())
    tuned.restore()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            eos_token_id=sorted(stops), pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        answers.append([token for token in made if token not in stops])
    return answers


def joint_answers(tuned_model, points, prompts, wanted, stops, budget=10_000):
    with live_points(tuned_model.tensors, points) as write:
        varied = VariedLayers(tuned_model.span.start, tuned_model.span.stop, write)
        return decode(
            tuned_model.parts, prompts, wanted, stops, max_new_tokens=NEW_TOKENS, prefill_tokens=budget, varied=varied,
        )[0]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_answers_at_points_are_those_of_plain_generation(family):
    model, prompts = tiny_model(family), make_prompts()
    layer = {"llama": 0, "qwen2": 3, "mistral": 3}.get(family, 2)
    tuned_model = tuned_layer(ModelParts(model), layer)
    tuned = tuned_model.tensors
    points = [Point({}, 0.0), *(Point(tuned.draw(0, 0, 0), scale) for scale in (EPS, -EPS))]
    stops = {plain_answers(family, model, tuned, points[0], prompts[:1], set())[0][3]}
    expected = [plain_answers(family, model, tuned, point, prompts, stops) for point in points]
    for budget in (1, 10_000):
        # not every point has every row, and one is asked for twice
        wanted = [Wanted(n, p) for p in range(len(points)) for n in range(len(prompts)) if (n + p) % 5] + [Wanted(1, 0)]
        found = joint_answers(tuned_model, points, prompts, wanted, stops, budget)
        assert found == [expected[want.point][want.prompt] for want in wanted]
    # answers part, some of them after the first token, and some rows end early
    pairs = [(one[n], two[n]) for one, two in combinations(expected, 2) for n in range(len(prompts))]
    assert any(one != two and one[:1] == two[:1] for one, two in pairs)
    assert len({len(answer) for own in expected for answer in own}) > 1
