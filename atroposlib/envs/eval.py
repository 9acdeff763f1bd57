"""Evaluations without an environment: subclass EvalBase, run it against any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import comb
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from atroposlib.envs.evaluation import map_items, write_evaluation
from atroposlib.utils.display import display_metrics_table

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.server_manager import ServerManager

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "n", "top_p", "max_tokens")


def pass_at_k(m: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated from m samples of which c are: 1 - C(m-c, k) / C(m, k).

    Raises:
        ValueError: the numbers do not fit together.
    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    if not (0 <= c <= m and 1 <= k <= m):
        raise ValueError(f"pass_at_k needs 0 <= c <= m and 1 <= k <= m, got m={m}, c={c}, k={k}")
    return 1.0 - comb(m - c, k) / comb(m, k)


def evaluate_log(
    metrics: dict[str, Any],
    eval_dir: str | None = None,
    task_name: str | None = None,
    model_name: str | None = None,
    start_time: float | None = None,
    end_time: float | None = None,
    generation_parameters: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    verbose: bool = True,
) -> None:
    """Write metrics.json and samples.jsonl into eval_dir, as BaseEnv.evaluate_log does; without eval_dir only print."""
    task_name, end_time = task_name or "eval", end_time or time.time()
    if verbose:
        display_metrics_table(task_name, metrics, start_time or end_time, end_time)
    if eval_dir is None:
        log.warning("eval_dir is not set: no evaluation files are written")
        return
    write_evaluation(
        Path(eval_dir),
        metrics,
        task_name=task_name,
        model_name=model_name or "unknown",
        start_time=start_time,
        end_time=end_time,
        generation_parameters=generation_parameters,
        samples=samples,
    )


class EvalBase(ABC):
    """One evaluation: its data, and how one item of it is run.

    Args:
        pass_at_n: samples that count for pass@n.
        pass_at_n_samples: samples that are drawn for it.
        attributes: become attributes: temperature, top_p, max_tokens, n, eval_dir, model_name, or your own.
    """

    def __init__(self, pass_at_n: int = 1, pass_at_n_samples: int = 1, **attributes: Any) -> None:
        self.pass_at_n = pass_at_n
        self.pass_at_n_samples = pass_at_n_samples
        for name, value in attributes.items():
            setattr(self, name, value)
        self.data = self.setup_data()

    @abstractmethod
    def setup_data(self) -> list[Any]:
        """The items."""

    @abstractmethod
    async def run_item(self, server: ServerManager, data_item: Any) -> tuple[dict[str, float], list[Any]]:
        """Run one item: its metrics, which are averaged over the items, and its samples."""

    def get_generation_params(self) -> dict[str, Any]:
        """Sampling options; an attribute of the same name wins."""
        defaults = {
            "temperature": 0.0,
            "n": max(self.pass_at_n, self.pass_at_n_samples),
            "top_p": 1.0,
            "max_tokens": -1,
        }
        return {name: getattr(self, name, defaults[name]) for name in _SAMPLING}

    async def chat_completion(self, server: ServerManager, messages: list[Any]) -> ChatCompletion:
        """Ask with the sampling options. max_tokens -1 leaves the limit to the server."""
        options = self.get_generation_params()
        if options["max_tokens"] == -1:
            del options["max_tokens"]
        return await server.chat_completion(messages=messages, **options)

    @property
    def task_name(self) -> str:
        """`<Class>@<n>`, with `:<samples>` where more are drawn than count."""
        samples = f":{self.pass_at_n_samples}" if self.pass_at_n_samples != self.pass_at_n else ""
        return f"{type(self).__name__}@{self.pass_at_n}{samples}"

    async def __call__(self, server_manager: ServerManager) -> dict[str, float]:
        """As eval()."""
        return await self.eval(server_manager)

    async def eval(self, server_manager: ServerManager) -> dict[str, float]:
        """Run every item at once; the averaged metrics, which are printed, and written where eval_dir is set.

        Raises:
            ExceptionGroup: an item failed. A partial evaluation is not a result.
        """
        started = time.time()
        results = await map_items(
            self.data,
            lambda item: self.run_item(server_manager, item),
            concurrency=max(1, len(self.data)),
            description=self.task_name,
        )
        metrics = average(metrics for metrics, _ in results)
        evaluate_log(
            metrics,
            eval_dir=getattr(self, "eval_dir", None),
            task_name=self.task_name,
            model_name=getattr(self, "model_name", None) or server_manager.servers[0].config.model_name,
            start_time=started,
            generation_parameters=self.get_generation_params(),
            samples=[sample for _, samples in results for sample in samples],
        )
        return metrics


def average(metrics: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the items that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in metrics:
        for name, value in one.items():
            values[name].append(value)
    return {name: fmean(column) for name, column in values.items()}


async def eval_runner(eval_env: EvalBase, argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run an evaluation from the command line: `asyncio.run(eval_runner(MyEval()))`."""
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig
    from atroposlib.envs.server_handling.server_manager import ServerManager

    arguments = _parser(type(eval_env).__name__).parse_args(argv)
    config = APIServerConfig(
        base_url=openai_url(arguments.server_url), model_name=arguments.model_name, api_key=arguments.api_key
    )
    if arguments.eval_dir is not None:
        vars(eval_env)["eval_dir"] = arguments.eval_dir
    manager = ServerManager([config])
    try:
        return await eval_env(manager)
    finally:
        await manager.close()


def openai_url(url: str) -> str:
    """The URL of the OpenAI-compatible routes: with /v1, where no path is given."""
    return url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Run the evaluation {name}.",
        epilog="example: python my_eval.py --server-url http://localhost:9001 --model-name MODEL --eval-dir evals",
    )
    parser.add_argument("--server-url", default="http://localhost:8000", help="inference server, default: %(default)s")
    parser.add_argument("--model-name", default="default", help="as the server knows it, default: %(default)s")
    parser.add_argument("--api-key", default=None, help="default: OPENAI_API_KEY")
    parser.add_argument("--eval-dir", default=None, help="folder for metrics.json and samples.jsonl, default: none")
    return parser
