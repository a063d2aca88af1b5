"""The tasks, one file each; see :mod:`slzo.tasks.base` for the contract."""
