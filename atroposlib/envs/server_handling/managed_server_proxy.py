"""Token-exact sessions over HTTP: any OpenAI client talks to `/{uuid}/v1`, the environment fetches the nodes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from atroposlib.envs.server_handling.proxy.requests import ChatRequest, CreateSession, ProxyConfig
from atroposlib.envs.server_handling.proxy.sessions import ProxySession, ProxySessions, is_well, server_url
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.errors import AtroposError, ConfigError, UnknownSessionError

log = logging.getLogger(__name__)

SESSION_IDLE_S = 3600.0
EXAMPLES = """examples:
  python -m atroposlib.envs.server_handling.managed_server_proxy --config proxy.json
  python -m atroposlib.envs.server_handling.managed_server_proxy --config proxy.json --port 9200 --host 127.0.0.1

proxy.json:
  {"model_name": "Qwen/Qwen3-8B", "servers": [{"base_url": "http://localhost:9001/v1", "server_type": "vllm"}]}
"""


@dataclass
class _Backend:
    """The servers that the proxy speaks for; POST /setup puts others there."""

    manager: Any
    tokenizer: Any
    model_name: str
    is_ours: bool = False
    """Whether closing the manager is up to the proxy."""

    async def replace(self, config: ProxyConfig) -> None:
        tokenizer = await asyncio.to_thread(load_tokenizer, config.tokenizer_name or config.model_name)
        manager = ServerManager(config.server_configs())
        await self.close()
        self.manager, self.tokenizer, self.model_name, self.is_ours = manager, tokenizer, config.model_name, True

    async def close(self) -> None:
        if self.is_ours:
            await self.manager.close()


def create_app(
    server_manager: Any, tokenizer: Any, model_name: str = "unknown", *, session_idle_s: float = SESSION_IDLE_S
) -> FastAPI:
    """The proxy as an application; it does not close `server_manager`.

    Args:
        server_manager: a ServerManager, or anything with `servers`.
        session_idle_s: a session that nobody used for so long is forgotten.
    """
    backend = _Backend(server_manager, tokenizer, model_name)
    sessions = ProxySessions(idle_s=session_idle_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(title="managed server proxy", lifespan=lifespan)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(AtroposError, _answer_error)
    _add_server_routes(app, backend, sessions)
    _add_session_routes(app, backend, sessions)
    _add_chat_routes(app, backend, sessions)
    return app


def openai_error(status_code: int, message: str, error_type: str = "invalid_request_error") -> JSONResponse:
    """An error in the form of the OpenAI API."""
    body = {"error": {"message": message, "type": error_type, "code": status_code}}
    return JSONResponse(status_code=status_code, content=body)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        asyncio.run(_serve(_read_config(arguments.config), arguments))
    except ConfigError as error:
        print(f"error: {error}\nhint: --help shows the form of the file", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        pass


# Routes


def _add_server_routes(app: FastAPI, backend: _Backend, sessions: ProxySessions) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        servers = backend.manager.servers
        return {
            "status": "ok",
            "model": backend.model_name,
            "sessions": len(sessions.list()),
            "servers": len(servers),
            "healthy_servers": sum(map(is_well, servers)),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": backend.model_name, "object": "model", "created": 0, "owned_by": "atropos"}
        return {"object": "list", "data": [model]}

    @app.post("/setup", response_model=None)
    async def setup(config: ProxyConfig) -> dict[str, Any] | JSONResponse:
        try:
            await backend.replace(config)
        except ConfigError as error:
            return openai_error(400, str(error))
        # Their servers are closed.
        sessions.clear()
        return {"status": "ok", "servers": len(config.servers), "model_name": config.model_name}

    @app.get("/servers")
    async def servers() -> dict[str, Any]:
        return {"servers": [_described(index, server) for index, server in enumerate(backend.manager.servers)]}


def _add_session_routes(app: FastAPI, backend: _Backend, sessions: ProxySessions) -> None:
    @app.post("/sessions/create", response_model=None)
    async def create_session(request: CreateSession) -> dict[str, Any] | JSONResponse:
        try:
            session = sessions.create(backend.manager, backend.tokenizer, **request.model_dump())
        except ConfigError as error:
            return openai_error(404, str(error))
        return {
            "uuid": session.uuid,
            "model_name": backend.model_name,
            "tool_parser": session.tool_parser,
            "base_url": session.base_url,
            "created_at": session.created_at,
        }

    @app.get("/sessions")
    async def list_sessions() -> dict[str, Any]:
        return {"sessions": [_summary(session, backend.model_name) for session in sessions.list()]}

    @app.get("/{session_uuid}/nodes")
    async def nodes(session_uuid: str) -> dict[str, Any]:
        with sessions.use(session_uuid) as session:
            return {"nodes": [node.model_dump() for node in session.nodes]}

    @app.delete("/{session_uuid}")
    async def delete_session(session_uuid: str) -> dict[str, Any]:
        sessions.delete(session_uuid)
        return {"status": "deleted", "uuid": session_uuid}


def _add_chat_routes(app: FastAPI, backend: _Backend, sessions: ProxySessions) -> None:
    @app.post("/{session_uuid}/v1/chat/completions", response_model=None)
    async def chat(session_uuid: str, request: ChatRequest) -> dict[str, Any] | JSONResponse:
        with sessions.use(session_uuid) as session:
            if (refusal := _refusal(request)) is not None:
                return refusal
            try:
                answer = await session.managed.chat_completion(
                    messages=request.messages,
                    tools=request.tools,
                    tool_choice=request.tool_choice,
                    **request.sampling(),
                )
            except Exception as error:
                # Whatever it is, a template that refuses the messages included, the caller hears it in its own terms.
                is_known = isinstance(error, AtroposError)
                log.warning("session %s failed: %s", session_uuid, error, exc_info=None if is_known else error)
                return openai_error(500, f"{type(error).__name__}: {error}", "server_error")
        return {**answer.model_dump(mode="json", exclude={"usage"}), "model": backend.model_name}

    @app.post("/{session_uuid}/v1/chat/completions/render", response_model=None)
    async def render(session_uuid: str, request: ChatRequest) -> dict[str, Any] | JSONResponse:
        with sessions.use(session_uuid) as session:
            if (refusal := _refusal(request)) is not None:
                return refusal
            text, token_ids = session.managed.render(request.messages, request.tools)
        return {"prompt_text": text, "token_ids": token_ids, "num_tokens": len(token_ids)}


def _refusal(request: ChatRequest) -> JSONResponse | None:
    if not request.messages:
        return openai_error(400, "messages is empty: a chat needs at least one")
    if request.stream:
        return openai_error(400, "stream is not supported: a session answers whole")
    return None


def _described(index: int, server: Any) -> dict[str, Any]:
    config = getattr(server, "config", None)
    return {
        "index": index,
        "base_url": server_url(server),
        "healthy": is_well(server),
        "model_name": getattr(config, "model_name", None),
        "server_type": getattr(config, "server_type", None),
    }


def _summary(session: ProxySession, model_name: str) -> dict[str, Any]:
    return {
        "uuid": session.uuid,
        "model_name": model_name,
        "base_url": session.base_url,
        "created_at": session.created_at,
        "last_accessed": session.last_accessed,
        "num_nodes": len(session.nodes),
    }


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UnknownSessionError):
        return openai_error(404, str(error))
    log.warning("request failed: %s", error)
    return openai_error(500, str(error), "server_error")


async def _answer_validation(_: Request, error: Exception) -> JSONResponse:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    text = "; ".join(f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in problems)
    return openai_error(422, f"the request is not valid: {text}")


# The process


async def _serve(config: ProxyConfig, arguments: argparse.Namespace) -> None:
    import uvicorn

    backend = _Backend(None, None, config.model_name)
    await backend.replace(config)
    try:
        app = create_app(backend.manager, backend.tokenizer, config.model_name, session_idle_s=arguments.session_idle_s)
        settings = uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning")
        print(f"managed server proxy on http://{arguments.host}:{arguments.port}", flush=True)
        await uvicorn.Server(settings).serve()
    finally:
        await backend.close()


def _read_config(path: Path) -> ProxyConfig:
    try:
        return ProxyConfig.model_validate(msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValidationError) as error:
        raise ConfigError(f"{path} is not a proxy configuration: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="managed_server_proxy",
        description="Token-exact sessions over HTTP, for agents that speak the OpenAI API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="JSON file, see below")
    parser.add_argument("--port", type=int, default=9100, help="default: %(default)s")
    parser.add_argument(
        "--host", default="0.0.0.0", help="default: %(default)s; the proxy asks for no key, so keep its network closed"
    )
    parser.add_argument(
        "--session-idle-s",
        type=float,
        default=SESSION_IDLE_S,
        help="seconds after which an unused session is forgotten; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    main()
