"""The body of POST /v1/groups, and what a group in it may hold as this server is configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import Blob
from rollout_server.config import ServerConfig
from rollout_server.http.limits import check_media_type, read_payload

GROUPS_MEDIA_TYPE = "application/vnd.atropos.groups"
GROUPS_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {GROUPS_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
ID_COLUMNS = ("tokens", "distill_token_ids", "labels")


async def read_groups_body(request: Request, config: ServerConfig) -> bytes | memoryview:
    """The body of a request that says it holds groups.

    Raises:
        MediaTypeError: it says something else (415).
        AtroposError: as limits.read_body.
    """
    check_media_type(request, GROUPS_MEDIA_TYPE, "application/octet-stream")
    return await read_payload(request, config)


def check_groups(blobs: Sequence[Blob], config: ServerConfig) -> None:
    """Refuse groups that are larger than the server takes, or hold tokens that the model does not have.

    Raises:
        GroupFormatError: names the group, the value and the limit.
    """
    for blob in blobs:
        _check_sizes(blob, config)
        if config.vocab_size is not None:
            _check_ids(blob, config.vocab_size)


def _check_sizes(blob: Blob, config: ServerConfig) -> None:
    if blob.n_sequences > config.max_group_sequences:
        raise GroupFormatError(
            f"group {blob.header.group_id!r}: {blob.n_sequences} sequences are over max_group_sequences={config.max_group_sequences};"
            " send smaller groups"
        )
    if blob.longest_sequence > config.max_sequence_tokens:
        raise GroupFormatError(
            f"group {blob.header.group_id!r}: a sequence of {blob.longest_sequence} tokens is over"
            f" max_sequence_tokens={config.max_sequence_tokens};"
            " send shorter ones"
        )


def _check_ids(blob: Blob, vocab_size: int) -> None:
    for name in ID_COLUMNS:
        column = blob.columns.get(name)
        if column is not None and int(column.max(initial=-1)) >= vocab_size:
            raise GroupFormatError(
                f"group {blob.header.group_id!r}: column {name!r} holds the id {int(column.max())}, expected ids below"
                f" vocab_size={vocab_size}"
            )
