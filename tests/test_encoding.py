"""Prompts and answers as tokens, with tokenizers of several kinds."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slzo.data.encoding import Encoder, newline_token
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError

pytestmark = pytest.mark.fast

CORPUS = [
    "the film is good and it was great",
    "a bad film it was terrible",
    "Is the film good? Yes or No?\nYes",
    "Is the film bad? Yes or No?\nNo",
    "Can we infer that it was good? Yes, No, or Maybe?\nMaybe",
    "Question: where is the film?\nAnswer: Paris\n",
    "Question: who is good?\nAnswer: the bad man\n",
] * 20
COMMON = {"special_tokens": ["<unk>", "<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def wrap(tokenizer, template):
    if template is not None:
        pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def trained(kind, splitter, decoder, trainer, template, corpus=CORPUS):
    tokenizer = Tokenizer(kind())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoder
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer, template)


def byte_level(use_regex, template=None):
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return trained(models.BPE, splitter, decoders.ByteLevel(), trainers.BpeTrainer(vocab_size=400, **COMMON), template)


def joining(template=None):
    """Has the tokens "⏎Yes", "⏎No" and "⏎May", but no "⏎Maybe": newlines join the next word."""
    corpus = ["\nYes", "\nNo", "\nMay"] * 50 + ["be", "?", " it was great"]
    words = pre_tokenizers.Split(Regex(r"\n[A-Za-z]+|[^\n]+|\n"), "isolated")
    splitter = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=270, min_frequency=20, **COMMON)
    return trained(models.BPE, splitter, decoders.ByteLevel(), trainer, template, corpus)


def metaspace(template="<s> $A"):
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=COMMON["special_tokens"], unk_token="<unk>")
    return trained(models.Unigram, pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer, template)


def characters(tokenizer, ids):
    """Text of the tokens, not tidied up as decode() does."""
    text = "".join(tokenizer.convert_ids_to_tokens(list(ids)))
    return text.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")


MAKERS = {
    "byte-level": lambda: byte_level(True),
    "byte-level, BOS and EOS": lambda: byte_level(True, "<s> $A </s>"),
    "byte-level, no word boundaries": lambda: byte_level(False, "<s> $A"),
    "joining newlines": lambda: joining("<s> $A"),
    "metaspace": metaspace,
    "metaspace, EOS": lambda: metaspace("$A </s>"),
}
CASES = [
    Example("a", "the film is good It was", (" terrible", " great"), (1,)),
    Example("b", "Is the film good? Yes or No?\n", ("Yes", "No", "Maybe"), (0,)),
    Example("c", "Question: where is the film?\nAnswer:", (" Paris\n",), (0,)),
    Example("d", "It was good so", (" the film is great", " I was bad"), (0,)),
]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("example", CASES, ids=lambda example: example.prompt[-10:])
def test_answer_tokens_hold_the_candidate_and_no_token_more(tokenizer, example):
    encoded = Encoder(tokenizer).encode(example, 7)
    assert (encoded.index, encoded.gold) == (7, example.gold)
    for candidate, sequence in zip(example.candidates, encoded.sequences, strict=True):
        assert tokenizer.eos_token_id not in sequence.ids
        first = len(sequence.ids) - sequence.num_answer
        assert characters(tokenizer, sequence.ids[first:]).endswith(candidate)
        assert not characters(tokenizer, sequence.ids[first + 1 :]).endswith(candidate)


@pytest.mark.parametrize("maker", ["byte-level", "metaspace"])
@pytest.mark.parametrize("example", CASES, ids=lambda example: example.prompt[-10:])
def test_answer_length_is_what_the_prompt_lacks(maker, example):
    tokenizer = MAKERS[maker]()
    for candidate, sequence in zip(example.candidates, Encoder(tokenizer).encode(example, 0).sequences, strict=True):
        ids = tokenizer(example.prompt + candidate)["input_ids"]
        assert list(sequence.ids) == ids
        assert sequence.num_answer == len(ids) - len(tokenizer(example.prompt)["input_ids"])


def test_newline_joined_with_the_candidate_counts_as_answer():
    tokenizer = joining("<s> $A")
    encoded = Encoder(tokenizer).encode(CASES[1], 0)
    texts = [[tokenizer.decode([i]) for i in s.ids[-s.num_answer :]] for s in encoded.sequences]
    # "⏎Maybe" is one token longer than the prompt, which would leave "be" alone as its answer or a part of it
    assert texts[:2] == [["\nYes"], ["\nNo"]]
    assert texts[2][0] == "\nMay"
    assert "".join(texts[2]) == "\nMaybe"


class WithoutOffsets:
    """A tokenizer written in Python, which cannot tell where a token ends in the text."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("example", CASES, ids=lambda example: example.prompt[-10:])
def test_tokenizers_without_offsets_give_the_same(tokenizer, example):
    slow = Encoder(WithoutOffsets(tokenizer))
    assert slow.encode(example, 0) == Encoder(tokenizer).encode(example, 0)


