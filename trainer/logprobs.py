"""Logprobs of sampled tokens under the policy, on packed sequences, without ever holding all logits.

Shapes: T tokens of a packed micro batch in segments, M trained tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention that takes a mask of ours. Others find sequence boundaries in the position ids, and share no prompts."""


def attention_mask(segments_1T: Tensor, prefixes_1T: Tensor) -> Tensor:
    """[1, 1, T, T] True where a token may look: back, in its own segment or in the prompt that its segment goes on from.

    Args:
        segments_1T: [1, T] which segment each token is in.
        prefixes_1T: [1, T] the segment that it goes on from; its own where there is none.
    """
    seen_11T = segments_1T[:, None, :]
    is_own = segments_1T[:, :, None] == seen_11T
    is_prompt = prefixes_1T[:, :, None] == seen_11T
    return (is_own | is_prompt).tril()[:, None]


class PackedPolicy(nn.Module):
    """A causal language model whose forward pass returns logprobs of chosen tokens instead of logits.

    Wrap this module (DDP, DeepSpeed), not the model inside: gradients synchronise only through the wrapper's forward.

    Args:
        lm: a Hugging Face causal language model.
        chunk_size: trained tokens whose logits are alive at once, C.
    """

    def __init__(self, lm: Any, *, chunk_size: int) -> None:
        super().__init__()
        self.lm = lm
        self.chunk_size = chunk_size

    @property
    def shares_prompts(self) -> bool:
        """Whether several completions may follow one prompt."""
        return self.lm.config._attn_implementation in MASKED_ATTENTION

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
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies at the sampling temperature.

        Args:
            input_ids_1T: [1, T] segments end to end.
            position_ids_1T: [1, T] place in the sequence. Without an attention mask, transformers takes each restart at
                0 for a boundary that attention does not cross.
            segments_1T, prefixes_1T: see attention_mask.
            target_positions_M: [M] positions in T whose next token is scored.
            target_ids_M: [M] those next tokens.
            temperatures_M: [M] logits are divided by this.
        Returns:
            [M] float32 logprobs in nats, and [M] float32 entropies in nats, which carry no gradient.
        """
        body = self.lm.base_model
        hidden_1TH = body(
            input_ids=input_ids_1T,
            position_ids=position_ids_1T,
            attention_mask=self._mask(segments_1T, prefixes_1T),
            use_cache=False,
        ).last_hidden_state
        hidden_MH = hidden_1TH[0, target_positions_M]
        chunks = zip(
            torch.split(hidden_MH, self.chunk_size),
            torch.split(target_ids_M, self.chunk_size),
            torch.split(temperatures_M, self.chunk_size),
            strict=True,
        )
        parts = [self._score(*chunk) for chunk in chunks]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _mask(self, segments_1T: Tensor, prefixes_1T: Tensor) -> Tensor | None:
        kind = self.lm.config._attn_implementation
        if kind not in MASKED_ATTENTION:
            return None
        mask = attention_mask(segments_1T, prefixes_1T)
        if kind == "sdpa":
            return mask
        # Eager attention adds its mask to the scores.
        return torch.zeros(mask.shape, dtype=self.lm.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(self.lm.dtype).min
        )

    def _score(self, hidden_CH: Tensor, target_ids_C: Tensor, temperatures_C: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return self._score_chunk(hidden_CH, target_ids_C, temperatures_C)
        result = checkpoint(self._score_chunk, hidden_CH, target_ids_C, temperatures_C, use_reentrant=False)
        return cast("tuple[Tensor, Tensor]", result)

    def _score_chunk(self, hidden_CH: Tensor, target_ids_C: Tensor, temperatures_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = self.lm.get_output_embeddings()(hidden_CH).float() / temperatures_C[:, None]
        log_total_C = logits_CV.logsumexp(dim=-1)
        logprobs_C = logits_CV.gather(-1, target_ids_C[:, None])[:, 0] - log_total_C
        with torch.no_grad():
            probs_CV = torch.exp(logits_CV - log_total_C[:, None])
            entropies_C = log_total_C - (probs_CV * logits_CV).sum(dim=-1)
        return logprobs_C, entropies_C
