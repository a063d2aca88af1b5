"""How Lightning starts the processes of a trainer; the class of a launcher that copies this process has no public name."""


def copies_process(launcher: object) -> bool:
    """Return whether the launcher of a strategy forks or spawns copies of this process."""
    return any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__)
