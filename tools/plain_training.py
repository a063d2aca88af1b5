"""Train with plain transformers and torch: AdamW on all weights or on LoRA adapters, or published MeZO. For comparison only.

    python tools/plain_training.py --model smollm2-135m --task sst2 --data_dir DIR --method lora

Prints the peak memory of the process in GiB, the median seconds of a step after the first, and the number of trained parameters.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from published_step import PaddedBatch, encoded_rows, pad_left, published_loss, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.models.load import load_model
from slzo.tasks.base import Kind
from slzo.tasks.registry import get_task
from slzo.utils.runtime import peak_memory_gb

METHODS = ("mezo", "adamw", "lora", "lora-checkpointing")
LEARNING_RATE = 1e-5


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


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Take the steps; return ``peak`` in GiB, ``seconds`` of a step and the number of ``trained`` parameters."""
    own, only_gold = batches(args.model, args.task, args.data_dir, args.rows, args.steps)
    model: Any = load_model(args.model, "float32")  # no parameter requires a gradient
    trained = list(model.parameters())
    if args.method == "adamw":
        model.requires_grad_(True)
    if args.method == "lora-checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    if args.method.startswith("lora"):
        model = with_lora(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = None if args.method == "mezo" else torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if not args.method.startswith("lora"):
        unmap(model)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak becomes what is used now
    seconds = []
    for number, examples in enumerate(own):
        started = time.perf_counter()
        if optimizer is None:
            published_step(model, trained, pad_left(examples, only_gold), only_gold, number)
        else:
            adamw_step(model, optimizer, pad_left(examples, only_gold=True))
        seconds.append(time.perf_counter() - started)
    return {
        "peak": peak_memory_gb(torch.device("cpu")),
        "seconds": statistics.median(seconds[1:] or seconds),
        "trained": sum(parameter.numel() for parameter in trained),
    }


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="model, as in model.model")
    parser.add_argument("--task", default="sst2", help="task, as in data.task")
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--steps", type=int, default=4)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
