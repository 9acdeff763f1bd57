"""Logprobs of sampled tokens under the policy, on packed sequences, without ever holding all logits.

Shapes: T tokens of a packed micro batch in segments, M trained tokens, C tokens of a chunk, K candidates of a token, H
hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.policy import attention
from trainer.policy.vocabulary_scores import vocabulary_scores

KEPT_LOGITS_BYTES = 2**29
"""Logits of a micro batch that may stay in memory until its backward pass, counted as float32; more are computed again."""


class TokenScores(NamedTuple):
    """What the policy makes of the trained tokens. A tuple: DeepSpeed looks for tensors in nothing of our own."""

    logprobs_M: Tensor
    """[M] float32, nats."""
    entropies_M: Tensor
    """[M] float32, nats."""

    @property
    def candidate_logprobs_MK(self) -> None:  # noqa: N802 (a tensor of CandidateScores)
        """No candidates were asked for."""
        return None


class CandidateScores(NamedTuple):
    """TokenScores where candidates were asked for."""

    logprobs_M: Tensor
    entropies_M: Tensor
    candidate_logprobs_MK: Tensor
    """[M, K] float32, nats."""


class PackedPolicy(nn.Module):
    """A causal language model whose forward pass returns logprobs of chosen tokens instead of logits.

    Wrap this module (DDP, DeepSpeed), not the model inside: gradients synchronise only through the wrapper's forward.

    Args:
        lm: a Hugging Face causal language model.
        chunk_size: trained tokens whose logits are alive at once, C.
    """

    def __init__(self, lm: Any, *, chunk_size: int) -> None:
        super().__init__()
        attention.prepare(lm)
        self.lm = lm
        self.chunk_size = chunk_size

    @property
    def shares_prompts(self) -> bool:
        """Whether several completions may follow one prompt."""
        return self.lm.config._attn_implementation in attention.SHARES_PROMPTS

    @property
    def config(self) -> Any:
        """The model's configuration; transformers and accelerate look for it here."""
        return self.lm.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass."""
        self.lm.gradient_checkpointing_enable(**kwargs)

    def forward(
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
    ) -> TokenScores | CandidateScores:
        """Logprobs and entropies at the sampling temperature.

        Args:
            input_ids_1T: [1, T] segments end to end.
            position_ids_1T: [1, T] place in the sequence. Without an attention mask, transformers takes each restart at
                0 for a boundary that attention does not cross.
            segments_1T, prefixes_1T: see attention.packed_mask.
            target_positions_M: [M] positions in T whose next token is scored.
            target_ids_M: [M] those next tokens.
            temperatures_M: [M] logits are divided by this.
            candidate_ids_MK: [M, K] other tokens to score in the same places.
            entropy_grad: let gradients flow through the entropies; they carry none otherwise.
        """
        hidden_MH = hidden_at(self.lm, input_ids_1T, position_ids_1T, segments_1T, prefixes_1T, target_positions_M)
        ids_MJ = target_ids_M[:, None]
        if candidate_ids_MK is not None:
            ids_MJ = torch.cat([ids_MJ, candidate_ids_MK], dim=1)
        chunks = zip(*(torch.split(t, self.chunk_size) for t in (hidden_MH, ids_MJ, temperatures_M)), strict=True)
        keeps_logits = 4 * len(hidden_MH) * self.config.get_text_config().vocab_size <= KEPT_LOGITS_BYTES
        parts = [
            self._score(hidden, ids, temperatures, entropy_grad, keeps_logits=keeps_logits)
            for hidden, ids, temperatures in chunks
        ]
        logprobs_MJ, entropies_M = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if candidate_ids_MK is None:
            return TokenScores(logprobs_MJ[:, 0], entropies_M)
        return CandidateScores(logprobs_MJ[:, 0], entropies_M, logprobs_MJ[:, 1:])

    def _score(
        self, hidden_CH: Tensor, ids_CJ: Tensor, temperatures_C: Tensor, entropy_grad: bool, *, keeps_logits: bool
    ) -> tuple[Tensor, Tensor]:
        if keeps_logits or not torch.is_grad_enabled():
            return self._score_chunk(hidden_CH, ids_CJ, temperatures_C, entropy_grad)
        result = checkpoint(self._score_chunk, hidden_CH, ids_CJ, temperatures_C, entropy_grad, use_reentrant=False)
        return cast("tuple[Tensor, Tensor]", result)

    def _score_chunk(
        self, hidden_CH: Tensor, ids_CJ: Tensor, temperatures_C: Tensor, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        logits_CV = self.lm.get_output_embeddings()(hidden_CH)
        return vocabulary_scores(logits_CV, ids_CJ, temperatures_C, entropy_grad=entropy_grad)


def hidden_at(
    lm: Any, ids_1T: Tensor, positions_1T: Tensor, segments_1T: Tensor, prefixes_1T: Tensor, target_positions_M: Tensor
) -> Tensor:
    """[M, H] last hidden states of a packed pass, in the places that predict the targets. See PackedPolicy.forward."""
    hidden_1TH = lm.base_model(
        input_ids=ids_1T,
        position_ids=positions_1T,
        attention_mask=attention.packed_mask(lm, segments_1T, prefixes_1T),
        use_cache=False,
    ).last_hidden_state
    # A model that is spread over devices ends on its last one.
    return cast("Tensor", hidden_1TH[0, target_positions_M.to(hidden_1TH.device)])
