"""Conversations: rows, templates, which tokens are trained on, what is cut, splits, and the commands."""

import json
import random

import pytest
import torch
from helpers import read_lines, run_dir, summary, tiny_model, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slzo.__main__ import main
from slzo.batches.losses import answer_losses
from slzo.batches.packing import pack
from slzo.data.chat import TEMPLATES, ChatEncoder
from slzo.data.sources import RowSource
from slzo.data.splits import draw_splits, split_off_test
from slzo.evaluation.generation import answer_text, ends_with
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.prompting.pair import load_pair
from slzo.task_data import TaskData
from slzo.tasks.base import Example
from slzo.tasks.chat import ChatTask
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.errors import RowError, SlzoError
from tiny import make_tokenizer

pytestmark = pytest.mark.fast

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "A film?"},
    {"role": "assistant", "content": "It was great."},
]
FORGETS = "{% for m in messages %}{{ '[' + m['role'] + m['content'] if loop.last else '?' }}{% endfor %}"


def example_of(row, **options):
    return ChatTask(**options).example(row, "7")


def chatml(turns):
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def encoder(max_length=512, template="chatml", turns="all"):
    return ChatEncoder(make_tokenizer(), max_length, ChatFormat(template, turns))


def text_of(ids):
    return make_tokenizer().decode(ids)


def scored_text(sequence):
    return text_of([sequence.ids[place] for place in sequence.places])


def test_three_forms_of_rows():
    talk = example_of({"messages": TALK})
    assert [(turn.role, turn.content) for turn in talk.messages] == [(t["role"], t["content"]) for t in TALK[:-1]]
    assert (talk.candidates, talk.gold, talk.references) == (("It was great.",), (0,), ("It was great.",))
    plain = example_of({"prompt": "Why?", "completion": " So."}, system="Be kind.")
    assert plain.messages == (Message("system", "Be kind."), Message("user", "Why?"))
    assert (plain.candidates, plain.references) == ((" So.",), ("So.",))
    turns = example_of({"prompt": TALK[:2], "completion": [TALK[2]]}, system="unused: the row has one")
    assert turns.messages == (Message("system", "Be brief."), Message("user", "Hello?"))
    alpaca = example_of({"instruction": "Translate", "input": "cat", "output": "chat"})
    assert (alpaca.prompt, alpaca.candidates) == ("Translate\n\ncat", ("chat",))
    assert example_of({"instruction": "Write", "input": "", "output": "x"}).prompt == "Write"
    parts = example_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]})
    assert (parts.prompt, parts.candidates, parts.gold) == ("ab", (), ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "field 'messages' is 'x'; it must be a list of turns with role and content"),
        ({"messages": [{"role": "user"}]}, "field 'messages', turn 1 is"),
        ({"messages": TALK[2:3]}, "the answer has no turn before it"),
        ({"messages": [*TALK[:3], TALK[2]]}, "the turn before the answer has role assistant; it must be a user turn"),
        ({"prompt": "x", "completion": " "}, "the answer is empty"),
        ({"prompt": " "}, "the user turn is empty"),
        ({"instruction": "x", "input": 3}, "field 'input' is 3; it must be text"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "a preference pair .* write the chosen answer as 'completion'",
        ),
        ({"text": "x"}, "field 'messages' is missing, and so are 'prompt' and 'instruction'; the row has text"),
    ],
)
def test_rows_that_do_not_fit(row, message):
    with pytest.raises(ValueError, match=message):
        example_of(row)


def test_the_assistants_tokens_are_scored_and_no_others():
    example = example_of({"messages": TALK})
    (every,) = encoder().encode(example, 0).sequences
    assert text_of(every.ids) == chatml(TALK).rstrip("\n")
    assert scored_text(every) == "Hi there.<|im_end|>It was great.<|im_end|>"
    (last,) = encoder(turns="last").encode(example, 0).sequences
    assert last.ids == every.ids
    assert scored_text(last) == "It was great.<|im_end|>"
    prompt = encoder().encode_prompt(example, max_new_tokens=5).ids
    assert text_of(prompt) == chatml(TALK[:-1]) + "<|im_start|>assistant\n"
    assert every.ids[: len(prompt)] == prompt


