"""Helpers of the tests: tiny random models of every family, references to compare with, run folders."""

import copy
import hashlib
import json
import random
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

import tiny
from slzo.__main__ import main
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import PackedBatch, pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.utils.assets import WheelFile
from slzo.utils.errors import SlzoError
from slzo.zo.closure import ClosureLoss
from slzo.zo.estimators import SPSA, EstimatorContext, LayerOutputPerturbation
from slzo.zo.estimators.base import estimate_of
from slzo.zo.forward import Span, SuffixForward
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.processes import SINGLE_PROCESS, Processes
from slzo.zo.profile import LayerStatistics
from slzo.zo.scopes import LayerScope, LoRA, ScopeContext
from slzo.zo.selection import SelectionContext
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.trial import Score, StepCost, Trial
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel
from tiny import VOCABULARY

# a GPU, or the device of second_device.py
CARD = torch.accelerator.current_accelerator(check_available=True)
needs_card = pytest.mark.skipif(CARD is None, reason="needs a GPU that torch can use")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use (CUDA)")

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "phi3": {"head_dim": None},
    # as in Gemma 4 E2B the upper half takes keys and values from layers 0 and 1
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 6,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
    },
}


# some families of different build; the others are slow tests
FAST = ("llama", "gpt2", "gemma3_text")
each_family = pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)


def tiny_model(family="llama", seed=0, scale=3.0, **changes):
    """A random model whose logits differ enough between tokens to reveal errors."""
    return tiny.tiny_model(family, seed, scale, **{**FAMILIES.get(family, {}), **changes})


def random_example(generator, index=0, prompt=8, answers=(1, 1), gold=0):
    """An example of random tokens, given the lengths of prompt and candidates."""

    def tokens(count):
        return tuple(generator.choices(range(3, VOCABULARY), k=count))

    start = tokens(prompt)
    sequences = tuple(EncodedSequence(start + tokens(count), count) for count in answers)
    return EncodedExample(index, sequences, (gold,))


def plain_logits(model, examples):
    """Logits that predict each answer token: one candidate at a time, the model's own forward, nothing shared."""
    rows = []
    for sequence in (sequence for example in examples for sequence in example.sequences):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0]
        rows.append(logits[len(sequence.ids) - sequence.num_answer - 1 : -1].float())
    return torch.cat(rows)


def tune_layer(parts, layer):
    """Masters of a whole decoder layer."""
    return LayerScope().tensors(ScopeContext(parts, layer, lambda _: ()))


def tuned_layer(parts, layer, **options):
    """A model in which one decoder layer is tuned."""
    return TunedModel.from_scope(parts, LayerScope(), layer, **options)


def layer_forward(parts, layer, cache_gb=1.0, **options):
    """The loss as a function of one decoder layer."""
    return SuffixForward(parts, Span(layer, layer + 1), PrefixCache(layer, cache_gb), **options)


class WholeVocabulary(CandidateCrossEntropy):
    """The cross-entropy over the candidates, from the logits of the whole vocabulary."""

    def needs_vocabulary(self, batch):
        return True


class LossAt:
    """A loss for estimators made from a function of the points."""

    def __init__(self, function):
        self.at = function


def estimate(estimator, tuned, function, seed=0, step=0, **settings):
    """One estimate from a function of the points."""
    return estimate_of(estimator, EstimatorContext(tuned, LossAt(function), seed, step, **settings))


def flat(gradient):
    """The gradient of an estimate as one vector."""
    return torch.cat([part.flatten() for part in gradient.values()])


def run_dir(number=0):
    """The folder of a run, the first one is 0."""
    return Path("runs") / f"version_{number}"


def tuned(path):
    """The tuned tensors in a checkpoint."""
    return read_checkpoint(path).content["state_dict"]


def layer_statistics(*pairs, error=None):
    """Layers of these magnitudes and ratios; their standard errors are this share of them."""
    same = {"same_channel": 1.0, "same_position": 1.0}
    layers = [
        LayerStatistics(i, m, m / r, r, 3.0, 0, 0, 0, **same, rest_max_abs=m, rest_ratio=r)
        for i, (m, r) in enumerate(pairs)
    ]
    if error is None:
        return layers
    return [replace(layer, max_abs_se=layer.max_abs * error, ratio_se=layer.ratio * error) for layer in layers]


def choose(rule, layers, trials=None):
    """The choice of a selection rule."""
    return rule.select(SelectionContext(layers, trials))


def random_prompts(count=12):
    """Prompts of several lengths for an outlier profile."""
    generator = random.Random(2)
    return [random_example(generator, i, 4 + i % 5, (1,)) for i in range(count)]


def run_fit(*options):
    """``slzo fit`` with these options."""
    assert main(["fit", *options]) == 0


