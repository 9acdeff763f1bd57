"""New weights reach the server of the policy and no other: TeacherGRPOTrainer beside a frozen student."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from tests.trainer.fakes import FakeRolloutServer, a_config, tiny_llama
from tests.trainer.weight_sync.fake_vllm import FakeVllm
from trainer.teacher import TeacherGRPOTrainer
from trainer.weight_sync.config import WeightSyncConfig


def test_training_a_teacher_leaves_the_students_server_alone(tmp_path: Path) -> None:
    teacher, student, rollouts = FakeVllm(), FakeVllm(), FakeRolloutServer()
    config = a_config(
        tmp_path,
        inference_servers=[teacher.url],
        tokenizer_name_or_path=save_byte_tokenizer(tmp_path / "tokenizer"),
        weight_sync=WeightSyncConfig(transport="gloo", probe=False, fingerprint_every=0),
    )

    try:
        TeacherGRPOTrainer(
            config,
            model=tiny_llama(),
            student_model="frozen",
            student_server=f"{student.url}/v1",
            connect=rollouts.client,
        ).train()
    finally:
        teacher.die()
        student.die()

    assert rollouts.said("ack")[-1] == ("ack", 2, 3)
    assert (teacher.version, student.version) == ("3", "default")
    assert student.calls == []
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert teacher.weights.keys() == final.keys()
    assert all(torch.equal(teacher.weights[name], tensor.bfloat16()) for name, tensor in final.items())
