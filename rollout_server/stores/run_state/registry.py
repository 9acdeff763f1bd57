"""Who takes part in the run: environments and inference servers."""

from __future__ import annotations

from dataclasses import replace

from atroposlib.errors import ConfigError
from atroposlib.wire.models import EnvInfo, EnvRequest, InferenceServer, RunRequest
from rollout_server.stores.changes import EnvRow
from rollout_server.stores.run_state.state import EnvState, RunState


def register_env(state: RunState, request: EnvRequest) -> EnvInfo:
    """See Store.register_env."""
    run = state.require_run()
    _check_group_size(run.request, request)
    known = {env.row.request.name: env_id for env_id, env in state.envs.items()}
    env_id = known.get(request.name, max(state.envs, default=-1) + 1)
    session = state.envs[env_id].row.session + 1 if env_id in state.envs else 1
    state.void_tickets(state.flight.of_env(env_id), reason="env_restarted")
    row = state.changes.envs[env_id] = EnvRow(env_id, request, session)
    state.envs[env_id] = EnvState(row, state.clock())
    state.note_event("env_joined", f"environment {request.name}: id {env_id}, session {session}")
    return EnvInfo(env_id=env_id, session=session, run=run.info())


def _check_group_size(run: RunRequest, request: EnvRequest) -> None:
    if run.group_size is not None and request.group_size != run.group_size:
        raise ConfigError(
            f"environment {request.name!r} has group_size={request.group_size}, the run wants {run.group_size};"
            f" set --group_size {run.group_size}"
        )


def touch_env(state: RunState, env_id: int) -> bool:
    """See Store.touch_env."""
    env = state.envs.get(env_id)
    if env is not None:
        env.last_seen = state.clock()
    return env is not None


def disconnect_env(state: RunState, env_id: int) -> bool:
    """See Store.disconnect_env."""
    env = state.envs.get(env_id)
    if env is None:
        return False
    state.void_tickets(state.flight.of_env(env_id), reason="env_left")
    env.is_waiting = False
    env.row = state.changes.envs[env_id] = replace(env.row, is_connected=False)
    state.queue_changed = state.capacity_changed = True
    state.note_event("env_left", f"environment {env.row.request.name} said goodbye")
    return True


def register_server(state: RunState, server: InferenceServer) -> None:
    """See Store.register_server."""
    known = state.servers.get(server.url)
    state.servers[server.url] = (server, state.clock())
    if known is None or known[0] != server:
        _note_servers(state)


def remove_server(state: RunState, url: str) -> bool:
    """See Store.remove_server."""
    if state.servers.pop(url, None) is None:
        return False
    _note_servers(state)
    return True


def _note_servers(state: RunState) -> None:
    state.changes.servers = {url: server for url, (server, _) in state.servers.items()}
