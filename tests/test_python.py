"""slzo as a package: ``from slzo import ZOModule, TaskDataModule, ZOTrainer``."""

import csv
import inspect
import json
import math
import pickle
import random
import shlex
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import last_checkpoint, on_tiny, run_dir, same_tensors, summary, tuned, write_lines
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

import slzo
from slzo import TaskDataModule, ZOModule, ZOTrainer
from slzo.__main__ import main
from slzo.callbacks.answer_log import AnswerLog
from slzo.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from slzo.callbacks.defaults import DEFAULTS
from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.run_record import RunRecord
from slzo.callbacks.step_watch import StepWatch
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.find import find_checkpoint, newest_checkpoint
from slzo.export.write import export_checkpoint
from slzo.fit import best_state
from slzo.lightning.checkpoint_io import AtomicCheckpointIO
from slzo.lightning.loggers import RunLogger
from slzo.lightning.trainer_options import check_callbacks
from slzo.lightning.trainer_state import callback_of
from slzo.tasks.chat import ChatTask
from slzo.tasks.template import TemplateTask
from slzo.training.resume import changed_settings
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import ESTIMATORS, SPSA
from slzo.zo.objectives import OBJECTIVES
from slzo.zo.objectives.reward import Reward
from slzo.zo.processes import SINGLE_PROCESS, Processes
from slzo.zo.scopes import SCOPES, ActivationSubspace, LayerScope, LoRA, PrefixTuning, RandomLayers
from slzo.zo.selection import RULES

pytestmark = pytest.mark.usefixtures("own_folder")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def rows(data_dir, **options):
    sizes = {"num_train": 16, "num_dev": 8, "num_test": 12, "batch_size": 4}
    return TaskDataModule("sst2", data_dir=str(data_dir), **{**sizes, **options})


def printed(code):
    """What a new Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_is_imported_without_torch():
    heavy = "[name for name in ('torch', 'lightning', 'transformers', 'numpy', 'matplotlib') if name in sys.modules]"
    plots = "slzo.plots.curves, slzo.plots.profile, slzo.plots.sweep"
    assert printed(f"import sys, slzo, {plots}; print(slzo.__version__, {heavy})") == f"{slzo.__version__} []"
    with pytest.raises(AttributeError, match="no attribute 'ZOModul'"):
        _ = slzo.ZOModul


@pytest.mark.slow
def test_the_module_is_imported_without_packages_that_few_runs_need():
    """Lightning imports some of them itself where they are installed."""
    lazy = "accelerate bitsandbytes datasets gguf peft pyarrow tensorboard torchao transformers.modeling_utils"
    code = "import sys, torch, lightning; known = set(sys.modules); import slzo.module; new = set(sys.modules) - known;"
    assert printed(f"{code} print([name for name in {lazy!r}.split() if name in new])") == "[]"


def test_the_example_of_the_package(model_dir, data_dir, capsys):
    code = textwrap.dedent(inspect.getdoc(slzo).partition("::\n")[2])
    on = on_tiny(
        code, model_dir, data_dir, {"max_steps=160, val_check_interval=20": "max_steps=2, val_check_interval=1"}
    )
    exec(on.replace(f", tokenizer={str(model_dir)!r}", ""), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(summary()["score_after"])


def fitted(model_dir, data_dir, scope=None, layer=2):
    """A run of two steps with a scope."""
    module = ZOModule(str(model_dir), layer, scope, eps=1e-3, seed=0)
    trainer = ZOTrainer(max_steps=2, val_check_interval=2, **QUIET)
    trainer.fit(module, datamodule=rows(data_dir))


@pytest.mark.parametrize(
    "scope",
    [pytest.param(LoRA(rank=2), marks=pytest.mark.slow), PrefixTuning(num_tokens=2)],
    ids=lambda scope: scope.describe(),
)
def test_a_checkpoint_becomes_a_module(scope, model_dir, data_dir):
    fitted(model_dir, data_dir, scope)
    trainer, data = ZOTrainer(logger=False, **QUIET), rows(data_dir)
    module = ZOModule.load_from_checkpoint(last_checkpoint())
    (loaded,) = trainer.test(module, datamodule=data)
    (usual,) = trainer.test(ZOModule(str(model_dir)), datamodule=rows(data_dir), ckpt_path=str(last_checkpoint()))
    assert loaded == usual
    assert data.encoder.max_length == 256 - 2 * isinstance(scope, PrefixTuning)
    others = rows(data_dir)
    assert trainer.test(module, datamodule=others) == [usual]
    assert others.encoder.max_length == data.encoder.max_length
    with pytest.raises(SlzoError, match=r"model\.scope: this run and the checkpoint differ"):
        ZOTrainer(max_steps=1, **QUIET).fit(module, datamodule=rows(data_dir))


def test_a_checkpoint_that_is_scored_is_no_part_of_the_next_training(model_dir, data_dir):
    """Neither its best state nor the options of its run."""
    fitted(model_dir, data_dir, RandomLayers(0.5), layer=None)
    old, trainer = last_checkpoint(), ZOTrainer(max_steps=2, val_check_interval=2, **QUIET)
    module = ZOModule(str(model_dir), scope=RandomLayers(0.5), eps=1e-3, seed=0)
    trainer.test(module, datamodule=rows(data_dir), ckpt_path=str(old))
    trainer.fit(module, datamodule=rows(data_dir))
    assert Path(summary(1)["best_checkpoint"]) == run_dir(1) / "checkpoints" / "step=2.ckpt"
    assert len(module.tuned_model.tensors.draw(0, 0, 0)) < len(module.tuned_model.tensors.names)
    other = ZOModule(str(model_dir), 1, seed=0)
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET)
    trainer.test(other, datamodule=rows(data_dir), ckpt_path=str(old))
    with pytest.raises(SlzoError, match=r"model\.scope: this run and the checkpoint differ"):
        trainer.fit(other, datamodule=rows(data_dir))


def test_the_checks_of_a_scored_checkpoint_are_those_of_the_one_that_is_scored(model_dir, data_dir, capsys):
    """A trainer still names the checkpoint of its last call when it sets the module up for the next one."""
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET)
    for dtype in ("float32", "bfloat16"):
        module = ZOModule(str(model_dir), 2, eps=1e-3, dtype=dtype, seed=0)
        ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(module, datamodule=rows(data_dir))
    float32, bfloat16 = (str(last_checkpoint(number)) for number in (0, 1))

    def said(module, **options):
        capsys.readouterr()
        trainer.test(module, datamodule=rows(data_dir), **options)
        return capsys.readouterr().err

    changed = "model.dtype: float32 -> bfloat16"
    plain = ZOModule(str(model_dir), dtype="bfloat16", seed=0)
    assert changed in said(plain, ckpt_path=float32)
    loaded = ZOModule.load_from_checkpoint(float32, dtype="bfloat16")
    assert changed in said(loaded)
    assert changed not in said(loaded, ckpt_path=bfloat16)
    assert changed not in said(loaded)  # it has the tensors of the other one now


def test_a_refused_command_keeps_the_run_of_another_trainer(model_dir, data_dir):
    """Both have the same logger, as in Lightning's examples."""
    logger, module = RunLogger(), ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
    ZOTrainer(max_steps=1, val_check_interval=1, logger=logger, **QUIET).fit(module, datamodule=rows(data_dir))
    before = sorted(run_dir().rglob("*"))
    with pytest.raises(SlzoError, match="typo"):
        ZOTrainer(logger=logger, **QUIET).test(module, datamodule=rows(data_dir), ckpt_path="typo.ckpt")
    assert sorted(run_dir().rglob("*")) == before != []


