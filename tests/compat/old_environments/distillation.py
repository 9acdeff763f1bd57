"""Teacher distillation by inheritance from two sides, as the bundled GSM8K teacher environment does it."""

from managed_group import ManagedGroupEnv

from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv


class DistillationEnv(ManagedGroupEnv, TeacherDistillationEnv):
    name = "distillation"
    env_config_cls = TeacherDistillationConfig

    @classmethod
    def config_init(cls):
        env_config = TeacherDistillationConfig(
            group_size=4, wandb_name="distillation", teacher_enabled=True, teacher_top_k=2
        )
        return env_config, [
            APIServerConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x", server_type="vllm")
        ]


if __name__ == "__main__":
    DistillationEnv.cli()
