"""The parts of reproduce_tables.py: the table config, the runs, and the tables."""