def test_reading_the_folder_of_a_run_makes_none():
    trainer = ZOTrainer(**QUIET)
    assert Path(trainer.log_dir).absolute() == run_dir().absolute()
    assert not run_dir().exists()


def test_arguments_of_lightnings_load_from_checkpoint(model_dir, data_dir, once):
    once(fitted, model_dir, data_dir)
    path = last_checkpoint()
    assert ZOModule.load_from_checkpoint(path, map_location="cpu", strict=True, weights_only=True).is_tuned
    for wrong in ({"hparams_file": "x.yaml"}, {"strict": False}):
        with pytest.raises(SlzoError, match=r"^load_from_checkpoint: .* does not apply to checkpoints of slzo"):
            ZOModule.load_from_checkpoint(path, **wrong)


def test_lightnings_schedule_by_epochs(model_dir, data_dir):
    """The dev rows are scored once an epoch, and the last checkpoint names the best one."""
    trainer = ZOTrainer(max_epochs=2, check_val_every_n_epoch=1, **QUIET)
    assert (trainer.val_check_interval, trainer.max_steps) == (1.0, -1)
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=rows(data_dir))
    best = callback_of(trainer, BestCheckpoint).best_model_path
    assert Path(find_checkpoint(run_dir(), "runs").path) == Path(best)
    Path(best).unlink()
    with pytest.raises(SlzoError, match="has no best one: it was not validated, all"):
        find_checkpoint("best", "runs")


def test_a_plain_trainer_does_not_go_on_by_itself(model_dir, data_dir, once):
    """Lightning keeps the path of a checkpoint that it has loaded."""
    once(fitted, model_dir, data_dir)
    plugin = AtomicCheckpointIO()
    trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, plugins=[plugin], **QUIET)
    data, module = rows(data_dir), ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
    trainer.validate(module, datamodule=data, ckpt_path=str(last_checkpoint()))
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=data)
    assert not trainer.lightning_module.prepared.resumed
    assert trainer.global_step == 2


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"logger": False}])
def test_a_run_without_checkpoints_has_no_best_one(model_dir, data_dir, options, once):
    once(fitted, model_dir, data_dir)  # the checkpoint of another run
    trainer, module = ZOTrainer(max_steps=1, **QUIET, **options), ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
    trainer.fit(module, datamodule=rows(data_dir))
    for name in ("best", "last"):
        with pytest.raises(SlzoError, match=f"ckpt_path '{name}': the run of this trainer has no checkpoints"):
            trainer.test(module, datamodule=rows(data_dir), ckpt_path=name)


def test_a_callback_that_saves_is_not_dropped():
    with pytest.raises(SlzoError, match="ModelCheckpoint: it saves checkpoints; leave out"):
        ZOTrainer(enable_checkpointing=False, callbacks=[ModelCheckpoint("x")], **QUIET)
    with pytest.raises(SlzoError, match="ModelCheckpoint: without a logger it has no folder; give it a dirpath"):
        ZOTrainer(logger=False, callbacks=[ModelCheckpoint()], **QUIET)
    trainer = ZOTrainer(callbacks=[ModelCheckpoint()], **QUIET)
    assert isinstance(trainer.checkpoint_callback, BestCheckpoint)  # the one of "best"


def test_a_callback_does_not_replace_the_last_checkpoint_of_a_run():
    """A resume needs the state after a validation."""
    with pytest.raises(SlzoError, match=r"ModelCheckpoint\.save_last: last\.ckpt is written by the run itself"):
        ZOTrainer(callbacks=[ModelCheckpoint(save_last=True)], **QUIET)
    ZOTrainer(callbacks=[ModelCheckpoint("own", save_last=True)], **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overfit_batches": 2}, "trainer.overfit_batches 2: each step draws other rows"),
        (
            {"callbacks": [StochasticWeightAveraging(1e-3)]},
            "trainer.callbacks StochasticWeightAveraging: does not work",
        ),
        ({"callbacks": [EMAWeightAveraging()]}, "trainer.callbacks EMAWeightAveraging: does not work"),
        ({"callbacks": [ModelPruning("l1_unstructured")]}, "trainer.callbacks ModelPruning: does not work"),
    ],
)
def test_a_plain_trainer_cannot_do_what_has_no_effect(options, message, model_dir, data_dir):
    trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, **QUIET, **options)
    with pytest.raises(SlzoError, match=f"^{message}"):
        trainer.fit(ZOModule(str(model_dir), 2, seed=0), datamodule=rows(data_dir))


