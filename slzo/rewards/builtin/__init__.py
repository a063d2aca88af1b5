"""Built-in rewards, one file each; :mod:`slzo.rewards.registry` lists them."""
