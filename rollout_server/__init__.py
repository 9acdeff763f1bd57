"""The rollout server: keeps groups, forms batches, bounds staleness."""
