"""TeacherGRPOTrainer: GRPO for a teacher, with the documented methods for trying it out.

Training is that of GRPOTrainer: the protocol itself runs in an environment, which sends groups to the rollout server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.errors import ConfigError
from atroposlib.teaching.checks import check_guidance_arguments, check_probe_arguments
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.diagnosis import DiagnosticResult
from atroposlib.teaching.env import TeacherEnv
from atroposlib.teaching.scoring import reward_by_scores
from trainer.config.grpo import GRPOConfig
from trainer.grpo_trainer import GRPOTrainer

T = TypeVar("T")

TeacherServerType: TypeAlias = Literal["vllm", "sglang"]
"""Servers that take token ids, as the teacher is asked."""
StudentServerType: TypeAlias = Literal["openai", "vllm", "sglang", "trl"]

LOCAL_MODE = ("reward_funcs", "train_dataset", "eval_dataset", "reward_weights", "reward_model", "local")
"""Arguments with which GRPOTrainer starts servers and an environment of its own."""


class TeacherGRPOTrainer(GRPOTrainer):
    """Trains a teacher on the groups of a teaching environment.

    It starts nothing: train() takes batches from config.rollout_server_url, where an environment such as
    `environments.teaching` must send them; `atropos up` starts both, and the servers. The methods here ask the servers as
    that environment does, without a training run.

    Args:
        config: options of the trainer; its inference_servers are the teacher.
        server_type: what runs at inference_servers: vllm or sglang.
        student_model: name of the student, as its server knows it; None: that of teacher_env. train() needs none.
        student_server: base URL of the student's server, with /v1; it gets no weights.
        student_server_type: what runs there; openai speaks to every server with OpenAI's routes, hosted ones too.
        student_api_key: bearer token for it; empty: none is sent; None: that of the variable OPENAI_API_KEY.
        use_reference_teacher_model: pay what a guidance is better than one of reference_server's teacher.
        reference_server: base URL of a server with the teacher before training.
        logging_prob: share of the groups that the environment writes in full.
        teacher_env: the protocol's options; what is given beside it wins.
        options: as GRPOTrainer, without those of local mode.
    Raises:
        ConfigError: student_model is a model instead of its name, a server type is unknown, or an option is of local mode or
            cannot work.
    """

    def __init__(
        self,
        config: GRPOConfig | None = None,
        *,
        server_type: TeacherServerType = "vllm",
        student_model: str | None = None,
        student_server: str = "http://localhost:9002/v1",
        student_server_type: StudentServerType = "openai",
        student_api_key: str | None = "",
        use_reference_teacher_model: bool | None = None,
        reference_server: str | None = None,
        logging_prob: float | None = None,
        teacher_env: TeacherEnvConfig | None = None,
        **options: Any,
    ) -> None:
        if student_model is not None and not isinstance(student_model, str):
            raise ConfigError(
                f"student_model is a {type(student_model).__name__}, expected a name: the student is served, not loaded; "
                "start a server with it and give its address as student_server"
            )
        _check_choice("server_type", server_type, get_args(TeacherServerType))
        _check_choice("student_server_type", student_server_type, get_args(StudentServerType))
        _refuse_local_mode(options)
        super().__init__(config, **options)
        self.server_type = server_type
        self.student_server = student_server
        self.student_server_type = student_server_type
        self.student_api_key = student_api_key
        self.reference_server = reference_server
        given = {
            "student_model": student_model,
            "use_reference_teacher_model": use_reference_teacher_model,
            "logging_prob": logging_prob,
        }
        self.teacher_env = _with_options(teacher_env or TeacherEnvConfig(tokenizer_name=self._tokenizer_name()), given)
        """Options of the protocol."""
        if self.teacher_env.use_reference_teacher_model and not reference_server:
            raise ConfigError(
                "use_reference_teacher_model needs reference_server, the base URL of a server with the teacher before training"
            )

    # The documented methods

    def diagnostic_probe(self, task: str, max_tokens: int = 50) -> DiagnosticResult:
        """As TeacherEnv.diagnostic_probe.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
            ConfigError: as make_env.
        """
        check_probe_arguments(task, max_tokens)
        return self._ask(lambda env: env.diagnostic_probe(task, max_tokens))

    def generate_guidance(self, task: str, diagnostic: DiagnosticResult, max_tokens: int = 200) -> str:
        """As TeacherEnv.generate_guidance: what the teacher's servers say now.

        Raises:
            TypeError, ValueError, RuntimeError: as there.
            ConfigError: as make_env.
        """
        check_guidance_arguments(task, diagnostic, max_tokens)
        return self._ask(lambda env: env.generate_guidance(task, diagnostic, max_tokens))

    def compute_teaching_reward(self, baseline_score: float, enhanced_score: float, teaching_length: float) -> float:
        """As TeacherEnv.compute_teaching_reward."""
        return reward_by_scores(baseline_score, enhanced_score, teaching_length, self.teacher_env)

    def make_env(self) -> TeacherEnv:
        """An environment between the teacher's and the student's servers; whoever asks for it closes it.

        Raises:
            ConfigError: config.inference_servers is empty, or no student_model is given.
        """
        urls = self.args.inference_servers
        if not urls:
            raise ConfigError(
                "the teacher is asked through inference_servers, and there is none: give inference_servers=[http://HOST:PORT]"
            )
        student_model = self.teacher_env.student_model
        if not student_model:
            raise ConfigError(
                f"the student at {self.student_server} is asked for by name, and student_model is not set: "
                "give student_model=NAME, one that this server lists under /v1/models"
            )
        name = self.args.model_name_or_path
        teacher = [
            APIServerConfig(base_url=f"{url.rstrip('/')}/v1", model_name=name, server_type=self.server_type)
            for url in urls
        ]
        student = APIServerConfig(
            base_url=self.student_server,
            model_name=student_model,
            server_type=self.student_server_type,
            api_key=self.student_api_key,
        )
        reference = (
            [APIServerConfig(base_url=self.reference_server, model_name=name)] if self.reference_server else None
        )
        return TeacherEnv(
            self.teacher_env, teacher, student_server_configs=[student], reference_server_configs=reference
        )

    def _ask(self, call: Callable[[TeacherEnv], Awaitable[T]]) -> T:
        """One call on an environment of its own, on an event loop of its own: notebooks have one running already."""

        async def once() -> T:
            env = self.make_env()
            try:
                return await call(env)
            finally:
                await env.aclose()

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher") as pool:
            return pool.submit(lambda: asyncio.run(once())).result()

    def _tokenizer_name(self) -> str:
        return str(self.args.tokenizer_name_or_path or self.args.model_name_or_path)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Of an argument with few values.

    Raises:
        ConfigError: the value is none of them.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(choices)}: give one of them")


def _refuse_local_mode(options: dict[str, Any]) -> None:
    """Local mode pays the policy's answers to the rows: there is no student in it.

    Raises:
        ConfigError: an argument of local mode is given.
    """
    given = [name for name in LOCAL_MODE if options.get(name) is not None]
    if given:
        raise ConfigError(
            f"TeacherGRPOTrainer takes no {', '.join(given)}: problems and rewards are options (data, teaching_reward_mode) "
            "of a teaching environment, which runs beside it: `atropos up recipe=teacher_quickstart` starts environment, "
            "trainer and servers. To train without a student, use GRPOTrainer"
        )


def _with_options(config: TeacherEnvConfig, given: dict[str, Any]) -> TeacherEnvConfig:
    """The options with those of the constructor over them.

    Raises:
        ConfigError: they cannot work together.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return type(config).model_validate({**config.model_dump(), **changes})
    except ValueError as error:
        raise ConfigError(f"impossible options of the teacher protocol: {error}") from error
