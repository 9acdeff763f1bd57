"""The policy loss in parts, all pure: objectives, off-policy corrections, distance to a reference, distillation, aggregation.

Shapes throughout: M trained tokens of a micro batch, S sequences in it, N sequences of the batch, K candidates of a position.
All logprobs are in nats and at the sampling temperature.
"""
