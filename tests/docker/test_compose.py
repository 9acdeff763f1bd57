"""docker-compose.yml, checked by reading it: no Docker engine is needed.

Every service's command is started as a local process with that service's environment; container paths become folders
of the test, and host names become this machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from atroposlib.launch.inference import InferenceConfig, vllm_command
from tests.processes import free_port

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
INFERENCE = [name for name in SERVICES if name.startswith("inference")]
TRAINERS = [name for name in SERVICES if name.startswith("trainer")]
START_TIMEOUT_S = 30.0


def dockerfile_of(name: str) -> Path:
    build: dict[str, str] = SERVICES[name]["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    return ROOT / build["dockerfile"]


def services_of(profile: str) -> dict[str, dict[str, Any]]:
    """Services of a profile by every name that they answer to."""
    found = {}
    for name, service in SERVICES.items():
        if profile in service["profiles"]:
            found[name] = service
            for alias in service.get("networks", {}).get("default", {}).get("aliases", []):
                found[alias] = service
    return found


def listening_port(service: dict[str, Any]) -> int | None:
    command = " ".join(service["command"])
    match = re.search(r"--port[= ](\d+)", command)
    return int(match.group(1)) if match else None


def as_local(words: list[str], folders: dict[str, Path]) -> list[str]:
    """The command with container paths and the interpreter of this machine."""
    local = []
    for word in words:
        for container, folder in folders.items():
            word = re.sub(rf"(?<![\w/]){container}(?=/|$)", str(folder), word)
        local.append(word)
    assert local[0] in ("python", "python3")
    return [sys.executable, *local[1:]]


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    wanted = {name: str(value) for name, value in service.get("environment", {}).items()}
    wanted.pop("LD_PRELOAD", None)  # a path of the image
    return {**os.environ, **wanted}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for name in ("models/SmolLM2-135M-Instruct", "runs", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/SmolLM2-135M-Instruct/config.json").write_text("{}")
    return {"/models": tmp_path / "models", "/runs": tmp_path / "runs", "/data": tmp_path / "data"}


@pytest.mark.parametrize("name", SERVICES)
def test_the_image_of_a_service_copies_only_what_exists(name: str) -> None:
    lines = dockerfile_of(name).read_text().splitlines()

    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    missing = [source for sources in copies for source in sources if not (ROOT / source).exists()]
    assert missing == []
    assert any(line.startswith("FROM ") for line in lines)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_a_program_that_its_image_holds(name: str) -> None:
    command, image = SERVICES[name]["command"], dockerfile_of(name).read_text()

    program = command[2] if command[1] == "-m" else command[1]
    if program.startswith("vllm."):
        assert "vllm" in image
    else:
        package = re.split(r"[./]", program)[0]
        assert f"COPY {package} {package}" in image
        assert (ROOT / (program.replace(".", "/") + ".py" if command[1] == "-m" else program)).is_file()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_profile_holds_one_of_each_process(profile: str) -> None:
    images = sorted(dockerfile_of(name).name.split(".")[0] for name, s in SERVICES.items() if profile in s["profiles"])

    assert images == ["environment", "inference", "rollout_server", "trainer"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_address_is_a_service_of_the_profile_and_its_port(profile: str) -> None:
    services = services_of(profile)
    urls = [url for s in services.values() for word in s["command"] for url in re.findall(r"http://[^\]\s]+", word)]

    assert urls
    for url in urls:
        address = urlsplit(url)
        assert address.hostname in services, url
        assert address.port == listening_port(services[address.hostname]), url


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_who_is_waited_for_is_in_the_profile_and_can_be_asked(profile: str) -> None:
    services = services_of(profile)

    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert name in services
            assert condition["condition"] == "service_healthy"
            assert "healthcheck" in services[name]


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "healthcheck" in service])
def test_a_health_check_asks_the_port_that_the_service_listens_on(name: str) -> None:
    service = SERVICES[name]

    (port,) = re.findall(r"http://127.0.0.1:(\d+)/", " ".join(service["healthcheck"]["test"]))
    assert int(port) == listening_port(service)
    assert f"EXPOSE {port}" in dockerfile_of(name).read_text()


def test_published_ports_are_open_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert published == ["127.0.0.1:8000:8000"]
    assert published[0].endswith(f":{listening_port(SERVICES['rollout-server'])}")


def test_the_model_name_is_the_same_everywhere() -> None:
    served = {word.split("=")[1] for n in INFERENCE for word in SERVICES[n]["command"] if "served-model-name" in word}
    asked = {w.split("=")[1] for w in SERVICES["environment"]["command"] if w.startswith("--openai.model_name")}

    assert served == asked
    assert len(asked) == 1


def test_the_rollout_server_starts_and_is_healthy_by_its_own_check(folders: dict[str, Path]) -> None:
    service, port = SERVICES["rollout-server"], free_port()
    replaced = {"8000": str(port), "0.0.0.0": "127.0.0.1"}
    command = as_local([replaced.get(word, word) for word in service["command"]], folders)
    check = [sys.executable, *service["healthcheck"]["test"][2:]]
    check[-1] = check[-1].replace(":8000/", f":{port}/")
    process = subprocess.Popen(command, env=environment_of(service), cwd=ROOT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while subprocess.run(check, capture_output=True, check=False).returncode != 0:
            assert process.poll() is None, "the rollout server ended"
            assert time.monotonic() < deadline, "the rollout server is not healthy"
            time.sleep(0.2)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert list(folders["/data"].iterdir()) != []
    finally:
        process.terminate()
        process.wait(timeout=15)


@pytest.mark.parametrize("name", ["environment", *TRAINERS])
def test_the_command_is_understood_with_its_environment(name: str, folders: dict[str, Path]) -> None:
    service = SERVICES[name]
    command = [*as_local(service["command"], folders), "--dry-run"]

    result = subprocess.run(command, env=environment_of(service), cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert str(folders["/models"] / "SmolLM2-135M-Instruct") in result.stdout


@pytest.mark.parametrize("name", INFERENCE)
def test_the_engine_gets_what_atropos_up_gives_it(name: str) -> None:
    has_gpu = name.endswith("gpu")
    config = InferenceConfig(model="/models/SmolLM2-135M-Instruct", max_model_len=512, port=9001, host="0.0.0.0")
    argv, env = vllm_command(config, has_gpu=has_gpu)
    service = SERVICES[name]

    given = {word.split("=")[0] for word in service["command"] if word.startswith("--")}
    assert {word for word in argv if word.startswith("--")} - given - {"--tensor-parallel-size"} == set()
    assert service["command"][2] == argv[2]
    same = {key: value for key, value in env.items() if key not in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    assert same.items() <= service["environment"].items()


PARSE_VLLM_ARGUMENTS = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(arguments)
print(json.dumps([arguments.port, str(arguments.model), arguments.served_model_name]))
"""


@pytest.mark.vllm
@pytest.mark.parametrize("name", INFERENCE)
def test_vllm_understands_the_command(name: str, folders: dict[str, Path]) -> None:
    service = SERVICES[name]
    words = as_local(service["command"], folders)[3:]

    result = subprocess.run(
        [sys.executable, "-c", PARSE_VLLM_ARGUMENTS, *words],
        env=environment_of(service),
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    port, model, served = json.loads(result.stdout.splitlines()[-1])
    assert (port, served) == (9001, ["SmolLM2-135M-Instruct"])
    assert model == str(folders["/models"] / "SmolLM2-135M-Instruct")
