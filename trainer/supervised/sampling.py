"""Sample completions from a model in this process, prompts in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ids = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: from the model's own distribution, nothing cut off or penalised."""

    temperature: float
    """0: the likeliest token."""
    max_new_tokens: int
    batch_size: int
    """Prompts at once."""
    max_tokens: int | None = None
    """Of a prompt with its completion, which ends there at the latest; None for no bound."""

    def room(self, prompt: Ids) -> int:
        """Tokens that a completion may have."""
        if self.max_tokens is None:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, self.max_tokens - len(prompt)))


def batches_of(prompts: Sequence[Ids], sampling: Sampling) -> list[list[int]]:
    """Places of the prompts that are sampled together, by length: like lengths waste the least on padding.

    A batch ends when its longest prompt has no room left. Prompts that have all of max_new_tokens are apart from those that have
    less, so that these shorten none of them.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    parts = [list(part) for _, part in groupby(order, lambda i: sampling.room(prompts[i]) == sampling.max_new_tokens)]
    size = sampling.batch_size
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


class Sampler:
    """Samples from one model.

    Args:
        lm: a Hugging Face causal language model.
        tokenizer: of the model; says which tokens end a completion and pad a batch.
    """

    def __init__(self, lm: Any, tokenizer: Any) -> None:
        self._lm = lm
        self.ends = frozenset(_end_ids(lm, tokenizer))
        """Token ids after which a completion is over."""
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.ends, default=0)

    def sample(self, prompts: Sequence[Ids], sampling: Sampling, *, seed: int) -> list[list[int]]:
        """A completion for each prompt, with the token that ends it where it did not run out of length.

        Args:
            seed: the same seed samples the same; the process's own generators stay as they were.
        """
        completions: list[list[int]] = [[] for _ in prompts]
        device = self._lm.device
        with torch.no_grad(), _seeded(seed, device), _ready(self._lm, self._generation_config(sampling)):
            for places in batches_of(prompts, sampling):
                found = self._batch([prompts[i] for i in places], most=min(sampling.room(prompts[i]) for i in places))
                for place, completion in zip(places, found, strict=True):
                    completions[place] = completion
        return completions

    def _batch(self, prompts: Sequence[Ids], *, most: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self._padding] * (width - len(each)) + list(each) for each in prompts])
        mask_BT = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        device = self._lm.device
        found_BT = self._lm.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), max_new_tokens=most
        )
        return [self._until_end(row) for row in found_BT[:, width:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = (place for place, token in enumerate(ids, start=1) if token in self.ends)
        return ids[: next(ends, len(ids))]

    def _generation_config(self, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        chance = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            pad_token_id=self._padding,
            eos_token_id=sorted(self.ends) or None,
            use_cache=True,
            **(chance if sampling.temperature > 0 else {"do_sample": False}),
        )


def _end_ids(lm: Any, tokenizer: Any) -> set[int]:
    configured = getattr(lm.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}


@contextmanager
def _ready(lm: Any, config: Any) -> Iterator[None]:
    """Without dropout, and with these settings alone: a checkpoint's own would cut the distribution."""
    own, was_training = lm.generation_config, lm.training
    lm.generation_config = config
    lm.eval()
    try:
        yield
    finally:
        lm.generation_config = own
        lm.train(was_training)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
