"""Python code for the model card that answers one prompt with transformers."""

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any

from slzo.export.facts import Facts
from slzo.tasks.base import MAX_NEW_TOKENS, Task
from slzo.tasks.registry import TASKS

_SCORES = """\
{prompt}
answers = {answers}


def score(answer):
    \"\"\"Mean log-likelihood of the answer's tokens.\"\"\"
    start = len(tokenizer(prompt)["input_ids"]){shift}
    ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]{cut}
    return model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).mean().item()


print(max(answers, key=score))"""

_TEXT = """\
{inputs}
stop = {stop}
output = model.generate(
    **inputs, max_new_tokens={length}, do_sample=False, stop_strings=stop or None, tokenizer=tokenizer
)
text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for end in stop:
    text = text.partition(end)[0]
print(text.strip())"""

_PROMPT_INPUTS = """\
{prompt}
inputs = tokenizer(prompt, return_tensors="pt")"""

_CUT = """
# this tokenizer appends special tokens, which would end the prompt
inputs = {{name: values[:, :-{number}] for name, values in inputs.items()}}"""

_CHAT_INPUTS = """\
messages = {messages}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def answer_code(facts: Facts) -> str:
    """Return the Python code that answers one prompt, after the code that loads ``model`` and ``tokenizer``."""
    metadata = facts.metadata
    stop = metadata.get("stop")
    template, length = _template_and_length(metadata)
    number = metadata.get("num_appended_tokens", 0)
    if metadata.get("chat"):
        system = metadata.get("system_prompt")
        turns = [] if system is None else [{"role": "system", "content": system}]
        inputs = _CHAT_INPUTS.format(messages=_literal([*turns, {"role": "user", "content": "..."}]))
        return _TEXT.format(inputs=inputs, stop=_literal(stop or []), length=length)
    if template is None:
        prompt = f'prompt = "..."  # as the task {" ".join(facts.task.split())} writes it'
    else:
        row = dict.fromkeys((name for _, name, _, _ in Formatter().parse(template) if name), "...")
        prompt = f'row = {_literal(row)}\nprompt = {_literal(template)}.format(**row).strip(" ")'
    if stop:
        inputs = _PROMPT_INPUTS.format(prompt=prompt) + (_CUT.format(number=number) if number else "")
        return _TEXT.format(inputs=inputs, stop=_literal(stop), length=length)
    answers = metadata.get("candidates") or [" one answer", " another answer"]
    shift, cut = (f" - {number}", f"[:, :-{number}]") if number else ("", "")
    return _SCORES.format(prompt=prompt, answers=_literal(answers), shift=shift, cut=cut)


def _template_and_length(metadata: Mapping[str, Any]) -> tuple[str | None, int]:
    """Return the template of the prompts, if it is known, and the longest answer in tokens."""
    task, length = metadata.get("task"), metadata.get("max_new_tokens", MAX_NEW_TOKENS)
    if isinstance(task, str):
        return _template_of(TASKS[task]()), length
    return (None if task is None else task["init_args"].get("prompt")), length


def _template_of(task: Task) -> str | None:
    """Return the prompt of a built-in task with its fields in braces; ``None`` if it does more than insert them."""
    fields = {name: f"{{{name}}}" for name in task.fields}
    row = {name: f"some Words in {name}?" for name in task.fields}
    try:
        template, prompt = (task.example({**values, **task.no_label}, "").prompt for values in (fields, row))
    except ValueError:
        return None
    return template if template.format(**row) == prompt else None


def _literal(value: Any) -> str:
    """Return texts as Python code, always with double quotes."""
    return json.dumps(value, ensure_ascii=False)
