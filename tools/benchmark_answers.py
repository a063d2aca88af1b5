"""Times a zeroth-order step on generated answers against generating them at one point after the other with transformers.

    python tools/benchmark_answers.py --threads 1 --layers 11 29 --json FILE

Both ways get the same prompts, real text of the movie reviews cut to a length, and generate a fixed number of tokens at w + eps z
and at w - eps z; they take turns, and the figures are medians. The plain way is ``generate`` with a key-value cache on the
padded batch, after writing the layer. ``allowed`` is what a count of the saved operations allows: multiplications of the linear
layers and the head in the plain way over those in this one, as if both ran at the same rate; ``with nothing in common`` counts as
if no two answers had a token in common. Joint decoding also reads the weights once instead of twice, which the count leaves out,
and a prompt's many rows take less time an operation than a token's few: ``at the products' own rates`` weighs each with the
seconds that a layer's linear maps and the head take alone at that number of rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slzo.batches.encoded import prompt_key
from slzo.data.encoding import Encoder
from slzo.data.sources import load_examples
from slzo.evaluation.decoding import Kept, VariedLayers, Wanted, decode
from slzo.models.load import load_model, load_tokenizer
from slzo.models.startup_check import split_and_verify
from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError
from slzo.utils.runtime import keep_freed_memory, peak_memory_gb
from slzo.zo.estimators import Point
from slzo.zo.loss import live_points
from slzo.zo.scopes import LayerScope
from slzo.zo.tuned_model import TunedModel


def make_prompts(args: argparse.Namespace) -> list[list[list[int]]]:
    """For each round a batch of prompts, all of one length."""
    task = get_task("movie_reviews")
    encoder = Encoder(load_tokenizer(args.model))
    ids: list[int] = []
    for example in load_examples(task, "train"):
        ids += encoder.encode_prompt(example)
        if len(ids) >= args.rounds * args.batch_size * args.prompt_tokens:
            break
    rows = [ids[start : start + args.prompt_tokens] for start in range(0, len(ids), args.prompt_tokens)]
    return [rows[n * args.batch_size : (n + 1) * args.batch_size] for n in range(args.rounds)]


class Step:
    """The answers that one step on generated answers needs, made in both ways."""

    def __init__(self, args: argparse.Namespace, model: PreTrainedModel, layer: int) -> None:
        self.args = args
        self.parts = split_and_verify(model)
        self.tuned_model = TunedModel.from_scope(self.parts, LayerScope(), layer)
        self.count = 0

    def points(self, eps: float) -> list[Point]:
        """Those of the next step."""
        z = self.tuned_model.tensors.draw(0, self.count, 0)
        self.count += 1
        return [Point(z, eps), Point(z, -eps)]

    def joint(self, points: Sequence[Point], prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[list[int]]:
        """What the package does; the answers at the first point come first."""
        tuned, span = self.tuned_model, self.tuned_model.span
        states = tuned.prompt_states
        wanted = [Wanted(prompt, point) for point in range(len(points)) for prompt in range(len(prompts))]
        with live_points(tuned.tensors, points) as write:
            return decode(
                self.parts,
                prompts,
                wanted,
                set(),
                max_new_tokens=self.args.new_tokens,
                prefill_tokens=768,
                varied=VariedLayers(span.start, span.stop, write),
                kept=None if states is None else Kept(states, keys),
            )[0]

    def plain(
        self, plain: PreTrainedModel, points: Sequence[Point], prompts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Generation by transformers at each point; the model has the layer's tensors of this one."""
        found = []
        for point in points:
            self.tuned_model.tensors.write(point.direction, point.scale)
            found += self.plain_here(plain, prompts)
        return found

    def plain_here(self, plain: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Generation by transformers at the live weights."""
        ids = torch.tensor(prompts)
        made: Tensor = plain.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self.args.new_tokens,
            min_new_tokens=self.args.new_tokens,
            pad_token_id=0,
        )
        return made[:, ids.shape[1] :].tolist()


def share_weights(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a model with its own attention the tensors of another one: what is written there is seen here."""
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, parameter)
    plain.tie_weights()