class LogsMore(ZOModule):
    """A user's module with a metric of its own."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("my/metric", 1.0)


@pytest.mark.parametrize(("module", "monitor"), [(LogsMore, "my/metric"), (ZOModule, "loss")])
def test_all_logged_metrics_can_be_watched(module, monitor, model_dir, data_dir):
    stop = EarlyStopping(monitor, check_on_train_epoch_end=False)
    trainer = ZOTrainer(max_steps=2, val_check_interval=1, callbacks=[stop], **QUIET)
    trainer.fit(module(str(model_dir), 2, seed=0), datamodule=rows(data_dir))
    assert math.isfinite(stop.best_score)
    with pytest.raises(SlzoError, match=r"EarlyStopping\.monitor 'my/metrc': no such metric"):
        ZOTrainer(callbacks=[EarlyStopping("my/metrc")], **QUIET).fit(
            ZOModule(str(model_dir), 2), datamodule=rows(data_dir)
        )


@pytest.mark.fast
def test_a_mode_that_looks_for_the_worst_value_is_named(capsys):
    metrics, maximized = ["val/loss", "val/accuracy"], ["val/accuracy"]
    good = [EarlyStopping("val/loss"), EarlyStopping("val/accuracy", mode="max"), BestCheckpoint("val/accuracy")]
    check_callbacks(good, metrics, maximized, logs_more=False)
    assert not capsys.readouterr().err
    for callback, option in (
        (EarlyStopping("val/accuracy"), "EarlyStopping"),
        (BestCheckpoint("val/accuracy", mode="min"), "checkpoint"),
    ):
        check_callbacks([callback], metrics, maximized, logs_more=False)
        assert f"{option}.mode min: larger values of val/accuracy are better" in capsys.readouterr().err


def test_a_scheduler_is_not_added_to_a_run(model_dir, data_dir, once):
    once(fitted, model_dir, data_dir)
    make = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    module = ZOModule(
        str(model_dir), 2, eps=1e-3, seed=0, optimizer=partial(torch.optim.SGD, lr=1e-3), lr_scheduler=make
    )
    with pytest.raises(
        SlzoError, match=r"^model.lr_scheduler StepLR: the checkpoint was trained with none, whose state"
    ):
        ZOTrainer(max_steps=9, **QUIET).fit(module, datamodule=rows(data_dir), ckpt_path="last")


def test_other_types_of_a_checkpoint_are_reported_when_it_is_scored(model_dir, data_dir, capsys, once):
    once(fitted, model_dir, data_dir)
    for dtype, words in (
        ("float32", ""),
        ("bfloat16", "model.dtype: float32 -> bfloat16; scores may differ from those of its run"),
    ):
        capsys.readouterr()
        module = ZOModule(str(model_dir), dtype=dtype, seed=0)
        ZOTrainer(**QUIET).test(module, datamodule=rows(data_dir), ckpt_path=str(last_checkpoint()), verbose=False)
        error = capsys.readouterr().err
        assert words in error if words else "scores may differ" not in error


@pytest.mark.parametrize("name", ["sst2", "other"])
def test_another_prompt_of_the_same_task_is_reported_when_a_checkpoint_is_scored(
    name, model_dir, data_dir, capsys, once
):
    once(fitted, model_dir, data_dir)
    files = {
        f"{split}_file": f"{data_dir}/sst2/{file}.jsonl" for split, file in (("train", "train"), ("test", "validation"))
    }
    task = TemplateTask("{sentence} is", [" terrible", " great"], name=name, **files)
    data = TaskDataModule(task, num_test=12)
    ZOTrainer(**QUIET).test(ZOModule(str(model_dir)), datamodule=data, ckpt_path=str(last_checkpoint()), verbose=False)
    error = capsys.readouterr().err
    assert ("data.task.prompt: None -> {sentence} is" in error) == (name == "sst2")
    assert "_file" not in error


def test_held_out_rows_of_a_file_that_has_changed_are_reported_when_a_checkpoint_is_scored(
    model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"film {number}", "label": number % 2} for number in range(40)]

    def scored(rows, **options):
        write_lines("rows.jsonl", rows)
        task = TemplateTask("{text} is", [" bad", " good"], train_file="rows.jsonl")
        data = TaskDataModule(task, num_dev=4, batch_size=4, **options)
        module = ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
        if not run_dir().exists():
            ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(module, datamodule=data)
        capsys.readouterr()
        checkpoint = str(last_checkpoint())
        ZOTrainer(logger=False, **QUIET).test(module, datamodule=data, ckpt_path=checkpoint, verbose=False)
        return "rows.jsonl has changed since the checkpoint's run" in capsys.readouterr().err

    assert not scored(rows)
    assert not scored(rows, num_test=3)
    assert not scored(rows, num_demonstrations=2)
    assert scored(rows[1:])


def test_a_rate_that_replaces_an_automatic_one_is_used(model_dir, data_dir, capsys):
    ZOTrainer(max_steps=2, val_check_interval=2, **QUIET).fit(
        ZOModule(str(model_dir), 2, seed=0), datamodule=rows(data_dir)
    )
    module = ZOModule(str(model_dir), 2, seed=0, optimizer=partial(torch.optim.AdamW, lr=0.01))
    trainer = ZOTrainer(max_steps=3, val_check_interval=1, **QUIET)
    trainer.fit(module, datamodule=rows(data_dir), ckpt_path="last")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    saved = read_checkpoint(last_checkpoint(1))
    assert saved.metadata["settings"]["model.optimizer.lr"] == 0.01
    assert saved.content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01
    assert "which continue from the checkpoint; model.optimizer.lr is the new one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_train", "num_dev", "num_test", "num_demonstrations", "seed"])
def test_rows_that_were_read_cannot_be_changed(name, model_dir, data_dir):
    """The new value would be recorded, and have no effect."""
    data = rows(data_dir, tokenizer=str(model_dir), seed=0)
    data.setup("fit")
    data.batch_size = 2  # not used yet
    data.setup("test")
    setattr(data, name, 3)
    with pytest.raises(SlzoError, match=rf"^data.{name} 3: was \d+ when the rows were read; make a new TaskDataModule"):
        data.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"barebones": True}, "trainer.barebones: slzo's callbacks log and save; leave it out"),
        (
            {"strategy": DDPStrategy(start_method="fork"), "devices": 2},
            "trainer.strategy 'DDPStrategy': it copies this",
        ),
        (
            {"callbacks": [BestCheckpoint(dirpath="x")], "limit_test_batches": 1},
            "trainer.limit_test_batches 1: fit scores",
        ),
    ],
)
def test_options_that_a_run_cannot_have(options, message, model_dir, data_dir):
    with pytest.raises(SlzoError, match=f"^{message}"):
        ZOTrainer(**{**QUIET, **options}).fit(ZOModule(str(model_dir)), datamodule=rows(data_dir))


@pytest.mark.parametrize("kind", [Trainer, ZOTrainer])
def test_a_compiled_module_is_refused_before_the_model_is_loaded(kind, model_dir, data_dir):
    module = ZOModule(str(model_dir), 2, eps=1e-3)
    with pytest.raises(SlzoError, match=r"^model: torch.compile does not work with slzo's steps; pass a new ZOModule"):
        kind(max_steps=1, logger=False, enable_checkpointing=False, **QUIET).fit(
            torch.compile(module), datamodule=rows(data_dir)
        )
    assert module.model is None


class OwnTraining(ZOModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


class OwnValidation(ZOModule):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


class OwnStart(ZOModule):
    def on_validation_epoch_start(self):
        pass


class OwnLoader(TaskDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4))


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (
            OwnTraining,
            TaskDataModule,
            r"^OwnTraining.training_step: callbacks need what super\(\).training_step returns",
        ),
        (OwnValidation, TaskDataModule, r"^OwnValidation.validation_step: callbacks need what super\(\)"),
        (
            OwnStart,
            TaskDataModule,
            r"^model: the scores were not reset; call super\(\) in your on_validation_epoch_start",
        ),
        (
            ZOModule,
            OwnLoader,
            r"^data: a batch is a Tensor, not one of TaskDataModule; do not override its data loaders",
        ),
    ],
)
def test_a_method_of_a_subclass_that_leaves_something_out_is_named(module, data, message, model_dir, data_dir):
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, logger=False, enable_checkpointing=False, **QUIET)
    own = data("sst2", data_dir=str(data_dir), num_train=16, num_dev=8, num_test=12, batch_size=4)
    with pytest.raises(SlzoError, match=message):
        trainer.fit(module(str(model_dir), 2, eps=1e-3, seed=0), datamodule=own)


def test_a_plain_trainer_takes_a_loss_from_a_subclass(model_dir, data_dir):
    options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = Trainer(max_steps=9, callbacks=[Ends(1)], **options, **QUIET)
    trainer.fit(OwnTraining(str(model_dir), 2, eps=1e-3, seed=0), datamodule=rows(data_dir))
    assert trainer.global_step == 1


def test_an_optimizer_of_a_subclass_is_refused_before_the_model_is_loaded(model_dir, data_dir):
    """Its rate would be replaced, and its scheduler never stepped."""

    class Own(ZOModule):
        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=10.0)

    module = Own(str(model_dir), 2, seed=0)
    with pytest.raises(SlzoError, match=r"^Own.configure_optimizers: .*; do not override the method, and pass them"):
        ZOTrainer(max_steps=1, **QUIET).fit(module, datamodule=rows(data_dir))
    assert module.model is None


@pytest.mark.parametrize("stage", ["train", "val"])
def test_less_than_one_batch_is_refused_before_the_model_is_loaded(stage, model_dir, data_dir):
    module = ZOModule(str(model_dir), 2)
    trainer = Trainer(max_steps=1, **QUIET, **{f"limit_{stage}_batches": 0.01})
    with pytest.raises(SlzoError, match=rf"^trainer.limit_{stage}_batches 0.01: is less than one of the [24] batches"):
        trainer.fit(module, datamodule=rows(data_dir, eval_batch_size=4))
    assert module.model is None


def test_rows_that_are_not_read_are_reported(data_dir, model_dir):
    with pytest.raises(SlzoError, match=r"^data: the rows are not read yet; pass datamodule="):
        Trainer(max_steps=1, **QUIET).fit(ZOModule(str(model_dir), 2), rows(data_dir).train_dataloader())


@pytest.mark.parametrize("lr", [None, torch.tensor(1e-3)])
def test_a_rate_that_is_no_number_is_named(lr):
    def make(params):
        optimizer = torch.optim.SGD(params, lr=1.0)
        optimizer.defaults["lr"] = optimizer.param_groups[0]["lr"] = lr
        return optimizer

    with pytest.raises(
        SlzoError, match=r"^model.optimizer SGD: its learning rate is .*; give a number for lr, or auto$"
    ):
        ZOModule(optimizer=make)


def test_a_value_of_many_lines_is_named_in_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(SlzoError, match=r"^model.optimizer SGD [^\n]*; give a class of torch.optim"):
        ZOModule(optimizer=optimizer)


@pytest.mark.parametrize(
    "option", ["save_last", "save_on_train_epoch_end", "every_n_train_steps", "train_time_interval"]
)
def test_the_best_checkpoint_writes_no_other_state(option):
    with pytest.raises(SlzoError, match=f"^checkpoint.{option}: "):
        BestCheckpoint(**{option: True})


def test_a_score_before_training_is_that_of_the_model(model_dir, data_dir, monkeypatch):
    """Also if an earlier fit ended between this score and the first step."""
    trainer, data = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET), rows(data_dir)
    with monkeypatch.context() as patch:
        patch.setattr(ZOModule, "training_step", fail)
        with pytest.raises(SlzoError, match="out of luck"):
            trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=data)
    record = callback_of(trainer, RunRecord)
    record._history.before.metrics["accuracy"] = 2.0
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=data)
    assert summary()["score_before"] <= 1


def test_rows_have_the_length_of_each_model(model_dir, data_dir):
    data = rows(data_dir)
    for scope, length in ((PrefixTuning(num_tokens=5), 251), (LayerScope(), 256)):
        module = ZOModule(str(model_dir), 2, scope, eps=1e-3, seed=0)
        ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(module, datamodule=data)
        assert data.encoder.max_length == length


def test_commands_of_a_run_with_checkpoints_elsewhere(options, tmp_path, capsys):
    assert main(["fit", *options, f"--checkpoint.dirpath={tmp_path / 'kept'}", "--trainer.max_steps=2"]) == 0
    command = next(each for each in summary()["use"] if each.startswith("slzo test"))
    assert main(shlex.split(command)[1:]) == 0
    assert main(["test", "--ckpt_path=best"]) == 0
    assert capsys.readouterr().out.count("test/accuracy") >= 2


def test_a_second_fit_keeps_log_and_history_of_the_first(model_dir, data_dir):
    module, data = (
        ZOModule(str(model_dir), 2, eps=1e-3, seed=0, optimizer=partial(torch.optim.SGD, lr=1e-3)),
        rows(data_dir),
    )
    trainer = ZOTrainer(max_steps=2, val_check_interval=2, **QUIET)
    trainer.fit(module, datamodule=data)
    before = (run_dir() / "zo_log").read_bytes()
    for steps in (2, 4):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == steps
        assert (run_dir() / "zo_log").read_bytes() == before
        assert summary()["evaluations"] == 2 * steps == 2 * summary()["steps"]
        assert [each["step"] for each in summary()["validations"]] == list(range(2, steps + 1, 2))


def test_a_fit_that_fails_leaves_nothing_in_the_model(model_dir, data_dir, monkeypatch):
    """The fingerprint in a later checkpoint would be that of a model with the adapter."""
    module, data = ZOModule(str(model_dir), 2, LoRA(rank=2), seed=0), rows(data_dir)
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET)
    trainer.test(module, datamodule=data)
    with monkeypatch.context() as patch:
        patch.setattr("slzo.fit.plan_prefix", fail)
        with pytest.raises(SlzoError, match="out of luck"):
            trainer.fit(module, datamodule=data)
    trainer.fit(module, datamodule=data)
    scored = ZOTrainer(**QUIET).test(
        ZOModule(str(model_dir)), datamodule=rows(data_dir), ckpt_path=str(last_checkpoint())
    )
    assert scored == trainer.test(module, datamodule=data)


@pytest.mark.parametrize("scope", [LayerScope(), LoRA(rank=2)], ids=lambda scope: scope.describe())
def test_a_fit_after_one_that_ended_before_its_first_step_is_that_of_a_new_module(scope, model_dir, data_dir):
    """With the same directions, profile and log of losses."""
    module, data = ZOModule(str(model_dir), 2, scope, eps=1e-3, seed=0), rows(data_dir)
    broken = Callback()
    broken.on_train_start = fail
    with pytest.raises(SlzoError, match="out of luck"):
        ZOTrainer(max_steps=1, callbacks=[broken], **QUIET).fit(module, datamodule=data)
    ZOTrainer(max_steps=2, val_check_interval=2, **QUIET).fit(module, datamodule=data)
    fitted(model_dir, data_dir, scope)
    assert same_tensors(tuned(last_checkpoint(0)), tuned(last_checkpoint(1)))
    assert summary(0)["layer_reason"] == summary(1)["layer_reason"]
    assert (run_dir(0) / "zo_log").exists() == (run_dir(1) / "zo_log").exists()


def fail(*_, **__):
    raise SlzoError("out of luck")


def test_modes_of_torch_in_which_scores_or_weights_would_be_wrong_are_refused(model_dir, data_dir, monkeypatch):
    module, trainer = ZOModule(str(model_dir), 2), ZOTrainer(**QUIET)
    with torch.inference_mode(), pytest.raises(SlzoError, match=r"^fit: torch.inference_mode is on"):
        trainer.fit(module, datamodule=rows(data_dir))
    with torch.autocast("cpu"), pytest.raises(SlzoError, match=r"^torch.autocast: is on, .* as model.dtype"):
        trainer.test(module, datamodule=rows(data_dir))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    with pytest.raises(SlzoError, match=r"^torch.set_default_dtype: is torch.bfloat16, .* back to torch.float32"):
        trainer.test(module, datamodule=rows(data_dir))


def test_ctrl_c_works_again_after_one_that_ended_the_preparation(model_dir, data_dir, monkeypatch, listening):
    monkeypatch.setattr("slzo.module.prepare", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):  # of Lightning, which then ignores Ctrl-C
        ZOTrainer(**QUIET).fit(ZOModule(str(model_dir), 2), datamodule=rows(data_dir))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_rows_are_printed_before_and_after_they_are_read(data_dir, model_dir):
    data = rows(data_dir, tokenizer=str(model_dir))
    assert str(data) == "TaskDataModule of task sst2"
    data.setup("fit")
    assert str(data) == "TaskDataModule of task sst2"


@pytest.mark.parametrize(("name", "value"), [("max_steps", 8.0), ("max_steps", None), ("max_epochs", 2.0)])
def test_a_number_of_steps_or_epochs_is_a_whole_one(name, value):
    with pytest.raises(SlzoError, match=rf"^trainer.{name} {value}: is a {type(value).__name__}; give a whole number"):
        ZOTrainer(**{name: value})


def test_the_layer_of_a_checkpoint_is_not_replaced(model_dir, data_dir, once):
    once(fitted, model_dir, data_dir)
    module = ZOModule.load_from_checkpoint(last_checkpoint(), layer=1)
    with pytest.raises(SlzoError, match=r"model\.layer 1: the checkpoint tunes layer 2"):
        ZOTrainer(max_steps=1, **QUIET).fit(module, datamodule=rows(data_dir))


def test_a_resumed_optimizer_keeps_its_options_and_says_so(model_dir, data_dir, capsys):
    def fit(steps, schedule, **options):
        module = ZOModule(
            str(model_dir), 2, seed=0, optimizer=partial(torch.optim.AdamW, lr=1e-3, **options), lr_scheduler=schedule
        )
        trainer = ZOTrainer(max_steps=steps, val_check_interval=2, **QUIET)
        trainer.fit(module, datamodule=rows(data_dir), ckpt_path="last" if steps > 2 else None)
        return trainer

    cosine, once = torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.OneCycleLR
    fit(2, partial(cosine, T_max=2))
    trainer = fit(4, partial(cosine, T_max=4), weight_decay=0.5)
    changes = "model.lr_scheduler.T_max: 2 -> 4; model.optimizer.weight_decay: 0.01 -> 0.5"
    assert f"these options differ from the checkpoint's: {changes}; the new" in capsys.readouterr().err
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.01
    fit(2, partial(once, max_lr=1e-3, total_steps=2))
    with pytest.raises(SlzoError, match=r"model\.lr_scheduler: .* is 2 \(the run takes 4 steps\); a resumed run keeps"):
        fit(4, partial(once, max_lr=1e-3, total_steps=4))


class StopAtStep2(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 2


def test_a_refused_resume_keeps_the_run(model_dir, data_dir):
    trainer = ZOTrainer(max_steps=4, val_check_interval=2, callbacks=[StopAtStep2()], **QUIET)
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=rows(data_dir))
    kept = last_checkpoint()
    with pytest.raises(SlzoError, match="this run and the checkpoint differ"):
        trainer.fit(ZOModule(str(model_dir), 2, LoRA(), eps=1e-3), datamodule=rows(data_dir), ckpt_path=str(kept))
    assert kept.is_file()


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_trainer_with_a_logger_of_lightning_scores_after_a_fit(logger, model_dir, data_dir):
    module, data = ZOModule(str(model_dir), 2, eps=1e-3, seed=0), rows(data_dir)
    trainer = ZOTrainer(max_steps=2, val_check_interval=2, logger=logger("own", name=""), **QUIET)
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, ckpt_path="best")
    with pytest.raises(SlzoError, match="exists; give another version"):
        ZOTrainer(max_steps=1, logger=logger("own", name="", version=0), **QUIET).fit(module, datamodule=data)


def test_a_plain_trainer_does_not_warn_of_modules_in_eval_mode(model_dir, data_dir, recwarn):
    module = ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
    Trainer(max_steps=1, logger=False, enable_checkpointing=False, **QUIET).fit(module, datamodule=rows(data_dir))
    assert not [str(each.message) for each in recwarn if "eval mode" in str(each.message)]


def test_a_checkpoint_is_tuned_further_with_its_scope(model_dir, data_dir, once):
    once(fitted, model_dir, data_dir)
    before = tuned(last_checkpoint())
    wrong = ZOModule.load_from_checkpoint(last_checkpoint(), scope=LoRA())
    with pytest.raises(SlzoError, match=r"model\.scope: this run and the checkpoint differ"):
        ZOTrainer(max_steps=1, **QUIET).fit(wrong, datamodule=rows(data_dir))
    module = ZOModule.load_from_checkpoint(last_checkpoint(), eps=1e-3)
    ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(module, datamodule=rows(data_dir))
    assert module.state_dict().keys() == before.keys()
    assert any(not tensor.equal(before[name]) for name, tensor in module.state_dict().items())


def test_a_second_data_module_gets_no_states_of_the_first(model_dir, tmp_path):
    """The cached states and the plan of the cache belong to one data module."""
    draw = random.Random(0)  # rows that share no beginnings, whose dev states are cached
    for split in ("train", "validation"):
        sentences = ["".join(draw.choices("abcdefgh", k=6 + number % 9)) for number in range(80)]
        found = [{"idx": n, "sentence": text, "label": n % 2} for n, text in enumerate(sentences)]
        write_lines(tmp_path / f"sst2/{split}.jsonl", found)
    data_dir = tmp_path

    second = {"seed": 7, "num_dev": 6}  # other rows under the same keys, in other batches

    def fit(module, steps, ckpt_path=None, **options):
        trainer = ZOTrainer(max_steps=steps, val_check_interval=1, **QUIET)
        trainer.fit(module, datamodule=rows(data_dir, **options), ckpt_path=ckpt_path)

    module, other = (ZOModule(str(model_dir), seed=0, layer=1) for _ in range(2))
    fit(module, 2)
    fit(other, 2, **second)
    found = [
        Trainer(logger=False, **QUIET).validate(each, datamodule=rows(data_dir, **second), verbose=False)
        for each in (module, ZOModule.load_from_checkpoint(last_checkpoint()))
    ]
    assert found[0] == found[1]
    fit(module, 4, last_checkpoint(1), **second)
    fit(other, 4, last_checkpoint(1), **second)
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_a_module_that_was_scored_is_tuned_further(model_dir, data_dir, once):
    """The tuned weights of a scored checkpoint are not taken for those of the base model."""
    once(fitted, model_dir, data_dir)
    module, same = (ZOModule.load_from_checkpoint(last_checkpoint(), eps=1e-3) for _ in range(2))
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET)
    trainer.test(module, datamodule=rows(data_dir), verbose=False)
    for each in (module, same):
        ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(each, datamodule=rows(data_dir))
        assert each.stepper.seed not in (0, module.options.noise_seed)  # not the directions of the first training again
    assert all(tensor.equal(same.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert module.stepper.seed == same.stepper.seed


def test_a_plain_trainer_continues_its_own_checkpoint_with_the_module_in_memory(model_dir, data_dir, capsys):
    """Also in Lightning's format, which slzo reads."""

    def fit(module, steps, path=None):
        saved = ModelCheckpoint(save_last=True)
        trainer = Trainer(max_steps=steps, logger=False, callbacks=[saved], default_root_dir=f"to{steps}", **QUIET)
        trainer.fit(module, datamodule=rows(data_dir), ckpt_path=path)
        return module, saved

    module, saved = fit(ZOModule(str(model_dir), seed=0, layer=1), 4)
    Trainer(logger=False, **QUIET).test(
        module, datamodule=rows(data_dir), ckpt_path=saved.best_model_path, verbose=False
    )
    fit(module, 6, saved.last_model_path)
    new, _ = fit(ZOModule(str(model_dir), seed=0, layer=1), 6, saved.last_model_path)
    assert all(tensor.equal(new.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert read_checkpoint(saved.last_model_path).metadata["layer"] == 1
    capsys.readouterr()
    found = newest_checkpoint("to4")
    assert (Path(found.path).name, found.step) == ("last.ckpt", 4)
    assert capsys.readouterr().err == ""  # it is not taken for a damaged one


@pytest.mark.parametrize("logger", [False, [], ()])
def test_without_a_logger_nothing_is_written(logger):
    trainer = ZOTrainer(logger=logger, **QUIET)
    assert (trainer.log_dir, trainer.loggers, trainer.checkpoint_callbacks) == (None, [], [])


@pytest.mark.parametrize("method", ["fit", "test", "validate", "predict"])
def test_modules_of_other_classes_are_refused_at_once(method, model_dir, data_dir):
    line = "model BoringModel: ZOTrainer takes a ZOModule; use lightning.Trainer for other modules"
    with pytest.raises(SlzoError, match=line):
        getattr(ZOTrainer(**QUIET), method)(BoringModel(), datamodule=rows(data_dir))
    with pytest.raises(SlzoError, match="model: needs the rows of a TaskDataModule"):
        getattr(ZOTrainer(max_steps=1, **QUIET), method)(ZOModule(str(model_dir)), datamodule=BoringDataModule())
    assert not Path("runs").exists()


class OwnRows(TaskDataModule):
    """A user's subclass."""


@pytest.mark.parametrize("method", ["fit", "test", "validate", "predict"])
def test_a_call_without_rows_says_what_to_pass(method, model_dir, data_dir):
    """Also after a call that had some, where Lightning asks for a method such as test_dataloader."""
    module, trainer = ZOModule(str(model_dir)), ZOTrainer(**QUIET)
    trainer.test(module, datamodule=rows(data_dir))
    with pytest.raises(SlzoError, match=r"^model: needs the rows of a TaskDataModule; pass datamodule=\.\.\."):
        getattr(trainer, method)(module)
    with pytest.raises(SlzoError, match=r"^datamodule 'sst2': is a str; give a TaskDataModule"):
        getattr(trainer, method)(module, datamodule="sst2")


def test_a_module_is_pickled_after_a_fit(model_dir, data_dir):
    """As when a worker process returns it."""
    module, data = ZOModule(str(model_dir), 2, eps=1e-3, seed=0), rows(data_dir)
    ZOTrainer(max_steps=1, **QUIET).fit(module, datamodule=data)
    try:
        pickle.dumps(module.model)
    except AttributeError:  # it replaces functions of the model by local classes
        pytest.skip("with this version of the package kernels, models of transformers cannot be pickled")
    copied, copied_data = pickle.loads(pickle.dumps((module, data)))
    trainer = ZOTrainer(**QUIET)
    assert trainer.test(copied, datamodule=copied_data) == trainer.test(module, datamodule=data)


def test_the_card_of_a_subclass_of_the_rows_names_the_task(model_dir, data_dir):
    own = OwnRows("sst2", data_dir=str(data_dir), num_train=16, num_dev=8, num_test=12)
    ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(ZOModule(str(model_dir), layer=1), datamodule=own)
    export_checkpoint(read_checkpoint(last_checkpoint()), "out")
    assert json.loads(Path("out/slzo.json").read_text())["task"] == "sst2"


def test_the_best_weights_reach_a_process_without_the_file(model_dir, data_dir, once):
    once(fitted, model_dir, data_dir)
    sent = []
    first = Processes(2, 0, broadcast=lambda value: sent.append(value) or value)
    expected = best_state(str(last_checkpoint()), first)
    found = best_state("elsewhere.ckpt", Processes(2, 1, broadcast=lambda _: sent.pop(0)))
    assert expected.keys() == found.keys() == read_checkpoint(last_checkpoint()).content["state_dict"].keys()
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert best_state("elsewhere.ckpt", SINGLE_PROCESS) is best_state(None, SINGLE_PROCESS) is None


def test_kernels_that_are_missing_are_not_forced_on_resume(monkeypatch):
    options = ZOModule().options
    assert options.with_onednn(True).engine.onednn
    monkeypatch.setattr("slzo.training.options.has_onednn_linear", lambda: False)
    assert options.with_onednn(True).engine.onednn is None
    assert options.with_onednn(False).engine.onednn is False


def test_runs_without_a_logger_have_their_folders_too(model_dir, data_dir):
    for _ in range(2):
        trainer = ZOTrainer(max_steps=1, val_check_interval=1, logger=False, default_root_dir="own", **QUIET)
        trainer.fit(ZOModule(str(model_dir), layer=1), datamodule=rows(data_dir))
    assert [Path(f"own/runs/version_{number}/summary.json").is_file() for number in (0, 1)] == [True, True]


def test_rates_are_known_before_the_first_step(model_dir, data_dir):
    """For callbacks such as Lightning's LearningRateMonitor."""
    rates = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = ZOTrainer(max_steps=2, val_check_interval=1, logger=False, callbacks=[Look()], **QUIET)
    trainer.fit(ZOModule(str(model_dir), layer=1), datamodule=rows(data_dir))
    assert 0 < rates[1] <= rates[0] < 1


def test_a_monitor_of_rates_sees_that_of_each_step(model_dir, data_dir):
    monitor = LearningRateMonitor()
    trainer = ZOTrainer(max_steps=3, val_check_interval=3, log_every_n_steps=1, callbacks=[monitor], **QUIET)
    halved = partial(ExponentialLR, gamma=0.5)
    module = ZOModule(str(model_dir), layer=1, optimizer=partial(SGD, lr=8e-3), lr_scheduler=halved)
    trainer.fit(module, datamodule=rows(data_dir))
    assert monitor.lrs == {"lr-SGD": [8e-3, 4e-3, 2e-3]}


def test_a_run_validates_on_schedule_after_a_checkpoint_of_a_callback_before_a_step(model_dir, data_dir):
    class Saves(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.save_checkpoint("mine.ckpt")

    for path in (None, "mine.ckpt"):
        trainer = ZOTrainer(max_steps=5, val_check_interval=2, callbacks=[Saves()], **QUIET)
        trainer.fit(ZOModule(str(model_dir), layer=1), datamodule=rows(data_dir), ckpt_path=path)
        points = json.loads((Path(trainer.log_dir) / "history.json").read_text())["points"]
        assert [point["step"] for point in points] == [2, 4, 5]


def test_an_error_after_the_training_names_the_step_of_the_last_state(model_dir, data_dir, capsys):
    class Fails(Callback):
        def on_fit_end(self, *_):
            raise RuntimeError("mine")

    trainer = ZOTrainer(max_steps=2, val_check_interval=1, callbacks=[Fails()], **QUIET)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(ZOModule(str(model_dir), layer=1), datamodule=rows(data_dir))
    assert read_checkpoint(last_checkpoint()).step == 2
    assert "Stopped at step 2; continue from step 2 with" in capsys.readouterr().out


def test_a_checkpoint_of_code_that_is_not_trusted_is_refused(model_dir, data_dir, monkeypatch, once):
    with pytest.raises(SlzoError, match=r"'nope\.ckpt'"):
        ZOModule.load_from_checkpoint("nope.ckpt")
    once(fitted, model_dir, data_dir)
    assert ZOModule.load_from_checkpoint("last").options.model == str(model_dir)
    content = read_checkpoint(last_checkpoint())
    content.metadata["trust_remote_code"] = True
    monkeypatch.setattr(slzo.module, "find_checkpoint", lambda *_: content)
    with pytest.raises(SlzoError, match="if you trust it, give trust_remote_code=True"):
        ZOModule.load_from_checkpoint(last_checkpoint())


def test_rows_take_the_tokenizer_of_the_model_unless_told_otherwise(data_dir):
    data = rows(data_dir)
    with pytest.raises(
        SlzoError, match=r"data\.tokenizer: not known before there is a model; give TaskDataModule\(tok"
    ):
        _ = data.encoder
    data.follow_model("one", trust_remote_code=True)
    data.follow_model("another")
    assert (data.tokenizer_name, data.trust_remote_code) == ("another", False)
    named = rows(data_dir, tokenizer="mine")
    named.follow_model("another")
    assert named.tokenizer_name == "mine"


def test_a_trainer_goes_on_after_a_refused_fit(model_dir, data_dir):
    trainer = ZOTrainer(max_steps=2, val_check_interval=2, **QUIET)
    with pytest.raises(SlzoError, match=r"model\.layer 9"):
        trainer.fit(ZOModule(str(model_dir), 9, eps=1e-3), datamodule=rows(data_dir))
    assert not run_dir().is_dir()
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=rows(data_dir))
    assert summary()["steps"] == 2
    assert [*run_dir().glob("events.*")]


def fit(data_dir, model_dir, **options):
    """A short training; the trainer and the rows."""
    trainer = ZOTrainer(**{"max_steps": 2, "val_check_interval": 1, **QUIET, **options})
    data = rows(data_dir)
    trainer.fit(ZOModule(str(model_dir), 2, estimator=SPSA(), optimizer=torch.optim.SGD, eps=1e-3), datamodule=data)
    return trainer, data


def test_strategies_see_the_masters_alone(model_dir, data_dir):
    """DDP sends the buffers of its module in each step, and a subspace has large ones."""
    module = ZOModule(str(model_dir), 2, scope=ActivationSubspace(rank=2), seed=0)
    ZOTrainer(max_steps=1, val_check_interval=1, **QUIET).fit(module, datamodule=rows(data_dir))
    assert [*module.tuned_model.tensors.buffers()]
    assert not [name for name, _ in module.named_buffers() if not name.startswith("model.")]
    held = [id(each) for name, each in module.named_parameters() if not name.startswith("model.")]
    assert held == [id(master) for master in module.tuned_model.tensors.masters]


def test_the_best_checkpoint_is_not_one_of_another_callback(model_dir, data_dir):
    snapshots = ModelCheckpoint(every_n_train_steps=1, filename="snap-{step}", save_top_k=-1)
    fit(data_dir, model_dir, callbacks=[snapshots])
    best = min(summary()["validations"], key=lambda point: point["loss"])["step"]
    assert Path(summary()["best_checkpoint"]).name == f"step={best}.ckpt"
    assert Path(find_checkpoint(run_dir(), "runs").path).name == f"step={best}.ckpt"
    (run_dir() / "checkpoints/broken.ckpt").symlink_to("gone.ckpt")
    assert Path(newest_checkpoint("runs").path).name == "last.ckpt"
    with pytest.raises(SlzoError, match=r"ckpt_path 'best': no run below 'nothing' has a checkpoint"):
        newest_checkpoint("nothing", "best")


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"monitor": "val/accuracy"}, "max"),
        ({"monitor": "val/accuracy", "mode": "min"}, "min"),
        ({"monitor": "train/loss"}, "min"),
        ({}, "min"),
    ],
)
def test_the_best_value_of_a_metric_is_the_better_one(options, mode, data_dir, monkeypatch):
    monkeypatch.setattr(ModelCheckpoint, "setup", lambda *_: None)
    best = BestCheckpoint(**options)
    best.setup(SimpleNamespace(datamodule=rows(data_dir)), None, "fit")
    assert (best.mode, float(best.kth_value)) == (mode, math.inf if mode == "min" else -math.inf)
    best.kth_value = torch.tensor(0.5)
    best.setup(SimpleNamespace(datamodule=rows(data_dir)), None, "test")
    assert float(best.kth_value) == 0.5  # a later stage keeps it


