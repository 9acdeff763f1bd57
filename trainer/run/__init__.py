"""A run at its rollout server and its inference servers."""
