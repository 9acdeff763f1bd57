"""Benchmarks of the rollout server against other servers and against physical limits.

`python -m benchmarks.rollout_server --help` lists them.
"""
