"""Options of the rollout server."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

Role = Literal["env", "trainer", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
MIN_TOKEN_CHARACTERS = 16


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _read_token_file(path: Path) -> dict[str, list[str]]:
    try:
        tokens = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # The text of a YAML error quotes the file, and with it tokens.
        raise ValueError(f"token_file={path} cannot be read as YAML ({type(error).__name__})") from None
    is_book = isinstance(tokens, dict) and all(
        role in ROLES and isinstance(known, list) and all(isinstance(token, str) for token in known)
        for role, known in tokens.items()
    )
    if not is_book:
        raise ValueError(f"token_file={path} must hold a list of tokens for each role: {{{', '.join(ROLES)}}}")
    book: dict[str, list[str]] = tokens
    return book


class ServerConfig(BaseModel):
    """Checked whole at start, handed down, never written to."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs tokens, or insecure."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 picks a free port."""
    store: Literal["sqlite", "memory", "redis"] = "sqlite"
    """sqlite: files in data_dir; memory: lost with the process; redis: shared by several rollout servers."""
    data_dir: Path = Path("rollout_server_data")
    """Folder of the embedded store; a server started again on it goes on where it was."""
    synchronous: Literal["normal", "full"] = "full"
    """SQLite durability: normal survives SIGKILL of any process, full also a power cut."""
    redis_url: str | None = None
    """For store=redis, e.g. redis://localhost:6379/0."""
    redis_namespace: str = Field(default="atropos", min_length=1, max_length=100)
    """Prefix of the keys in Redis: servers with the same one serve the same run."""
    retain_bytes: int = Field(default=10 << 30, ge=-1)
    """Payload of committed groups kept for export and replay, oldest go first; 0 keeps none, -1 keeps all."""

    ticket_ttl_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """A ticket that is not renewed for this long is void, and its place goes to another group."""
    env_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """An environment that is silent for this long is shown as lost."""
    trainer_timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """A trainer that is silent for this long is shown as lost."""
    allocation_wait_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long a batch waits for an environment with min_batch_allocation before it gives its share back."""
    legacy_dedupe_window_s: float = Field(default=120.0, ge=0, allow_inf_nan=False)
    """Identical groups posted again by old clients within this window are duplicates; 0 switches it off."""

    max_body_bytes: int = Field(default=256 << 20, ge=1 << 10)
    """Largest request body, as sent."""
    max_decompressed_bytes: int = Field(default=256 << 20, ge=1 << 10)
    """Largest request body after gzip is undone."""
    max_inflight_bytes: int = Field(default=1 << 30, ge=1 << 10)
    """Request bodies in memory at once; beyond it requests are answered 429."""
    max_queued_bytes: int = Field(default=8 << 30, ge=1 << 10)
    """Payload that may wait for the trainer; beyond it groups are answered 429."""
    max_group_sequences: int = Field(default=4096, ge=1)
    """Sequences of one group."""
    max_sequence_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens of one sequence."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Token ids at or above it are refused; absent, every id that is not negative passes."""
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """A body must arrive within this time and a second more for every 64 KiB of it; slower ones are answered 408."""
    header_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """A connection whose request headers are not complete after this long is closed."""
    max_header_bytes: int = Field(default=32 << 10, ge=1 << 10)
    """Request line and headers together; larger ones are answered 431."""
    max_connections: int = Field(default=4096, ge=1)
    """Open connections; further ones are answered 503 and closed."""

    tokens: dict[Role, Annotated[tuple[SecretStr, ...], BeforeValidator(_split)]] = {}
    """Bearer tokens by role (env, trainer, admin). From a file or ATROPOS_SERVER_TOKENS_ENV, _TRAINER, _ADMIN."""
    token_file: Path | None = None
    """YAML file {role: [token, ...]}, added to tokens."""
    insecure: bool = False
    """Serve everybody who reaches the port, on any address, without tokens."""
    ssl_certfile: Path | None = None
    """PEM certificate chain: serve https."""
    ssl_keyfile: Path | None = None
    """PEM private key of ssl_certfile."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    """Web origins whose pages may call the server, e.g. https://ui.example.org; none by default."""

    drain_delay_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """After SIGTERM the server answers on for this long, with /readyz at 503, so that load balancers notice."""
    drain_timeout_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """After that, requests under way have this long to finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message to show; debug adds a line a request."""
    log_format: Literal["text", "json"] = "text"
    """json: one object a line, with request id, run, step and group where they are known."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def has_tokens(self) -> bool:
        """Whether callers must show a token."""
        return any(self.tokens.values())

    @model_validator(mode="before")
    @classmethod
    def _add_token_file(cls, values: Any) -> Any:
        given = values.get("tokens") or {}
        if not values.get("token_file") or not isinstance(given, dict):
            return values
        book = _read_token_file(Path(values["token_file"]))
        tokens = {role: [*_split(given.get(role, [])), *book.get(role, [])] for role in ROLES}
        return {**values, "tokens": {**given, **{role: known for role, known in tokens.items() if known}}}

    @model_validator(mode="after")
    def _redis_has_a_url(self) -> Self:
        if self.store == "redis" and self.redis_url is None:
            raise ValueError("store=redis needs redis_url, e.g. redis://localhost:6379/0")
        if self.store != "redis" and self.redis_url is not None:
            raise ValueError(
                f"redis_url is given, but store={self.store} does not use it; set store=redis or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _largest_body_fits_in_flight(self) -> Self:
        largest = max(self.max_body_bytes, self.max_decompressed_bytes)
        if self.max_inflight_bytes < largest:
            raise ValueError(
                f"max_inflight_bytes={self.max_inflight_bytes} is smaller than the largest body, {largest} bytes"
                " (max_body_bytes, max_decompressed_bytes); raise it, or lower those"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_long_and_belong_to_one_role(self) -> Self:
        seen: dict[str, Role] = {}
        for role, tokens in self.tokens.items():
            for token in tokens:
                text = token.get_secret_value()
                if not re.fullmatch(rf"[!-~]{{{MIN_TOKEN_CHARACTERS},}}", text):
                    raise ValueError(
                        f"a token of role {role} has {len(text)} characters, or others than visible ASCII;"
                        f" use {MIN_TOKEN_CHARACTERS} or more, e.g. from: openssl rand -hex 32"
                    )
                if seen.setdefault(text, role) != role:
                    raise ValueError(f"the roles {seen[text]} and {role} share a token; a token has one role")
        return self

    @model_validator(mode="after")
    def _is_open_on_loopback_only(self) -> Self:
        if not (self.is_loopback or self.has_tokens or self.insecure):
            raise ValueError(
                f"host={self.host} can be reached from other machines, and there are no tokens;"
                " give --token-file, or set --insecure to serve everybody"
            )
        return self

    @model_validator(mode="after")
    def _tls_files_come_in_pairs(self) -> Self:
        files = {"ssl_certfile": self.ssl_certfile, "ssl_keyfile": self.ssl_keyfile}
        for name, file in files.items():
            if file is None and any(files.values()):
                raise ValueError(f"{name} is missing; https needs ssl_certfile and ssl_keyfile")
            if file is not None and not file.is_file():
                raise ValueError(f"{name}={file} is not a file")
        return self
