"""atropos inference: start one inference server, register it, look after it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.cli import connection
from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from atroposlib.launch.commands import Command
    from atroposlib.launch.processes import ChildFailedError
    from atroposlib.launch.registration import Registration
    from atroposlib.launch.serve_inference import InferenceService

NAME = "inference"
ENGINES = ("vllm", "sglang")
ROLES = ("policy", "frozen", "teacher", "judge")
PLAIN_PROGRESS_EVERY_S = 10.0

EXAMPLES = """roles: a policy server gets the trainer's weights; frozen, teacher and judge servers never do, and
their weight routes stay closed. The server leaves the rollout server's list when it ends.

exit status: 0 ended by Ctrl-C or SIGTERM, 1 the engine did not come up or died, 2 wrong options

examples:
  atropos inference models/SmolLM2-135M-Instruct                           on this machine, port 9001
  atropos inference models/SmolLM2-135M-Instruct --dry-run                 print the engine's command line
  atropos inference Qwen/Qwen3-8B --online --host 0.0.0.0 --rollout-server http://head:8000
  atropos inference Qwen/Qwen3-32B --online --role teacher --port 9002 --tensor-parallel-size 4
  atropos inference models/base --lora --max-lora-rank 32
  atropos inference models/base --engine sglang --python /opt/sglang/bin/python
  atropos inference models/base -- --max-num-batched-tokens 8192           what follows -- goes to the engine
"""

# Fields of InferenceConfig: type and help; the flag is their name. One that is not given keeps its default.
FIELDS: dict[str, tuple[type, str]] = {
    "served_model_name": (str, "what clients put in `model`; default: MODEL"),
    "host": (str, "address to listen on; its RL routes are open to whoever reaches it; default: 127.0.0.1"),
    "port": (int, "0: any free one; default: 9001"),
    "dtype": (str, "auto, bfloat16, float16 or float32; default: bfloat16"),
    "max_model_len": (int, "tokens of prompt and completion together; default: 2048"),
    "max_num_seqs": (int, "sequences decoded together; default: 64"),
    "kv_cache_gib": (int, "CPU build: memory for keys and values; default: 1"),
    "gpu_memory_utilization": (float, "share of a GPU's memory; default: 0.9"),
    "tensor_parallel_size": (int, "GPUs for one copy of the model; default: 1"),
    "omp_threads": (int, "CPU build: threads of the engine; default: half of the cores"),
    "weight_transfer": (str, "gloo, nccl, ipc, delta or none; default: gloo, and none unless the role is policy"),
    "max_lora_rank": (int, "highest rank of an adapter; default: 16"),
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        NAME,
        usage="atropos inference MODEL [OPTION ...] [-- ENGINE_OPTION ...]",
        help="start an inference server and look after it",
        description="Builds the engine's command line, starts it, waits, explains what fails, registers the server with "
        "a rollout server, ends a pause that a dead trainer left behind, and leaves nothing behind itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, or a name on the Hub")
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: %(default)s")
    parser.add_argument("--role", choices=ROLES, default="policy", help="default: %(default)s")
    parser.add_argument("--rollout-server", metavar="URL", help="register there; default: nowhere")
    parser.add_argument(
        "--advertise", metavar="URL", default="", help="under which others reach it; default: by --host"
    )
    connection.add_arguments(parser)
    _add_engine_options(parser)
    parser.add_argument(
        "--python", metavar="FILE", default="", help="interpreter that has the engine; default: this one"
    )
    parser.add_argument("--log-dir", metavar="DIR", type=Path, help="default: runs/inference-PORT")
    parser.add_argument("--ready-timeout", metavar="SECONDS", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument(
        "--max-pause", metavar="SECONDS", type=float, help="resume an engine that no trainer resumes; longer than a "
        "publication may take with all of its attempts, which follows from weight_sync.timeout_s; 0: never; default: 1200",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command line, start nothing")
    parser.set_defaults(run=run)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    for name, (kind, text) in FIELDS.items():
        metavar = {int: "N", float: "SHARE", str: "VALUE"}[kind]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=None, help=text)
    group.add_argument("--lora", action="store_true", help="adapters can be loaded while it runs")
    group.add_argument("--online", action="store_true", help="MODEL may come from the Hugging Face Hub")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the engine dies."""
    from atroposlib.launch.inference import has_gpu
    from atroposlib.launch.ports import assign_ports
    from atroposlib.launch.processes import ChildFailedError

    service = service_of(arguments)
    if not arguments.dry_run:
        port = assign_ports({"--port": (service.config.host, service.config.port)})["--port"]
        service = replace(service, config=service.config.model_copy(update={"port": port}))
        service = service if arguments.log_dir else replace(service, log_dir=Path(f"runs/inference-{port}"))
    command = service.command(has_gpu=has_gpu())
    print(command, flush=True)
    if arguments.dry_run:
        print(f"# missing: {service.missing}" if service.missing else f"# others reach it at {service.url}")
        return 0
    if service.missing:
        raise ConfigError(service.missing)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(_serve(service, command, arguments))
    except ChildFailedError as error:
        _explain(error)
        return 1
    return 0


