"""The LightningDataModule: rows of a task as packed, tokenized batches."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slzo.batches.blocks import Block
from slzo.batches.encoded import prompt_alone
from slzo.batches.losses import LogitLoss
from slzo.batches.packing import PackedBatch, pack
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.bad_rows import refuse, tell_left_out
from slzo.data.balance import check_has_classes, classes_of, describe_balance, epochs_for_all
from slzo.data.batch import EvalBatch, EvalCollator, EvalPlan, Row, TrainBatch, TrainCollator, plan_batches
from slzo.data.blocks import evaluation_blocks, evaluation_prompts, training_blocks, training_prompts
from slzo.data.chat import ChatEncoder
from slzo.data.drawing import RowSource
from slzo.data.encoding import Encoder
from slzo.data.sampler import EpochBatchSampler
from slzo.data.splits import Splits
from slzo.errors import RowError, SlzoError
from slzo.evaluation.evaluator import REWARD_NAMES, Evaluator, Logits
from slzo.evaluation.generation import Decoding
from slzo.evaluation.metrics import TaskMetrics, make_metrics
from slzo.evaluation.prompt_states import PromptStates
from slzo.models.load import load_tokenizer
from slzo.models.parts import ModelParts
from slzo.rewards.registry import PERPLEXITY
from slzo.settings import constructor_settings, flat_settings
from slzo.tasks.base import Example, Kind, Task
from slzo.tasks.registry import get_task
from slzo.zo.objectives import LOSS_OBJECTIVES, METRIC_OBJECTIVES, AnswerF1, Objective, Reward
from slzo.zo.processes import Divided, Processes

# A CPU is fastest while a layer's activations fit in its cache; an accelerator wants to be filled.
_CPU_TOKENS = 768
_ACCELERATOR_TOKENS = 16384
# Of the prompts that are profiled, which a run does once: enough for speed, too few for the peak of its memory.
_PROMPT_TOKENS = 4096


@dataclass(frozen=True)
class Judge:
    """What a run is judged by.

    Attributes:
        name: Of the value by which dev rows choose a checkpoint: loss, or reward or f1 where that is what training maximizes.
        metric: What sums a run up on held-out rows.
        best: The largest reward or F1 there can be; ``None`` for a loss.
    """

    name: str
    metric: str
    best: float | None = None

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more of it is better."""
        return "min" if self.best is None else "max"

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return self.metric == PERPLEXITY

    @property
    def words(self) -> str:
        """What :meth:`distance` is, in words."""
        return "dev loss" if self.best is None else f"dev distance to the best {self.name}, {self.best:g},"

    def distance(self, found: Mapping[str, Any], prefix: str = "") -> float:
        """How far scored rows are from the best there can be: the loss, or how much of the reward or F1 is missing."""
        value = float(found.get(f"{prefix}{self.name}", math.nan))
        return value if self.best is None else self.best - value


