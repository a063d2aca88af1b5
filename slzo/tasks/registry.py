"""Registry of tasks by name."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from slzo.tasks.base import Task
from slzo.tasks.boolq import BoolQ
from slzo.tasks.cb import Cb
from slzo.tasks.chat import ChatTask
from slzo.tasks.copa import Copa
from slzo.tasks.drop import Drop
from slzo.tasks.movie_reviews import MovieReviews
from slzo.tasks.multirc import MultiRc
from slzo.tasks.record import Record
from slzo.tasks.rte import Rte
from slzo.tasks.squad import Squad
from slzo.tasks.sst2 import Sst2
from slzo.tasks.template import TemplateTask
from slzo.tasks.wic import Wic
from slzo.tasks.wsc import Wsc
from slzo.utils.class_paths import import_failure, required_arguments
from slzo.utils.errors import SlzoError, did_you_mean

_ALL = (BoolQ, Cb, Copa, Drop, MovieReviews, MultiRc, Record, Rte, Squad, Sst2, Wic, Wsc)
TASKS: Mapping[str, type[Task]] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """Return the task with a name or class path, made without options.

    Raises:
        SlzoError: There is no such task, or it needs options.
    """
    if name in TASKS:
        return TASKS[name]()
    if name == ChatTask.__name__:  # the command line passes a class without options as its name
        return ChatTask()
    if name == TemplateTask.__name__:
        raise SlzoError(
            "data.task TemplateTask: needs data.task.prompt; slzo fit --data.task.help TemplateTask lists its options"
        )
    if "." in name:
        return _task_at(name)
    own = f"for your own files use {TemplateTask.__name__} or {ChatTask.__name__}"
    hint = did_you_mean(name.lower(), TASKS, own)
    raise SlzoError(f"data.task {name!r}: unknown task; choose one of {', '.join(sorted(TASKS))}; {hint}")


def task_to_predict(task: Task) -> str | dict[str, Any] | None:
    """Return a task as the option ``data.task`` takes it for rows to predict; ``None`` for a class of the user."""
    kind = type(task)
    if type(task) is TemplateTask or type(task) is ChatTask:
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": task.options_to_predict()}
    return task.name if TASKS.get(task.name) is kind else None


def _task_at(path: str) -> Task:
    if reason := import_failure(path):
        raise SlzoError(f"data.task {path!r}: {reason}")
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if not inspect.isclass(cls) or not issubclass(cls, Task) or inspect.isabstract(cls):
        raise SlzoError(f"data.task {path!r}: not a task; give a subclass of slzo.tasks.base.Task that defines example")
    if needed := required_arguments(cls):
        raise SlzoError(
            f"data.task {path!r}: needs data.task.{needed[0]}; give it as data.task.init_args or --data.task.{needed[0]}"
        )
    return cls()
