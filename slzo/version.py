"""The version of slzo."""

__version__ = "0.2.0"
