"""A group of guidances as the trainer gets it: the very tokens that were sampled, and what they were worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.teaching.episode import PaidLesson, Preparation
from atroposlib.teaching.records import diagnosis_facts, lesson_facts
from atroposlib.type_definitions import ScoredDataGroup

METADATA = "teaching"
"""Key of group_overrides and overrides under which people find what happened; no trainer reads it."""


def teacher_messages(preparation: Preparation) -> list[Any]:
    """What the teacher is asked, as a chat."""
    return [{"role": "user", "content": preparation.teacher_prompt}]


def group_of(
    preparation: Preparation, members: Sequence[tuple[SequenceNode, PaidLesson]], sampling: Mapping[str, Any]
) -> ScoredDataGroup:
    """The group of one item. Student tokens are in no sequence, so none is trained."""
    prompt = teacher_messages(preparation)
    nodes = [node for node, _ in members]
    item = preparation.item
    return ScoredDataGroup(
        tokens=[node.tokens for node in nodes],
        masks=[node.masked_tokens for node in nodes],
        scores=[paid.reward for _, paid in members],
        inference_logprobs=[node.logprobs for node in nodes],
        policy_versions=[node.policy_versions for node in nodes],
        finish_reasons=[(node.metadata or {}).get("finish_reason", "") for node in nodes],
        messages=[[*prompt, {"role": "assistant", "content": paid.lesson.guidance.text}] for _, paid in members],
        generation_params=dict(sampling),
        overrides=[{METADATA: lesson_facts(paid)} for _, paid in members],
        group_overrides={
            METADATA: {
                "question": item.question,
                "ground_truth": item.ground_truth,
                "source_id": item.source_id,
                "baseline_score": preparation.baseline_score,
                "diagnosis": diagnosis_facts(preparation),
            }
        },
    )
