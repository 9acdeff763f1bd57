"""Options of local mode beside those of the trainer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from atroposlib.launch.config import InferenceSection

OF_THE_TRAINER = {
    "temperature": "temperature",
    "max_tokens": "max_completion_length",
    "max_completion_tokens": "max_completion_length",
    "n": "num_generations",
}
"""Sampling options that the trainer computes with, and their names in GRPOConfig."""


class LocalConfig(BaseModel):
    """What is sampled, and by which engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    inference: InferenceSection = InferenceSection()
    """The vLLM server; what is not set follows from the model and the trainer's options. With `url` none is started."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Room for the prompt in the engine's max_model_len, where that is not set and the model has it."""
    sampling: dict[str, Any] = {}
    """Further sampling options of every request: top_p, top_k, stop, ... Temperature and length are the trainer's."""
    skip_equal_rewards: bool = False
    """Train only on groups whose rewards differ: sample others until a batch is full of them."""
    reward_timeout_s: float = Field(default=300.0, gt=0)
    """One call of one reward function; a longer one costs its group, which is tried again."""
    eval_before: bool = True
    """Evaluate eval_dataset before the first step."""
    eval_after: bool = True
    """And after the last."""
    eval_every_steps: int = Field(default=0, ge=0)
    """And beside training, whenever so many steps are done; 0: not."""
    eval_temperature: float = Field(default=0.0, ge=0)
    """Of evaluation; one completion for each row."""
    show_progress: bool | None = None
    """A live line with step, reward and staleness; None: on a terminal and in a notebook."""

    @field_validator("sampling")
    @classmethod
    def _leaves_the_trainers_options(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        for name in OF_THE_TRAINER.keys() & sampling.keys():
            raise ValueError(
                f"{name}={sampling[name]!r} is the trainer's: give GRPOConfig({OF_THE_TRAINER[name]}={sampling[name]!r})"
            )
        return sampling
