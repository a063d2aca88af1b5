"""Write chat data: conversations of two questions about made-up people, with short answers.

    python tools/chat_task.py --output chat_task
    slzo fit --config configs/chat.yaml

The files train.jsonl and test.jsonl hold ``messages``; no sentence is in both.
"""

import random
from typing import Any

from json_task import people, write_task

_QUESTIONS = {
    "job": ("What does {name} do?", "{name} is a {job}."),
    "city": ("Where does {name} live?", "{name} lives in {city}."),
    "age": ("How old is {name}?", "{name} is {age}."),
}


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with ``messages``: a sentence with a question, its answer, another question and its answer."""
    generator = random.Random(seed)
    return [{"messages": _conversation(person, generator)} for person in people(count, seed)]


def _conversation(person: dict[str, Any], generator: random.Random) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for kind in generator.sample(sorted(_QUESTIONS), 2):
        question, answer = (text.format(**person) for text in _QUESTIONS[kind])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages[0]["content"] = f"{person['text']} {messages[0]['content']}"
    return messages


if __name__ == "__main__":
    write_task(make_rows, __doc__, "chat_task")
