"""Loads the fixtures where tests run."""


def pytest_configure(config):
    """Import ``shared_fixtures.py``, except in the process that only hands out tests: it need not wait for PyTorch."""
    if not config.getoption("numprocesses", 0) or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")
