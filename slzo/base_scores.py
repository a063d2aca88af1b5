"""Scores what was tuned on another copy of the base model: on the original weights, say, where training saw quantized ones."""

from slzo.checkpoint import Checkpoint
from slzo.console import say
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.evaluation.evaluator import score_rows
from slzo.export import BaseScores
from slzo.models.load import load_model
from slzo.models.origin import origin_of
from slzo.models.startup_check import take_apart
from slzo.zo.tuned_model import TunedModel


def scores_on(base: str, checkpoint: Checkpoint, rows: TaskDataModule) -> BaseScores:
    """Held-out scores of a copy of the base model, alone and with what was tuned.

    Args:
        base: Folder, GGUF file, built-in name or Hub id.
        checkpoint: Of what is of low rank: other tensors would replace those of the copy.
        rows: Of the run; its tokenizer is used.

    Raises:
        SlzoError: The copy does not fit.
    """
    note = {**checkpoint.note, "base": {}}
    model = load_model(base, note["dtype"], note["trust_remote_code"])
    parts = take_apart(model)
    rows.prepare_data()
    rows.fit_to(model, rows.tokenizer_name)
    rows.setup("test")
    metric = rows.judge.metric
    assert rows.splits is not None
    num_rows = len(rows.splits.test)
    say(f"Scoring {num_rows} held-out rows on {base}, before and after ...")
    found = [score_rows(rows.evaluator(parts), rows.test_dataloader(), rows.make_metrics(), also=rows.also)[metric]]
    try:
        tuned_model = TunedModel.of_description(parts, note)
        if tuned_model.peft_files() is None:
            raise SlzoError("base: only adapters go on another copy of the base model; the scope tuned whole tensors")
        tuned_model.tensors.load(checkpoint.content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise SlzoError(
            f"base {base!r}: what was tuned does not fit it ({error}); give a copy of the base model"
        ) from error
    if tuned_model.parts.virtual_tokens is not None:
        rows.fit_to(model, rows.tokenizer_name, reserved=tuned_model.parts.virtual_tokens.num_tokens)
    evaluator = rows.evaluator(tuned_model.parts, tuned_model.logits)
    found.append(score_rows(evaluator, rows.test_dataloader(), rows.make_metrics(), also=rows.also)[metric])
    return BaseScores(origin_of(base).name, metric, found[0], found[1], num_rows)
