"""atropos mock-inference: an inference server without a model, for trying out environments."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError
from atroposlib.testing.mock.behaviour import FAULT_KINDS

if TYPE_CHECKING:
    from atroposlib.testing.mock_inference import MockInferenceServer, Policy

EXAMPLES = """routes:
  OpenAI   /v1/chat/completions  /v1/completions  /v1/models
  vLLM     /inference/v1/generate  /generate  /health  /weight_info  /update_weight_version  /metrics
  SGLang   /generate  /health  /get_model_info  /update_weights_from_disk
  TRL      /generate/
  mock     POST /mock/version {"version": "4"}   GET /mock/stats

faults, each with its probability (--fault refuse=0.01 --fault hang=0.001):
%s

examples:
  atropos mock-inference                                       random words on port 9001
  atropos mock-inference --text 42                             always the same answer
  atropos mock-inference --one-of 4 --one-of 5                 rewards that differ within a group
  atropos mock-inference --text 'Is it 5?' --text 'It is 7.'   one text a turn
  atropos mock-inference --rule '(\\d+) times 1=>\\1' --rule '.*=>0'
  atropos mock-inference --policy my_policy.py                 def reply(prompt): return prompt.text[-1]
  atropos mock-inference --latency 2 --sigma 0.8 --per-token 0.01 --stragglers 0.02 --max-running 64
  curl -s localhost:9001/v1/chat/completions -d '{"messages": [{"role": "user", "content": "hi"}]}'
  python my_env.py process --openai.base_url http://localhost:9001/v1 --openai.server_type vllm --openai.model_name mock
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    faults = "\n".join(f"  {name:<9} {meaning}" for name, meaning in FAULT_KINDS.items())
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "mock-inference",
        help="serve scripted answers over the routes of OpenAI, vLLM, SGLang and TRL",
        description="An inference server that holds no model: scripted answers, latency, faults, weight versions.",
        epilog=EXAMPLES % faults,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=9001, help="0: any free one; default: %(default)s")
    parser.add_argument("--model-name", default="mock", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="folder or Hugging Face name; default: one id a byte, 259 in all"
    )
    parser.add_argument(
        "--save-tokenizer",
        metavar="DIR",
        help="write the tokenizer of bytes there first, for --tokenizer_name of yours",
    )
    parser.add_argument("--weight-version", default="0", metavar="V", help="policy version it runs; default: 0")
    parser.add_argument("--seed", type=int, default=0, help="of replies, latencies and faults; default: 0")
    add_answers(parser)
    _add_behaviour(parser)
    parser.set_defaults(run=run)


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Add the options that chosen_policy reads."""
    group = parser.add_argument_group("answers, one kind of")
    group.add_argument("--text", action="append", metavar="TEXT", help="the answer; again: of the next turn")
    group.add_argument("--one-of", action="append", metavar="TEXT", help="by chance; give it several times")
    group.add_argument("--rule", action="append", metavar="REGEX=>REPLY", help="the first that is found decides")
    group.add_argument("--echo", action="store_true", help="what the user said last")
    group.add_argument("--random", type=int, metavar="N", help="up to N random words; the default, with N = 8")
    group.add_argument("--policy", metavar="FILE.py[:NAME]", help="a function reply(prompt) that returns text or ids")


def _add_behaviour(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("time and faults")
    group.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="median of a generation")
    group.add_argument("--sigma", type=float, default=0.0, help="lognormal spread of --latency; 0: constant")
    group.add_argument("--per-token", type=float, default=0.0, metavar="SECONDS", help="added for each token")
    group.add_argument("--stragglers", type=float, default=0.0, metavar="SHARE", help="part that takes far longer")
    group.add_argument("--straggler-factor", type=float, default=10.0, metavar="X", help="how much; default: 10")
    group.add_argument("--max-running", type=int, metavar="N", help="generations at once, the others queue")
    group.add_argument("--fault", action="append", default=[], metavar="KIND=P", help="probability of a fault")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    server = build_server(arguments)
    if arguments.save_tokenizer:
        from atroposlib.testing.byte_tokenizer import save_byte_tokenizer

        print(f"tokenizer of bytes: --tokenizer_name {save_byte_tokenizer(Path(arguments.save_tokenizer))}", flush=True)
    _raise_file_limit()
    try:
        asyncio.run(_serve(server))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror}; choose another --port"
        ) from error
    return 0


def build_server(arguments: argparse.Namespace) -> MockInferenceServer:
    """The server that the options describe.

    Raises:
        ConfigError: options that contradict each other, or an unknown fault.
    """
    from atroposlib.testing.mock_inference import Latency, MockInferenceServer

    tokenizer = None
    if arguments.tokenizer:
        from atroposlib.envs.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
    return MockInferenceServer(
        chosen_policy(arguments),
        weight_version=arguments.weight_version,
        latency_s=Latency(
            base_s=arguments.latency,
            sigma=arguments.sigma,
            per_token_s=arguments.per_token,
            straggler_share=arguments.stragglers,
            straggler_factor=arguments.straggler_factor,
        ),
        host=arguments.host,
        port=arguments.port,
        fault_rates=parse_faults(arguments.fault),
        tokenizer=tokenizer,
        model_name=arguments.model_name,
        max_running=arguments.max_running,
        seed=arguments.seed,
        keeps_requests=False,
    )


def chosen_policy(arguments: argparse.Namespace) -> Policy:
    """The one kind of answer that was asked for."""
    from atroposlib.testing.mock.policies import Echo, OneOf, RandomWords, Rules, Script, load_policy, parse_rule

    makers: dict[str, Any] = {
        "text": lambda: Script(tuple(arguments.text)),
        "one_of": lambda: OneOf(tuple(arguments.one_of)),
        "rule": lambda: Rules(tuple(parse_rule(text) for text in arguments.rule)),
        "echo": Echo,
        "random": lambda: RandomWords(arguments.random),
        "policy": lambda: load_policy(arguments.policy),
    }
    asked = [name for name in makers if getattr(arguments, name)]
    if len(asked) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigError(f"{flags} are different kinds of answer; give one of them")
    policy: Policy = makers[asked[0]]() if asked else RandomWords()
    return policy


def parse_faults(texts: list[str]) -> Any:
    """`KIND=P` each."""
    from atroposlib.testing.mock_inference import FaultRates

    rates: dict[str, float] = {}
    for text in texts:
        kind, _, probability = text.partition("=")
        try:
            rates[kind] = float(probability)
        except ValueError as error:
            raise ConfigError(f"--fault is KIND=P, e.g. refuse=0.01, not {text!r}") from error
        if kind not in FAULT_KINDS:
            raise ConfigError(f"unknown fault {kind!r}; one of {', '.join(FAULT_KINDS)}")
    return FaultRates(**rates)


async def _serve(server: MockInferenceServer) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with server:
        print(f"MOCK inference server on {server.url} (no model), answers: {server.policy}", flush=True)
        await stopped.wait()


def _raise_file_limit() -> None:
    """Allow as many connections as the system lets us: the usual 1,024 are too few."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