def test_bos_comes_once_and_appended_eos_is_taken_off():
    tokenizer = byte_level(True, "<s> $A </s>")
    encoder = Encoder(tokenizer)
    ids = encoder.encode(CASES[0], 0).sequences[1].ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids[1:]) == "the film is good It was great"
    assert tokenizer.decode(encoder.encode_prompt(CASES[0]).ids[1:]) == "the film is good It was"


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_long_prompts_lose_tokens_on_the_left_only(template):
    tokenizer = byte_level(True, template)
    example = Example("long", "the film is good " * 30 + "It was", (" terrible", " great"), (1,))
    whole = Encoder(tokenizer).encode(example, 0)
    cut = Encoder(tokenizer, max_length=12).encode(example, 0)
    for long, short in zip(whole.sequences, cut.sequences, strict=True):
        assert len(short.ids) == 12 < len(long.ids)
        assert short.num_answer == long.num_answer
        if template is None:
            assert short.ids == long.ids[-12:]
        else:
            assert short.ids == (tokenizer.bos_token_id, *long.ids[-11:])
    prompt = Encoder(tokenizer, max_length=12).encode_prompt(example, max_new_tokens=5)
    assert (whole.cut, cut.cut, prompt.cut) == (False, True, True)
    assert len(prompt.ids) == 7
    assert tokenizer.decode(prompt.ids[1:]).endswith("It was")


def test_answer_that_does_not_fit_is_an_error():
    example = Example("7", "Is it?", (" terrible terrible terrible terrible",), (0,))
    tokenizer = byte_level(True, "<s> $A")
    needed = Encoder(tokenizer).encode(example, 0).sequences[0].num_answer + 1
    assert len(Encoder(tokenizer, needed).encode(example, 0).sequences[0].ids) == needed
    message = rf"^data.max_length {needed - 1}: the answer ' terrible.* of example '7' needs {needed} tokens"
    with pytest.raises(SlzoError, match=message):
        Encoder(tokenizer, needed - 1).encode(example, 0)
    with pytest.raises(SlzoError, match=r"data.max_length 50: leaves no room for a prompt with 50 new tokens"):
        Encoder(tokenizer, 50).encode_prompt(example)


def test_demonstrations_stand_in_front_and_do_not_change_the_answer(tokenizer):
    encoder, shown = Encoder(tokenizer), [CASES[0], CASES[2]]
    plain, after = encoder.encode(CASES[1], 0), encoder.encode(CASES[1], 0, demonstrations=shown)
    assert [s.num_answer for s in after.sequences] == [s.num_answer for s in plain.sequences]
    text = "the film is good It was great\n\nQuestion: where is the film?\nAnswer: Paris\n\n" + CASES[1].prompt
    for found, expected in ((after.sequences[0].ids, text + "Yes"), (encoder.encode_prompt(CASES[1], shown).ids, text)):
        ids = tokenizer(expected)["input_ids"]
        assert list(found) == (ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)


def test_only_gold_leaves_the_first_gold_candidate():
    encoder = Encoder(byte_level(True))
    every = encoder.encode(CASES[0], 3)
    gold = encoder.encode(CASES[0], 3, only_gold=True)
    assert gold.sequences == (every.sequences[1],)
    assert gold.gold == (0,)
    unlabelled = Example("u", "Is it?", (" a", " b"))
    assert len(encoder.encode(unlabelled, 0).sequences) == 2
    assert encoder.encode(Example("u", "Is it?", ()), 0).sequences == ()
    with pytest.raises(SlzoError, match="example 'u': has no label"):
        encoder.encode(unlabelled, 0, only_gold=True)
    with pytest.raises(SlzoError, match="example 'u': has no label"):
        encoder.encode(CASES[0], 0, demonstrations=[unlabelled])


def test_answers_without_tokens_are_errors():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "<s>": 2, "</s>": 3, "a": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(SlzoError, match=r"example 'w': the tokenizer makes no tokens from answer '\\n'"):
        Encoder(wrap(words, None)).encode(Example("w", "good", ("\n", " good"), (0,)), 0)
    assert newline_token(wrap(words, None)) is None


def test_candidates_with_the_same_tokens_are_errors():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    message = (
        r"example 'w': the tokenizer makes the same tokens from the candidates ' yes' and ' no', so they cannot be told"
    )
    with pytest.raises(SlzoError, match=message):
        Encoder(wrap(words, None)).encode(Example("w", "good", (" yes", " good", " no"), (0,)), 0)


@pytest.mark.parametrize("maker", [lambda: byte_level(True), lambda: byte_level(True, "<s> $A </s>"), joining])
def test_newline_token_is_the_one_that_ends_an_answer(maker):
    tokenizer = maker()
    assert tokenizer.decode([newline_token(tokenizer)]) == "\n"


def test_a_newline_may_be_a_space_to_a_tokenizer():
    assert newline_token(metaspace()) is not None