def test_names_are_those_of_the_trainers_own_run(model_dir, data_dir, capsys):
    first, data = fit(data_dir, model_dir)
    with pytest.raises(SlzoError, match="make a new ZOTrainer for another model or other rows"):
        first.fit(ZOModule(str(model_dir), 1, eps=1e-3), datamodule=data)
    fit(data_dir, model_dir)
    capsys.readouterr()
    first.test(ZOModule(str(model_dir)), datamodule=data, ckpt_path="best")
    assert f"Using the best checkpoint of the newest run, {run_dir(0)}" in capsys.readouterr().out
    first.test(datamodule=data)  # Lightning scores the best checkpoint of the fitted module
    assert "untuned" not in capsys.readouterr().out
    other = ZOTrainer(**QUIET)
    other.test(ZOModule(str(model_dir)), datamodule=data, ckpt_path=run_dir(0))
    assert "untuned" not in capsys.readouterr().out


def test_the_best_checkpoint_is_found_from_another_folder(model_dir, data_dir, tmp_path, monkeypatch):
    trainer, data = fit(data_dir, model_dir)
    before = trainer.test(datamodule=data, ckpt_path="best")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trainer.test(datamodule=data, ckpt_path="best") == before


def test_epochs_replace_the_default_number_of_steps(model_dir, data_dir):
    trainer, _ = fit(data_dir, model_dir, max_steps=-1, max_epochs=1)
    assert trainer.global_step == 4
    assert ZOTrainer(max_epochs=3, **QUIET).max_steps == -1
    assert ZOTrainer(**QUIET).max_steps == 1000
    other, _ = fit(data_dir, model_dir, max_steps=50, max_epochs=1)
    assert callback_of(other, RunRecord)._outcome(other).limit == ("max_epochs", 1)


