"""Pays for being close in meaning to the solution."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atroposlib.envs.reward_fns.answers import golds
from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

Embed = Callable[[Sequence[str]], npt.ArrayLike]
"""Texts to [N, D] vectors."""


@registry.register
class CosineScaledReward(RewardFunction):
    """1 - scale_factor * cosine distance between completion and solution, clamped to min_reward...max_reward.

    Needs `ground_truth` or `solution`: one for all, or a list. The model runs in this process; call the reward in an
    executor so that rollouts go on.

    Args:
        model_name: a sentence embedding model: a folder or a Hugging Face name.
        default_reward: for an empty completion.
        embed: texts to vectors, instead of the model.
    Raises:
        ConfigError: on first use, when torch is not installed or the model cannot be loaded.
    """

    def __init__(
        self,
        model_name: str = "all-MiniLM-L6-v2",
        scale_factor: float = 1.0,
        min_reward: float = -1.0,
        max_reward: float = 1.0,
        default_reward: float = 0.0,
        embed: Embed | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.scale_factor = scale_factor
        self.min_reward = min_reward
        self.max_reward = max_reward
        self.default_reward = default_reward
        self._given_embed = embed

    @cached_property
    def embed(self) -> Embed:
        """Texts to vectors; loads the model when it is first asked for."""
        return self._given_embed or _load_model(self.model_name)

    def compute(
        self, completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any
    ) -> list[float]:
        """Embed all texts at once and compare them in pairs."""
        wanted = [str(gold) for gold in golds(solution, ground_truth, len(completions))]
        texts = [self.get_content(completion) for completion in completions]
        if not any(texts):
            return [self.default_reward] * len(texts)
        vectors = np.asarray(self.embed([*texts, *wanted]), dtype=np.float64)
        similarities = _cosines(vectors[: len(texts)], vectors[len(texts) :])
        return [
            self._scaled(similarity) if text else self.default_reward
            for text, similarity in zip(texts, similarities.tolist(), strict=True)
        ]

    def _scaled(self, similarity: float) -> float:
        return min(self.max_reward, max(self.min_reward, 1 - self.scale_factor * (1 - similarity)))


def cosine_scaled_reward(
    completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any
) -> list[float]:
    """CosineScaledReward with its defaults. It loads the model at every call: prefer an instance."""
    return CosineScaledReward()(completions, solution=solution, ground_truth=ground_truth)


def _cosines(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: npt.NDArray[np.float64] = (left * right).sum(axis=1) / np.where(norms == 0, 1.0, norms)
    return cosines


def _load_model(name: str) -> Embed:
    """The model's mean over the last hidden states of the tokens."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the reward 'cosine_scaled' needs torch: pip install 'atroposlib[trainer]', or pass embed="
        ) from error
    transformers = importlib.import_module("transformers")
    full_name = name if "/" in name or Path(name).exists() else f"sentence-transformers/{name}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(full_name)
        model = transformers.AutoModel.from_pretrained(full_name).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the embedding model {full_name!r}: {str(error).splitlines()[0]}; set model_name to a folder "
            "or a Hugging Face name"
        ) from error

    def embed(texts: Sequence[str]) -> npt.ArrayLike:
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states_NTD = model(**inputs).last_hidden_state
        mask_NT1 = inputs["attention_mask"].unsqueeze(-1)
        vectors: npt.ArrayLike = ((states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)).float().numpy()
        return vectors

    return embed
