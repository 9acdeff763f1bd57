"""Going down in order: the flag that everybody looks at while the server drains."""

from __future__ import annotations

from collections.abc import Callable


class Drain:
    """Set once, when the process was asked to end."""

    def __init__(self) -> None:
        self.is_draining = False
        self.wake: Callable[[], None] = lambda: None
        """Makes the long-polls look up; set by the application when it has started."""

    def begin(self) -> None:
        """From now on /readyz says 503, and long-polls answer with what they have."""
        self.is_draining = True
        self.wake()