def test_the_clock_of_a_run_starts_with_the_fit(model_dir, data_dir, monkeypatch):
    trainer = ZOTrainer(max_steps=1, val_check_interval=1, **QUIET)
    record = callback_of(trainer, RunRecord)
    record._started -= 1000  # an open notebook
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3), datamodule=rows(data_dir))
    assert summary()["seconds"] < 500


def test_an_error_after_a_finished_training_asks_nobody_to_continue_it(model_dir, data_dir, capsys):
    class Fail(Callback):
        def on_test_start(self, *args):
            raise ValueError("a bug of the user")

    trainer, data = fit(data_dir, model_dir, callbacks=[Fail()])
    with pytest.raises(ValueError, match="a bug of the user"):
        trainer.test(trainer.lightning_module, datamodule=data)
    assert "continue from step" not in "".join(capsys.readouterr())


def test_a_run_that_must_go_on_saves_as_usual(model_dir, data_dir):
    saved = []

    class Stop(Callback):
        def on_train_batch_start(self, *args):
            saved.append((run_dir() / "checkpoints/last.ckpt").is_file())

        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    trainer, _ = fit(data_dir, model_dir, max_steps=8, min_steps=6, callbacks=[Stop(), LastCheckpoint(every_n_steps=1)])
    assert trainer.global_step == 6
    assert saved == [False, *[True] * 5]
    assert read_checkpoint(run_dir() / "checkpoints/last.ckpt").content["global_step"] == 6


