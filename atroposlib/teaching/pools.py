"""The servers beside the policy's: student, reference teacher, judges."""

from __future__ import annotations

import logging

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.teacher_distillation_env import TeacherServers
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import ConfigError
from atroposlib.rim.reward import RIMReward
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.errors import StudentFailedError, TeacherFailedError
from atroposlib.teaching.frozen_model import FrozenModel
from atroposlib.teaching.scoring import DIAGNOSTIC

log = logging.getLogger(__name__)


def student_of(config: TeacherEnvConfig, servers: TeacherServers | None, *, testing: bool) -> FrozenModel:
    """The student behind its servers.

    Raises:
        ConfigError: there is none.
    """
    if not servers and not testing:
        raise ConfigError(
            "the teacher protocol needs a student, a model that gets no weights: give --student.base_url, a section "
            "student: in the YAML file, or override student_config_init"
        )
    listed = [servers] if isinstance(servers, APIServerConfig) else servers or []
    name = config.student_tokenizer_name_or_path
    return FrozenModel(
        ServerManager(listed, testing=testing),
        role="student",
        failed=StudentFailedError,
        tokenizer=load_tokenizer(name) if name else None,
    )


def warn_of_a_shared_server(policy: ServerManager, student: ServerManager) -> None:
    """Say so where the student is asked at an address of the policy's, as one server for a trial run is."""
    taught = {server.config.root_url for server in policy.servers} - {""}
    shared = sorted(taught & {server.config.root_url for server in student.servers})
    if shared:
        log.warning(
            "the student is asked at %s, which is the policy's server: with every update of the weights it is another student, "
            "and its kept baselines are wrong; give it a server of its own for training",
            ", ".join(shared),
        )


def reference_of(config: TeacherEnvConfig) -> FrozenModel | None:
    """The reference teacher; None where it is not used."""
    if not config.use_reference_teacher_model:
        return None
    server = APIServerConfig(base_url=config.reference_base_url, model_name=config.reference_model_name)
    return FrozenModel(ServerManager([server]), role="reference teacher", failed=TeacherFailedError)


def approach_judge_of(config: TeacherEnvConfig) -> RIMReward | None:
    """The diagnostic judge alone; None where no judge says how able the student is."""
    if config.rim is None or config.capability_estimator not in ("auto", "judge"):
        return None
    alone = {"active_judges": {DIAGNOSTIC: True}, "judge_weights": {}}
    return RIMReward(config.rim.model_copy(update=alone))
