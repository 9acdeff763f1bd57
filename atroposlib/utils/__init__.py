"""Helpers that environments import, at the paths that existing environments know."""