def test_an_interval_longer_than_a_shortened_epoch_is_refused_first(model_dir, data_dir):
    options = {"check_val_every_n_epoch": 1, "val_check_interval": 2, "limit_train_batches": 1}
    with pytest.raises(SlzoError, match=r"trainer.val_check_interval 2: must be at most 1"):
        fit(data_dir, model_dir, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "LoRA"}, r"^model.scope 'LoRA': is a str; give one such as slzo.zo.scopes.LayerScope\(\)"),
        ({"estimator": SPSA}, r"^model.estimator .*: is a \w+; give one such as"),
        ({"layer": "3"}, r"^model.layer '3': is a str; give a whole number, or None for the dominant layer"),
        ({"eps": "0.1"}, r"^model.eps '0.1': is a str; give a number, or auto"),
        ({"layer": True}, r"^model.layer True: is a bool; give a whole number"),
        ({"num_queries": 2.5}, r"^model.num_queries 2.5: is a float; give a whole number"),
        ({"seed": "a"}, r"^model.seed 'a': is a str; give a whole number"),
        (
            {"engine": {"cache_gb": 1}},
            r"^model.engine {'cache_gb': 1}: is a dict; give one such as slzo.models.engine.Engine",
        ),
        (
            {"optimizer": "Adam"},
            r"^model.optimizer 'Adam': is a str; give a class of torch.optim, or functools.partial",
        ),
        ({"device_map": 3}, r"^model.device_map 3: is a int; give a name such as"),
        ({"parallel": True}, r"^model.parallel True: is a bool; give rows, directions"),
        ({"lr_scheduler": 3}, r"^model.lr_scheduler 3: is a int; give functools.partial of a class"),
        ({"trust_remote_code": "no"}, r"^model.trust_remote_code 'no': is a str; give true or false"),
        ({"quantization": 8}, r"^model.quantization 8: is a int; give a name such as"),
        ({"dtype": "bf16"}, r"^model.dtype 'bf16': choose one of float32, bfloat16, float16"),
        (
            {"model": torch.nn.Identity()},
            r"^model.model Identity\(\): is a Identity; .*; for a loaded model call ZOModule.from_",
        ),
    ],
)
def test_an_option_of_another_kind_is_named(options, message):
    with pytest.raises(SlzoError, match=message):
        ZOModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 1.5}, "data.num_train 1.5: is a float; give a whole number"),
        ({"batch_size": "4"}, "data.batch_size '4': is a str; give a whole number"),
        ({"num_train": 0}, "data.num_train 0: must be at least 1"),
        ({"skip_bad_rows": "no"}, "data.skip_bad_rows 'no': is a str; give true or false"),
        ({"tokenizer": 3}, "data.tokenizer 3: is a int; give the name or the folder of its model"),
        (
            {"task": [{"text": "good"}]},
            "data.task [{'text': 'good'}]: is a list; give a name such as \"sst2\", or a task such as "
            "slzo.tasks.TemplateTask(...)",
        ),
    ],
)
def test_an_option_of_the_rows_of_another_kind_is_named(options, message):
    with pytest.raises(SlzoError) as error:
        TaskDataModule(**{"task": "sst2", **options})
    assert str(error.value) == message


