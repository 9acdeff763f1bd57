"""An environment whose groups carry a teacher model's logprobs, for distillation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from pydantic import Field

from atroposlib.envs.base import BaseEnv, BaseEnvConfig
from atroposlib.envs.command_line.server_choice import Servers, resolve_servers
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.server_pools import handed_over
from atroposlib.envs.serving.delivery import drop_reason
from atroposlib.envs.serving.sending import as_groups
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import ConfigError, ModelServerError
from atroposlib.type_definitions import ScoredDataGroup
from atroposlib.wire.layout import PADDING_LOGPROB

log = logging.getLogger(__name__)

# T: tokens of a sequence, K: candidates of a token


class TeacherConfigError(ConfigError, ValueError):
    """The teacher's servers are missing, or its tokens are not the policy's."""


class TeacherDistillationConfig(BaseEnvConfig):
    """Options of distillation beside those of every environment."""

    teacher_enabled: bool = Field(default=False, description="Ask a teacher model for logprobs of every group.")
    teacher_top_k: int = Field(
        default=0,
        ge=-1,
        description="Candidates for each token from the teacher, beside the token itself; 0: the token itself only; -1: off.",
    )


class TeacherDistillationEnv(BaseEnv):
    """Adds `distill_token_ids` and `distill_logprobs` [T, K] to every group before it is sent.

    A group whose teacher cannot be asked goes without them: the reward needs no teacher. Combine it with another
    environment: `class MyTeacherEnv(MyEnv, TeacherDistillationEnv)`, with a config of both.

    Args:
        teacher_server_configs: servers of the teacher; they must return logprobs of prompts (vllm, sglang). None: those
            that build_env hands over. A bool stands for slurm: constructors of other environments pass
            (config, servers, slurm, testing) on by position.
    Raises:
        TeacherConfigError: teacher_enabled without servers, or the teacher's vocabulary is not the policy's.
    """

    env_config_cls: ClassVar[type[BaseEnvConfig]] = TeacherDistillationConfig
    teacher_namespace: ClassVar[str] = "teacher"
    """Section of the YAML file and prefix of the flags of the teacher's servers."""

    def __init__(
        self,
        config: TeacherDistillationConfig,
        server_configs: ServerBaseline | list[APIServerConfig],
        teacher_server_configs: Servers | bool | None = None,
        slurm: bool = False,
        testing: bool = False,
    ) -> None:
        given = handed_over(self.teacher_namespace)
        if isinstance(teacher_server_configs, bool):
            slurm, testing = teacher_server_configs, slurm or testing
        elif teacher_server_configs is not None:
            given = teacher_server_configs
        super().__init__(config, server_configs, slurm, testing)
        self.teacher_server: ServerManager | None = None
        self.teacher_groups = 0
        """Groups that the teacher has seen since the last log."""
        self.teacher_failures = 0
        """Groups since the last log that go without a teacher because it could not be asked."""
        if self._teacher_top_k >= 0:
            self.teacher_server = self._make_teacher_server(given, testing=testing)

    # What an author overrides

    @classmethod
    def server_pools(cls) -> dict[str, Servers | None]:
        """The teacher's, beside those of a class that this one is combined with."""
        return {**super().server_pools(), cls.teacher_namespace: cls.teacher_config_init()}

    @classmethod
    def teacher_config_init(cls) -> Servers | None:
        """Default servers of the teacher; None: they come from flags or a file."""
        return None

    # Sending

    async def handle_send_to_api(
        self,
        scored_data: ScoredDataGroup | list[ScoredDataGroup | None] | None,
        item: Any = None,
        do_send_to_api: bool = True,
        abort_on_any_max_length_exceeded: bool = True,
    ) -> None:
        """Ask the teacher about every group that will be sent, then send as BaseEnv does."""
        limit = self.max_token_len if abort_on_any_max_length_exceeded else -1
        wanted = [
            group
            for group in as_groups(scored_data)
            if self.teacher_server is not None
            and group.get("distill_token_ids") is None
            and drop_reason(group, self.config, max_token_len=limit) is None
        ]
        await asyncio.gather(*(self._attach_teacher_distillation(group) for group in wanted))
        await super().handle_send_to_api(scored_data, item, do_send_to_api, abort_on_any_max_length_exceeded)

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Add how many groups the teacher has seen, and how many it has not."""
        metrics = dict(wandb_metrics or {})
        if self.teacher_server is not None:
            metrics |= {"train/teacher_groups": self.teacher_groups, "train/teacher_failures": self.teacher_failures}
            self.teacher_groups = self.teacher_failures = 0
        await super().wandb_log(metrics)

    async def aclose(self) -> None:
        """Close the teacher's connections too."""
        try:
            await super().aclose()
        finally:
            if self.teacher_server is not None:
                await self.teacher_server.close()

    async def _attach_teacher_distillation(self, group: ScoredDataGroup) -> ScoredDataGroup:
        """Fill the group's distill columns, or set both to None when any of its sequences fails."""
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [
                    tasks.create_task(self._fetch_teacher_for_sequence(tokens, self._teacher_top_k))
                    for tokens in group["tokens"]
                ]
        except* Exception as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            self.teacher_failures += 1
            log.warning("group goes without the teacher's logprobs: %s: %s", type(failure).__name__, failure)
            group["distill_token_ids"] = group["distill_logprobs"] = None
            return group
        answers = [task.result() for task in asked]
        self.teacher_groups += 1
        width = max(1, *(len(position) for ids, _ in answers for position in ids))
        group["distill_token_ids"] = [_padded(ids, width, 0) for ids, _ in answers]
        group["distill_logprobs"] = [_padded(logprobs, width, PADDING_LOGPROB) for _, logprobs in answers]
        return group

    async def _fetch_teacher_for_sequence(
        self, token_ids: list[int], top_k: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Candidates [T][K] and their logprobs in nats; a position without any (the first) is empty.

        Raises:
            ModelServerError: no teacher answered, or one answered for another number of tokens.
        """
        assert self.teacher_server is not None
        answer = await self.teacher_server.get_logprobs(input_ids=token_ids, top_k=top_k, max_tokens=1, split="train")
        ids, logprobs = answer["prompt_topk_token_ids"], answer["prompt_topk_logprobs"]
        if not len(ids) == len(logprobs) == len(token_ids):
            raise ModelServerError(
                f"the teacher answered {len(ids)} positions and {len(logprobs)} logprobs for {len(token_ids)} tokens"
            )
        if top_k == 0:  # engines give at least one candidate beside the token itself, which comes first
            return [position[:1] for position in ids], [position[:1] for position in logprobs]
        return ids, logprobs

    # Construction

    @property
    def _teacher_top_k(self) -> int:
        """-1: off. The config of a class that was combined with this one may have no teacher fields."""
        return int(self.config.teacher_top_k) if getattr(self.config, "teacher_enabled", False) else -1

    def _make_teacher_server(self, configs: Servers | None, *, testing: bool) -> ServerManager:
        if not configs:
            raise TeacherConfigError(
                "teacher_enabled=True needs a teacher server: give --teacher.base_url, a section teacher: in the YAML "
                "file, or override teacher_config_init"
            )
        servers = [configs] if isinstance(configs, APIServerConfig) else configs
        for server in servers if isinstance(servers, list) else [servers]:
            name = server.tokenizer_name if server.tokenizer_name != "none" else server.model_name
            self._validate_teacher_tokenizer_compatibility(name)
        return ServerManager(servers, slurm=False, testing=testing)

    def _validate_teacher_tokenizer_compatibility(self, teacher_tokenizer_name: str) -> None:
        """Raises TeacherConfigError unless both tokenizers are the same, by name or by vocabulary."""
        own = self.config.tokenizer_name
        if teacher_tokenizer_name == own:
            return
        fix = "set --teacher.tokenizer_name to the teacher's tokenizer; it must have the policy's vocabulary"
        try:
            teacher_vocabulary = load_tokenizer(teacher_tokenizer_name).get_vocab()
        except ConfigError as error:
            raise TeacherConfigError(f"{error}; {fix}") from error
        if self.tokenizer is None or teacher_vocabulary != self.tokenizer.get_vocab():
            raise TeacherConfigError(
                f"the teacher's tokenizer {teacher_tokenizer_name!r} has another vocabulary than the policy's {own!r}, "
                f"so its logprobs are of other tokens; {fix}"
            )

    @classmethod
    def _resolve_teacher_server_configs(
        cls,
        default_teacher_server_configs: Servers | None,
        yaml_config: Mapping[str, Any],
        cli_passed_flags: Mapping[str, Any],
    ) -> Servers | None:
        """Flags over the file's teacher section over the default, by the rules of --openai.*."""
        prefix = f"{cls.teacher_namespace}."
        flags = {key.removeprefix(prefix): value for key, value in cli_passed_flags.items() if key.startswith(prefix)}
        default = cast(Any, default_teacher_server_configs)
        return resolve_servers(default, yaml_config.get(cls.teacher_namespace), flags, namespace=cls.teacher_namespace)


def _padded(rows: Sequence[Sequence[Any]], width: int, filler: float) -> list[list[Any]]:
    """[T, width]: a column is rectangular, and positions differ in their number of candidates."""
    return [[*row, *[filler] * (width - len(row))] for row in rows]
