"""The trainer's options: their layers, names, checks, and the file that keeps what a run was given."""
