"""Which sequence of a session a prompt continues, and where the new sequences go: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from atroposlib.envs.server_handling.sessions.sequence_node import SequenceNode


def node_to_extend(nodes: Iterable[SequenceNode], prompt: str, *, claimed: Collection[int] = ()) -> SequenceNode | None:
    """The longest sequence that the prompt continues exactly.

    Args:
        claimed: id() of sequences that a request in flight extends. Of two with the same text the free one is taken, so
            that concurrent rollouts that said the same thing each keep their own; then the first.
    """
    candidates = [node for node in nodes if prompt.startswith(node.exact_text)]
    return max(candidates, key=lambda node: (len(node.exact_text), id(node) not in claimed), default=None)


def place(nodes: list[SequenceNode], base: SequenceNode | None, new: list[SequenceNode]) -> None:
    """Put the first new sequence where its base was, and the others behind; change `nodes` in place."""
    # By identity: sequences with the same content are not the same, and another request may have moved this one.
    where = next((i for i, node in enumerate(nodes) if node is base), None)
    if where is None:
        nodes.extend(new)
        return
    nodes[where : where + 1] = new[:1]
    nodes.extend(new[1:])
