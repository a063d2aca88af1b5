"""Settings of the process for commands that run a model."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jsonargparse import set_dumper

from slzo.cli.auto_values import as_yaml
from slzo.utils.console import is_first_process
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.runtime import bound_kernel_caches, keep_freed_memory

_IRRELEVANT_WARNINGS = (
    ".*every_n_train_steps.*",  # written for automatic optimization; manual optimization counts the same steps here
    ".*args parameter is intended to run from within Python.*",  # main([...]) does this on purpose
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.13
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*is smaller than the logging interval.*",  # steps are counted over epochs, and their losses are printed
    ".*It is recommended to use .*sync_dist=True.*",  # the metrics are those of all processes
)


def prepare_process() -> None:
    """Set up memory allocation and the form of configs, and silence advice that does not apply to forward-only training."""
    set_dumper("yaml", as_yaml)  # also for the arguments of classes, which jsonargparse dumps and reads again
    threading.excepthook = _report_thread_error
    keep_freed_memory()
    bound_kernel_caches()
    for message in _IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        # an advertisement, and a message that the summary repeats
        lambda record: not re.search("litlogger|stopped: `max_(steps|epochs)", record.getMessage())
    )
    transformers.utils.logging.disable_progress_bar()
    if not (sys.stderr.isatty() and is_first_process()):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported


@contextmanager
def memory_errors() -> Iterator[None]:
    """Convert an error of too little memory to one that names the options which need less.

    Raises:
        SlzoError: Instead of a MemoryError or a torch.OutOfMemoryError.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = ". ".join(one_line(error, None).split(". ")[:2])  # the rest is advice on PyTorch's allocator
        raise SlzoError(
            f"out of memory ({reason}): slzo plan with the options of a run estimates what it takes; data.tokens_per_pass and "
            "data.eval_batch_tokens run batches in parts, model.dtype bfloat16 and model.quantization need less for the model"
        ) from error


def _report_thread_error(args: Any) -> None:
    """Report the error that ended a thread, except an OSError, which TensorBoard's thread passes to the main one."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
