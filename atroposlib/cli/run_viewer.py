"""What view-run and view-run-multimodal share: options and the loop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from atroposlib.cli import connection
from atroposlib.cli.example_page import LOOPBACK, Decode, Examples, page_server
from atroposlib.cli.old_routes import OldRoutes

EXAMPLES = """Unlike its ancestor it registers no trainer and resets nothing: it only reads GET /latest_example, and the page is
open to this machine alone. Progress, queue and environments: atropos view.

examples:
  {prog}                                      then open http://localhost:9001
  {prog} --api-url http://gpu-host:8000 --port 9100
"""


def main(argv: Sequence[str] | None, *, prog: str, tokenizer: str, has_images: bool) -> int:
    """Serve the page until Ctrl-C; the exit status."""
    arguments = _parser(prog, tokenizer).parse_args(argv)
    with OldRoutes(arguments.api_url, arguments.token) as routes:
        examples = Examples(routes, decoder(arguments.tokenizer), has_images=has_images)
        try:
            server = page_server(examples, arguments.port)
        except OSError as error:
            print(f"error: cannot listen on port {arguments.port}: {error.strerror}", file=sys.stderr)
            print("hint: choose another one with --port", file=sys.stderr)
            return 1
        with server:
            print(f"groups of {routes.url} on http://{LOOPBACK}:{server.server_port}; Ctrl-C ends it", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return 0
    return 0


def decoder(name: str) -> Decode:
    """Tokens to text; the tokenizer is loaded when the first group needs it."""

    @lru_cache(maxsize=1)
    def tokenizer() -> Any:
        from atroposlib.envs.tokenizers import load_tokenizer

        return load_tokenizer(name)

    return lambda tokens: str(tokenizer().decode(tokens))


def _parser(prog: str, tokenizer: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A page of the groups that a rollout server received last.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=9001, help="of the page, default: %(default)s")
    parser.add_argument("--api-url", default=connection.DEFAULT_URL, help="rollout server, default: %(default)s")
    parser.add_argument(
        "--tokenizer", default=tokenizer, help="decodes groups that hold no messages, default: %(default)s"
    )
    parser.add_argument("--group-size", type=int, default=2, help="accepted; the page registers nothing")
    parser.add_argument("--max-token-len", type=int, default=2048, help="accepted; the page registers nothing")
    connection.add_arguments(parser)
    return parser