def last_checkpoint(number=0):
    """The file of a run's newest state."""
    return run_dir(number) / "checkpoints" / "last.ckpt"


def summary(number=0):
    """The summary of a run."""
    return json.loads((run_dir(number) / "summary.json").read_text())


def same_tensors(one, other):
    """Whether two dictionaries have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_line(capsys, *args):
    """The error line of a command that fails."""
    capsys.readouterr()
    assert main(list(args)) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("slzo: error:")]
    assert error.strip().endswith(line)
    assert "Traceback" not in error
    return line


# as in SmolLM2-135M: the outlier appears in layer 11 and is removed in layer 28
SMOLLM2_LAYERS = [(40, 59), *[(770, 700)] * 9, (112, 62), *[(25000, 13000)] * 17, (10000, 890), (4400, 300)]


class FakeTrials:
    """Short trainings of SmolLM2-135M that lower each layer's dev loss linearly from 1 by a given amount."""

    measures_rate, generates, num_train, num_dev = True, False, 200, 96

    def __init__(self, gains, steps=3200, measured=None, **changes):
        self.gains, self.steps, self.measured = gains, steps, measured
        self.looks, self.trained = [], []
        vars(self).update(changes)

    def planned_steps(self, layer, share=0.0):
        return self.steps

    def cost(self, dev_rows):
        rows = min(dev_rows, self.num_dev)
        return StepCost(30, 16, 2, measuring=25, dev_rows=rows, measured=frozenset(self.looks))

    def step_size(self, layer):
        self.looks.append(layer)
        return self.measured

    def train(self, layer, steps, *, dev_rows, num_batches, checks):
        scores = [Score(0, 0, 0.0, 1.0, 0.5)]
        for step in [*checks, steps]:
            scores.append(Score(step, 2 * step, 0.0, 1 - self.gains[layer] * step / steps, 0.5))
            if step in checks and not checks[step](scores[-1]):
                break
        self.trained.append((layer, scores[-1].step, steps))
        return Trial(tuple(scores), (), 1.0, ""), f"states that enter layer {layer}"


def logged(name, number=0):
    """The values of a figure that a run logged, as ``train/loss``."""
    events = EventAccumulator(str(run_dir(number)), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(name)]


# ---- code in pages -------------------------------------------------------------------------------------------------------------


def page_code(page, name, language="python"):
    """The code block of a page below ``<!-- tested: NAME -->``; one of another language may come before it."""
    below = (ROOT / page).read_text(encoding="utf-8").partition(f"<!-- tested: {name} -->\n")[2]
    found = re.match(rf"(?:```\w+\n(?:(?!```).)*```\n\n)?```{language}\n(.*?)```", below, re.DOTALL)
    assert found, f"no tested {language} block {name!r} in {page}"
    return found[1]


def on_tiny(code, model_dir, data_dir, changes):
    """Code of a page with the tiny model, the made-up rows and further changes."""
    rows = f'"sst2", data_dir={str(data_dir)!r}, tokenizer={str(model_dir)!r}, num_train=40, num_dev=16, num_test=12'
    usual = {'"movie_reviews", num_train=1000, num_dev=200, num_test=500': rows, '"smollm2-135m"': repr(str(model_dir))}
    for old, new in {**usual, **changes}.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


# ---- gradients and losses to compare with ----------------------------------------------------------------------------------


def described(thing):
    """The name of a scope, an estimator or an objective, for the names of tests."""
    return thing.describe()


def plain_scores(model, example, temperature=1.0):
    """Log-probabilities of each candidate's tokens, float64: a forward pass of the whole model for each candidate."""
    scores = []
    for sequence in example.sequences:
        logits = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0].double()
        log_probs = (logits / temperature).log_softmax(-1)
        start = len(sequence.ids) - sequence.num_answer
        scores.append(torch.stack([log_probs[i - 1, sequence.ids[i]] for i in range(start, len(sequence.ids))]))
    return scores


def plain_losses(model, examples):
    """Cross-entropy over the candidates, and the negative log-likelihood of the gold answers; gradients may flow."""
    scores = [(plain_scores(model, example), example.gold[0]) for example in examples]
    means = [(torch.stack([tokens.mean() for tokens in own]), gold) for own, gold in scores]
    entropies = [F.cross_entropy(own[None], torch.tensor([gold])) for own, gold in means]
    return torch.stack(entropies).mean(), -torch.cat([own[gold] for own, gold in scores]).mean()


@torch.no_grad()
def plain_two_passes(family, examples, direction, eps):
    """Both plain losses at ``eps`` and at ``-eps`` along a direction, shape (losses, 2)."""
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].clone() for name in direction}
    losses = []
    for sign in (1, -1):
        for name, z in direction.items():
            parameters[name].copy_(before[name] + sign * eps * z)
        losses.append(torch.stack(plain_losses(model, examples)))
    return torch.stack(losses, dim=1)


