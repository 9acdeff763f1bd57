"""The rollout server's old HTTP routes, as the console scripts of old use them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx

from atroposlib.errors import AtroposError, NoBatchError, ServerUnreachableError

TIMEOUT_S = 30.0


class TrainerRegisteredError(AtroposError):
    """A trainer owns the rollout server's run; a second consumer would take its data away."""

    code: ClassVar[str] = "trainer_registered"
    hint = "wait until it has ended, use another server (--api-url), or end its run with --force"


class OldRoutes:
    """The routes as calls.

    Args:
        url: of the rollout server.
        token: bearer token; None: ATROPOS_TOKEN, where it is set.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url if "://" in url else f"http://{url}"
        token = token or os.environ.get("ATROPOS_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=self.url.rstrip("/"), timeout=TIMEOUT_S, headers=headers)

    def get(self, path: str) -> Any:
        """The JSON of a GET, or its text.

        Raises:
            ServerUnreachableError: nobody answers.
            AtroposError: the server refuses.
        """
        return self._request("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST; raises as get()."""
        return self._request("POST", path, json=body)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._client.request(method, path, **options)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerUnreachableError(
                f"the rollout server at {self.url} does not answer ({error}); start it with run-api, or name it with --api-url"
            ) from error
        if answer.is_error:
            raise AtroposError(f"{method} {path} was refused with {answer.status_code}: {answer.text[:500]}")
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.json() if is_json else answer.text


class OwnRun:
    """A run of our own at the server: registered as a trainer, given back at the end.

    Args:
        routes: of the server.
        name: what the run is for; shows in its group name.
    """

    def __init__(self, routes: OldRoutes, name: str) -> None:
        self._routes = routes
        self.group = f"{name}-{uuid.uuid4().hex[:8]}"

    def open(self, *, batch_size: int, max_token_len: int, num_steps: int, is_forced: bool) -> None:
        """Register.

        Args:
            batch_size: sequences.
            is_forced: end a run that is there.
        Raises:
            TrainerRegisteredError: a trainer is registered, and nothing was changed.
        """
        if self._routes.get("/info")["batch_size"] != -1:
            if not is_forced:
                group = self._routes.get("/wandb_info").get("group")
                raise TrainerRegisteredError(f"a trainer is registered at {self._routes.url} (group {group!r})")
            self._routes.get("/reset_data")
        self._routes.post(
            "/register",
            {
                "wandb_group": self.group,
                "wandb_project": self.group,
                "batch_size": batch_size,
                "max_token_len": max_token_len,
                "checkpoint_dir": "",
                "save_checkpoint_interval": -1,
                "starting_step": 0,
                "num_steps": num_steps,
            },
        )
        if self._routes.get("/wandb_info").get("group") != self.group:
            # Old servers drop a registration silently while data of nobody is queued.
            raise TrainerRegisteredError(f"the server at {self._routes.url} did not take the registration")

    def batch(self) -> list[dict[str, Any]]:
        """The groups of the next batch; empty when none is there yet."""
        groups: list[dict[str, Any]] = self._routes.get("/batch")["batch"] or []
        return groups

    def close(self) -> None:
        """End the run, where it is still ours, so that the next trainer is not refused."""
        if self._routes.get("/wandb_info").get("group") == self.group:
            self._routes.get("/reset_data")


def groups_of(run: OwnRun, *, patience_s: float, poll_s: float, clock: Any, sleep: Any) -> Iterator[dict[str, Any]]:
    """Every group of every batch, waiting for the next.

    Args:
        patience_s: seconds without a batch.
    Raises:
        NoBatchError: patience is over.
    """
    last = clock()
    while True:
        groups = run.batch()
        yield from groups
        if groups:
            last = clock()
        elif clock() - last > patience_s:
            raise NoBatchError(
                f"no batch came within {patience_s:.0f} s; is an environment connected (python env.py serve), "
                "and can its groups fill a batch? --patience waits longer"
            )
        else:
            sleep(poll_s)
