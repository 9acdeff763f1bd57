"""References inside values: ${key}, ${oc.env:NAME,default} and ${now:%Y-%m-%d}. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from atroposlib.errors import ConfigError

# A variable may hold a reference to itself; no value needs more than this.
_MOST_REFERENCES = 100
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")


class Interpolation:
    """Resolves the references of one configuration.

    Args:
        lookup: the value of a key, references in it unresolved. Raises ConfigError where there is no such key.
        environ: for ${oc.env:...}.
        now: for ${now:...}.
        timeless: keys that must not depend on the time: several processes resolve them, and must find the same value.
    """

    def __init__(
        self,
        lookup: Callable[[str], Any],
        *,
        environ: Mapping[str, str],
        now: datetime,
        timeless: Collection[str] = (),
    ) -> None:
        self._lookup = lookup
        self._environ = environ
        self._now = now
        self._timeless = timeless

    def resolve(self, value: Any, *, key: str) -> Any:
        """The value of `key` without references.

        A string that is one reference becomes what it refers to, with its type; else references become text.

        Raises:
            ConfigError: a cycle, an unknown key, a variable that is not set and has no default, or the time in a timeless key.
        """
        return self._resolve(value, (key,))

    def _resolve(self, value: Any, chain: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {name: self._resolve(item, (*chain[:-1], f"{chain[-1]}.{name}")) for name, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, chain) for item in value]
        if not isinstance(value, str):
            return value
        return self._text(value, chain)

    def _text(self, text: str, chain: tuple[str, ...]) -> Any:
        for _ in range(_MOST_REFERENCES):
            match = _INNERMOST.search(text)
            if match is None:
                break
            found = self._reference(match[1].strip(), chain)
            if match[0] == text:
                return found
            text = text[: match.start()] + _as_text(found) + text[match.end() :]
        if "${" in text:
            raise ConfigError(f"{chain[0]}: cannot resolve the references in {text!r}; they look like ${{run_dir}}")
        return text

    def _reference(self, name: str, chain: tuple[str, ...]) -> Any:
        kind, colon, argument = name.partition(":")
        if colon and kind in ("oc.env", "env"):
            return self._variable(argument, chain[0])
        if colon and kind == "now":
            return self._time(argument, chain[0])
        if colon:
            raise ConfigError(
                f"{chain[0]}: unknown reference ${{{name}}}; there are ${{key}}, ${{oc.env:NAME}}, ${{now:%Y}}"
            )
        if name in chain:
            raise ConfigError(
                f"these keys refer to each other in a circle: {' -> '.join((*chain, name))}; give one a value"
            )
        return self._resolve(self._lookup(name), (*chain, name))

    def _time(self, form: str, key: str) -> str:
        if key in self._timeless:
            raise ConfigError(
                f"{key} refers to ${{now:{form}}}, and every rank reads its own clock, so they may not meet in one folder; "
                "give a fixed name"
            )
        return self._now.strftime(form)

    def _variable(self, argument: str, key: str) -> str:
        name, comma, default = argument.partition(",")
        value = self._environ.get(name.strip(), default.strip() if comma else None)
        if value is None:
            raise ConfigError(
                f"{key} refers to the environment variable {name.strip()}, which is not set; set it, or give a default: "
                f"${{oc.env:{name.strip()},VALUE}}"
            )
        return value


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value)
