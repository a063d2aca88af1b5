"""The tasks by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from slzo.errors import SlzoError
from slzo.tasks.base import Task
from slzo.tasks.boolq import BoolQ
from slzo.tasks.cb import Cb
from slzo.tasks.copa import Copa
from slzo.tasks.drop import Drop
from slzo.tasks.movie_reviews import MovieReviews
from slzo.tasks.multirc import MultiRc
from slzo.tasks.record import Record
from slzo.tasks.rte import Rte
from slzo.tasks.squad import Squad
from slzo.tasks.sst2 import Sst2
from slzo.tasks.wic import Wic
from slzo.tasks.wsc import Wsc

_ALL = (BoolQ, Cb, Copa, Drop, MovieReviews, MultiRc, Record, Rte, Squad, Sst2, Wic, Wsc)
TASKS: Mapping[str, type[Task]] = MappingProxyType({task.name: task for task in _ALL})


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        SlzoError: There is none.
    """
    if name in TASKS:
        return TASKS[name]()
    close = difflib.get_close_matches(name.lower(), TASKS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; one on your own files is slzo.tasks.template.TemplateTask"
    raise SlzoError(f"data.task {name!r}: unknown task; choose one of {', '.join(sorted(TASKS))}{hint}")
