"""Finds the dominant layer before training, by forward passes only."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from slzo.callbacks.logged_pictures import log_picture
from slzo.callbacks.profile_notes import MIN_SEQUENCES, bos_note, sequence_notes, too_alike
from slzo.callbacks.profile_report import format_profile
from slzo.console import say
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.experiments.checked_choice import checked_choice
from slzo.experiments.race import RaceResult, race
from slzo.experiments.trial import Workbench
from slzo.files import write_json
from slzo.models.placement import to_device
from slzo.models.prefix_cache import PrefixCache
from slzo.module import ZOModule
from slzo.pictures.profile import profile_picture
from slzo.pictures.style import save
from slzo.pictures.sweep import sweep_curves_picture
from slzo.tasks.base import Example
from slzo.zo.profile import LayerStatistics, OutlierProfile, profile_layers, usable_sequences
from slzo.zo.selection import Auto, Choice, Race, SelectionRule

PROFILE_FILE = "outlier_profile.json"
_PICTURE = "outlier_profile"
_RACE = "race"


class OutlierProfiler(Callback):
    """Measures activation outliers of every decoder layer and lets a rule choose the layer to tune.

    Says how clear the choice is, in standard errors over the sequences, and what was wrong with the prompts.

    When model.layer is set the profile is only made for the picture, and when model.scope needs no layer there is none. A resumed
    run takes layer and profile from its checkpoint.

    Args:
        rule: Auto (LargestFall, in doubt a Race; when left out), LargestFall, FirstOutlierLayer (the paper's), MaxRatioJump,
            Race (short trainings), FixedLayer, or your own SelectionRule.
        num_sequences: Prompts to average over, at least 10; if fewer are there, those. Prompts of one token are left out.
        batch_size: Prompts per forward pass.
        text_file: Take sequences from this file, one a line, instead of the task's prompts.
    """

    def __init__(
        self,
        rule: SelectionRule | None = None,
        num_sequences: int = 16,
        batch_size: int = 16,
        text_file: str | None = None,
    ) -> None:
        if num_sequences < MIN_SEQUENCES:
            raise SlzoError(
                f"profiler.num_sequences {num_sequences}: single sequences mislead, average over at least {MIN_SEQUENCES}"
            )
        if batch_size < 1:
            raise SlzoError(f"profiler.batch_size {batch_size}: must be at least 1")
        if text_file is not None and not Path(text_file).is_file():
            found = "is a folder" if Path(text_file).is_dir() else "no such file"
            raise SlzoError(f"profiler.text_file {text_file!r}: {found}; give a text file with one sequence a line")
        self.rule = rule if rule is not None else Auto()
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.text_file = text_file
        self.profile: OutlierProfile | None = None
        self._race: RaceResult | None = None
        self._states: PrefixCache | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the layer; if it is set, profile for the picture."""
        if stage != "fit" or not isinstance(pl_module, ZOModule):
            return
        self._race = self._states = None  # of other rows, maybe
        if pl_module.resumed or not pl_module.scope.needs_layer:
            return
        if pl_module.layer is None:
            profile = self.run(trainer, pl_module)
            pl_module.choose_layer(profile.dominant_layer, profile.rule)
        elif not getattr(trainer, "fast_dev_run", False):
            self._beside(trainer, pl_module, Choice(pl_module.layer, pl_module.layer_origin))

    def run(self, trainer: Trainer, module: ZOModule) -> OutlierProfile:
        """Profile, show and save.

        Raises:
            SlzoError: The rule finds no layer, or there are too few sequences.
        """
        profile = self._shown(trainer, module, partial(self._choose, trainer, module))
        if profile.dominant_layer < 0:
            raise SlzoError(profile.rule)
        self._save(trainer, module)
        return profile

    def _beside(self, trainer: Trainer, module: ZOModule, set_layer: Choice) -> None:
        """Profile for the picture; what is in the way of that is no reason to stop."""
        module.load(module.datamodule)
        if not 0 <= set_layer.layer < module.parts.num_layers:  # whoever tunes it says so
            return
        try:
            self.profile = self._measured(trainer, module, lambda layers: set_layer)
        except SlzoError as error:
            say(f"No outlier profile: {error}")
            return
        self._save(trainer, module)

    def measure(self, trainer: Trainer, module: ZOModule) -> OutlierProfile:
        """Profile and show; the rule has the statistics only, unless it is a race.

        Returns:
            The profile; where the rule finds no layer, that is -1 and ``rule`` says why.

        Raises:
            SlzoError: There are too few sequences, or the output of a layer is not finite.
        """
        return self._shown(trainer, module, partial(self._choose, trainer, module, checked=False))

    def _shown(
        self, trainer: Trainer, module: ZOModule, choose: Callable[[list[LayerStatistics]], Choice]
    ) -> OutlierProfile:
        self.profile = self._measured(trainer, module, choose)
        say(format_profile(self.profile))
        return self.profile

    def _measured(
        self, trainer: Trainer, module: ZOModule, choose: Callable[[list[LayerStatistics]], Choice]
    ) -> OutlierProfile:
        datamodule = module.datamodule
        module.load(datamodule)
        device = trainer.strategy.root_device
        to_device(module.model, device)
        batches = [batch.to(device) for batch in self._batches(datamodule)]
        given, sequences = sum(batch.num_examples for batch in batches), usable_sequences(batches)
        if len(sequences) < MIN_SEQUENCES:
            longer = " of two tokens or more" if len(sequences) < given else ""
            raise SlzoError(
                f"profiler: only {len(sequences)} sequences{longer} to profile, at least {MIN_SEQUENCES} are needed; use more "
                "rows, or give text with --profiler.text_file"
            )
        layers, passes = profile_layers(module.parts, batches)
        tokenizer = datamodule.encoder.tokenizer
        layers = [replace(layer, token=str(tokenizer.decode([layer.token_id]))) for layer in layers]
        if too_alike(sequences):
            layers = [replace(layer, max_abs_se=None, ratio_se=None) for layer in layers]
        choice = choose(layers)
        notes = sequence_notes(self.num_sequences, given, sequences)
        of_bos = None if choice.layer < 0 else bos_note(layers[choice.layer], tokenizer.bos_token_id)
        notes += [note for note in (choice.note, of_bos) if note]
        profile = OutlierProfile(
            choice.layer,
            choice.reason,
            len(sequences),
            passes,
            tuple(layers),
            choice.title,
            notes=tuple(notes),
            thresholds=choice.thresholds,
        )
        if choice.margin is not None and math.isfinite(choice.margin.errors):
            profile = replace(profile, margin=choice.margin.errors, margin_reason=choice.margin.words)
        # every process must tune the same layer, whatever rounding did on its device
        return OutlierProfile.from_dict(trainer.strategy.broadcast(profile.to_dict()))

    def _choose(
        self, trainer: Trainer, module: ZOModule, layers: list[LayerStatistics], checked: bool = True
    ) -> Choice:
        """The rule's choice; layer -1 and why where it finds none, since the figures help to choose thresholds."""
        rule = self.rule
        checks = checked and trainer.world_size == 1 and not getattr(trainer, "fast_dev_run", False)
        try:
            if isinstance(rule, Race):
                return self._raced(trainer, race(self._bench(trainer, module), rule, layers, _steps(trainer, module)))
            if isinstance(rule, Auto) and checks and module.scope.needs_layer:
                bench = self._bench(trainer, module)
                return self._raced(trainer, checked_choice(bench, rule, layers, _steps(trainer, module)))
            return rule.select(layers)
        except SlzoError as error:
            return Choice(-1, str(error))

    def _raced(self, trainer: Trainer, result: RaceResult) -> Choice:
        self._race = replace(result, states=None)
        self._states = result.states if trainer.state.fn == TrainerFn.FITTING else None
        return result.choice

    def _bench(self, trainer: Trainer, module: ZOModule) -> Workbench:
        if trainer.world_size > 1:
            raise SlzoError(
                f"trainer.devices {trainer.world_size}: a race runs in one process; find the layer with slzo profile on one "
                "device, and set model.layer"
            )
        module.check_training(module.datamodule)
        return Workbench(module, module.datamodule)

    def _batches(self, datamodule: TaskDataModule) -> list[Any]:
        if self.text_file is None:
            return datamodule.profile_batches(self.num_sequences, self.batch_size)
        try:
            text = Path(self.text_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SlzoError(
                f"profiler.text_file {self.text_file!r}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        lines = [line for line in text.splitlines() if line.strip()]
        examples = [Example(str(i), line, ()) for i, line in enumerate(lines[: self.num_sequences])]
        return datamodule.prompt_batches(examples, self.batch_size)

    def _save(self, trainer: Trainer, module: ZOModule) -> None:
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if (
            log_dir is None
            or not trainer.is_global_zero
            or getattr(trainer, "fast_dev_run", False)
            or self.profile is None
        ):
            return
        folder, model = Path(log_dir), module.model_name.rstrip("/").rpartition("/")[2]
        write_json(folder / PROFILE_FILE, self.profile.to_dict())
        save(profile_picture(self.profile.to_dict(), model, module.datamodule.task.name), folder, _PICTURE)
        if self._race is not None and self._race.trials:
            curves = {layer: [asdict(score) for score in trial.scores] for layer, trial in self._race.trials.items()}
            title = f"{model} on {module.datamodule.task.name}: race of the layers"
            write_json(folder / f"{_RACE}.json", self._race.to_dict())
            save(sweep_curves_picture(curves, title, self._race.choice.layer), folder, _RACE)
        log_picture(trainer, _PICTURE, folder / f"{_PICTURE}.png")

    def state_dict(self) -> dict[str, Any]:
        """The profile, kept in checkpoints."""
        return {"profile": None if self.profile is None else self.profile.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the profile from a checkpoint."""
        if state_dict["profile"] is not None:
            self.profile = OutlierProfile.from_dict(state_dict["profile"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has a folder of its own and gets the profile too; a raced layer goes on with the race's states."""
        if not isinstance(pl_module, ZOModule):
            return
        if pl_module.resumed:
            self._save(trainer, pl_module)
        if self._states is not None and pl_module.tuned_model is not None:
            pl_module.tuned_model.forward.cache.take_over(self._states)
        self._states = None


def _steps(trainer: Trainer, module: ZOModule) -> int:
    """Of the training to come, as far as they are known before it: of one epoch where no limit is set."""
    data, limit = module.datamodule, trainer.limit_train_batches
    batches = math.ceil(len(data.rows("train")) / data.batch_size)
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs is not None or not limits:
        limits.append(batches * (epochs or 1))
    return min(limits)
