"""1 - F1 of generated answers."""

from collections.abc import Sequence

from slzo.rewards.answers import token_f1
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError
from slzo.zo.objectives.base import AnswerObjective


class AnswerF1(AnswerObjective):
    """1 - token F1 of the generated answer, the best over the references."""

    selected_by = "f1"

    def check_examples(self, examples: Sequence[Example]) -> None:
        if not any(example.references for example in examples):
            raise SlzoError(
                "data.objective AnswerF1: no training row has an answer to compare with; use a task with free answers, such as "
                "TemplateTask with an answer_field, or data.objective loss"
            )

    def answer_losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        return [1 - token_f1(answer, example.references) for answer, example in zip(answers, examples, strict=True)]
