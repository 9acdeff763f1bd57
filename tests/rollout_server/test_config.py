"""Options of run-api: where they come from, who wins, and what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atroposlib.errors import ConfigError
from rollout_server import cli
from rollout_server.config import ServerConfig
from rollout_server.config_sources import masked_yaml, resolve

ENV_TOKEN, OTHER_TOKEN = "a-token-of-env-0001", "another-token-00002"


def a_file(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = a_file(tmp_path, "port: 1\nticket_ttl_s: 1\nenv_timeout_s: 1\n")
    environ = {"ATROPOS_SERVER_PORT": "2", "ATROPOS_SERVER_TICKET_TTL_S": "2", "PATH": "/bin"}

    config = resolve({"port": "3"}, environ, file)

    assert (config.port, config.ticket_ttl_s, config.env_timeout_s, config.synchronous) == (3, 2.0, 1.0, "full")


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    assert resolve({}, {"ATROPOS_SERVER_CONFIG": str(a_file(tmp_path, "port: 7"))}, None).port == 7


def test_an_empty_file_is_no_options(tmp_path: Path) -> None:
    assert resolve({}, {}, a_file(tmp_path, "# nothing\n")) == ServerConfig()


@pytest.mark.parametrize(
    ("flags", "environ", "file", "named"),
    [
        ({}, {}, "prot: 1", ["server.yaml", "'prot'", "did you mean port?"]),
        ({}, {}, "[1, 2]", ["server.yaml", "list", "mapping"]),
        ({}, {}, "port: [", ["server.yaml", "not YAML"]),
        ({}, {}, "port: many", ["server.yaml: port='many'", "integer"]),
        ({}, {}, "tokens: [abc]", ["server.yaml: tokens", "dictionary"]),
        ({}, {}, "tokens: {boss: [abcdefghijklmnopq]}", ["server.yaml: tokens", "'env', 'trainer' or 'admin'"]),
        ({}, {"ATROPOS_SERVER_PROT": "1"}, "", ["ATROPOS_SERVER_PROT", "did you mean port?"]),
        ({}, {"ATROPOS_SERVER_PORT": "99999"}, "", ["ATROPOS_SERVER_PORT='99999'", "65535"]),
        ({"ticket_ttl_s": "0"}, {}, "", ["--ticket-ttl-s='0'", "greater than 0"]),
        ({"ticket_ttl_s": "nan"}, {}, "", ["--ticket-ttl-s='nan'", "finite"]),
        ({"synchronous": "off"}, {}, "", ["--synchronous='off'", "'normal' or 'full'"]),
        ({"store": "redis"}, {}, "", ["redis_url", "redis://localhost:6379/0"]),
        ({"redis_url": "redis://h"}, {}, "", ["store=sqlite", "store=redis"]),
        ({"max_inflight_bytes": "4096"}, {}, "", ["max_inflight_bytes=4096", "max_body_bytes"]),
        ({"host": "0.0.0.0"}, {}, "", ["host=0.0.0.0", "--token-file", "--insecure"]),
        ({"host": "::"}, {}, "", ["host=::", "--insecure"]),
        ({"ssl_certfile": "/nowhere.pem"}, {}, "", ["ssl_"]),
        ({"token_file": "/nowhere.yaml"}, {}, "", ["/nowhere.yaml"]),
    ],
)
def test_a_mistake_names_key_value_and_expectation(
    tmp_path: Path, flags: dict[str, str], environ: dict[str, str], file: str, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(flags, environ, a_file(tmp_path, file))

    assert [text for text in named if text not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_a_loopback_address_may_be_open(host: str) -> None:
    assert ServerConfig(host=host).is_loopback


@pytest.mark.parametrize("options", [{"insecure": True}, {"tokens": {"admin": [OTHER_TOKEN]}}])
def test_another_address_needs_tokens_or_leave(options: dict[str, object]) -> None:
    assert not ServerConfig.model_validate({"host": "0.0.0.0", **options}).is_loopback


def test_tokens_come_from_file_environment_and_token_file_together(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"trainer: [{OTHER_TOKEN}]\n")
    file = a_file(tmp_path, f"token_file: {tokens}\ntokens: {{admin: [the-admins-own-token]}}")

    config = resolve({}, {"ATROPOS_SERVER_TOKENS_ENV": f"{ENV_TOKEN}, {ENV_TOKEN}2"}, file)

    known = {role: [token.get_secret_value() for token in group] for role, group in config.tokens.items()}
    assert known == {"env": [ENV_TOKEN, f"{ENV_TOKEN}2"], "trainer": [OTHER_TOKEN], "admin": ["the-admins-own-token"]}


@pytest.mark.parametrize(
    "text",
    ["", "env: x", "boss: [abcdefghijklmnopqr]", "env: [1234]", "[", "env: [short]", "env: [has a space in it now]"],
)
def test_a_token_file_that_cannot_be_used_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(text)

    with pytest.raises(ConfigError) as error:
        resolve({"token_file": str(tokens)}, {}, None)

    assert not any(secret in str(error.value) for secret in ("abcdefg", "1234", "short", "space in"))


def test_a_token_has_one_role() -> None:
    with pytest.raises(ConfigError, match="env and admin share a token") as error:
        resolve({}, {"ATROPOS_SERVER_TOKENS_ENV": ENV_TOKEN, "ATROPOS_SERVER_TOKENS_ADMIN": ENV_TOKEN}, None)

    assert ENV_TOKEN not in str(error.value)


def test_secrets_are_masked_wherever_the_configuration_is_shown() -> None:
    config = ServerConfig.model_validate(
        {"tokens": {"env": [ENV_TOKEN]}, "store": "redis", "redis_url": "redis://user:pass-word@host:6379/0"}
    )

    shown = masked_yaml(config)

    assert ENV_TOKEN not in shown + repr(config)
    assert "pass-word" not in shown
    assert yaml.safe_load(shown)["redis_url"] == "redis://user:**********@host:6379/0"


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    config = resolve({"port": "81", "cors_origins": "https://a.example, https://b.example"}, {}, None)

    assert resolve({}, {}, a_file(tmp_path, masked_yaml(config))) == config
    assert config.cors_origins == ("https://a.example", "https://b.example")


def test_dry_run_prints_the_configuration_and_serves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--dry-run", "--insecure", "--port", "81", "--host", "0.0.0.0"])

    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["insecure"], printed["port"], printed["host"]) == (True, 81, "0.0.0.0")
    assert set(printed) == set(ServerConfig.model_fields)


@pytest.mark.parametrize("words", [["--insecure"], ["--insecure", "true"], ["--insecure=true"]])
def test_a_switch_may_stand_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--dry-run", *words])

    assert yaml.safe_load(capsys.readouterr().out)["insecure"] is True


def test_help_shows_every_option_with_its_default_and_commands_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])

    text = capsys.readouterr().out
    flags = {f"--{name.replace('_', '-')}" for name in ServerConfig.model_fields} - {"--tokens"}
    assert [flag for flag in flags if flag not in text] == []
    assert "--tokens" not in text, "secrets do not belong on a command line"
    assert "default: 8000" in text
    assert "run-api --port 8100 --data-dir /data/run1" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prot", "1"], "unknown option --prot; did you mean port?"),
        (["--port", "x"], "--port='x'"),
        (["--port"], "expected one argument"),
        (["--host", "0.0.0.0"], "no tokens"),
        (["--data-dir", "/dev/null/data"], "/dev/null/data"),
        (["--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1:8000"),
    ],
)
def test_the_command_answers_a_mistake_in_two_lines_with_status_2(words: list[str], named: str, tmp_path: Path) -> None:
    if "--data-dir" not in words:
        words = [*words, "--data-dir", str(tmp_path)]
    if "--port" not in words and "192.0.2.1" not in words:
        words = [*words, "--port", "0"]

    result = subprocess.run(
        [sys.executable, "-m", "rollout_server.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )

    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert lines[-2].startswith("error: ")
    assert named in lines[-2]
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in result.stderr
