"""Which servers of the rollout server's registry rollouts may come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atroposlib.wire.models import InferenceServer, Status


def servable_urls(status: Status) -> list[str]:
    """URLs, with /v1, of the policy servers whose tokens can still be trained on: for ServerManager.sync_servers.

    A server that joined late, was restarted or missed publications is left out until it runs a version within the
    staleness bound. Whether a server answers is for the circuit breaker to find out, not for the registry.
    """
    if status.policy_version < 0:
        return []
    oldest = max(0, status.policy_version - status.max_staleness)
    servers = [entry.server for entry in status.inference_servers]
    return [f"{server.url.rstrip('/').removesuffix('/v1')}/v1" for server in servers if _can_serve(server, oldest)]


def _can_serve(server: InferenceServer, oldest: int) -> bool:
    is_current = server.policy_version is not None and server.policy_version >= oldest
    return server.role == "policy" and is_current and not server.problem
