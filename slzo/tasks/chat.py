"""Task on your own conversations, described in the config. The model trains on the assistant's turns.

Source: ``train_file`` (and ``dev_file``, ``test_file``), or instead of files ``data.data_dir`` or ``data.hub_path`` with splits
called train and validation. A row has ``messages`` (turns with role and content), or ``prompt`` and ``completion`` (texts or
turns), or ``instruction``, ``input`` and ``output`` (Alpaca).
Metric: perplexity of the answers, or the ``metrics`` of generated answers.
"""

from typing import Any

from slzo.rewards.registry import PERPLEXITY, check_metrics
from slzo.tasks.base import Example, Kind, Split, Task, check_list, check_stop
from slzo.tasks.fields import Fields, is_missing
from slzo.tasks.messages import ChatFormat, Message, Turns, read_messages
from slzo.utils.argument_checks import check_at_least, check_choice
from slzo.utils.errors import SlzoError, short_repr


class ChatTask(Task):
    """Chat data: rows of ``messages``, of ``prompt`` and ``completion``, or of ``instruction``, ``input`` and ``output``.

    The last turn is the answer if it is the assistant's. Rows without an answer can be used for generation and rewards, but not
    for training on the answer's likelihood. If a conversation is too long, its oldest turns are left out first, then the system
    prompt; then the last user turn is cut at its beginning. The answer is never cut.

    Args:
        train_file: JSON Lines, JSON, CSV or Parquet.
        dev_file: As ``train_file``; by default dev rows are drawn from the training rows.
        test_file: As ``train_file``; by default held-out rows are drawn from the training rows.
        system: System prompt of rows without one; by default the template may add its own.
        turns: Train on all of the assistant's turns, or on the last one only.
        template: Chat template: chatml, plain, or a file with one; by default the tokenizer's, or plain if it has none. Where
            it writes today's date, rows have 26 July 2024, so that they are the same every day.
        max_new_tokens: Longest generated answer, in tokens.
        stop: Texts that end a generated answer, in addition to the template's end of turn.
        metrics: Metrics of held-out rows; the first one summarizes a run. Choose perplexity, or for generated answers f1,
            exact_match and other built-in rewards.
        name: Name of the task in logs and file names.
        id_field: Field with a row's id for predictions and messages, unique over all files; by default id, query_id or
            idx, else the row's position.

    Raises:
        SlzoError: An argument is wrong.
    """

    kind = Kind.GENERATION

    def __init__(
        self,
        train_file: str | None = None,
        dev_file: str | None = None,
        test_file: str | None = None,
        system: str | None = None,
        turns: Turns = "all",
        template: str | None = None,
        max_new_tokens: int = 256,
        stop: list[str] | None = None,
        metrics: list[str] | None = None,
        name: str = "chat",
        id_field: str | None = None,
    ) -> None:
        self.name, self.id_field = name, id_field
        self.fields = () if id_field is None else (id_field,)
        self.no_label = {"completion": None, "output": None}  # in messages, the turns show whether there is an answer
        self.train_file, self.dev_file, self.test_file = train_file, dev_file, test_file
        files: dict[Split, str | None] = {"train": train_file, "dev": dev_file, "test": test_file}
        self.files = {split: file for split, file in files.items() if file is not None}
        if system is not None and not system.strip():
            raise SlzoError("data.task.system: is empty; give it some text, or leave it out")
        check_choice("data.task.turns", turns, Turns)
        self.system, self.turns, self.template = system, turns, template
        self.chat: ChatFormat = ChatFormat(template, turns, system)
        check_at_least("data.task.max_new_tokens", max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self.stop = check_stop(stop or ())
        check_list("data.task.metrics", metrics)
        self.metrics = check_metrics((PERPLEXITY,) if metrics is None else metrics)
        self.metric = self.metrics[0]

    def example(self, row: Fields, id: str) -> Example:
        turns, answer = _turns(row)
        if not turns:
            raise ValueError("the answer has no turn before it; begin with a user turn")
        if turns[-1].is_system or turns[-1].role == "assistant":
            raise ValueError(f"the turn before the answer has role {turns[-1].role}; it must be a user turn")
        if not any(turn.content.strip() for turn in turns if not turn.is_system):
            raise ValueError("the user turn is empty; give it some text")
        if self.turns == "all" and any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
            raise ValueError(
                "an earlier turn of the assistant is empty; give it some text, or use data.task.turns last"
            )
        if answer is not None and not answer.strip():
            raise ValueError("the answer is empty; give it some text, or leave it out")
        turns = self.chat.with_system(turns)
        known = () if answer is None else (answer,)
        prompt = turns[0].content if len(turns) == 1 else "\n".join(f"{t.role}: {t.content}" for t in turns)
        references = tuple(text.strip() for text in known)
        return Example(id, prompt.strip(" "), known, tuple(range(len(known))), references, messages=turns)

    def options_to_predict(self) -> dict[str, Any]:
        """Return the constructor's arguments for rows to predict, without files."""
        names = ("system", "turns", "max_new_tokens", "stop", "metrics", "name", "id_field")
        return {name: value for name in names if (value := getattr(self, name))}


def _turns(row: Fields) -> tuple[tuple[Message, ...], str | None]:
    """Return the turns before the answer, and the answer if there is one."""
    if row.get("tools"):
        raise ValueError("field 'tools' is not supported; leave it out, or leave out the row")
    if row.get("messages") is not None:
        return _split_off_answer(read_messages(row["messages"], "messages"))
    if all(row.get(name) is not None for name in ("chosen", "rejected")) and is_missing(row.get("completion")):
        raise ValueError(
            "a preference pair ('chosen' and 'rejected') is not supported; write the chosen answer as 'completion', or its "
            "conversation as 'messages'"
        )
    if row.get("prompt") is not None:
        prompt, answer = row["prompt"], None if is_missing(row.get("completion")) else row["completion"]
        turns = (Message("user", prompt),) if isinstance(prompt, str) else read_messages(prompt, "prompt")
        if answer is None or isinstance(answer, str):
            return turns, answer
        return _split_off_answer((*turns, *read_messages(answer, "completion")))
    if row.get("instruction") is not None:
        instruction, context, answer = (_text(row, name) for name in ("instruction", "input", "output"))
        prompt = instruction if not context.strip() else f"{instruction}\n\n{context}"
        return (Message("user", prompt),), None if is_missing(row.get("output")) else answer
    present = ", ".join(str(name) for name, value in row.items() if value is not None)
    raise ValueError(f"field 'messages' is missing, and so are 'prompt' and 'instruction'; the row has {present}")


def _split_off_answer(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    return (turns[:-1], turns[-1].content) if turns[-1].role == "assistant" else (turns, None)


def _text(row: Fields, name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {name!r} is {short_repr(value)}; it must be text")
    return value or ""
