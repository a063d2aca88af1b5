"""Scores of the fast path against a scorer written independently from the protocol: one example, one candidate, one full forward.

The plain scorer shares no code with the package beyond the prompt texts: it has its own rule for which tokens belong to a
candidate, its own truncation, its own indexing.
"""

import pytest
import torch
from helpers import FAMILIES, SHARED_DATA, read_lines, tiny_model

from slzo.batches.losses import by_example, candidate_scores
from slzo.batches.packing import pack
from slzo.batches.sharing import share_beginnings
from slzo.data.batch import Row, plan_batches
from slzo.data.encoding import Encoder
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.tasks.base import Example
from slzo.tasks.registry import get_task
from tiny import make_tokenizer

NINE = ["sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop"]
LONG = ("squad", "rte", "cb", "boolq", "wsc", "multirc", "copa", "drop")  # their rows take seconds
TOLERANCE = 1e-4


def plain_score(model, tokenizer, prompt, candidate, max_length=2048, demonstrations=""):
    """Mean log-likelihood of the candidate's tokens: those of prompt + candidate beyond the tokenized prompt."""
    without = tokenizer(prompt)["input_ids"]
    short = tokenizer(prompt + candidate)["input_ids"]
    count = len(short) - len(without)
    # a tokenizer may join the prompt's last character with the candidate
    while short[: len(short) - count] != without[: len(short) - count]:
        count += 1
    ids = tokenizer(demonstrations + prompt + candidate)["input_ids"]
    if len(ids) > max_length:
        bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids = bos + ids[len(ids) - max_length + len(bos) :]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    total = 0.0
    for place in range(len(ids) - count, len(ids)):
        total += float(logits[place - 1].log_softmax(dim=0)[ids[place]])
    return total / count


def fast_scores(parts, encoder, examples, demonstrations=(), share=False):
    """Scores of all candidates through packed batches, as lists by example."""
    rows = [Row(e, encoder.encode(e, i, demonstrations), i) for i, e in enumerate(examples)]
    scores = {}
    for batch in plan_batches(rows, max_rows=64, max_tokens=400).batches:
        packed = pack([row.encoded for row in batch])
        packed = share_beginnings(packed)[0] if share else packed
        table = by_example(candidate_scores(needed_logits(parts, packed), packed), packed).tolist()
        for row, values in zip(batch, table, strict=True):
            scores[row.position] = values[: len(row.example.candidates)]
    return [scores[i] for i in range(len(examples))]


def real_examples(task_name, count, longest=10**9):
    """Rows of the shared data with short prompts, in the order of the file."""
    path = SHARED_DATA / "hf" / task_name / "validation.jsonl"
    if not path.is_file():
        pytest.skip("the shared real rows are not on this machine")
    task = get_task(task_name)
    found = [task.example(row, str(i)) for i, row in enumerate(read_lines(path))]
    return [example for example in found if len(example.prompt) <= longest][:count]


def assert_agree(fast, plain):
    assert [len(values) for values in fast] == [len(values) for values in plain]
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@torch.no_grad()
@pytest.mark.real_model
@pytest.mark.parametrize("task", [pytest.param(t, marks=[pytest.mark.slow] * (t in LONG)) for t in NINE])
def test_real_rows_and_model(task, real_model):
    model, parts, tokenizer = real_model
    longest = {"sst2": 200, "copa": 200, "wsc": 300, "rte": 300, "cb": 300}.get(task, 500)
    examples = real_examples(task, 5 if task in ("sst2", "copa") else 2, longest)
    if not examples:  # no row is that short: the shortest of the first
        examples = sorted(real_examples(task, 200), key=lambda example: len(example.prompt))[:2]
    plain = [[plain_score(model, tokenizer, e.prompt, c) for c in e.candidates] for e in examples]
    assert_agree(fast_scores(parts, Encoder(tokenizer), examples), plain)
    assert_agree(fast_scores(parts, Encoder(tokenizer), examples, share=True), plain)


@pytest.fixture(scope="module")
def real_model():
    from slzo.models.load import load_model, load_tokenizer

    model = load_model("smollm2-135m")
    return load_model("smollm2-135m"), ModelParts(model), load_tokenizer("smollm2-135m")


@torch.no_grad()
@pytest.mark.parametrize("task", NINE)
@pytest.mark.parametrize("share", [False, True])
def test_real_rows_and_a_tiny_model(task, share):
    tokenizer = make_tokenizer()
    examples = real_examples(task, 4, 900)[:4]
    changes = {"max_position_embeddings": 1024}
    plain_model, model = tiny_model(**changes), tiny_model(**changes)
    plain = [[plain_score(plain_model, tokenizer, e.prompt, c, 500) for c in e.candidates] for e in examples]
    assert examples
    assert_agree(fast_scores(ModelParts(model), Encoder(tokenizer, 500), examples, share=share), plain)


EXAMPLES = [
    Example("a", "A good movie. It was", (" great", " terrible"), (0,)),
    Example("b", "It was\nIs it true? Yes or No?\n", ("Yes", "No", "Maybe so"), (1,)),
    Example("c", "The film so", (" she left.", " we stayed until the end."), (1,)),
    Example("d", "A good movie. It was long", (" great", " terrible"), (1,)),
]


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("packed", [True, False])
def test_families(family, packed):
    tokenizer = make_tokenizer()
    plain_model = tiny_model(family)
    plain = [[plain_score(plain_model, tokenizer, e.prompt, c) for c in e.candidates] for e in EXAMPLES]
    parts = ModelParts(tiny_model(family), packed)
    for share in (False, True):
        assert_agree(fast_scores(parts, Encoder(tokenizer), EXAMPLES, share=share), plain)


@torch.no_grad()
@pytest.mark.parametrize("max_length", [20, 60, 2048])
def test_demonstrations_and_truncation(max_length):
    tokenizer = make_tokenizer()
    shown, asked = EXAMPLES[:2], EXAMPLES[2:]
    text = "A good movie. It was great\n\nIt was\nIs it true? Yes or No?\nNo\n\n"
    plain_model = tiny_model()
    plain = [[plain_score(plain_model, tokenizer, e.prompt, c, max_length, text) for c in e.candidates] for e in asked]
    if max_length == 20:
        # a longer candidate does not fit at all
        asked, plain = asked[1:], plain[1:]
    parts = ModelParts(tiny_model())
    for share in (False, True):
        assert_agree(fast_scores(parts, Encoder(tokenizer, max_length), asked, shown, share), plain)
