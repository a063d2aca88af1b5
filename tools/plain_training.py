"""Train with plain transformers and torch: AdamW on all weights or on LoRA adapters, or published MeZO. For comparison only.

    python tools/plain_training.py --model smollm2-135m --task sst2 --data_dir DIR --method lora

Prints the peak memory of the process in GiB, the median seconds of a step after the first, and the number of trained parameters.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from measuring import timed
from options import command, option, parse
from published_step import PaddedBatch, encoded_rows, pad_left, published_loss, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.models.load import load_model
from slzo.tasks.base import Kind
from slzo.tasks.registry import get_task
from slzo.utils.runtime import peak_memory_gb

LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "model, as in model.model")
    task: str = option("sst2", "task, as in data.task")
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    method: Literal["mezo", "adamw", "lora", "lora-checkpointing"] = option(help="what is trained, and how")
    rows: int = option(16, "rows of a step")
    steps: int = option(4, "number of steps")


def batches(model: str, task: str, data_dir: str, rows: int, steps: int) -> tuple[list[list[EncodedExample]], bool]:
    """Return tokenized training rows, batch by batch, and whether the task is trained on gold answers only."""
    encoded = encoded_rows(model, task, data_dir, rows * steps)
    own = [encoded[start : start + rows] for start in range(0, rows * steps, rows)]
    return own, get_task(task).kind is not Kind.CLASSIFICATION


def adamw_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: PaddedBatch) -> None:
    """Take a step with the gradient of the likelihood of the gold answers, by back-propagation."""
    published_loss(model, batch, only_gold=True).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def with_lora(model: nn.Module) -> nn.Module:
    """Return the model with adapters in the attention of all layers: rank 8, queries and values, as peft chooses for a Llama."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def measure(options: Options) -> dict[str, float]:
    """Take the steps; return ``peak`` in GiB, ``seconds`` of a step and the number of ``trained`` parameters."""
    own, only_gold = batches(options.model, options.task, options.data_dir, options.rows, options.steps)
    model: Any = load_model(options.model, "float32")  # no parameter requires a gradient
    trained = list(model.parameters())
    if options.method == "adamw":
        model.requires_grad_(True)
    if options.method == "lora-checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    if options.method.startswith("lora"):
        model = with_lora(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = None if options.method == "mezo" else torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if not options.method.startswith("lora"):
        unmap(model)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak becomes what is used now
    seconds = []
    for number, examples in enumerate(own):
        if optimizer is None:
            step: Callable[[], Any] = partial(
                published_step, model, trained, pad_left(examples, only_gold), only_gold, number
            )
        else:
            step = partial(adamw_step, model, optimizer, pad_left(examples, only_gold=True))
        seconds.append(timed(step)[0])
    return {
        "peak": peak_memory_gb(torch.device("cpu")),
        "seconds": statistics.median(seconds[1:] or seconds),
        "trained": sum(parameter.numel() for parameter in trained),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps and print the figures as JSON."""
    print(json.dumps(measure(parse(Options, __doc__, argv))))


if __name__ == "__main__":
    sys.exit(main())