def whole_numbers():
    """The arguments of classes of slzo that are whole numbers."""
    for cls in (*SCOPES, *ESTIMATORS, *RULES, *OBJECTIVES, *DEFAULTS.values(), TemplateTask, ChatTask):
        for name, kind in get_type_hints(cls.__init__).items():
            if int in (kind, *(get_args(kind) if isinstance(kind, UnionType) else ())):
                yield pytest.param(cls, name, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize(("cls", "name"), list(whole_numbers()))
@pytest.mark.parametrize("value", [20.5, "20", True])
def test_an_argument_of_another_kind_is_named(cls, name, value):
    needed = {Reward: {"functions": "accuracy"}, TemplateTask: {"prompt": "{q}"}}
    with pytest.raises(SlzoError, match=rf"\.{name} {value!r}: is a {type(value).__name__}; give a whole number$"):
        cls(**needed.get(cls, {}), **{name: value})


def test_a_path_and_a_type_of_torch_are_taken(model_dir):
    assert ZOModule(model_dir, dtype=torch.bfloat16).options.dtype == "bfloat16"
    assert ZOModule(model_dir).options.model == str(model_dir)


def test_half_precision_of_lightning_is_refused_in_its_own_trainer(model_dir, data_dir):
    trainer = Trainer(max_steps=1, precision="bf16-true", logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(SlzoError, match=r"^trainer.precision 'bf16-true': .* set model.dtype to bfloat16"):
        trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3), datamodule=rows(data_dir))


