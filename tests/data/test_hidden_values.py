"""A mistyped key of a data set shows no password, whichever command line it stands on."""

from __future__ import annotations

import pytest

from atroposlib.data.config import DataConfig
from atroposlib.envs.command_line.usage import UsageError, validate
from atroposlib.errors import ConfigError
from atroposlib.teaching.config import TeacherEnvConfig
from trainer.config.values import coerce

URL = "postgresql://reader:SECRET@host/db"


def test_on_an_environments_command_line() -> None:
    with pytest.raises(UsageError, match=r"--env\.data\.db_ulr") as raised:
        validate(TeacherEnvConfig, {"data": {"db_ulr": URL}}, "--env.")

    assert "SECRET" not in f"{raised.value} {raised.value.hint}"


def test_on_the_trainers() -> None:
    with pytest.raises(ConfigError, match=r"data\.db_url in trainer\.yaml") as raised:
        coerce("data", {"db_url": [URL]}, DataConfig, source_of=lambda key: "trainer.yaml")

    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None
