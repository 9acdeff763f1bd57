"""Turns a config into the exact command lines of its processes. Starts nothing."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from atroposlib.launch.config import EnvironmentSection, InferenceSection, OptionValue, ProcessSection, Scalar, UpConfig
from atroposlib.launch.inference import InferenceConfig, vllm_command
from atroposlib.launch.run_folder import RunFolder

_NO_OPTIONS_OF_THE_ENGINE = {"base_url", "ready_timeout_s", "model", "port", "served_model_name", "env"}
"""Keys of a section that the engine's own configuration lacks, or that are found otherwise."""


@dataclass(frozen=True)
class Command:
    """How a process is started."""

    argv: tuple[str, ...]
    env: dict[str, str]
    grace_s: float = 10.0

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


@dataclass(frozen=True)
class Plan:
    """A config, the folder of its run, and the ports that were found for it."""

    config: UpConfig
    folder: RunFolder
    server_port: int
    inference_port: int
    has_gpu: bool
    frozen_ports: Mapping[str, int] = field(default_factory=dict)
    """Of the frozen servers that we start, by name."""

    def in_folder(self, folder: RunFolder) -> Plan:
        """The same plan for another folder."""
        return replace(self, folder=folder)

    @property
    def server_url(self) -> str:
        """Base URL of the rollout server."""
        return f"http://{_reachable(self.config.rollout_server.host)}:{self.server_port}"

    @property
    def inference_url(self) -> str:
        """Base URL of the inference server, without /v1."""
        return _url(self.config.inference, self.inference_port)

    def frozen_url(self, name: str) -> str:
        """Base URL of a frozen server, without /v1."""
        return _url(self.config.frozen[name], self.frozen_ports.get(name, 0))

    @property
    def model(self) -> Path:
        """The model as the run begins."""
        return self.folder.mock_model if self.config.is_mock else self.config.model

    @property
    def served_model(self) -> str:
        """What clients of the inference server put in `model`."""
        return self.config.inference.served_model_name or self.model.name

    def rollout_server(self) -> Command:
        """The rollout server, on the same port and store at every restart."""
        section = self.config.rollout_server
        data_dir = section.data_dir or self.folder.path / "rollout_server"
        arguments = ["--host", section.host, "--port", str(self.server_port), "--data-dir", str(data_dir)]
        arguments += [word for key, value in section.options.items() for word in _flag(key.replace("_", "-"), value)]
        program = [sys.executable, "-m", "rollout_server.cli"]
        return _command(self.config.processes.rollout_server, program, arguments, {})

    def inference(self, model: Path | None = None) -> Command:
        """The inference server; serves the model of the run unless told another."""
        section = self.config.inference
        return self._engine(section, str(model or section.model or self.model), self.served_model, self.inference_port)

    def frozen(self, name: str) -> Command:
        """A frozen server; serves the model of the run as it was at first unless told another."""
        section = self.config.frozen[name]
        command = self._engine(
            section, section.model or str(self.model), self._frozen_model(name), self.frozen_ports[name]
        )
        return replace(command, env={**command.env, **section.env})

    def _engine(self, section: InferenceSection, model: str, served_model: str, port: int) -> Command:
        if self.config.is_mock:
            return self._mock_engine(section, served_model, port)
        fields = section.model_dump(exclude=_NO_OPTIONS_OF_THE_ENGINE)
        engine = InferenceConfig(model=model, port=port, served_model_name=served_model, **fields)
        argv, env = vllm_command(engine, has_gpu=self.has_gpu)
        # The program of the command line; what follows are its arguments.
        split = argv.index("--model")
        return _command(self.config.processes.inference, argv[:split], argv[split:], env)

    def _mock_engine(self, section: InferenceSection, served_model: str, port: int) -> Command:
        program = [sys.executable, "-m", "atroposlib.cli.main", "mock-inference"]
        arguments = ["--host", section.host, "--port", str(port), "--model-name", served_model]
        arguments += ["--save-tokenizer", str(self.folder.mock_model), *section.extra_args]
        return _command(self.config.processes.inference, program, arguments, {})

    def _frozen_model(self, name: str) -> str:
        """What clients of a frozen server put in `model`."""
        section = self.config.frozen[name]
        return section.served_model_name or Path(section.model or self.model).name

    def environment(self, section: EnvironmentSection) -> Command:
        """An environment that collects groups until the run is finished."""
        return self._environment(section, "serve", {})

    def evaluation(self, section: EnvironmentSection, phase: str) -> Command:
        """The held-out evaluation of an environment; phase is before or after."""
        folder = self.folder.evaluation(phase)
        if len(self.config.environments) > 1:
            folder /= section.label
        return self._environment(section, "evaluate", {"env.data_dir_to_save_evals": str(folder)})

    def _environment(self, section: EnvironmentSection, mode: str, extra: dict[str, Scalar]) -> Command:
        flags: dict[str, OptionValue] = {
            "env.rollout_server_url": self.server_url,
            "env.tokenizer_name": str(self.model),
            "env.run_dir": str(self.folder.path),
            "env.seed": self.config.seed,
            "env.group_size": section.group_size,
            "env.wandb_name": section.label,
            "openai.base_url": f"{self.inference_url}/v1",
            "openai.model_name": self.served_model,
            "openai.server_type": "vllm",
            **{key: value for name in section.servers for key, value in self._frozen_flags(name).items()},
            **extra,
            **{key if "." in key else f"env.{key}": value for key, value in section.options.items()},
        }
        arguments = [mode, *(word for key, value in flags.items() for word in _flag(key, value))]
        program = [sys.executable, str(section.command)]
        return _command(self.config.processes.environment, program, arguments, {"OMP_NUM_THREADS": "1"})

    def _frozen_flags(self, name: str) -> dict[str, Scalar]:
        return {
            f"{name}.base_url": f"{self.frozen_url(name)}/v1",
            f"{name}.model_name": self._frozen_model(name),
            f"{name}.server_type": "vllm",
        }

    def trainer_check(self) -> Command:
        """The trainer as one process, to look at its options."""
        return self._trainer(ranks=1)

    def trainer(self) -> Command:
        """The trainer; reads the file that `trainer_keys` is written to."""
        return self._trainer(ranks=self.config.trainer_ranks)

    def _trainer(self, *, ranks: int) -> Command:
        program = [sys.executable, "-m", "trainer.cli"]
        if ranks > 1:
            program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            program += ["--nproc-per-node", str(ranks), "-m", "trainer.cli"]
        env = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
            # A waiting thread sleeps: the inference server works on the same cores.
            "OMP_WAIT_POLICY": "passive",
        }
        if not self.has_gpu:
            env["DS_ACCELERATOR"] = "cpu"
        arguments = ["--config", str(self.folder.trainer_config)]
        return _command(self.config.processes.trainer, program, arguments, env, grace_s=30.0)

    def trainer_keys(self) -> dict[str, Any]:
        """The trainer's config: what the user gave, and how the processes are connected."""
        return {
            **self.config.trainer.model_dump(mode="json"),
            "model_name_or_path": str(self.model),
            "rollout_server_url": self.server_url,
            "run_name": self.folder.run_id,
            # A mock takes no weights.
            "inference_servers": [] if self.config.is_mock else [self.inference_url],
            "run_dir": str(self.folder.path),
            "output_dir": str(self.folder.checkpoints),
            "seed": self.config.seed,
        }

    def describe(self) -> str:
        """Every command line, and the trainer's config, for --dry-run."""
        parts = {"rollout-server": str(self.rollout_server())}
        if self.config.inference.base_url is None:
            parts["inference"] = str(self.inference())
        parts |= {f"inference of {name}": str(self.frozen(name)) for name in self.frozen_ports}
        for section in self.config.environments:
            if self.config.evaluation.before:
                parts[f"{section.label}, held-out evaluation before"] = str(self.evaluation(section, "before"))
            parts[section.label] = str(self.environment(section))
        trainer_yaml = yaml.safe_dump(self.trainer_keys(), sort_keys=False).rstrip().replace("\n", "\n    ")
        parts["trainer"] = f"{self.trainer()}\n  with {self.folder.trainer_config}:\n    {trainer_yaml}"
        for section in self.config.environments:
            if self.config.evaluation.after:
                parts[f"{section.label}, held-out evaluation after"] = str(self.evaluation(section, "after"))
        return "\n\n".join(f"# {name}\n{text}" for name, text in parts.items())


def _command(
    process: ProcessSection,
    program: list[str],
    arguments: list[str],
    env: dict[str, str],
    *,
    grace_s: float = 10.0,
) -> Command:
    shared = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Command(
        argv=(*(process.command or program), *arguments),
        env={**shared, **env, **process.env},
        grace_s=process.grace_s or grace_s,
    )


def _url(section: InferenceSection, port: int) -> str:
    if section.base_url is not None:
        return section.base_url.rstrip("/").removesuffix("/v1")
    return f"http://{_reachable(section.host)}:{port}"


def _flag(key: str, value: OptionValue) -> tuple[str, str]:
    return f"--{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
