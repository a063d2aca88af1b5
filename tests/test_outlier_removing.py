"""The rule that chooses the layer which removes the outlier: on made-up figures, and on the built-in models."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import SHARED_DATA, choose, layer_statistics, random_prompts, tiny_model

from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import pack
from slzo.data.encoding import Encoder
from slzo.models.load import load_model, load_tokenizer
from slzo.models.parts import ModelParts
from slzo.tasks.base import Example
from slzo.tasks.registry import get_task
from slzo.utils.assets import cache_dir
from slzo.zo.profile import profile_layers
from slzo.zo.selection import Choice, FirstOutlierLayer, OutlierRemovingLayer

RULE = OutlierRemovingLayer()


def falling(*magnitudes, error=None):
    """Layers of these largest magnitudes; their ratios must not matter."""
    return layer_statistics(*((magnitude, 10.0) for magnitude in magnitudes), error=error)


@pytest.mark.parametrize(
    ("magnitudes", "layer", "fall"),
    [
        ((20, 800, 900, 23000, 23000, 8000, 3000), 5, "15,000"),
        ((1000, 1, 0.5, 0.1), 1, "999"),  # in absolute terms, not in shares
        ((5, 3, 10, 4, 9, 4.5), 3, "6"),
        ((8, 4, 8, 4), 1, "4"),  # the first of two
        ((2, 1), 1, "1"),
        ((3000, 2000, 5000, 4000.5), 1, "1,000"),
    ],
)
def test_the_layer_after_the_largest_fall(magnitudes, layer, fall):
    reason = f"max |h| falls most across it, by {fall}"
    assert choose(RULE, falling(*magnitudes)) == Choice(layer, reason, "outlier-removing layer")


@pytest.mark.parametrize("magnitudes", [(1, 2, 3), (1, 1, 1), (7,)])
def test_without_a_fall_it_is_the_last_layer(magnitudes):
    choice = choose(RULE, falling(*magnitudes, error=0.1))
    assert choice == Choice(len(magnitudes) - 1, "the last layer, as none lowers the largest magnitude")


def test_the_margin_is_over_the_next_largest_fall():
    choice = choose(RULE, falling(20, 23000, 8000, 3000, 2900, error=0.01))
    spread = math.hypot(230, 80, 80, 30)  # the layer between takes part in both falls
    assert choice.layer == 2
    assert choice.margin.errors == pytest.approx((15000 - 5000) / spread)
    assert choice.margin.description == (
        f"layer 2's fall of 15,000 is {10000 / spread:.1f} standard errors above layer 3's of 5,000"
    )


def test_the_nearest_rival_is_the_one_with_fewest_standard_errors():
    """A smaller fall of noisy figures may be nearer than a larger one of clear figures."""
    layers = falling(100, 50, 400, 380, 100, 80)
    layers = [replace(layer, max_abs_se=e) for layer, e in zip(layers, (1, 1, 5, 5, 60, 60), strict=True)]
    choice = choose(RULE, layers)  # falls of 50, -350, 20, 280 and 20
    assert choice.layer == 4
    assert choice.margin.description.endswith("above layer 5's of 20")
    assert choice.margin.errors == pytest.approx(260 / math.hypot(5, 60, 60, 60))


def test_the_margin_is_infinite_without_errors_and_unknown_without_figures():
    assert choose(RULE, falling(5, 9, 1, 2, error=0.0)).margin.errors == math.inf
    assert choose(RULE, falling(5, 9, 1, 2)).margin is None
    assert choose(RULE, falling(5, 1, error=0.1)).margin is None  # no rival


def test_a_planted_fall_is_found():
    """One layer writes a huge value into a channel, another one removes it."""
    model = tiny_model("llama", scale=1.0)
    model.model.layers[1].mlp.down_proj.weight[13] *= 1e7
    model.model.layers[3].register_forward_hook(lambda module, inputs, out: out * 1e-4)
    layers = profile_layers(ModelParts(model), [pack(random_prompts())])
    assert choose(RULE, layers).layer == 3


# ---- the built-in models ---------------------------------------------------------------------------------------------------

NINE = ("sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop")
TEXT = """It was late in the year when the two brothers came back to the valley.
The river had changed its course twice since they were children.
Nobody in the village remembered the name of the old ferryman.
A cold wind blew from the north, and the fields lay empty.
They asked at the inn for a room, and were given the attic.
In the morning the younger one went down to look at the mill.
Its wheel had been taken away, and grass grew on the steps.
He sat there for an hour and thought of what their father had said.
The elder one had stayed behind to write a letter.
It began with an apology and ended with a question.""".splitlines()
QUESTIONS = """What is the capital of France?
Write a poem about rain.
How do I sort a list in Python?
Translate 'good morning' into German.
Why is the sky blue?
Give me three ideas for dinner.
Summarize the plot of Hamlet.
What is 17 times 23?
Explain photosynthesis to a child.
Who wrote War and Peace?""".splitlines()
CHAT = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
CODE = [
    "def add(a, b):\n    return a + b\n",
    "for (int i = 0; i < n; i++) {\n  sum += x[i];\n}\n",
    "import os\n\nprint(os.getcwd())\n",
    "SELECT name, COUNT(*) FROM users GROUP BY name;\n",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n",
    'fn main() {\n    println!("hello");\n}\n',
    "const f = async (x) => {\n  await fetch(x);\n};\n",
    "while True:\n    try:\n        step()\n    except StopIteration:\n        break\n",
    "#include <stdio.h>\nint main(void) { return 0; }\n",
    "git commit -m 'first' && git push origin main\n",
]
WORDS = ["apple", "river", "seven", "quickly", "London", "music", "because", "yellow", "computer", "winter"]


def reviews(count):
    rows = (cache_dir() / "data" / "rotten_tomatoes-0.0.2.jsonl").read_text(encoding="utf-8").split("\n")[:count]
    task = get_task("movie_reviews")
    return [task.example(json.loads(row), str(number)).prompt for number, row in enumerate(rows)]


def of_task(name):
    """Prompts of a task's first rows, cut so that ten take seconds."""
    lines = (SHARED_DATA / "hf" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    return [get_task(name).example(json.loads(line), str(number)).prompt[-400:] for number, line in enumerate(lines)]


SOURCES = {
    **{name: (lambda name=name: of_task(name)) for name in NINE},
    "10 movie reviews": lambda: reviews(10),
    "64 movie reviews": lambda: reviews(64),
    "plain text": lambda: TEXT,
    "chat": lambda: CHAT,
    "code": lambda: CODE,
    "words": lambda: [f"{word} is" for word in WORDS],
}
QUICK = ("10 movie reviews", "plain text")
ANSWERS = {"smollm2-135m": 28, "gemma3-270m": 16}


@pytest.fixture(scope="module")
def loaded():
    """Each model once, when it is first asked for."""
    models = {}

    def get(name):
        if not (cache_dir() / "models" / name).is_dir():
            pytest.skip(f"{name} is not in the cache")
        if name not in models:
            models.clear()
            models[name] = ModelParts(load_model(name)), Encoder(load_tokenizer(name))
        return models[name]

    return get


@pytest.mark.real_model
@pytest.mark.parametrize("source", [pytest.param(s, marks=[pytest.mark.slow] * (s not in QUICK)) for s in SOURCES])
@pytest.mark.parametrize("model", ["smollm2-135m", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_source_of_prompts_gives_the_same_layer(model, source, loaded):
    if source in NINE and not (SHARED_DATA / "hf" / source).is_dir():
        pytest.skip("the shared real rows are not on this machine")
    if "reviews" in source and not (cache_dir() / "data" / "rotten_tomatoes-0.0.2.jsonl").is_file():
        pytest.skip("the reviews are not in the cache")
    parts, encoder = loaded(model)
    texts = SOURCES[source]()
    assert len(texts) >= 10
    encoded = [
        prompt_alone(number, encoder.encode_prompt(Example(str(number), text, ()), max_new_tokens=1).ids)
        for number, text in enumerate(texts)
    ]
    layers = profile_layers(parts, [pack(encoded[start : start + 16]) for start in range(0, len(encoded), 16)])
    choice = choose(RULE, layers)
    assert choice.layer == ANSWERS[model]
    assert choice.margin.errors > 1
    if model == "smollm2-135m" and source in ("sst2", "rte", "64 movie reviews"):  # the paper's rule
        assert choose(FirstOutlierLayer(), layers).layer == 11
        assert layers[11].channel == 507
        assert layers[2].ratio < 1000 < layers[11].ratio