@torch.no_grad()
def test_the_loss_is_that_of_a_plain_pass():
    model, made = tiny_model(), encoder()
    generator, rows, total, count = random.Random(0), [], 0.0, 0
    for number in range(4):
        talk = TALK[: 3 if number == 2 else 5]
        turns = [{**turn, "content": turn["content"] * generator.randint(1, 3)} for turn in talk]
        rows.append(made.encode(example_of({"messages": turns}), number))
        ids, mask = [], []
        for turn in turns:  # the template by hand
            answer = f"{turn['content']}<|im_end|>"
            for text in (f"<|im_start|>{turn['role']}\n", answer, "\n"):
                piece = made.tokenizer(text)["input_ids"]
                ids += piece
                mask += [text == answer and turn["role"] == "assistant"] * len(piece)
        logs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        total -= sum(float(logs[at - 1, ids[at]]) for at in range(len(ids)) if mask[at])
        count += sum(mask)
    batch = pack(rows)
    found, weight = answer_losses(needed_logits(ModelParts(model), batch), batch).sum()
    assert float(weight) == count
    assert float(found) == pytest.approx(total, rel=1e-4)
    halves = [
        answer_losses(needed_logits(ModelParts(model), part), part) for part in batch.cut(batch.num_tokens // 2 + 1)
    ]
    assert sum(float(half.totals.sum()) for half in halves) == pytest.approx(total, rel=1e-4)


def test_long_conversations_keep_the_last_user_turn_and_the_answer():
    example = example_of({"messages": TALK})
    whole = len(encoder().encode(example, 0).sequences[0].ids)
    made = encoder(whole - 1)
    encoded = made.encode(example, 0)
    (cut,) = encoded.sequences
    assert text_of(cut.ids) == chatml([TALK[0], *TALK[3:]]).rstrip("\n")  # without the first exchange
    assert encoded.cut
    (cut,) = encoder(len(cut.ids) - 1).encode(example, 0).sequences
    assert text_of(cut.ids) == chatml(TALK[3:]).rstrip("\n")  # without the system prompt
    (short,) = encoder(len(cut.ids) - 3).encode(example, 0).sequences
    assert text_of(short.ids) == chatml([{**TALK[3], "content": "ilm?"}, TALK[4]]).rstrip("\n")
    assert scored_text(short) == scored_text(cut)
    assert text_of(encoder(len(cut.ids) - 3).encode_prompt(example, max_new_tokens=2).ids).endswith("assistant\n")
    with pytest.raises(SlzoError, match=r"^data.max_length 40: the answer with the template of example '7' alone"):
        encoder(40).encode(example, 0)


def test_a_user_turn_is_not_cut_to_nothing():
    least = example_of({"messages": [{**TALK[3], "content": "?"}, TALK[4]]})
    (shortest,) = encoder().encode(least, 0).sequences
    (cut,) = encoder(len(shortest.ids)).encode(example_of({"messages": TALK}), 0).sequences
    assert cut.ids == shortest.ids
    with pytest.raises(SlzoError, match="the answer with the template of example '7' alone"):
        encoder(len(shortest.ids) - 1).encode(example_of({"messages": TALK}), 0)


def test_demonstrations_are_former_turns():
    first, second = example_of({"prompt": "A?", "completion": "B."}), example_of({"messages": TALK})
    text = text_of(encoder().encode_prompt(second, [first], 5).ids)
    shown = [TALK[0], {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, *TALK[1:-1]]
    assert text == chatml(shown) + "<|im_start|>assistant\n"


def test_without_a_template_there_is_a_plain_one():
    plain = encoder(template=None)
    assert plain.note.startswith("The tokenizer has no chat template: using the one called plain")
    (sequence,) = plain.encode(example_of({"messages": TALK}), 0).sequences
    assert text_of(sequence.ids).endswith("Assistant: It was great.</s>")
    assert plain.stop == ("</s>",)


def metaspace():
    """A tokenizer of single characters that puts a space before each text, as that of Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=0, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["\n".join(map(chr, range(32, 127)))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("maker", [make_tokenizer, metaspace])
@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_answers_have_the_tokens_of_the_whole_text(maker, template):
    tokenizer, example = maker(), example_of({"messages": TALK})
    (sequence,) = ChatEncoder(tokenizer, 512, ChatFormat(template)).encode(example, 0).sequences
    whole = tokenizer.apply_chat_template(TALK, tokenize=False, chat_template=TEMPLATES[template]).rstrip("\n")
    assert list(sequence.ids) == tokenizer(whole)["input_ids"]


def test_the_template_of_the_tokenizer_is_used():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    own = ChatEncoder(tokenizer, 512, ChatFormat())
    assert (own.note, own.stop) == (None, ("<|im_end|>",))


THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' }}"
    "{{ m['content'] + '</s>' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)


def test_an_empty_reasoning_of_the_template_is_not_part_of_an_answer(tmp_path, model_dir):
    path = tmp_path / "thinks.jinja"
    path.write_text(THINKS)
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"Film {i}?", "completion": "great"} for i in range(8)])
    task = ChatTask(train_file=str(rows), template=str(path), stop=["\n"], metrics=["exact_match"], max_new_tokens=40)
    data = TaskData(task, tokenizer=str(model_dir), max_length=256, seed=0)
    made, decoding = data.encoder, data.decoding
    (sequence,) = made.encode(example_of({"prompt": "A?", "completion": "great"}), 0).sequences
    answer = [sequence.ids[place] for place in sequence.places][:-1]
    assert text_of(answer) == "<think>\n\n</think>\n\ngreat"
    assert answer_text(made.tokenizer, answer, decoding.stop, decoding.lead) == "great"
    ended = ends_with(made.tokenizer, decoding.stop, decoding.lead)
    assert not any(ended(answer[:length]) for length in range(len(answer) + 1))
    assert ended([*answer, *made.tokenizer("\n")["input_ids"]])
    assert answer_text(made.tokenizer, answer[1:], (), decoding.lead) == text_of(answer[1:])  # not the whole of it


def test_a_template_with_a_clock_gives_the_same_tokens_every_day(tmp_path):
    path = tmp_path / "dated.jinja"
    path.write_text("""{{ strftime_now("%d %b %Y") + strftime_now( '%A' ) }}""" + TEMPLATES["chatml"])
    made = encoder(template=str(path))
    assert text_of(made.encode_prompt(example_of({"prompt": "A?"})).ids).startswith("26 Jul 2024Friday<|im_start|>")
    assert "strftime_now" in made.template  # exported folders keep it


# as of models with image input; the content of rows is text
PARTS = (
    "{% for m in messages %}{{ m['role'] }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FORGETS, "use data.task.turns last, or data.task.template"),
        (
            PARTS,
            r"^data.task.template .*own.jinja': leaves out the text of a message; choose plain, chatml, or",
        ),
        ("{% for %}", r"^data.task.template .*: the chat template cannot format a conversation of user \("),
        (None, "neither a known template nor a readable file"),
    ],
    ids=["forgets former turns", "content in parts", "no template", "no file"],
)
def test_templates_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SlzoError, match=message):
        encoder(template=str(path)).encode(example_of({"messages": TALK[1:]}), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": " "}, "data.task.system: is empty"),
        ({"turns": "first"}, "data.task.turns 'first': choose one of all, last"),
        ({"max_new_tokens": 0}, "data.task.max_new_tokens 0: must be at least 1"),
        ({"stop": ["x", ""]}, "data.task.stop"),
        (
            {"metrics": ["perplex"]},
            "data.task.metrics 'perplex': no such metric; did you mean perplexity\\? choose from",
        ),
        ({"metrics": []}, r"data.task.metrics \[\]: name at least one of perplexity"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SlzoError, match=message):
        ChatTask(**arguments)


def rows_of(count, prefix="p"):
    return [Example(f"{prefix}{i}", f"{prefix} says {i}", (" a",), (0,)) for i in range(count)]


def test_held_out_rows_are_drawn_once_for_all_seeds_and_in_no_other_split():
    pool = [*rows_of(50), Example("twin", "p says 3", (" b",), (0,))]
    train, test, notes = split_off_test(pool, None)
    assert len(test) == 10
    assert sum("Left out 1 row with" in note for note in notes) == ("p says 3" in {example.prompt for example in test})
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    again = split_off_test(pool[::-1], 4)
    assert {example.prompt for example in again[1]} <= {example.prompt for example in test}
    assert len(again[1]) == 4
    splits = draw_splits(train, test, num_train=30, num_dev=5, num_test=None, seed=1)
    prompts = [example.prompt for part in (splits.train, splits.dev, splits.test) for example in part]
    assert len(prompts) == len(set(prompts)) == 45


def test_a_dev_split_of_its_own():
    train, dev, test = rows_of(20), [*rows_of(5, "d"), Example("x", "p says 1", (" a",), (0,))], rows_of(4, "t")
    dev.append(Example("y", "t says 1", (" a",), (0,)))
    splits = draw_splits(train, test, num_train=30, num_dev=10, num_test=None, seed=0, dev_pool=dev)
    assert {example.id for example in splits.dev} == {"d0", "d1", "d2", "d3", "d4", "x"}
    assert len(splits.train) == 19
    assert splits.notes == (
        "Left out 1 dev row also found in the test split.",
        "Left out 1 training row also found in the dev split.",
        "Took 19 of 30 training examples and 6 of 10 dev examples: there are no more usable rows.",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [TALK[1], {**TALK[2], "tool_calls": [{"id": "1"}]}, *TALK[3:]]}, "turn 2 has tool_calls "),
        (
            {"messages": [TALK[1], {**TALK[2], "reasoning_content": "so"}, *TALK[3:]]},
            "turn 2 has reasoning_content 'so'",
        ),
        ({"messages": [TALK[1], {**TALK[2], "weight": 0.5}, *TALK[3:]]}, "turn 2 has weight 0.5"),
        ({"messages": [TALK[1], {**TALK[2], "weight": 0}, *TALK[3:]]}, "turn 2 has weight 0, which is not supported"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "field 'tools' is not supported"),
        ({"messages": [TALK[1], {**TALK[2], "content": " "}, *TALK[3:]]}, "an earlier turn of the assistant is empty"),
    ],
)
def test_what_would_be_trained_on_wrongly_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        ChatTask().example(row, "7")


def test_a_system_prompt_may_be_the_developers():
    talk = [{**TALK[0], "role": "developer"}, *TALK[1:]]
    example = ChatTask(system="Be kind.").example({"messages": talk}, "7")
    assert example.messages[0].role == "developer"


def test_rows_without_an_answer_name_the_role(tmp_path, model_dir):
    talks = ([{"role": "human", "content": f"Film {n}?"}, {"role": "gpt", "content": "great"}] for n in range(8))
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    rows = TaskData(ChatTask(train_file=str(path)), tokenizer=str(model_dir), max_length=256, seed=0)
    rows.setup("fit")
    assert rows.rows("test")  # no answers are generated, which would need 256 tokens
    with pytest.raises(
        SlzoError, match=r"the last turn must have role 'assistant', but in example .* it has role 'gpt'"
    ):
        rows.rows("train")


def test_the_line_of_a_bad_row_is_named(tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": TALK}, {"messages": TALK[2:3]}])
    with pytest.raises(SlzoError, match=r"talks.jsonl:2: the answer has no turn before it"):
        RowSource(ChatTask(train_file=str(path))).read("train")


def test_from_fit_to_export(model_dir, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    words = ["great", "terrible", "good", "bad"]
    rows = [{"prompt": f"Film {i}?", "completion": words[i % 4]} for i in range(30)]
    write_lines("talks.jsonl", [*rows, rows[0]])
    task = {"class_path": "ChatTask", "init_args": {"train_file": "talks.jsonl", "max_new_tokens": 4, "stop": ["?"]}}
    options = [f"--data.task={json.dumps(task)}", "--data.batch_size=8", f"--model.model={model_dir}"]
    options += ["--model.layer=1", "--model.eps=1e-3", "--model.optimizer=SGD", "--model.optimizer.lr=1e-2"]
    options += ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"]
    assert main(["fit", *options]) == 0
    assert not [
        each for each in recwarn if "logging interval" in str(each.message)
    ]  # 2 batches an epoch, fewer than 10
    output = capsys.readouterr().out
    assert "Task chat: 16 training, 8 dev and 6 held-out rows, drawn from the 31 of talks.jsonl" in output
    assert "using the one called plain" in output
    assert summary()["metric"] == "perplexity"
    assert summary()["score_change_standard_error"] > 0
    assert summary()["scores_after"].keys() == {"perplexity"}
    assert main(["predict", "--ckpt_path=last", "--output=found.jsonl"]) == 0
    found = read_lines("found.jsonl")
    assert len(found) == 6
    assert all(isinstance(record["prediction"], str) and record["gold"][0] in words for record in found)
    assert main(["export", "--ckpt_path=last", "--output=merged"]) == 0
    assert AutoTokenizer.from_pretrained("merged").chat_template == TEMPLATES["plain"]
    for source in ("--ckpt_path=last", "--ckpt_path=merged"):  # the prompt is a turn of the user, as in training
        capsys.readouterr()
        rest = ["--untuned=false", f"--prompt={found[0]['prompt']}", "--max_new_tokens=4"]
        assert main(["generate", source, *rest]) == 0
        assert capsys.readouterr().out.partition("--- tuned\n")[2].strip() == found[0]["prediction"].strip()
        assert load_pair(source.partition("=")[2], untuned=False).stop[-1] == "?"


def test_a_perplexity_next_to_metrics_of_generated_answers_has_the_same_error(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["great", "terrible", "good", "bad"]
    rows = [{"prompt": f"Film {i}?", "completion": words[i % 4]} for i in range(30)]
    write_lines("talks.jsonl", rows)
    options = [f"--model.model={model_dir}", "--model.layer=1", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    for metrics in (["perplexity"], ["perplexity", "f1"]):
        task = {
            "class_path": "ChatTask",
            "init_args": {"train_file": "talks.jsonl", "metrics": metrics, "max_new_tokens": 2},
        }
        assert main(["fit", *options, f"--data.task={json.dumps(task)}"]) == 0
    alone, both = summary(0), summary(1)
    assert both["metric"] == "perplexity"
    for name in ("score_after", "score_standard_error", "score_change_standard_error"):
        assert both[name] == pytest.approx(alone[name], rel=1e-3)


def test_answers_that_are_only_scored_are_no_predictions(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Film {i}?", "completion": "great"} for i in range(12)]
    write_lines("talks.jsonl", rows)
    write_lines("test.jsonl", [{"prompt": "A"}, {"prompt": "B"}, rows[0]])
    files = {"train_file": "talks.jsonl", "test_file": "test.jsonl"}
    task = {"class_path": "ChatTask", "init_args": {**files, "max_new_tokens": 2}}
    options = [f"--data.task={json.dumps(task)}", "--data.num_dev=2", "--data.batch_size=4", "--trainer.max_steps=1"]
    assert main(["fit", *options, f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu"]) == 0
    assert summary()["scores_after"]["perplexity"] > 0
    assert not (run_dir() / "samples.json").exists()
    assert main(["predict", "--ckpt_path=last", "--output=found.jsonl"]) == 0
    found = read_lines("found.jsonl")
    assert [record["gold"] for record in found] == [None, None, ["great"]]
    assert found[0]["messages"] == [{"role": "user", "content": "A"}]
    assert all(isinstance(record["prediction"], str) for record in found)


def test_answers_of_demonstrations_are_not_scored():
    shown, own = example_of({"prompt": "A?", "completion": "B."}), example_of({"messages": TALK})
    (alone,), (after,) = (encoder().encode(own, 0, shots).sequences for shots in ((), (shown,)))
    assert scored_text(after) == scored_text(alone)
    (last,) = encoder(turns="last").encode(shown, 0, (own,)).sequences
    assert scored_text(last) == scored_text(encoder().encode(shown, 0).sequences[0])


def test_a_template_that_drops_the_answer_or_refuses_a_turn_names_the_row(tmp_path):
    drops = "{% for m in messages %}{{ m['role'] if m['role'] == 'assistant' else m['content'] }}{% endfor %}"
    only_user = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    only_user += "{{ m['role'] + m['content'] }}{% endfor %}"
    for template, message in (
        (drops + "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}", "leaves nothing of the answer"),
        (only_user, r"the chat template cannot format a conversation of system, user.*no system"),
    ):
        path = tmp_path / "own.jinja"
        path.write_text(template)
        made = encoder(template=str(path))
        with pytest.raises(RowError, match=rf"^example '7': .*{message}"):
            made.encode(example_of({"messages": [TALK[0], *TALK[3:]]}), 0)


def test_rows_to_predict_may_have_an_empty_cell_for_the_answer(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nWhy?,\nHow?,So.\n")
    first, second = RowSource(ChatTask()).read_to_predict(str(path)).examples
    assert (first.candidates, second.candidates) == ((), ("So.",))


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_template_whose_generation_prompt_is_not_in_the_conversation_is_refused(turns, tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
    path = tmp_path / "own.jinja"
    path.write_text(template)
    made = encoder(template=str(path), turns=turns)
    with pytest.raises(
        SlzoError, match=r"an answer does not begin with the generation prompt, .*use data.task.template"
    ):
        made.encode(example_of({"messages": TALK}), 0)
