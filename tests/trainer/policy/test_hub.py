"""Uploads against a MOCK hub: nothing here reaches the network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from tests.trainer.fakes import a_config
from trainer.policy.hub import HubTarget, hub_target, push_folder


class MockHub:
    """Stands for huggingface_hub.HfApi; remembers, or refuses."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.repos: dict[str, bool | None] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.revisions: list[str | None] = []

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.repos[repo_id] = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.revisions.append(revision)
        self.files[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    final = tmp_path / "final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(b"weights")
    return final


def test_the_folder_arrives(folder: Path) -> None:
    hub = MockHub()

    assert push_folder(folder, HubTarget("me/model", "t", is_private=True, revision="v1"), api=hub)

    assert hub.repos == {"me/model": True}
    assert hub.files == {"me/model": {"model.safetensors": b"weights"}}
    assert hub.revisions == ["v1"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to the hub"), OSError("disk"), RuntimeError("403 Forbidden")]
)
def test_a_failed_upload_is_a_warning_with_the_command_and_costs_nothing(
    folder: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    target = HubTarget("me/model", "hf_secret", is_private=True, revision="v1")

    with caplog.at_level(logging.WARNING, logger="trainer.policy.hub"):
        assert not push_folder(folder, target, api=MockHub(error))

    assert f"hf upload me/model {folder} . --private --revision v1" in caplog.text
    assert str(error) in caplog.text
    assert "hf_secret" not in caplog.text
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_no_upload_is_wanted_by_default(tmp_path: Path) -> None:
    assert hub_target(a_config(tmp_path)) is None


def a_pushing_config(tmp_path: Path, **options: Any) -> Any:
    return a_config(tmp_path, push_to_hub=True, hub_model_id="me/model", **options)


def test_a_missing_token_is_told_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    with pytest.raises(ConfigError, match="HF_TOKEN"):
        hub_target(a_pushing_config(tmp_path))


def test_the_token_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")

    target = hub_target(a_pushing_config(tmp_path, hub_private_repo=True))

    assert target == HubTarget("me/model", "hf_of_the_environment", is_private=True)
