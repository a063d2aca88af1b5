"""The tasks, one file each; see :mod:`slzo.tasks.base` for the contract."""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.chat import ChatTask
from slzo.tasks.registry import TASKS, get_task
from slzo.tasks.template import TemplateTask

__all__ = ["TASKS", "ChatTask", "Example", "HubSource", "Kind", "Task", "TemplateTask", "get_task"]