def autograd_gradient(model, examples, names):
    """The gradient of the cross-entropy over the candidates, by back-propagation through a copy of the model."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    plain_losses(reference, examples)[0].backward()
    return {name: parameters[name].grad for name in names}


def batch_loss(model, examples, objective=None, processes=SINGLE_PROCESS, max_tokens=None):
    """The loss of a batch as a function of the tuned tensors."""
    objective = CandidateCrossEntropy() if objective is None else objective
    stepper = Stepper(model, objective, SPSA(), StepOptions(), processes=processes)
    packed = examples if isinstance(examples, PackedBatch) else pack(examples)
    return stepper.loss(TrainBatch(packed, (), max_tokens=max_tokens))


def tiny_loss(examples, family="llama", scope=None, objective=None, paired=None):
    """A tiny model with layer 2 or the given scope tuned, and the loss of a batch."""
    parts, engine = ModelParts(tiny_model(family, scale=1.0), onednn=False), Engine(cache_gb=0, paired=paired)
    model = TunedModel.from_scope(parts, LayerScope() if scope is None else scope, 2, engine=engine)
    return model, batch_loss(model, examples, objective)


def packed_prompts(count):
    """Made-up prompts for scopes that need some."""
    generator = random.Random(3)
    return [pack([random_example(generator, i, 12, (1,)) for i in range(count)])]


def tune_scope(scope, model, layer=2, engine=None):
    """A model with the tensors of a scope tuned."""
    return TunedModel.from_scope(ModelParts(model), scope, layer, prompts=packed_prompts, engine=engine)


# peft uses a number of key-value heads that these families ignore
PEFT_HEADS = {family: {"num_key_value_heads": None} for family in ("opt", "gpt2", "gpt_neox")}


def peft_prefix(family, weight, **options):
    """A tiny model with peft's own prefix tuning."""
    from peft import PrefixTuningConfig, get_peft_model

    plain = tiny_model(family, attn_implementation="eager", **options, **PEFT_HEADS.get(family, {}))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(weight), num_layers=4)
    model = get_peft_model(plain, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(weight)
    return model


class Quadratic:
    """L(w) = g.w + curvature * w.w / 2 of a matrix and a vector, 37 elements, in float64."""

    def __init__(self, curvature=0.0, scale=1.0):
        generator = torch.Generator().manual_seed(0)
        self.live = {"matrix": torch.randn(6, 5, generator=generator), "vector": torch.randn(7, generator=generator)}
        self.slope = scale * torch.cat([torch.randn(t.numel(), generator=generator) for t in self.live.values()])
        self.tuned = TunedTensors(self.live)
        self.curvature = curvature

    def at(self, points):
        losses = []
        for point in points:
            self.tuned.write(point)
            here = flat(self.live).double()
            losses.append(self.slope.double().dot(here) + self.curvature * here.dot(here) / 2)
        return torch.stack(losses)

    @property
    def gradient(self):
        return self.slope + self.curvature * flat(self.tuned.named_masters()).detach()

    def estimates(self, estimator, steps, **settings):
        """The estimates of some steps, one per row."""
        rows = []
        for step in range(steps):
            rows.append(flat(estimate(estimator, self.tuned, self.at, step=step, **settings).gradient))
            self.tuned.restore()
        return torch.stack(rows)


def images(count=64, seed=0):
    """Noise with a bright left or right half: two classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    pixels[labels == 0, :, :, :4] += 0.7
    pixels[labels == 1, :, :, 4:] += 0.7
    return pixels, labels


def cnn():
    """A small convolutional network for these images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).eval()


def image_loss(model, data):
    """Masters of a whole module, and its cross-entropy on images as a function of them."""
    tuned, (x, y) = TunedTensors(dict(model.named_parameters())), data
    return tuned, ClosureLoss(tuned, lambda: F.cross_entropy(model(x), y))


# ---- wheels -----------------------------------------------------------------------------------------------------------------


def make_wheel(folder, package, members):
    """A wheel of version 1.0 with these files; it cannot be installed, because it needs a package that does not exist."""
    module = package.replace("-", "_")
    wheel, info = folder / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: no-such-package\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{module}/{name}", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return [
        WheelFile(package, "1.0", digest, f"{module}/{name}", hashlib.sha256(content).hexdigest())
        for name, content in members.items()
    ]


