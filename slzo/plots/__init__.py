"""Draw profiles, runs and sweeps from plain numbers, without torch, a display or matplotlib's global state."""
