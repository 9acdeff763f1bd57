"""Which kind of session an environment gets: token-exact, with placeholder tokens, or in a proxy."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.pool.seat import Seat
from atroposlib.envs.server_handling.pool.sticky_server import StickyServer
from atroposlib.envs.server_handling.sessions.token_source import ALLOW_DUMMY
from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_manager import ServerManager

log = logging.getLogger(__name__)

PROXY_URL = "ATROPOS_PROXY_URL"
DEFAULT_TOOL_PARSER = "hermes"


def dummies_allowed() -> bool:
    """Whether sessions may hold placeholder tokens: only asked where no server returns token ids.

    Raises:
        NotImplementedError: they may not.
    """
    if os.environ.get(ALLOW_DUMMY, "").lower() not in ("1", "true", "yes"):
        raise NotImplementedError(
            "managed_server needs a server that returns token ids: use --openai.server_type vllm; openai servers are "
            f"for evaluation and judges. For a trial without training set {ALLOW_DUMMY}=1: tokens are made up then"
        )
    _warn_of_dummies()
    return True


def managed_session(manager: ServerManager, seat: Seat, tokenizer: Any, preserve_think_blocks: bool) -> Any:
    """A session that settles on a server; its kind is that of the server."""
    from atroposlib.envs.server_handling.managed_server import DummyManagedServer, ManagedServer

    # A hand-made server with upstream's token method only is spoken to directly.
    server: Any = StickyServer(manager, seat.server) if hasattr(seat.server, "sample_tokens") else seat.server
    if not seat.returns_tokens:
        return DummyManagedServer(server, tokenizer=tokenizer)
    return ManagedServer(
        server, tokenizer=tokenizer, tool_parser=manager.tool_parser, preserve_think_blocks=preserve_think_blocks
    )


@asynccontextmanager
async def proxy_session(
    proxy_url: str | None,
    base_url: str | None,
    tool_parser: str | None,
    model_name: str,
    *,
    require_version: bool = False,
) -> AsyncIterator[Any]:
    """A session in the managed-server proxy, deleted there at the end.

    Args:
        base_url: of the inference server that the proxy uses; None: it chooses.
        require_version: refuse sampled tokens without a policy version.
    Raises:
        ConfigError: the proxy's address is unknown.
    """
    if not proxy_url:
        raise ConfigError(f"use_proxy=True needs the proxy's address: set proxy_url or the variable {PROXY_URL}")
    from atroposlib.envs.server_handling.proxy_client import create_proxy_session

    session = await create_proxy_session(
        proxy_url,
        base_url=base_url,
        tool_parser=tool_parser or DEFAULT_TOOL_PARSER,
        model_name=model_name,
        require_version=require_version,
    )
    async with session:
        yield session


@cache
def _warn_of_dummies() -> None:
    log.warning("%s is set: sessions hold made-up tokens, nothing can be trained on them", ALLOW_DUMMY)