def operations(step: Step, answers: Sequence[Sequence[int]], batch_size: int) -> tuple[float, float, float]:
    """Multiplications of the plain way, of this one, and of this one if no two answers had a token in common."""
    args, parts, span = step.args, step.parts, step.tuned_model.span
    layers = [sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)) for layer in parts.layers]
    head = parts.model.get_output_embeddings().weight.numel()
    below, above = sum(layers[: span.start]), sum(layers[span.start :])
    prompt, decoded = 2 * batch_size * args.prompt_tokens, 2 * batch_size * (args.new_tokens - 1)
    heads = 2 * batch_size * args.new_tokens * head
    plain = (prompt + decoded) * (below + above) + heads
    seen = {
        (row, tuple(answers[copy * batch_size + row][:length]))
        for copy in range(2)
        for row in range(batch_size)
        for length in range(1, args.new_tokens)
    }
    ours = prompt * above + decoded * above + len(seen) * below + heads
    return plain, ours, prompt * above + decoded * (below + above) + heads


class Products:
    """Seconds of a layer's linear maps, or the head's, at a number of rows: they depend on it, few rows read as many weights."""

    def __init__(self, args: argparse.Namespace, plain: PreTrainedModel) -> None:
        self.args, self.known = args, dict[tuple[bool, int], float]()
        layer = next(module for module in plain.modules() if isinstance(module, nn.ModuleList))[0]
        self.layer = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        self.output = [plain.get_output_embeddings()]

    def seconds(self, rows: int, head: bool = False) -> float:
        """Median of five."""
        if rows and (head, rows) not in self.known:
            maps = self.output if head else self.layer
            inputs = [torch.zeros(rows, m.weight.shape[1], dtype=m.weight.dtype) for m in maps]
            run = lambda: [m(own) for m, own in zip(maps, inputs, strict=True)]  # noqa: E731
            self.known[head, rows] = statistics.median(timed(self.args, run)[0] for _ in range(5))
        return self.known[head, rows] if rows else 0.0

    def allowed(self, step: Step, answers: Sequence[Sequence[int]], batch_size: int) -> float:
        """By how much joint decoding would be faster if there were these products alone; prompts are kept."""
        args, span, layers = self.args, step.tuned_model.span, len(step.parts.layers)
        prompt, above = batch_size * args.prompt_tokens, layers - span.stop
        one = self.seconds(prompt) + (args.new_tokens - 1) * self.seconds(batch_size)
        plain = 2 * (layers * one + args.new_tokens * self.seconds(batch_size, head=True))
        ours = 2 * self.seconds(prompt) * (span.stop - span.start) + self.seconds(2 * prompt) * above
        ours += args.new_tokens * self.seconds(2 * batch_size, head=True)
        for length in range(1, args.new_tokens):
            distinct = {
                (row, tuple(answers[copy * batch_size + row][:length]))
                for copy in range(2)
                for row in range(batch_size)
            }
            ours += span.start * self.seconds(len(distinct)) + above * self.seconds(2 * batch_size)
            ours += 2 * (span.stop - span.start) * self.seconds(batch_size)
        return plain / ours


