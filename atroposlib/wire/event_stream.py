"""Server-sent events, read line by line."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

from atroposlib.wire.models import Event


async def parse_events(lines: AsyncIterable[str]) -> AsyncIterator[Event]:
    """The events of a stream; comments (keep-alives) and fields other than data are passed over.

    Args:
        lines: without their line ends; an empty one ends an event.
    """
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            yield Event.model_validate_json("\n".join(data))
            data = []
