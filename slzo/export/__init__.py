"""Exported models: each format is one file, registered in :mod:`slzo.export.write`."""
