"""Logprobs of sampled tokens under the policy, on packed sequences, without ever holding all logits.

Shapes: T tokens of a packed micro batch, M trained tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
        target_positions_M: Tensor,
        target_ids_M: Tensor,
        temperatures_M: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies at the sampling temperature.

        Args:
            input_ids_1T: [1, T] sequences end to end.
            position_ids_1T: [1, T] restarting at 0 with each sequence. Without an attention mask, transformers takes
                each restart for a boundary that attention does not cross.
            target_positions_M: [M] positions in T whose next token is scored.
            target_ids_M: [M] those next tokens.
            temperatures_M: [M] logits are divided by this.
        Returns:
            [M] float32 logprobs in nats, and [M] float32 entropies in nats, which carry no gradient.
        """
        body = self.lm.base_model
        hidden_1TH = body(
            input_ids=input_ids_1T, position_ids=position_ids_1T, attention_mask=None, use_cache=False
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
