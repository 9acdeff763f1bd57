"""The trainer process: GRPO on the batches of a rollout server, and the way of new weights to the engines."""
