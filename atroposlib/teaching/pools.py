"""The servers beside the policy's: student, reference teacher, judges."""

from __future__ import annotations

import logging

from atroposlib.envs.command_line.server_choice import Servers
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import ConfigError
from atroposlib.rim.reward import RIMReward
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.errors import StudentFailedError, TeacherFailedError
from atroposlib.teaching.frozen_model import FrozenModel
from atroposlib.teaching.scoring import DIAGNOSTIC

log = logging.getLogger(__name__)


def student_of(config: TeacherEnvConfig, servers: Servers | None, *, testing: bool) -> FrozenModel:
    """The student behind its servers.

    Raises:
        ConfigError: there is none.
    """
    if not servers and not testing:
        raise ConfigError(
            "the teacher protocol needs a student, a model that gets no weights: give --student.base_url, a section "
            "student: in the YAML file, or override student_config_init"
        )
    name = config.student_tokenizer_name_or_path
    return FrozenModel(
        ServerManager(servers or [], testing=testing),
        role="student",
        failed=StudentFailedError,
        tokenizer=load_tokenizer(name) if name else None,
    )


def reference_of(
    config: TeacherEnvConfig, given: Servers | None, default: Servers | None, *, testing: bool
) -> FrozenModel | None:
    """The reference teacher behind the given servers, else those by default; None where it is not used.

    Raises:
        ConfigError: it is used, and has no server.
    """
    servers = given or default
    if not config.use_reference_teacher_model:
        # A default is for whoever switches it on; other servers were meant to be asked.
        if servers != default:
            log.warning(
                "the reference teacher's servers are not asked: set use_reference_teacher_model to compare with it"
            )
        return None
    if not servers and not testing:
        raise ConfigError(
            "use_reference_teacher_model needs a server of the teacher before training, which gets no weights: give "
            "--reference.base_url, a section reference: in the YAML file, or override reference_config_init"
        )
    return FrozenModel(
        ServerManager(servers or [], testing=testing), role="reference teacher", failed=TeacherFailedError
    )


def warn_of_shared_servers(policy: ServerManager, *frozen: FrozenModel | None) -> None:
    """Say so where a frozen model is asked at an address of the policy's, as one server for a trial run is."""
    taught = {server.config.root_url for server in policy.servers} - {""}
    for model in filter(None, frozen):
        shared = sorted(taught & {server.config.root_url for server in model.server.servers})
        if shared:
            log.warning(
                "the %s is asked at %s, which is the policy's server: with every update of the weights it is another model, "
                "and what is kept of it or compared with it is wrong; give it a server of its own for training",
                model.role,
                ", ".join(shared),
            )


def approach_judge_of(config: TeacherEnvConfig) -> RIMReward | None:
    """The diagnostic judge alone; None where no judge says how able the student is."""
    if config.rim is None or config.capability_estimator not in ("auto", "judge"):
        return None
    alone = {"active_judges": {DIAGNOSTIC: True}, "judge_weights": {}}
    return RIMReward(config.rim.model_copy(update=alone))