def write_lines(path, rows):
    """Write rows as JSON Lines; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    """The rows of a file of JSON Lines."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def chat_options(model_dir):
    """Options of a run on conversations without answers, which are written into the current folder."""
    rows = [{"messages": [{"role": "user", "content": f"Film {i}?"}], "word": "good"} for i in range(24)]
    write_lines("talks.jsonl", rows)
    task = {"class_path": "ChatTask", "init_args": {"train_file": "talks.jsonl", "max_new_tokens": 4}}
    options = [f"--data.task={json.dumps(task)}", "--data.batch_size=4", "--data.num_train=12", "--data.num_dev=6"]
    options += [f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu"]
    return [*options, "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]


def round_by_batch(monkeypatch):
    """Let prefix states depend on the size of the batch, as they do by rounding in models of real width."""
    original = ModelParts.run

    def run(self, batch, start, *args, **options):
        states = original(self, batch, start, *args, **options)
        return states * (1 + 1e-7 * batch.input_ids.numel()) if start == 0 else states

    monkeypatch.setattr(ModelParts, "run", run)


def visible(folder):
    """Names in a folder, without lock files."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix != ".lock")


def slzo_error(call, *args, **options):
    """The error line of a call that fails."""
    with pytest.raises(SlzoError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def tuned_model(family="llama", layer=2, scope=None, scale=1.0, packed=True):
    """A tiny model with one layer, or a scope of it, tuned; LoRA's second matrices are not 0."""
    model = tiny_model(family, scale=scale) if isinstance(family, str) else family
    parts, scope = ModelParts(model, packed, onednn=False), LayerScope() if scope is None else scope
    tuned = TunedModel.from_scope(parts, scope, layer, prompts=packed_prompts, engine=Engine(cache_gb=0))
    if isinstance(scope, LoRA):
        torch.manual_seed(0)
        tuned.tensors.load(
            {name: 0.3 * torch.randn_like(master) for name, master in tuned.tensors.named_masters().items()}
        )
    return tuned


def estimate_at(model, loss, step=0, seed=0, **options):
    """One estimate, from noise alone unless ``tokens`` are given."""
    return LayerOutputPerturbation(**{"tokens": 0, **options}).estimate(
        EstimatorContext(model.tensors, loss, seed, step)
    )


def short_examples(answers=(2, 1)):
    """Few tokens: with noise at all positions an estimate has as many directions as states have entries."""
    generator = random.Random(1)
    return [random_example(generator, i, 4 + i, answers, i % 2) for i in range(4)]


def assert_mean_is(expected, estimates):
    """The mean differs from a gradient by noise alone, and the noise is small."""
    assert all(one.gradient.keys() == expected.keys() for one in estimates)
    means = {}
    for name, wanted in expected.items():
        found = torch.stack([one.gradient[name] for one in estimates]).double()
        means[name], error = found.mean(dim=0), found.std(dim=0) / len(found) ** 0.5
        distance = ((means[name] - wanted) / error.clamp(min=1e-7 * float(wanted.abs().max()))).square().mean().sqrt()
        assert distance < 2, name  # about 1 if the differences are noise
    mean, wanted = flat(means), flat(expected).double()
    assert F.cosine_similarity(mean, wanted, dim=0) > 0.9
    assert float(mean @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.1)


def assert_same_estimate(found, expected):
    """Up to rounding of the losses, which is divided by the scale."""
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    one, other = flat(found.gradient), flat(expected.gradient)
    assert (one - other).norm() < 1e-4 * other.norm()


def on_grid(rows, directions, run):
    """What ``run(processes)`` returns on each process of a grid, in threads that exchange tensors."""
    number = rows * directions
    exchanges = {("rows", d): Exchange(rows) for d in range(directions)} | {
        ("points", r): Exchange(directions) for r in range(rows)
    }
    turn = threading.Lock()  # the seed of torch is global

    def process(rank):
        d, r = rank % directions, rank // directions
        of_rows, of_points = exchanges["rows", d], exchanges["points", r]
        with turn:
            return run(
                Processes(
                    number,
                    rank,
                    directions,
                    sum_rows=lambda tensor: of_rows.gather(tensor, r, turn).sum(dim=0),
                    sum_points=lambda tensor: of_points.gather(tensor, d, turn).sum(dim=0),
                    gather_rows=partial(of_rows.gather, place=r, turn=turn),
                )
            )

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(process, range(number)))


class Exchange:
    """The tensors of threads, each of which gives up its turn while it waits for the others."""

    def __init__(self, number):
        self.barrier, self.number, self.parts = threading.Barrier(number, timeout=60), number, {}

    def gather(self, tensor, place, turn):
        turn.release()
        self.parts[place] = tensor.clone()
        self.barrier.wait()
        gathered = torch.stack([self.parts[place] for place in range(self.number)])
        self.barrier.wait()
        turn.acquire()
        return gathered
