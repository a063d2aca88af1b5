"""Batched greedy generation against a plain loop that runs the whole sequence anew for each token."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import VOCABULARY, each_family, tiny_model

from slzo.batches.chunks import chunk_by_tokens, num_distinct_tokens, shared_beginnings
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.batches.sharing import share_beginnings
from slzo.evaluation.decoding import decode
from slzo.evaluation.generation import answer_text, ends_with, generate_plainly, stop_tokens
from slzo.models.logits import needed_logits
from slzo.models.parts import Limits, ModelParts
from tiny import make_tokenizer


def plain_greedy(model, prompt, stops, max_new_tokens):
    ids, answer = list(prompt), []
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        token = int(logits.argmax())
        if token in stops:
            break
        ids.append(token)
        answer.append(token)
    return answer


def make_prompts(count=9, seed=0):
    generator = random.Random(seed)
    start = generator.choices(range(3, VOCABULARY), k=9)
    prompts = []
    for number in range(count):
        own = generator.choices(range(3, VOCABULARY), k=1 + 3 * number)
        prompts.append(start + own if number % 2 else own)
    # one prompt is the beginning of another, and one comes twice
    return [*prompts, prompts[-1][:5], prompts[2]]


@torch.no_grad()
@each_family
def test_equals_a_plain_loop(family):
    model = tiny_model(family)
    prompts = make_prompts()
    # tokens that these random models really produce end some rows early
    long = [plain_greedy(model, prompt, set(), 12) for prompt in prompts]
    stops = {answer[3 + number % 5] for number, answer in enumerate(long[:5])}
    expected = [plain_greedy(model, prompt, stops, 12) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    parts = ModelParts(model)
    for budget in (1, 40, 10_000):
        assert decode(parts, prompts, stops, max_new_tokens=12, prefill_tokens=budget).answers == expected
    padded = ModelParts(tiny_model(family), packed=False)
    assert decode(padded, prompts, stops, max_new_tokens=12).answers == expected


def test_stop_token_at_once_gives_an_empty_answer():
    model = tiny_model()
    prompt = make_prompts()[4]
    first = plain_greedy(model, prompt, set(), 1)[0]
    assert decode(ModelParts(model), [prompt, prompt], {first}).answers == [[], []]
    assert decode(ModelParts(model), [], {first}).answers == []


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_gold_loss_is_that_of_the_answer_tokens(packed):
    model, prompts, generator = tiny_model(), make_prompts(), random.Random(3)
    gold, losses, counts = [], {}, {}
    for number, prompt in enumerate(prompts):
        answer = generator.choices(range(3, VOCABULARY), k=1 + number % 3)
        own = EncodedSequence((*prompt, *answer), len(answer))
        gold.append(EncodedExample(number, (own,), () if number == 4 else (0,)))
        if number == 4:  # a row without a label does not count
            continue
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(dim=-1)
        losses[number] = -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        counts[number] = len(answer)
    parts = ModelParts(model, packed)
    for budget in (1, 10_000):
        made = decode(parts, prompts, {2}, prefill_tokens=budget, gold=gold)
        assert {number: pair[0] for number, pair in made.gold.items()} == pytest.approx(losses, rel=1e-4)
        assert {number: pair[1] for number, pair in made.gold.items()} == counts
        assert sum(loss for loss, _ in made.gold.values()) == pytest.approx(sum(losses.values()), rel=1e-5)
        assert made.answers == decode(parts, prompts, {2}).answers
    unknown = [replace(row, gold=()) for row in gold]
    assert decode(parts, prompts, {2}, gold=unknown).gold == {}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_shared_beginnings_give_the_same_logits(family):
    parts = ModelParts(tiny_model(family))
    prompts = make_prompts()
    rows = [
        EncodedExample(i, tuple(EncodedSequence((*prompt, *end), len(end)) for end in ((5,), (6, 7), (6, 8))), (0,))
        for i, prompt in enumerate(prompts)
    ]
    plain = pack(rows)
    shared, _ = share_beginnings(plain)
    assert shared.num_tokens < plain.num_tokens
    assert shared.num_tokens == num_distinct_tokens(s.ids[:-1] for row in rows for s in row.sequences)
    assert sum(len(group) for group in shared.layout.groups) < sum(len(group) for group in plain.layout.groups)
    torch.testing.assert_close(needed_logits(parts, shared), needed_logits(parts, plain), rtol=1e-4, atol=1e-4)


def test_chunks_keep_order_and_limits():
    sequences = [(1, 2, 3), (1, 2, 4), (1, 2, 4, 5), (7,), (8, 9, 10, 11, 12, 13, 14)]
    lengths = [*map(len, sequences)]
    assert shared_beginnings(sequences) == [0, 2, 3, 0, 0]
    assert shared_beginnings([]) == []
    assert chunk_by_tokens(lengths, 5, shared=shared_beginnings(sequences)) == [[0, 1, 2], [3], [4]]
    assert chunk_by_tokens(lengths, 5) == [[0], [1], [2, 3], [4]]
    assert chunk_by_tokens(lengths, None, 2) == [[0, 1], [2, 3], [4]]
    assert chunk_by_tokens([], 5) == []
    # the first sequence of a chunk has nothing in common with an earlier one of it
    assert chunk_by_tokens([10] * 7, 12, shared=[0, *[9] * 6]) == [[0, 1, 2], [3, 4, 5], [6]]


def test_answer_text_is_cut_at_a_newline_inside_a_token_and_stripped():
    tokenizer = make_tokenizer()
    assert answer_text(tokenizer, tokenizer(" great movie \nBad").input_ids) == "great movie"
    assert answer_text(tokenizer, []) == ""
    model, ends = tiny_model(), {tokenizer.eos_token_id, *tokenizer("\n").input_ids}
    for own, more in ((None, set()), (9, {9}), ([8, 9], {8, 9})):
        model.generation_config.eos_token_id = own
        assert stop_tokens(tokenizer, model) == ends | more
    ended = ends_with(_Joined(), ("\n", "<end>"))
    assert [ended(ids) for ids in ([1, 1], [1, 2])] == [False, True]
    assert ends_with(_Joined(), ("<end>",)) is None


class _Joined:
    """A tokenizer with a token that contains a newline, besides the newline itself, and with an added token."""

    def get_added_vocab(self):
        return {"<end>": 4}

    def decode(self, ids, skip_special_tokens):
        return "".join({1: "a", 2: ".\n\n", 3: "\n"}[id] for id in ids)


@pytest.mark.parametrize("packed", [True, False])
def test_settings_that_come_with_a_model_change_no_answer(packed):
    parts = ModelParts(tiny_model(), packed=packed)
    expected = decode(parts, [[5, 6, 7]], {2}, max_new_tokens=8).answers
    parts.model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0
    )
    own = parts.model.generation_config
    assert decode(parts, [[5, 6, 7]], {2}, max_new_tokens=8).answers == expected
    assert parts.model.generation_config is own


def test_an_adapter_leaves_the_eos_tokens_of_its_base_model():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 9]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    generate_plainly(adapted, torch.tensor([[5, 6]]), set(), None, max_new_tokens=1)
    assert adapted.get_base_model().generation_config.eos_token_id == [2, 9]


@torch.no_grad()
@pytest.mark.parametrize("left_padding", [True, False])
def test_an_answer_ends_where_its_tokens_say_so_with_and_without_padding(left_padding):
    model, prompts = tiny_model(), make_prompts()
    long = [plain_greedy(model, prompt, set(), 12) for prompt in prompts]
    pairs = {tuple(answer[number % 7 : number % 7 + 2]) for number, answer in enumerate(long[:5])}

    def ended(ids):
        return tuple(ids[-2:]) in pairs

    expected = decode(ModelParts(model), prompts, set(), max_new_tokens=12, ended=ended).answers
    assert len({len(answer) for answer in expected}) > 2
    padded = ModelParts(tiny_model(), packed=False)
    padded.limits = Limits(left_padding=left_padding)
    assert decode(padded, prompts, set(), max_new_tokens=12, ended=ended).answers == expected
