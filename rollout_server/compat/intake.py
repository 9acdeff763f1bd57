"""Groups of old clients, from the body of a request to the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import Blob, Group, encode_group, read_blobs
from atroposlib.wire.json_codec import (
    GroupFieldError,
    ScoredData,
    group_from_json,
    read_scored_data,
    split_scored_data_list,
)
from rollout_server.compat.answering import work
from rollout_server.compat.dedupe import Deduplication, content_digest
from rollout_server.compat.messages import Location, parse, refusal
from rollout_server.config import ServerConfig
from rollout_server.group_limits import check_groups
from rollout_server.services import Services
from rollout_server.stores.base import Payload


@dataclass(frozen=True)
class Intake:
    """A group, checked and encoded."""

    group: Group
    blob: Blob
    previous_id: str | None
    """The id that it would have got a window ago; see dedupe."""


@dataclass(frozen=True)
class Reader:
    """Makes checked blobs of a body. Thread-safe.

    Args:
        config: limits of the server.
        dedupe: makes the group ids.
        sender: the host that sent the body.
    """

    config: ServerConfig
    dedupe: Deduplication
    sender: str

    def one(self, body: Payload) -> list[Intake]:
        """The body of POST /scored_data. Raises RequestValidationError."""
        return [self._checked(body, ("body",), Counter())]

    def many(self, body: Payload) -> list[Intake]:
        """The body of POST /scored_data_list; one bad group refuses them all. Raises RequestValidationError."""
        seen: Counter[str] = Counter()
        parts = parse(split_scored_data_list, body)
        return [self._checked(part, ("body", index), seen) for index, part in enumerate(parts)]

    def _checked(self, text: Payload | msgspec.Raw, location: Location, seen: Counter[str]) -> Intake:
        data = parse(read_scored_data, text, location)
        try:
            return self._encoded(data, seen)
        except GroupFieldError as error:
            raise refusal("value_error", (*location, error.field), str(error), getattr(data, error.field)) from error
        except GroupFormatError as error:
            raise refusal("value_error", location, str(error), None) from error
        except (OverflowError, RecursionError) as error:
            raise refusal("value_error", location, f"a value cannot be kept: {error}", None) from error

    def _encoded(self, data: ScoredData, seen: Counter[str]) -> Intake:
        group = group_from_json(data, group_id="")
        digest = content_digest(group, sender=self.sender) if self.dedupe.is_on else ""
        ids = self.dedupe.ids(digest, ordinal=seen[digest])
        seen[digest] += 1
        group = replace(group, group_id=ids.current)
        return Intake(group, _blob(group, self.config), ids.previous)


def _blob(group: Group, config: ServerConfig) -> Blob:
    blobs = list(read_blobs(encode_group(group)))
    check_groups(blobs, config)
    return blobs[0]


async def take_in(services: Services, body: Payload, read: Callable[[Payload], list[Intake]]) -> int:
    """Keep the groups of a body; returns how many there were, repetitions included.

    Raises:
        RequestValidationError: what is wrong with them. Nothing was kept.
        QueueFullError: the store holds as much as it may.
    """
    intakes = await work(len(body), read, body)
    known = await services.store.known([intake.previous_id for intake in intakes if intake.previous_id is not None])
    blobs = [_as_known(intake, known, services.config) for intake in intakes]
    if blobs:
        try:
            await services.store.append(blobs, is_strict=False)
        except GroupFormatError as error:
            raise refusal("value_error", ("body",), str(error), None) from error
    for blob in blobs:
        services.legacy.note_group(blob.header.env_id, blob.n_sequences)
    return len(blobs)


def _as_known(intake: Intake, known: set[str], config: ServerConfig) -> Blob:
    """A repetition across the edge of two windows goes under the id that its first sending got, and is counted there."""
    if intake.previous_id is None or intake.previous_id not in known:
        return intake.blob
    return _blob(replace(intake.group, group_id=intake.previous_id), config)
