"""Shows some generated answers as text in TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.callbacks.hooks import returned, zo_module
from slzo.evaluation.evaluator import Outcome
from slzo.utils.argument_checks import check_at_least

_LONGEST = 1000


class AnswerLog(Callback):
    """Logs generated answers to dev rows as text in TensorBoard.

    Args:
        num_examples: Number of dev rows whose answers are shown after each validation; always the same rows.
    """

    def __init__(self, num_examples: int = 4) -> None:
        check_at_least("answers.num_examples", num_examples, 0, "0 shows none")
        self.num_examples = num_examples
        self._shown: dict[str, str] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        outcome: Outcome = returned(zo_module(pl_module), "validation_step", outputs, "outcome")
        if not outcome.num_tokens:
            return
        for place, row in enumerate(batch.rows[: max(0, self.num_examples - len(self._shown))]):
            reward = "" if outcome.rewarded is None else f"\n\n**reward** {outcome.rewarded.totals[place]:.4g}"
            prompt, answer = _code_block(row.example.prompt), _code_block(str(outcome.predictions[place]))
            self._shown[row.example.id] = f"**prompt**\n\n{prompt}\n\n**answer**\n\n{answer}{reward}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for id, text in self._shown.items():
                    logger.experiment.add_text(f"answers/{id}", text, trainer.global_step)


def _code_block(text: str) -> str:
    """Return a text as a Markdown code block, cut to a readable length."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return "\n".join(f"    {line}" for line in cut.split("\n"))
