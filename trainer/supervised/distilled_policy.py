"""A student whose forward pass also says how far it is from a teacher, without ever holding all logits of either.

Shapes: T tokens of a pass, M learnt tokens, C tokens of a chunk, H hidden size (each model's own), V vocabulary of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.losses.distillation import generalised_jsd, jsd_scale
from trainer.policy.logprobs import CandidateScores, PackedPolicy, TokenScores, hidden_at


class DistilledScores(NamedTuple):
    """What the student makes of the learnt tokens. A tuple: DeepSpeed looks for tensors in nothing of our own."""

    logprobs_M: Tensor
    """[M] float32, nats, at temperature 1."""
    divergences_M: Tensor
    """[M] float32, nats, at the loss's temperature; carries the gradient."""
    cross_entropies_M: Tensor
    """[M] float32, nats: -sum over the vocabulary of teacher's probability times student's logprob, at temperature 1."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence; see trainer.losses.distillation.generalised_jsd."""

    beta: float
    temperature: float = 1.0
    """Logits of both are divided by it."""
    is_rescaled: bool = False
    """Divided by 4 beta (1 - beta)."""

    @property
    def scale(self) -> float:
        """What the divergence is multiplied by."""
        return jsd_scale(self.beta) if self.is_rescaled else 1.0


class DistilledPolicy(PackedPolicy):
    """A PackedPolicy that, given a teacher's hidden states, returns DistilledScores.

    Args:
        lm: the student, which build_policy has checked.
        chunk_size: see PackedPolicy.
        divergence: the loss of a token.
    """

    def __init__(self, lm: Any, *, chunk_size: int, divergence: Divergence) -> None:
        super().__init__(lm, chunk_size=chunk_size)
        self.divergence = divergence
        self._teacher_head: nn.Module | None = None

    def learn_from(self, head: nn.Module) -> None:
        """Take a teacher's output layer; it is no part of this module, and not trained."""
        object.__setattr__(self, "_teacher_head", head)

    def forward(  # type: ignore[override]  # a third kind of scores, where they are asked for
        self,
        input_ids_1T: Tensor,
        position_ids_1T: Tensor,
        segments_1T: Tensor,
        prefixes_1T: Tensor,
        target_positions_M: Tensor,
        target_ids_M: Tensor,
        temperatures_M: Tensor,
        candidate_ids_MK: Tensor | None = None,
        *,
        entropy_grad: bool = False,
        teacher_hidden_MH: Tensor | None = None,
    ) -> TokenScores | CandidateScores | DistilledScores:
        """As PackedPolicy; with a teacher's hidden states, DistilledScores.

        Args:
            teacher_hidden_MH: [M, H] constant, in the places that predict the learnt tokens. The temperatures, candidates and
                entropies of PackedPolicy mean nothing then.
        """
        if teacher_hidden_MH is None:
            return super().forward(
                input_ids_1T,
                position_ids_1T,
                segments_1T,
                prefixes_1T,
                target_positions_M,
                target_ids_M,
                temperatures_M,
                candidate_ids_MK,
                entropy_grad=entropy_grad,
            )
        hidden_MH = hidden_at(self.lm, input_ids_1T, position_ids_1T, segments_1T, prefixes_1T, target_positions_M)
        columns = (hidden_MH, teacher_hidden_MH, target_ids_M)
        chunks = zip(*(torch.split(column, self.chunk_size) for column in columns), strict=True)
        parts = [self._distil(*chunk) for chunk in chunks]
        return DistilledScores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _distil(self, hidden_CH: Tensor, teacher_CH: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return self._distil_chunk(hidden_CH, teacher_CH, ids_C)
        result = checkpoint(self._distil_chunk, hidden_CH, teacher_CH, ids_C, use_reentrant=False)
        return cast("tuple[Tensor, Tensor, Tensor]", result)

    def _distil_chunk(self, hidden_CH: Tensor, teacher_CH: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self._teacher_head is not None, "learn_from comes before the first pass"
        student_CV = self.lm.get_output_embeddings()(hidden_CH).float()
        with torch.no_grad():
            # A teacher may be on a device of its own.
            teacher_CV = self._teacher_head(teacher_CH).float().to(student_CV.device)
        # Output layers are padded to round sizes; no token has the ids in which they differ.
        size = min(student_CV.shape[1], teacher_CV.shape[1])
        student_CV, teacher_CV = student_CV[:, :size], teacher_CV[:, :size]
        own_CV, other_CV = (self._at_temperature(logits_CV) for logits_CV in (student_CV, teacher_CV))
        divergences_C = generalised_jsd(own_CV, other_CV, beta=self.divergence.beta)
        with torch.no_grad():
            if self.divergence.temperature != 1.0:
                own_CV, other_CV = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
            logprobs_C = own_CV.gather(-1, ids_C[:, None])[:, 0]
            cross_entropies_C = -(other_CV.exp() * own_CV).sum(-1)
        return logprobs_C, divergences_C * self.divergence.scale, cross_entropies_C

    def _at_temperature(self, logits_CV: Tensor) -> Tensor:
        temperature = self.divergence.temperature
        return (logits_CV if temperature == 1.0 else logits_CV / temperature).log_softmax(-1)