def timed(args: argparse.Namespace, function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    started = clock()
    result = function()
    return clock() - started, result


def compare(args: argparse.Namespace, layer: int) -> dict[str, Any]:
    """Time both ways in alternation."""
    model, plain = load_model(args.model, args.dtype), load_model(args.model, args.dtype)
    share_weights(plain, model)
    step = Step(args, model, layer)
    batches = make_prompts(args)
    seconds: dict[str, list[float]] = {"plain": [], "joint": [], "joint, prompts not kept": []}
    allowed, least, by_products, different = [], [], [], 0
    products = Products(args, plain)
    step.joint(
        step.points(args.eps), batches[0][:2], [prompt_key(1 << 30), prompt_key((1 << 30) + 1)]
    )  # nothing is timed cold
    for number, prompts in enumerate(batches):
        points = step.points(args.eps)
        keys = [prompt_key(number * len(prompts) + row) for row in range(len(prompts))]
        cold, _ = timed(args, lambda: step.joint(points, prompts, keys))  # noqa: B023
        slow, expected = timed(args, lambda: step.plain(plain, points, prompts))  # noqa: B023
        fast, found = timed(args, lambda: step.joint(points, prompts, keys))  # noqa: B023
        different += sum(one != two for one, two in zip(found, expected, strict=True))
        counts = operations(step, found, len(prompts))
        allowed.append(counts[0] / counts[1])
        least.append(counts[0] / counts[2])
        by_products.append(products.allowed(step, found, len(prompts)))
        for name, spent in zip(seconds, (slow, fast, cold), strict=True):
            seconds[name].append(spent)
        print(
            f"layer {layer}, batch {number + 1}: plain {slow:.2f} s, joint {fast:.2f} s, not kept {cold:.2f} s",
            flush=True,
        )
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["joint"], strict=True)]
    cold_ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["joint, prompts not kept"], strict=True)]
    return {
        "layer": layer,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "faster": statistics.median(ratios),
        "faster_not_kept": statistics.median(cold_ratios),
        "allowed": statistics.median(allowed),
        "allowed_nothing_in_common": statistics.median(least),
        "allowed_by_products": statistics.median(by_products),
        "different_answers": different,
        "answers": 2 * len(batches) * args.batch_size,
    }


def measure_memory(args: argparse.Namespace, layer: int) -> dict[str, float]:
    """Peak resident memory in GiB of plain generation at one point and of the step, each in a process of its own."""
    peaks = {}
    for what in ("plain", "joint"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", what, "--layers", str(layer)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[what] = float(done.stdout.strip().splitlines()[-1])
    return peaks


def memory_of(args: argparse.Namespace) -> float:
    """Peak resident memory of this process after two steps, GiB."""
    model, prompts = load_model(args.model, args.dtype), make_prompts(args)[0]
    if args.memory_of == "plain":
        ids = torch.tensor(prompts)
        for _ in range(2):
            model.generate(  # type: ignore[operator]
                input_ids=ids, do_sample=False, max_new_tokens=args.new_tokens, pad_token_id=0
            )
    else:
        step = Step(args, model, args.layers[0])
        for _ in range(2):
            step.joint(step.points(args.eps), prompts, [prompt_key(n) for n in range(len(prompts))])
    return peak_memory_gb(torch.device("cpu"))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder, .gguf file or Hub id")
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 29], help="tuned layers, one comparison each")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="type of the weights"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts a step")
    parser.add_argument("--prompt_tokens", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--eps", type=float, default=1e-3, help="size of the perturbation")
    parser.add_argument("--rounds", type=int, default=5, help="batches, each timed once in each way")
    parser.add_argument(
        "--cpu_time", action="store_true", help="processor seconds, for a machine that does other work too"
    )
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--memory_of", choices=["plain", "joint"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 2 after a mistake of the user's."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the slzo command does, for both ways alike
    results = []
    try:
        if args.memory_of:
            print(memory_of(args))
            return 0
        for layer in args.layers:
            result = compare(args, layer)
            if not args.no_memory:
                result["memory_gib"] = measure_memory(args, layer)
            results.append(result)
    except SlzoError as error:
        print(f"benchmark_answers: error: {error}", file=sys.stderr)
        return 2
    size = f"batch {args.batch_size}, {args.prompt_tokens} + {args.new_tokens} tokens"
    print(
        f"{args.model}, {args.dtype}, {args.threads} thread(s), {size}, {'processor' if args.cpu_time else 'wall'} time"
    )
    for result in results:
        spent, memory = result["seconds"], result.get("memory_gib")
        print(
            f"layer {result['layer']}: plain {spent['plain']:.2f} s, joint {spent['joint']:.2f} s, faster by "
            f"{result['faster']:.2f} (prompts not kept {result['faster_not_kept']:.2f}); allowed {result['allowed']:.2f}, with "
            f"nothing in common {result['allowed_nothing_in_common']:.2f}, at the products' own rates "
            f"{result['allowed_by_products']:.2f}; {result['different_answers']} of "
            f"{result['answers']} answers differ"
            + ("" if memory is None else f"; peak memory {memory['joint'] / memory['plain']:.2f} of plain generation's")
        )
    if args.json:
        document = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps({**document, "layers": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