class TaskDataModule(LightningDataModule):
    """One task's training, dev and held-out rows.

    Args:
        task: Task name (sst2, rte, cb, boolq, wsc, multirc, copa, squad, drop, wic, record, movie_reviews), or a task object
            for your own files: TemplateTask (a prompt template with candidates or free answers) or ChatTask (conversations).
        tokenizer: Where the tokenizer comes from; on the command line always model.model.
        data_dir: Folder with local files instead of the Hub; TASK/train.jsonl and TASK/validation.jsonl with the Hub's
            fields (also .parquet and .csv), or the official SuperGLUE download.
        hub_path: Hub data set to use instead of the task's own.
        hub_config: Configuration of hub_path.
        num_train: Training rows.
        num_dev: Dev rows, taken from the training split; left out, the task's usual number.
        num_test: Held-out rows, taken from the validation split; left out, all of them.
        batch_size: Training rows per step and process.
        tokens_per_pass: Tokens of a training batch that go through the model at once, at most; a larger batch is run in parts,
            with the same result but for rounding. Left out, all of them.
        eval_batch_size: Rows per batch when scoring, at most; more rows make generation faster and take more memory.
        eval_batch_tokens: Tokens per forward pass when scoring, at most; left out, a number that suits the device.
        num_demonstrations: Solved training rows to put before each dev and held-out prompt (in-context learning; MeZO has
            32). Training batches never contain any.
        max_length: Longest sequence in tokens; longer prompts are cut on the left.
        share_prompts: Run a prompt once for all of its candidates.
        length_buckets: Draw training batches of rows of similar length; each row still comes once per epoch.
        balanced: Draw training batches with all classes alike; rows of a small class then come several times an epoch.
            For unequal weights instead, see CandidateCrossEntropy.
        processes_divide: What several processes divide in training, rows or points; with rows each takes batch_size of its own
            and evaluates every point of a step on them; with points all take the same batch_size rows and each evaluates some
            of the step's points, such as the members of a population, and keeps the prefix states of all rows.
        objective: What training minimizes: loss, metric, CandidateCrossEntropy, AnswerLikelihood, CandidateErrors, AnswerF1,
            Reward, or your own Objective; left out, Reward with data.reward, else "loss". "loss" is the task's (cross-entropy
            over candidates, or the answer's likelihood), "metric" what is left to win in its metric (1 - accuracy, or 1 - F1 of
            generated answers: no gradient exists, and zeroth-order steps need none).
        reward: Rewards of generated answers, one or several: built-in ones (accuracy, bleu, chrf, exact_match, json_valid,
            number_match, regex, rouge, token_f1), package.module.function or file.py:function, or a mapping with function,
            weight and arguments. Without an objective training maximizes their weighted sum, with one they are only reported.
        skip_bad_rows: Leave out rows that cannot be used, and tell how many and the first of them; otherwise one ends the run.
        seed: Seed of the draws; left out, that of seed_everything.
        trust_remote_code: Run tokenizer code that comes with a Hub repository; on the command line model.trust_remote_code.
    """

    def __init__(
        self,
        task: str | Task = "movie_reviews",
        tokenizer: str = "smollm2-135m",
        data_dir: str | None = None,
        hub_path: str | None = None,
        hub_config: str | None = None,
        num_train: int = 1000,
        num_dev: int | None = None,
        num_test: int | None = 1000,
        batch_size: int = 16,
        tokens_per_pass: int | None = None,
        eval_batch_size: int = 64,
        eval_batch_tokens: int | None = None,
        num_demonstrations: int = 0,
        max_length: int = 2048,
        share_prompts: bool = True,
        length_buckets: bool = False,
        balanced: bool = False,
        processes_divide: Divided = "rows",
        objective: Literal["loss", "metric"] | Objective | None = None,
        reward: str | list[str | dict[str, Any]] | None = None,
        skip_bad_rows: bool = False,
        seed: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(task, Task):
            task = get_task(str(task))
        self.task = task
        self.tokenizer_name = tokenizer
        self.loss: LogitLoss = LOSS_OBJECTIVES[self.task.kind]()
        given = None if reward is None else Reward(reward)
        if objective is None:
            objective = given or "loss"
        if not isinstance(objective, Objective):
            named = {"loss": LOSS_OBJECTIVES, "metric": METRIC_OBJECTIVES}
            if objective not in named:
                raise SlzoError(f"data.objective {objective!r}: choose loss, metric, or an Objective")
            objective = named[objective][self.task.kind]()
        if isinstance(objective, Reward) and given not in (None, objective):
            raise SlzoError("data.reward: the objective names its own functions; leave out one of the two")
        self.reward = objective if isinstance(objective, Reward) else given
        if self.reward is not None and self.task.kind is not Kind.GENERATION:
            raise SlzoError(
                f"data.reward: task {self.task.name!r} chooses among candidates; a reward needs a task that generates answers, "
                "such as TemplateTask with an answer_field, or ChatTask"
            )
        self.objective = objective
        if self.task.metric == "reward" and self.reward is None:
            raise SlzoError(
                f"data.reward: task {self.task.name!r} has no answers that held-out rows could be scored by; give a data.reward, "
                "or the rows' answers in data.task.answer_field"
            )
        # name, version and, if it is made from a config, arguments: before training, since checkpoints hold them
        own = {"class": self.task.name, "version": self.task.version}
        self.task_settings = {
            **flat_settings("task", constructor_settings(self.task, "data.task") | own),
            **flat_settings("objective", constructor_settings(objective, "data.objective")),
            **(
                {}
                if given in (None, objective)
                else flat_settings("reward", constructor_settings(given, "data.reward"))
            ),
        }
        self.data_dir = data_dir
        self.hub_path = hub_path
        self.hub_config = hub_config
        self.num_train = num_train
        self.num_dev = num_dev
        self.num_test = num_test
        self.batch_size = batch_size
        self.tokens_per_pass = tokens_per_pass
        self.eval_batch_size = eval_batch_size
        self.eval_batch_tokens = eval_batch_tokens
        self.num_demonstrations = num_demonstrations
        self.max_length = max_length
        self.share_prompts = share_prompts
        self.length_buckets = length_buckets
        self.balanced = balanced
        if balanced:
            check_has_classes(task)
        if balanced and length_buckets:
            raise SlzoError(
                "data.balanced true: data.length_buckets makes batches of rows of one length, whatever their class; leave one out"
            )
        self.processes_divide: Divided = processes_divide
        self.skip_bad_rows = skip_bad_rows
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        for name in ("batch_size", "tokens_per_pass", "eval_batch_size", "eval_batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SlzoError(f"data.{name} {value}: must be at least 1")
        if num_demonstrations < 0:
            raise SlzoError(f"data.num_demonstrations {num_demonstrations}: must be 0 (zero-shot) or more")
        self.splits: Splits | None = None
        self._rows: dict[str, list[Row]] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """Turns text into tokens."""
        return self._make_encoder(load_tokenizer(self.tokenizer_name, self.trust_remote_code), self.max_length)

    def _make_encoder(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
        chat = self.task.chat
        return Encoder(tokenizer, max_length) if chat is None else ChatEncoder(tokenizer, max_length, chat)

    def fit_to(self, model: PreTrainedModel, name: str, reserved: int = 0, longest: int | None = None) -> None:
        """Check that the tokenizer is a model's, and cut prompts to the positions that it knows; before rows are used.

        Args:
            model: The model.
            name: Of the model, as in model.model.
            reserved: Positions that come before every sequence.
            longest: Of its parts, see :class:`slzo.models.parts.ModelParts`.

        Raises:
            SlzoError: The tokenizer has tokens that the model does not know.
        """
        # the command line gives the rows the model's tokenizer; in Python the two may differ by mistake
        own, tokens = self.tokenizer_name, len(self.encoder.tokenizer)
        known: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        advice = f"give TaskDataModule(tokenizer={name!r})"
        if tokens > known:
            raise SlzoError(f"data.tokenizer {own!r}: has {tokens} tokens, model {name!r} knows {known}; {advice}")
        if own != name:
            rank_zero_warn(f"data.tokenizer {own!r} is not that of model.model {name!r}; {advice}")
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if longest is not None:
            positions = min(longest, positions or longest)
        if isinstance(positions, int) and 0 < positions - reserved < self.encoder.max_length:
            rank_zero_info(f"Prompts are cut to {positions - reserved} tokens, the longest that {name} takes.")
            self.encoder = self._make_encoder(self.encoder.tokenizer, positions - reserved)
            self._rows.clear()

    @property
    def chat_template(self) -> str | None:
        """The template of conversations where it is not the tokenizer's own, else ``None``; an exported folder gets it."""
        encoder = self.encoder
        return encoder.template if isinstance(encoder, ChatEncoder) and encoder.note is not None else None

    def make_metrics(self) -> TaskMetrics:
        """Fresh counters of the task's metrics."""
        return make_metrics(self.task)

    def metric_names(self, stage: str) -> list[str]:
        """What is logged of scored rows: ``val/loss`` and so on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there are no rows
            names = self.make_metrics().compute()
        also = [name for name in self.also if name != "reward"] + (
            list(REWARD_NAMES) if self.reward is not None else []
        )
        return [f"{stage}/{name}" for name in ("loss", *names, *also)]

    @property
    def also(self) -> tuple[str, ...]:
        """What scored rows are reported by beside metrics and loss, see :class:`slzo.evaluation.evaluator.RunningScore`."""
        perplexity = self.task.kind is Kind.GENERATION and PERPLEXITY in self.task.metrics
        return (*((PERPLEXITY,) if perplexity else ()), *(("reward",) if self.reward is not None else ()))

    @property
    def judge(self) -> Judge:
        """What validations judge a run by."""
        if isinstance(self.objective, Reward):
            return Judge("reward", "reward", -self.objective.lowest)
        if isinstance(self.objective, AnswerF1) and "f1" in self.task.metrics:
            return Judge("f1", self.task.metric, 1.0)
        return Judge("loss", self.task.metric)

    def state_dict(self) -> dict[str, Any]:
        """What a step's loss depends on, kept in checkpoints."""
        own = {name: getattr(self, name) for name in ("seed", "batch_size", "num_train", "length_buckets", "balanced")}
        return {**self.task_settings, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn where a resumed run's rows or objective are not those it began with."""
        mine = self.state_dict()
        different = [f"data.{k}: {v} -> {mine[k]}" for k, v in state_dict.items() if mine.get(k) != v]
        if different and self.trainer is not None and self.trainer.state.fn == "fit":
            rank_zero_warn("these data options differ from the checkpoint's: " + "; ".join(different))

    def prepare_data(self) -> None:
        """Fetch what several processes would fetch at once: once per machine."""
        _ = self.encoder

    def setup(self, stage: str) -> None:
        """Read and split the rows; calling it again changes nothing, unless training rows are needed now and were not.

        Raises:
            SlzoError: A split that is needed is missing or broken, or has too few rows for the demonstrations.
        """
        needs_train = stage in ("fit", "validate") or self.num_demonstrations > 0
        if self.splits is not None and (self.splits.train or not needs_train):
            return
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        source = RowSource(
            self.task, self.data_dir, self.hub_path, self.hub_config, self.reward is not None, self.skip_bad_rows
        )
        self.splits = source.draw(
            num_train=self.num_train,
            num_dev=self.task.default_num_dev if self.num_dev is None else self.num_dev,
            num_test=self.num_test,
            seed=self.seed,
            needs_train=needs_train,
        )
        for note in self.splits.notes:
            rank_zero_info(note)
        if self.num_demonstrations > len(self.splits.train):
            raise SlzoError(
                f"data.num_demonstrations {self.num_demonstrations}: only {len(self.splits.train)} training rows to take "
                "them from; lower it, or raise data.num_train"
            )
        counts = f"{len(self.splits.train)} training, {len(self.splits.dev)} dev and " if self.splits.train else ""
        origin = f", {self.splits.origin}" if self.splits.origin else ""
        rank_zero_info(f"Task {self.task.name}: {counts}{len(self.splits.test)} held-out rows{origin}.")
        if isinstance(self.encoder, ChatEncoder) and self.encoder.note is not None:
            rank_zero_info(self.encoder.note)
        if self.reward is not None:
            self.reward.rewards.load()

    @property
    def demonstrations(self) -> tuple[Example, ...]:
        """Solved rows before each dev and held-out prompt: the first training rows in the drawn order, so by seed."""
        assert self.splits is not None
        return self.splits.train[: self.num_demonstrations]

    def rows(self, split: str) -> list[Row]:
        """Tokenized rows of ``train``, ``dev`` or ``test``, or ``predict`` (those of ``test``), in the order of the split.

        Raises:
            SlzoError: No training row has a label, and the objective needs one.
        """
        if split not in self._rows:
            self._rows[split] = self._encode(split)
        return self._rows[split]

    def _encode(self, split: str) -> list[Row]:
        assert self.splits is not None
        examples: Sequence[Example] = getattr(self.splits, "test" if split == "predict" else split)
        is_train, objective = split == "train", self.objective
        before = () if is_train else self.demonstrations
        generates = objective.generates if is_train else self._generates(split)
        needs_label = is_train and objective.needs_label
        kept = [i for i, example in enumerate(examples) if example.gold or not needs_label]
        if needs_label and not kept:
            raise SlzoError(
                f"data.task: none of the {len(examples)} training rows has a label, and training needs one; give labelled rows"
            )
        if len(kept) < len(examples):
            rank_zero_info(f"Left out {len(examples) - len(kept)} training rows without a label.")
        # unique over the splits, whichever of them are loaded
        start = {"train": 0, "dev": 1, "test": 2, "predict": 2}[split] << 40
        rows: list[Row] = []
        bad: list[RowError] = []
        for i in kept:
            example, encoded = examples[i], None
            prompt: tuple[int, ...] = ()
            with self._on_bad_row(bad):
                if generates or not example.candidates:
                    prompt = self.encoder.encode_prompt(example, before, self.task.max_new_tokens)
                if example.candidates:
                    encoded = self.encoder.encode(
                        example, start + i, before, only_gold=is_train and objective.only_gold
                    )
                else:
                    encoded = prompt_alone(start + i, prompt)
            if encoded is not None:
                rows.append(Row(example, encoded, i, prompt if generates else ()))
        if bad:
            rank_zero_info(tell_left_out(bad, len(rows), f"the {split} split"))
        self._say_shortened(split)
        return rows

    @contextmanager
    def _on_bad_row(self, bad: list[RowError]) -> Iterator[None]:
        """Around what a row may turn out not to be usable for: ends the run, or takes note."""
        try:
            yield
        except RowError as error:
            if not self.skip_bad_rows:
                refuse(error)
            bad.append(error)

    def _generates(self, split: str) -> bool:
        """Whether answers to the rows of a split are generated when it is scored."""
        is_predicted = split == "predict" and self.task.kind is Kind.GENERATION
        return self.task.generates or self.reward is not None or is_predicted

    def _say_shortened(self, split: str) -> None:
        if isinstance(self.encoder, ChatEncoder) and self.encoder.shortened:
            rank_zero_info(
                f"Shortened {self.encoder.shortened} sequences of {split} rows to {self.encoder.max_length} tokens: former turns "
                "were left out first (data.max_length)."
            )
            self.encoder.shortened = 0

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Shuffled batches of the training rows."""
        rows, trainer = self.rows("train"), self.trainer
        # every batch is a step; Lightning's own counters call an epoch that max_steps cut off a finished one
        sampler = self.train_sampler(
            self.batch_size, self.seed or 0, lambda: trainer.global_step if trainer else 0, *self._training_process
        )
        if len(sampler) == 0:
            raise SlzoError(f"data.num_train {len(rows)}: fewer rows than processes; use more rows or fewer devices")
        return DataLoader(cast("Dataset[TrainBatch]", rows), batch_sampler=sampler, collate_fn=self._collator)

    def train_sampler(
        self, batch_size: int, seed: int, batches_done: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> EpochBatchSampler:
        """Row numbers of the training batches; see :class:`slzo.data.sampler.EpochBatchSampler` for the arguments."""
        rows = self.rows("train")
        lengths = [len(row.encoded.sequences[0].ids) for row in rows] if self.length_buckets else None
        classes = self._classes if self.balanced else None
        return EpochBatchSampler(len(rows), batch_size, seed, rank, world_size, lengths, batches_done, classes)

    @cached_property
    def _classes(self) -> list[int]:
        """The class of each training row."""
        examples = [row.example for row in self.rows("train")]
        classes = classes_of(examples)
        rank_zero_info(describe_balance(examples, classes))
        return classes

    @property
    def _collator(self) -> TrainCollator:
        return TrainCollator(self.share_prompts, self.tokens_per_pass)

    def training_batches(self, batch_size: int, seed: int) -> Iterator[TrainBatch]:
        """The training batches of a run with this seed, those of this process, without end; for work outside of a fit."""
        rows, done = self.rows("train"), 0
        sampler = self.train_sampler(batch_size, seed, lambda: done, *self._training_process)
        collate = self._collator
        while True:
            for numbers in sampler:
                done += 1
                yield collate([rows[number] for number in numbers])

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Dev rows, in an order that is fast to score."""
        return self.eval_loader("dev")

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Held-out rows, in an order that is fast to score; :attr:`slzo.data.batch.Row.position` is that of the file."""
        return self.eval_loader("test")

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """As :meth:`test_dataloader`; answers are generated where the task is to generate them."""
        return self.eval_loader("predict")

    def eval_loader(self, split: str, num_rows: int | None = None) -> DataLoader[EvalBatch]:
        """Rows of ``dev`` or ``test`` for scoring, those of this process; all, or of the first ``num_rows``."""
        plan = self.eval_plan(split, num_rows)
        collate = EvalCollator(self.share_prompts, plan.share)
        # an item is a whole batch: Lightning would take a batch sampler apart for predict
        return DataLoader(cast("Dataset[EvalBatch]", plan.batches), batch_size=None, collate_fn=collate)

    def eval_plan(self, split: str, num_rows: int | None = None) -> EvalPlan:
        """The batches that dev or held-out rows are scored in."""
        rows, (rank, processes) = self.rows(split)[:num_rows], self._process
        if 0 < len(rows) < processes:
            name = "test" if split == "predict" else split
            raise SlzoError(
                f"data.num_{name} {len(rows)}: fewer rows than the {processes} processes; use more rows or fewer devices"
            )
        return plan_batches(rows, self.eval_batch_size, self.scoring_tokens, rank, processes)

    def prefix_blocks(self) -> Iterator[Block]:
        """With which others the prefix of each dev and training row is computed, those that are asked for most first.

        The same after a resume; the training rows of all processes, since each sees others in later epochs.
        """
        yield from evaluation_blocks(self.eval_plan("dev"), self.share_prompts)
        if not self.objective.generates:
            yield from self.training_blocks()

    def prompt_blocks(self) -> Iterator[Block]:
        """The same of rows whose answers are generated."""
        yield from evaluation_prompts(self.eval_plan("dev"), self.scoring_tokens)
        if self.objective.generates:
            yield from training_prompts(self.rows("train"), self._first_epochs())

    def training_blocks(self) -> Iterator[Block]:
        """The training batches in which rows come first, those of all processes."""
        yield from training_blocks(self.rows("train"), self._first_epochs(), self.share_prompts)

    def _first_epochs(self) -> Iterator[EpochBatchSampler]:
        """The batches of each process in the first epoch, and in those after it until all rows have come."""
        _, processes = self._training_process
        for epoch in range(epochs_for_all(self._classes) if self.balanced else 1):
            for rank in range(processes):
                sampler = self.train_sampler(self.batch_size, self.seed or 0, lambda: 0, rank, processes)
                yield replace(sampler, batches_done=partial(int, epoch * len(sampler)))

    @property
    def _process(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def processes(self) -> Processes:
        """Those that a training step is divided over."""
        if self.trainer is None:
            return Processes()
        rank, number = self._process
        return Processes(number, rank, self.processes_divide, partial(self.trainer.strategy.reduce, reduce_op="sum"))

    @property
    def _training_process(self) -> tuple[int, int]:
        """Rank and number of those that training rows are divided over."""
        return self._process if self.processes_divide == "rows" else (0, 1)

    @property
    def rows_a_step(self) -> int:
        """Training rows of a step, over all processes."""
        return self.batch_size * self._training_process[1]

    @property
    def scoring_tokens(self) -> int:
        """Tokens per forward pass when scoring."""
        if self.eval_batch_tokens is not None:
            return self.eval_batch_tokens
        on_cpu = self.trainer is None or self.trainer.strategy.root_device.type == "cpu"
        return _CPU_TOKENS if on_cpu else _ACCELERATOR_TOKENS

    def evaluator(
        self, parts: ModelParts, logits: Logits | None = None, prompt_states: PromptStates | None = None
    ) -> Evaluator:
        """Scores rows of this task; arguments as for :class:`slzo.evaluation.evaluator.Evaluator`."""
        rewards = None if self.reward is None else self.reward.of_rows
        return Evaluator(
            parts,
            self.encoder.tokenizer,
            self.loss,
            self.scoring_tokens,
            logits=logits,
            prompt_states=prompt_states,
            decoding=self.decoding,
            rewards=rewards,
        )

    @property
    def decoding(self) -> Decoding:
        """Where generated answers end."""
        own = self.encoder.stop if isinstance(self.encoder, ChatEncoder) else ()
        return Decoding((*own, *self.task.stop), self.task.max_new_tokens)

    def profile_batches(self, num_sequences: int, batch_size: int) -> list[PackedBatch]:
        """Prompts of the first training rows (or, without any, of held-out rows), for the outlier profile."""
        assert self.splits is not None
        return self.prompt_batches((self.splits.train or self.splits.test)[:num_sequences], batch_size)

    def prompt_batches(self, examples: Sequence[Example], batch_size: int) -> list[PackedBatch]:
        """Prompts without answers, packed; fewer at once where they are long."""
        prompts = []
        for example in examples:
            with self._on_bad_row([]):  # they are told where the split is encoded
                prompts.append(self.encoder.encode_prompt(example, max_new_tokens=1))
        chunks = chunk_by_tokens(prompts, _PROMPT_TOKENS, batch_size, share=False)
        return [pack([prompt_alone(number, prompts[number]) for number in chunk]) for chunk in chunks]
