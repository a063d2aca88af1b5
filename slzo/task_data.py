"""The rows of a task as packed, tokenized batches for training, scoring and profiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch

from slzo.batches.losses import LogitLoss
from slzo.batches.packing import PackedBatch, pack
from slzo.data.batch import EvalBatch, EvalPlan, Row, TrainBatch, plan_batches
from slzo.data.chat import ChatEncoder
from slzo.data.classes import one_class_warning
from slzo.data.encoding import Encoder
from slzo.data.fingerprint import DataFingerprint
from slzo.data.row_encoding import encode_rows, prompt_batches
from slzo.data.sampler import StepBatchSampler
from slzo.data.sources import RowSource
from slzo.data.splits import Splits, draw_from
from slzo.evaluation.evaluator import Evaluator, RunningScore, score_rows
from slzo.evaluation.generation import Decoding
from slzo.evaluation.rewarding import check_columns
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.models.load import load_tokenizer, max_positions
from slzo.models.parts import ModelParts
from slzo.rewards.registry import REWARDS
from slzo.rewards.runner import RewardOption
from slzo.tasks.base import Example, Kind, Task, check_task
from slzo.tasks.registry import TASKS, get_task
from slzo.utils.argument_checks import ArgumentTypes, check_at_least, check_types
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.docs import with_lists
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.utils.seeding import global_seed
from slzo.utils.settings import constructor_settings, flat_settings
from slzo.zo.objectives import OBJECTIVES, Objective
from slzo.zo.objectives.choice import choose_objective, reported_loss, selection_metric
from slzo.zo.processes import SINGLE_PROCESS, Processes
from slzo.zo.tuned_model import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A CPU is fastest while a layer's activations fit in its cache; an accelerator needs more tokens to be fully used.
_CPU_TOKENS = 768
_ACCELERATOR_TOKENS = 16384
# Smallest values of the whole numbers.
_LEAST = dict.fromkeys(("num_dev", "num_demonstrations"), 0) | dict.fromkeys(
    ("num_train", "num_test", "batch_size", "tokens_per_pass", "eval_batch_size", "eval_batch_tokens", "max_length"), 1
)
# Options that are used when the rows are read.
_FIXED = ("data_dir", "hub_path", "hub_config", "num_train", "num_dev", "num_test", "num_demonstrations")
_OPTIONAL = ("num_dev", "num_test", "tokens_per_pass", "eval_batch_tokens", "seed")
_TYPES: ArgumentTypes = {
    **dict.fromkeys(_LEAST, (int, "a whole number")),
    **dict.fromkeys(_OPTIONAL, (int | None, "a whole number")),
    **dict.fromkeys(("skip_bad_rows", "allow_changed_rows", "trust_remote_code"), (bool, "true or false")),
}

# of arguments that are not kept as they are given
_NAMED: ArgumentTypes = {
    "task": (str | Task, 'a name such as "sst2", or a task such as slzo.tasks.TemplateTask(...)'),
    "tokenizer": (str | PathLike | None, "the name or the folder of its model"),
}


@with_lists(TASKS=sorted(TASKS), OBJECTIVES=OBJECTIVES, REWARDS=sorted(REWARDS))
class TaskData:
    """The training, dev and held-out rows of one task.

    Args:
        task: Task name ({TASKS}), TemplateTask or ChatTask.
            Required. TemplateTask (a prompt template with candidates or free answers) and ChatTask (conversations) read your own
            files.
        tokenizer: Model whose tokenizer is used; by default the model that is trained or scored.
        data_dir: Folder with local files instead of the Hub; TASK/train.jsonl and TASK/validation.jsonl with the Hub's
            fields (also .json, .parquet, .csv and .tsv), or the official SuperGLUE download.
        hub_path: Hub data set to use instead of the task's own; NAME@REVISION for a branch, a tag or a commit.
        hub_config: Configuration of the Hub data set; by default the task's own, or none with another hub_path.
        predict_file: File with rows for predict, in place of the held-out ones; they need no labels.
        num_train: Training rows.
        num_dev: Dev rows, taken from the training split; by default the task's own number.
        num_test: Held-out rows, taken from the validation split; null takes all of them. If a task has only a train_file,
            a fifth of its rows is held out.
        batch_size: Training rows per step and process.
        tokens_per_pass: Largest number of tokens of a training batch per forward pass; by default all of them. A larger batch is
            run in parts, with the same result up to rounding.
        eval_batch_size: Largest number of rows per batch when scoring; more rows make generation faster and take more memory.
        eval_batch_tokens: Largest number of tokens per forward pass when scoring; by default a number that suits the device.
        num_demonstrations: Solved training rows to put before each dev and held-out prompt. This is in-context learning; MeZO
            uses 32. Training batches never contain any.
        max_length: Longest sequence in tokens; longer prompts are cut on the left.
        objective: What training minimizes: loss, metric, {OBJECTIVES}, or your
            own Objective; by default Reward with data.reward, otherwise "loss". "loss" is the task's loss (cross-entropy over
            candidates, or the answer's likelihood). "metric" is the task's error (1 - accuracy, or 1 - F1 of generated
            answers), which has no gradient; zeroth-order steps need none.
        reward: Rewards of generated answers, one or several. Built-in ones ({REWARDS}),
            package.module.function or file.py:function, in Python also a function, or a mapping with function, weight and
            arguments. Without an objective,
            training maximizes their weighted sum; with one, they are only reported.
        allow_changed_rows: Accept a checkpoint of other rows or another tokenizer.
        skip_bad_rows: Leave out rows that cannot be used and report them; otherwise such a row ends the run.
        seed: Seed of the random draws; by default that of seed_everything.
        trust_remote_code: Run code of the given tokenizer that comes with a Hub repository; without data.tokenizer,
            model.trust_remote_code decides.
    """

    def __init__(
        self,
        task: str | Task | None = None,
        tokenizer: str | None = None,
        data_dir: str | None = None,
        hub_path: str | None = None,
        hub_config: str | None = None,
        predict_file: str | None = None,
        num_train: int = 1000,
        num_dev: int | None = None,
        num_test: int | None = 1000,
        batch_size: int = 16,
        tokens_per_pass: int | None = None,
        eval_batch_size: int = 64,
        eval_batch_tokens: int | None = None,
        num_demonstrations: int = 0,
        max_length: int = 2048,
        objective: Literal["loss", "metric"] | Objective | None = None,
        reward: RewardOption | None = None,
        allow_changed_rows: bool = False,
        skip_bad_rows: bool = False,
        seed: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if task is None:
            raise SlzoError(
                f'data.task: is required; name one, as in {type(self).__name__}("movie_reviews"), or give a TemplateTask or '
                "ChatTask for your own files"
            )
        check_types("data", _NAMED, {"task": task, "tokenizer": tokenizer})
        if not isinstance(task, Task):
            task = get_task(task)
        check_task(task)
        self.task = task
        self.tokenizer_name = None if tokenizer is None else str(tokenizer)
        self._follows_model = tokenizer is None
        self.objective, self.reward = choose_objective(self.task, objective, reward)
        self.loss: LogitLoss = reported_loss(self.task, self.objective)
        # recorded before training, because checkpoints contain them
        identity = {"class": self.task.name, "version": self.task.version}
        self._task_settings = {
            **flat_settings("data.task", constructor_settings(self.task, "data.task") | identity),
            **flat_settings("data.objective", constructor_settings(self.objective, "data.objective")),
        }
        if self.reward not in (None, self.objective):
            self._task_settings |= flat_settings("data.reward", constructor_settings(self.reward, "data.reward"))
        self.data_dir = data_dir
        self.hub_path = hub_path
        self.hub_config = hub_config
        self.predict_file = predict_file
        self.num_train = num_train
        self.num_dev = num_dev
        self.num_test = num_test
        self.batch_size = batch_size
        self.tokens_per_pass = tokens_per_pass
        self.eval_batch_size = eval_batch_size
        self.eval_batch_tokens = eval_batch_tokens
        self.num_demonstrations = num_demonstrations
        self.max_length = max_length
        self.allow_changed_rows = allow_changed_rows
        self.skip_bad_rows = skip_bad_rows
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        check_types("data", _TYPES, vars(self))
        for name, least in _LEAST.items():
            check_at_least(f"data.{name}", getattr(self, name), least)
        self.splits: Splits | None = None
        self._told_unlabelled = False
        self._read_with: dict[str, Any] = {}
        self._rows: dict[str, list[Row]] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """Encoder of text into tokens.

        Raises:
            SlzoError: No tokenizer is known yet, or it cannot be loaded.
        """
        if self.tokenizer_name is None:
            raise SlzoError(
                f"data.tokenizer: not known before there is a model; give {type(self).__name__}(tokenizer=MODEL)"
            )
        try:
            tokenizer = load_tokenizer(self.tokenizer_name, self.trust_remote_code)
        except SlzoError as error:
            if self._follows_model:
                raise
            # loading a model or its tokenizer names the option of the model
            message = str(error).replace("model.model", "data.tokenizer", 1)
            raise SlzoError(f"{message}; or leave data.tokenizer out") from error
        if self.task.chat is None:
            return Encoder(tokenizer, self.max_length)
        return ChatEncoder(tokenizer, self.max_length, self.task.chat)

    def follow_model(self, name: str, trust_remote_code: bool = False) -> None:
        """Take the tokenizer of a model, unless another one was given. Call this before using rows."""
        if self._follows_model and (name, trust_remote_code) != (self.tokenizer_name, self.trust_remote_code):
            self.tokenizer_name = name
            self.trust_remote_code = trust_remote_code
            vars(self).pop("encoder", None)
            self._rows.clear()  # they are encoded again when they are used next

    def adapt_to_model(self, model: PreTrainedModel, name: str, reserved: int = 0, longest: int | None = None) -> None:
        """Check the tokenizer against a model and limit sequences to its positions. Call this before using rows.

        ``name`` is that of the model, ``reserved`` the number of positions before every sequence, and ``longest`` the longest
        sequence that its parts support, see :class:`slzo.models.parts.Limits`.

        Raises:
            SlzoError: The tokenizer has more tokens than the model.
        """
        # a tokenizer that was given may differ by mistake
        encoder = self.encoder
        source = self.tokenizer_name
        size = len(self.encoder.tokenizer)
        known: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        advice = f"leave data.tokenizer out, or give {name!r}"
        if size > known and source != name:
            raise SlzoError(f"data.tokenizer {source!r}: has {size} tokens, but model {name!r} has {known}; {advice}")
        if source != name:
            rank_zero_warn(f"data.tokenizer {source!r} is not that of model.model {name!r}; {advice}")
        limits = (limit - reserved for limit in (max_positions(model), longest) if limit)
        length = min([self.max_length, *(limit for limit in limits if limit > 0)])
        # some tokenizers have tokens without an embedding, which a row must not contain
        num_embeddings = known if size > known else None
        if (encoder.max_length, encoder.num_embeddings) == (length, num_embeddings):
            return
        cuts = length < self.max_length
        if cuts:
            rank_zero_print(f"Prompts are cut to {length} tokens, the longest that slzo supports with {name}.")
        self.encoder = encoder.limited_to(length, num_embeddings, by_model=cuts)
        self._rows.clear()

    @property
    def chat_template(self) -> str | None:
        """Chat template if it is not the tokenizer's own, else ``None``; exported folders include it."""
        return None if self.encoder.note is None else self.encoder.template

    @property
    def prompt_length(self) -> int | None:
        """Most tokens of a prompt, with its candidate if there are candidates; ``None`` if the answer leaves no room for it."""
        answer = self.task.max_new_tokens if self.task.kind is Kind.GENERATION else 0
        length = self.encoder.max_length - answer
        return length if length > 0 else None

    def running_score(self, device: torch.device) -> RunningScore:
        """Return new counters of the metrics and the loss."""
        return RunningScore(self.task, device, None if self.reward is None else self.reward.runner.names)

    @property
    def metric_names(self) -> list[str]:
        """Names of the logged metrics of the dev rows, such as ``val/loss``."""
        return [f"val/{name}" for name in self.running_score(torch.device("cpu")).names]

    @property
    def maximized_metrics(self) -> list[str]:
        """Those of :attr:`metric_names` whose larger values are better."""
        return [f"val/{name}" for name in self.running_score(torch.device("cpu")).maximized]

    @property
    def selection_metric(self) -> SelectionMetric:
        """Metric that compares checkpoints and summarizes a run."""
        return selection_metric(self.task, self.objective, self.reward)

    def step_settings(self) -> dict[str, Any]:
        """Return the options that determine the loss of a step by their full names, primitives only.

        They are task and objective with their arguments, and how batches are drawn.
        """
        return {
            **self._task_settings,
            "data.seed": global_seed() if self.seed is None else self.seed,
            "data.batch_size": self.batch_size,
            "data.num_train": self.num_train,
        }

    @property
    def processes(self) -> Processes:
        """The processes of the run and the rank of this one."""
        return SINGLE_PROCESS

    @property
    def on_accelerator(self) -> bool:
        """Whether the model runs on an accelerator."""
        return False

    def setup(self, stage: str) -> None:
        """Read and split the rows. Later calls do nothing, except the first one that needs training rows.

        Raises:
            SlzoError: A required split is missing or broken, or has too few rows for the demonstrations.
        """
        self._check_unchanged()
        if stage == "predict" and self.predict_file is not None:
            _ = self._to_predict  # before the model is loaded
        if stage in ("validate", "test") and self.predict_file is not None:
            rank_zero_warn(
                f"data.predict_file {self.predict_file!r}: not used, as the task's own rows are scored; give it to slzo predict, "
                "or name the file in the task (test_file of TemplateTask)"
            )
        needs_train = stage in ("fit", "validate") or self.num_demonstrations > 0
        if self.splits is not None and (self.splits.train or not needs_train):
            if not self._told_unlabelled:  # they were read to predict them
                self._warn_unlabelled(self.splits, stage)
            return
        if stage == "predict" and self.predict_file is not None and not needs_train:
            self._load_rewards(None)
            return
        seed = global_seed() if self.seed is None else self.seed
        splits = draw_from(
            self._source,
            num_train=self.num_train,
            num_dev=self.task.default_num_dev if self.num_dev is None else self.num_dev,
            num_test=self.num_test,
            seed=seed,
            needs_train=needs_train,
        )
        labelled = sum(bool(example.gold) for example in splits.train)
        if self.num_demonstrations > labelled:
            raise SlzoError(
                f"data.num_demonstrations {self.num_demonstrations}: only {labelled} labelled training rows to take them from; "
                "lower it, or raise data.num_train"
            )
        self._report(splits, stage)
        self._load_rewards(splits)
        # only now, so that a call after an error reads the rows again
        self.splits = splits
        self._read_with |= {name: getattr(self, name) for name in _FIXED}
        if needs_train:  # otherwise no row depends on the seed
            self.seed = self._read_with["seed"] = seed

    def _report(self, splits: Splits, stage: str) -> None:
        """Print how many rows there are and what is unusual about them."""
        for note in splits.notes:
            rank_zero_print(note)
        for warning in filter(None, (self._source.unused_warning(), one_class_warning(self.task, splits.train))):
            rank_zero_warn(warning)
        self._warn_unlabelled(splits, stage)
        counts = f"{len(splits.train)} training, {len(splits.dev)} dev and " if splits.train else ""
        origin = f", {splits.origin}" if splits.origin else ""
        rank_zero_print(f"Task {self.task.name}: {counts}{pluralize(len(splits.test), 'held-out row')}{origin}.")
        unlabelled = sum(not example.gold for example in splits.train)
        if stage == "fit" and unlabelled and self.objective.needs_label:
            rank_zero_print(f"Left out {pluralize(unlabelled, 'training row')} without a label.")
        if self.tokenizer_name is not None and self.encoder.note is not None:
            rank_zero_print(self.encoder.note)

    def _warn_unlabelled(self, splits: Splits, stage: str) -> None:
        """Warn of rows without a label where they count in a score."""
        self._told_unlabelled = stage != "predict"
        if self._told_unlabelled and self.reward is None:
            for name, examples in (("dev", splits.dev), ("held-out", splits.test)):
                if (missing := sum(not example.is_labelled for example in examples)) > 0:
                    rank_zero_warn(f"{missing} of {len(examples)} {name} rows have no label and are not scored")

    def _check_unchanged(self) -> None:
        """Refuse an option that was changed after the rows were read, which would have no effect."""
        for name, value in self._read_with.items():
            if getattr(self, name) != value:
                raise SlzoError(
                    f"data.{name} {getattr(self, name)}: was {value} when the rows were read; make a new {type(self).__name__}"
                )

    def _load_rewards(self, splits: Splits | None) -> None:
        """Load the reward functions, and check that the rows of the splits, if they are read, have what these require."""
        if self.reward is None:
            return
        required = self.reward.runner.load()
        if splits is None:
            return
        for name, examples in {"training": splits.train, "dev": splits.dev, "held-out": splits.test}.items():
            if examples and (name != "training" or self.objective is self.reward):
                warning = check_columns(required, examples, name)
                if warning is not None:
                    rank_zero_warn(warning)

    @property
    def _source(self) -> RowSource:
        return RowSource(
            self.task, self.data_dir, self.hub_path, self.hub_config, self.reward is not None, self.skip_bad_rows
        )

    @cached_property
    def _to_predict(self) -> Sequence[Example]:
        """The rows of ``predict_file``."""
        assert self.predict_file is not None
        found = self._source.read_to_predict(self.predict_file)
        self._read_with["predict_file"] = self.predict_file
        if found.note:
            rank_zero_print(found.note)
        rank_zero_print(f"Task {self.task.name}: {pluralize(len(found.examples), 'row')} of {self.predict_file}.")
        return found.examples

    def _first_key(self, split: str) -> int:
        """Return the key of the first row of a split. It does not depend on which splits are loaded."""
        spaces = {"train": 0, "dev": 1, "test": 2, "predict": 2 if self.predict_file is None else 3}
        return spaces[split] << 40

    def _examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split; those to predict are the held-out ones, or in a file."""
        if split == "predict" and self.predict_file is not None:
            return self._to_predict
        if self.splits is None:
            raise SlzoError(
                'data: the rows are not read yet; pass datamodule=... to the trainer, which reads them, or call setup("fit")'
            )
        return getattr(self.splits, "test" if split == "predict" else split)

    @property
    def demonstrations(self) -> tuple[Example, ...]:
        """Solved rows before each dev and held-out prompt: the first training rows with a label in the drawn order."""
        examples = () if self.splits is None else self.splits.train
        return tuple(example for example in examples if example.gold)[: self.num_demonstrations]

    def rows(self, split: str) -> list[Row]:
        """Return the tokenized rows of ``train``, ``dev``, ``test`` or ``predict``, in the order of the split.

        Raises:
            SlzoError: The objective needs labels and no training row has one.
        """
        if split in self._rows:
            return self._rows[split]
        examples = self._examples(split)
        is_train = split == "train"
        objective = self.objective
        needs_label = is_train and objective.needs_label
        kept = [(place, example) for place, example in enumerate(examples) if example.gold or not needs_label]
        if needs_label and not kept:
            wanted = "give labelled rows"
            if self.task.chat is not None and examples and examples[0].messages:
                role = examples[0].messages[-1].role
                wanted = f"the last turn must have role 'assistant', but in {examples[0].location} it has role {role!r}"
            raise SlzoError(f"data.task: no training row has a label, and training needs one; {wanted}")
        if is_train or objective is self.loss:
            objective.check_examples([example for _, example in kept])
        self._rows[split] = encode_rows(
            kept,
            self.encoder,
            split=split,
            first_key=self._first_key(split),
            demonstrations=() if is_train else self.demonstrations,
            max_new_tokens=self.task.max_new_tokens,
            generates=objective.generates if is_train else self.generates(split),
            only_gold=is_train and objective.only_gold,
            skip_bad_rows=self.skip_bad_rows,
        )
        return self._rows[split]

    def fingerprint(self, saved: Mapping[str, Any] | None) -> DataFingerprint:
        """Return the fingerprint of the tokenizer and of all rows of a fit.

        ``saved`` is that of a checkpoint, to be checked unless ``allow_changed_rows`` is set; ``None`` without one.

        Raises:
            SlzoError: Rows or tokenizer are not those of the checkpoint.
        """
        splits = {split: self.rows(split) for split in ("train", "dev", "test")}
        own = DataFingerprint.of(self.encoder.tokenizer, splits)
        if saved is not None and not self.allow_changed_rows:
            own.check(saved, splits)
        return own

    def generates(self, split: str) -> bool:
        """Whether scoring ``dev``, ``test`` or ``predict`` generates answers."""
        is_predicted = split == "predict" and self.task.kind is Kind.GENERATION
        return self.task.generates or self.reward is not None or is_predicted

    def sampler(
        self,
        batch_size: int | None = None,
        seed: int | None = None,
        steps_done: Callable[[], int] = lambda: 0,
        rank: int | None = None,
    ) -> StepBatchSampler[Row]:
        """Return the sampler of training rows; batch size and seed default to the run's, the rank to this process.

        Raises:
            SlzoError: There are fewer rows than processes.
        """
        rows = self.rows("train")
        own_rank, world_size = self.processes.row_partition
        size = self.batch_size if batch_size is None else batch_size
        seed = (self.seed or 0) if seed is None else seed
        rank = own_rank if rank is None else rank
        num_tokens = [row.encoded.num_tokens for row in rows]
        sampler = StepBatchSampler(rows, num_tokens, size, seed, rank, world_size, steps_done)
        if len(sampler) == 0:
            raise SlzoError(f"data.num_train {len(rows)}: fewer rows than processes; use more rows or fewer devices")
        return sampler

    def pack_training_rows(self, rows: Sequence[Row]) -> TrainBatch:
        """Pack training rows, in the given order."""
        return TrainBatch(pack([row.encoded for row in rows]), tuple(rows), self.tokens_per_pass)

    def training_batches(self, seed: int | None = None, batch_size: int | None = None) -> Iterator[TrainBatch]:
        """Yield the training batches of this process without end; seed and batch size default to the run's."""
        return map(self.pack_training_rows, map(self.sampler(batch_size, seed).rows_of_step, count()))

    def eval_plan(self, split: str) -> EvalPlan:
        """Plan the batches in which this process scores dev or held-out rows."""
        rows = self.rows(split)
        processes = self.processes
        if 0 < len(rows) < processes.world_size:
            option = f"data.num_{'test' if split == 'predict' else split} {len(rows)}"
            if split == "predict" and self.predict_file is not None:
                option = f"data.predict_file {self.predict_file!r}, {pluralize(len(rows), 'row')}"
            raise SlzoError(
                f"{option}: fewer rows than the {processes.world_size} processes; use more rows or fewer devices"
            )
        return plan_batches(rows, self.eval_batch_size, self.scoring_tokens, processes.rank, processes.world_size)

    def eval_batches(self, split: str) -> Iterator[EvalBatch]:
        """Return the packed batches of :meth:`eval_plan`."""
        plan = self.eval_plan(split)
        return map(plan.pack, plan.batches)

    @property
    def scoring_tokens(self) -> int:
        """Tokens per forward pass when scoring."""
        if self.eval_batch_tokens is not None:
            return self.eval_batch_tokens
        return _ACCELERATOR_TOKENS if self.on_accelerator else _CPU_TOKENS

    def evaluator(self, model: ModelParts | TunedModel) -> Evaluator:
        """Return an evaluator that scores rows of this task with the live weights of a model."""
        tuned = model if isinstance(model, TunedModel) else None
        return Evaluator(
            model.parts if isinstance(model, TunedModel) else model,
            self.encoder.tokenizer,
            self.loss,
            self.scoring_tokens,
            states=None if tuned is None else tuned.final_states,
            prompt_states=None if tuned is None else tuned.prompt_states,
            decoding=self.decoding,
            rewards=None if self.reward is None else self.reward.rewards_of,
        )

    def score(self, evaluator: Evaluator, batches: Iterable[EvalBatch], keep_prefix: bool = False) -> dict[str, float]:
        """Return the loss and metrics of batches over all processes, see :class:`slzo.evaluation.evaluator.Evaluator`."""
        return score_rows(evaluator, batches, self.running_score(evaluator.parts.model.device), keep_prefix)

    @property
    def decoding(self) -> Decoding:
        """Stop texts and length limit of generated answers, and what a chat template writes before them."""
        return Decoding((*self.encoder.stop, *self.task.stop), self.task.max_new_tokens, self.encoder.lead)

    def profile_batches(self, num_sequences: int) -> list[PackedBatch]:
        """Return prompts of the first training rows for the outlier profile, or of held-out rows if there are none."""
        assert self.splits is not None
        return prompt_batches(self.encoder, (self.splits.train or self.splits.test)[:num_sequences], self.skip_bad_rows)
