"""Fine-tune a language model with forward passes only, by tuning its one dominant decoder layer."""

__version__ = "0.2.0"
