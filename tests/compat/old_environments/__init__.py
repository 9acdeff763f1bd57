"""Environments as users of Atropos 0.4.0 write them, one a style; each is a script of its own, and none knows of tickets or columns."""
