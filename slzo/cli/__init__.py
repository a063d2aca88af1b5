"""The command line: from words and YAML to the objects of a command.

``run.py`` finds the command and its configs. ``app.py`` parses the options of commands that take trainer, model and data, and
``parser.py`` those of the others. An error of a parser becomes one line in ``diagnose.py``, which checks each given option
against the types in ``option_types.py``; errors of YAML files come from ``config_files.py``, and errors of classes' own checks
through ``constructors.py``.
"""
