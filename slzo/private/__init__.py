"""The private names of other libraries that slzo needs, each with its reason; tests/test_private.py fails when one changes."""