@pytest.mark.parametrize("callback", [LossGuard, StepWatch, RunRecord, OutlierProfiler, AnswerLog])
def test_a_callback_refuses_another_module(callback):
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback()], **QUIET)
    with pytest.raises(SlzoError, match=r"^trainer.callbacks: those of slzo need a ZOModule, not a BoringModel; leave"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize(
    ("option", "value"), [("callbacks", [3]), ("callbacks", Trainer), ("logger", "csv"), ("logger", [None])]
)
def test_callbacks_and_loggers_of_another_class_are_refused_at_once(option, value):
    with pytest.raises(
        SlzoError, match=rf"^trainer\.{option} .*: is not a (Callback|Logger) of lightning\.pytorch; give one"
    ):
        ZOTrainer(**{option: value})


def test_nothing_is_saved_before_a_training(model_dir, data_dir):
    trainer = ZOTrainer(**QUIET)
    trainer.test(ZOModule(str(model_dir)), datamodule=rows(data_dir))
    with pytest.raises(SlzoError, match=r"^model: nothing was trained; call trainer.fit first"):
        trainer.save_checkpoint("x.ckpt")


def test_only_options_that_matter_are_compared_on_resume():
    saved = {
        "model.layer": 28,
        "model.optimizer.fused": True,
        "model.optimizer.lr": 1e-3,
        "model.lr_scheduler._step_count": 1,
    }
    own = {
        "model.layer": None,
        "model.optimizer.fused": None,
        "model.optimizer.lr": 1e-4,
        "model.lr_scheduler._step_count": 2,
    }
    assert changed_settings(saved, own) == "model.optimizer.lr: 0.001 -> 0.0001"
    assert changed_settings(saved, own | {"model.layer": 27}).startswith("model.layer: 28 -> 27")
    assert (
        changed_settings(saved | {"model.layer": None}, own | {"model.layer": 28})
        == "model.optimizer.lr: 0.001 -> 0.0001"
    )


class Ends(Callback):
    """Ends the training after a step, and keeps what callbacks and loggers can read."""

    def __init__(self, step):
        self.step, self.seen = step, {}

    def on_train_batch_end(self, trainer, *_):
        self.seen[trainer.global_step] = trainer.callback_metrics.get("train/evaluations")
        trainer.should_stop = trainer.global_step == self.step

    def on_validation_start(self, trainer, _):
        self.at_validation = trainer.callback_metrics["train/evaluations"]


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_epochs": 1}], ids=str)
def test_the_norm_of_an_update_can_be_watched(limit, model_dir, data_dir):
    """Before validations and after the last step, also at steps that are not logged."""
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = "train/update_norm" in trainer.callback_metrics

    stop = EarlyStopping("train/update_norm", patience=9)
    trainer = ZOTrainer(**limit, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[stop, Watch()], **QUIET)
    trainer.fit(ZOModule(str(model_dir), 2, eps=1e-3, seed=0), datamodule=rows(data_dir, num_train=12))
    assert seen == {1: False, 2: True, 3: True}


@pytest.mark.parametrize("end", [pytest.param(3, marks=pytest.mark.slow), 4, 9])
def test_a_step_logs_all_its_values_where_they_are_read(end, model_dir, data_dir):
    """Every third step, before validations, and at the last step, whatever ends the training."""
    ends = Ends(end)
    trainer = ZOTrainer(
        max_steps=9, val_check_interval=5, log_every_n_steps=3, logger=CSVLogger("own"), callbacks=[ends], **QUIET
    )
    module = ZOModule(str(model_dir), 2, eps=1e-3, seed=0)
    trainer.fit(module, datamodule=rows(data_dir))
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/evaluations"]]
    assert logged == sorted({*range(2, end, 3), end - 1})
    assert ends.at_validation == module.stepper.num_evaluations