def service_of(arguments: argparse.Namespace) -> InferenceService:
    """The service that the options describe.

    Raises:
        ConfigError: an option has a value that it cannot have, or options contradict each other.
    """
    from pydantic import ValidationError

    from atroposlib.launch.inference import InferenceConfig
    from atroposlib.launch.inference_watch import DEFAULT_MAX_PAUSE_S
    from atroposlib.launch.serve_inference import InferenceService

    given = {name: value for name in FIELDS if (value := getattr(arguments, name)) is not None}
    if arguments.role != "policy":
        given.setdefault("weight_transfer", "none")
    fields = {"model": arguments.model, "lora": arguments.lora, "is_offline": not arguments.online, **given}
    if given.get("port") == 0:
        fields.pop("port")  # drawn later: a config names a port that can be listened on
    try:
        config = InferenceConfig.model_validate({**fields, "extra_args": arguments.extra})
    except ValidationError as error:
        raise ConfigError("; ".join(_told(problem) for problem in error.errors())) from None
    if given.get("port") == 0:
        config = config.model_copy(update={"port": 0})
    return InferenceService(
        config,
        engine=arguments.engine,
        role=arguments.role,
        address=arguments.advertise,
        python=arguments.python,
        log_dir=arguments.log_dir or Path(f"runs/inference-{config.port}"),
        ready_timeout_s=arguments.ready_timeout,
        max_pause_s=DEFAULT_MAX_PAUSE_S if arguments.max_pause is None else arguments.max_pause,
    )


def _told(problem: Any) -> str:
    flag = "--" + str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "options"
    return f"{flag}={problem['input']}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


async def _serve(service: InferenceService, command: Command, arguments: argparse.Namespace) -> None:
    if not arguments.rollout_server:
        await _run_service(service, command, None)
        return
    from atroposlib.launch.registration import Registration

    async with connection.connect(arguments.rollout_server, arguments.token) as client:
        name = service.config.served_model_name or service.config.model
        registration = Registration(client, url=service.url, role=service.role, model_name=name)
        await _run_service(service, command, registration)


async def _run_service(service: InferenceService, command: Command, registration: Registration | None) -> None:
    from atroposlib.launch.serve_inference import RunningService

    progress = ProgressLine(service.log_dir / "inference.log")

    def on_ready() -> None:
        progress.end()
        listed = f", listed as {service.role} server {service.url}" if registration else ""
        print(f"ready: {service.config.url}/v1{listed}", flush=True)

    running = RunningService(service, command, registration, show_progress=progress.show, on_ready=on_ready)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    try:
        await running.run()
    finally:
        progress.end()


class ProgressLine:
    """What the engine is doing, on one line of a terminal; elsewhere a line now and then."""

    def __init__(self, log_path: Path) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_open = False
        self._next_s = 0.0
        print(f"log: {log_path}", file=sys.stderr, flush=True)

    def show(self, seconds: float, last_words: str) -> None:
        """Show how long it has taken, and what the engine said last."""
        line = f"waiting for the engine, {seconds:.0f} s: {last_words.strip()[:100]}"
        if self._is_terminal:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif seconds >= self._next_s:
            print(line, file=sys.stderr, flush=True)
            self._next_s = seconds + PLAIN_PROGRESS_EVERY_S

    def end(self) -> None:
        """Leave the line."""
        if self._is_open:
            print(file=sys.stderr, flush=True)
        self._is_open = False


def _explain(error: ChildFailedError) -> None:
    print(f"error: {error}", file=sys.stderr)
    if error.tail:
        print(f"the last lines of {error.log_path}:", file=sys.stderr)
        print("".join(f"  | {line}\n" for line in error.tail.splitlines()), end="", file=sys.stderr)
