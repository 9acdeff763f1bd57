"""inference-node-wandb-watcher: log to wandb, once a minute, whether the inference servers of this node are well."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from atroposlib.cli.old_routes import OldRoutes
from atroposlib.errors import AtroposError, ConfigError

FIRST_PORT = 9000
GPUS_PER_NODE = 8
PERIOD_S = 60.0
HEALTH_TIMEOUT_S = 30.0

EXAMPLES = """examples:
  inference-node-wandb-watcher --api_addr http://head-node:8000 --tp 2 --node_num 0      watches ports 9000 to 9003
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Watch until Ctrl-C; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with OldRoutes(arguments.api_addr) as routes:
            wandb = _open_wandb(routes, arguments.node_num)
            urls = health_urls(arguments.tp)
            while True:
                log_health(routes, urls, arguments.node_num, wandb.log)
                time.sleep(PERIOD_S)
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def health_urls(tp: int) -> list[str]:
    """One URL a server: tp GPUs each, GPUS_PER_NODE on the node."""
    return [f"http://localhost:{FIRST_PORT + index}/health_generate" for index in range(GPUS_PER_NODE // tp)]


def log_health(routes: OldRoutes, urls: Sequence[str], node: int, log: Callable[..., Any]) -> None:
    """Ask every server once and log 1 or 0 for each, at the run's step."""
    metrics = {f"server/server_health_{node}_{index}": int(_is_well(url)) for index, url in enumerate(urls)}
    try:
        step = routes.get("/status")["current_step"]
    except AtroposError as error:
        # The servers' health is worth logging while the rollout server restarts.
        print(f"warning: logged without a step: {error}", file=sys.stderr)
        log(metrics)
        return
    log(metrics, step=step)


def _is_well(url: str) -> bool:
    try:
        return httpx.get(url, timeout=HEALTH_TIMEOUT_S).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _open_wandb(routes: OldRoutes, node: int) -> Any:
    """A wandb run beside the trainer's; waits until there is a trainer."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ConfigError("this script logs to wandb, which is not installed: pip install wandb") from error
    while (info := routes.get("/wandb_info"))["project"] is None:
        time.sleep(1.0)
    wandb.init(project=info["project"], group=info["group"], name=f"inference-node-{node}")
    return wandb


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inference-node-wandb-watcher",
        description="Logs server/server_health_<node>_<i> once a minute for the inference servers of this node.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--api_addr", required=True, help="URL of the rollout server")
    parser.add_argument("--tp", type=_tp, required=True, help="GPUs of one inference server, 1 to 8")
    parser.add_argument("--node_num", type=int, required=True, help="number of this node")
    return parser


def _tp(text: str) -> int:
    value = int(text)
    if not 1 <= value <= GPUS_PER_NODE:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {GPUS_PER_NODE}")
    return value


if __name__ == "__main__":
    sys.exit(main())
