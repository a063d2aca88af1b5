"""The commands of slzo: one file each, with a function of the command's name."""
