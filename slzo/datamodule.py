"""The LightningDataModule: rows of a task as packed, tokenized batches."""

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from slzo.data.batch import EvalBatch, EvalCollator, TrainBatch, TrainCollator
from slzo.data.encoding import EncodedExample, EncodedSequence, Encoder
from slzo.data.sampler import EpochBatchSampler
from slzo.data.sources import load_examples
from slzo.data.splits import Splits, draw_splits
from slzo.errors import SlzoError
from slzo.evaluation.metrics import TaskMetrics, make_metrics
from slzo.evaluation.scoring import LossKind
from slzo.models.load import load_tokenizer
from slzo.models.packing import PackedBatch, pack
from slzo.tasks.base import Example, Kind, Task
from slzo.tasks.registry import get_task


class _Rows(Dataset):
    """A list as a data set."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class TaskDataModule(LightningDataModule):
    """One task's training, dev and held-out rows.

    Args:
        task: Task name (sst2, rte, cb, boolq, wsc, multirc, copa, squad, drop, wic, record, movie_reviews), or a task object
            such as slzo.tasks.template.TemplateTask for your own file.
        tokenizer: Where the tokenizer comes from; on the command line always model.model.
        data_dir: Folder with local files instead of the Hub: TASK/train.jsonl and TASK/validation.jsonl with the Hub's
            fields (also .parquet and .csv), or the official SuperGLUE download.
        hub_path: Hub data set to use instead of the task's own.
        hub_config: Configuration of hub_path.
        num_train: Training rows.
        num_dev: Dev rows, taken from the training split; left out, the task's usual number.
        num_test: Held-out rows, taken from the validation split; left out, all of them.
        batch_size: Training rows per step and process.
        eval_batch_size: Rows per batch when scoring.
        max_length: Longest sequence in tokens; longer prompts are cut on the left.
        share_prompts: Run a prompt once for all of its candidates.
        length_buckets: Draw training batches of rows of similar length; each row still comes once per epoch.
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
        eval_batch_size: int = 32,
        max_length: int = 2048,
        share_prompts: bool = True,
        length_buckets: bool = False,
        seed: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_length", max_length),
        ):
            if value < 1:
                raise SlzoError(f"data.{name} {value}: must be at least 1")
        self.task = get_task(task) if isinstance(task, str) else task
        self.tokenizer_name = tokenizer
        self.data_dir = data_dir
        self.hub_path = hub_path
        self.hub_config = hub_config
        self.num_train = num_train
        self.num_dev = num_dev
        self.num_test = num_test
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.share_prompts = share_prompts
        self.length_buckets = length_buckets
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.splits: Splits | None = None
        self._encoder: Encoder | None = None
        self._encoded: dict[str, list[EncodedExample]] = {}

    @property
    def loss(self) -> LossKind:
        """What training minimizes."""
        return LossKind.CANDIDATES if self.task.kind is Kind.CLASSIFICATION else LossKind.ANSWER

    @property
    def encoder(self) -> Encoder:
        """Turns text into tokens."""
        if self._encoder is None:
            tokenizer = load_tokenizer(self.tokenizer_name, self.trust_remote_code)
            self._encoder = Encoder(tokenizer, self.max_length)
        return self._encoder

    def make_metrics(self) -> TaskMetrics:
        """Fresh counters of the task's metrics."""
        return make_metrics(self.task)

    def prepare_data(self) -> None:
        """Fetch what several processes would fetch at once: once per machine."""
        _ = self.encoder

    def setup(self, stage: str) -> None:
        """Read, split and tokenize the rows; calling it again changes nothing."""
        if self.splits is not None:
            return
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        needs_train = stage in ("fit", "validate")
        source = {"data_dir": self.data_dir, "hub_path": self.hub_path, "hub_config": self.hub_config}
        test = load_examples(self.task, "test", **source)
        train = load_examples(self.task, "train", **source) if needs_train else None
        self.splits = draw_splits(
            train,
            test,
            num_train=self.num_train,
            num_dev=self.task.default_num_dev if self.num_dev is None else self.num_dev,
            num_test=self.num_test,
            seed=self.seed,
        )
        for note in self.splits.notes:
            rank_zero_info(note)
        rank_zero_info(
            f"Task {self.task.name}: {len(self.splits.train)} training, {len(self.splits.dev)} dev and "
            f"{len(self.splits.test)} held-out rows."
        )

    def encoded(self, split: str) -> list[EncodedExample]:
        """Tokenized rows of ``train``, ``dev`` or ``test``; indices are unique over all three."""
        assert self.splits is not None
        if split not in self._encoded:
            rows = {"train": self.splits.train, "dev": self.splits.dev, "test": self.splits.test}
            start = sum(len(rows[name]) for name in list(rows)[: list(rows).index(split)])
            only_gold = split == "train" and self.loss is LossKind.ANSWER
            self._encoded[split] = [
                self.encoder.encode(example, start + number, only_gold=only_gold)
                for number, example in enumerate(rows[split])
            ]
        return self._encoded[split]

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Shuffled batches of the training rows."""
        trainer = self.trainer
        encoded = self.encoded("train")
        sampler = EpochBatchSampler(
            len(encoded),
            self.batch_size,
            self.seed or 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            lengths=[len(row.sequences[0].ids) for row in encoded] if self.length_buckets else None,
            first_batch=trainer.fit_loop.epoch_loop.batch_progress.current.completed if trainer else 0,
        )
        if len(sampler) == 0:
            raise SlzoError(f"data.num_train {len(encoded)}: fewer rows than processes; use more rows or fewer devices")
        return DataLoader(
            _Rows(encoded), batch_sampler=sampler, collate_fn=TrainCollator(self.loss, self.share_prompts)
        )

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Dev rows, sorted by length."""
        return self._eval_loader("dev")

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Held-out rows, sorted by length."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader[EvalBatch]:
        assert self.splits is not None
        examples: list[Example] = getattr(self.splits, split)
        pairs = sorted(zip(self.encoded(split), examples, strict=True), key=lambda pair: -len(pair[0].sequences[0].ids))
        if self.trainer is not None:
            pairs = pairs[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            _Rows(pairs), batch_size=self.eval_batch_size, collate_fn=EvalCollator(self.loss, self.share_prompts)
        )

    def profile_batches(self, num_sequences: int, batch_size: int) -> list[PackedBatch]:
        """Prompts of the first training rows (or, without any, of held-out rows), for the outlier profile."""
        assert self.splits is not None
        rows = self.splits.train or self.splits.test
        return self.prompt_batches(rows[:num_sequences], batch_size)

    def prompt_batches(self, examples: Sequence[Example], batch_size: int) -> list[PackedBatch]:
        """Prompts without answers, packed."""
        encoded = []
        for number, example in enumerate(examples):
            ids = self.encoder.encode_prompt(example, max_new_tokens=1)
            # the last id of a sequence predicts nothing and is dropped; this one stands for the first answer token
            encoded.append(EncodedExample(number, (EncodedSequence((*ids, ids[-1]), 1),), ()))
        return [pack(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size)]
