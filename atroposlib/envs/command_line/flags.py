"""Flags of an environment's command line: words to raw values, sorted by namespace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from atroposlib.envs.command_line.usage import UsageError, alternatives, nearest
from atroposlib.envs.constants import ENV_NAMESPACE, NAMESPACE_SEP

ROOT = ""
"""Namespace of the options that belong to the command itself."""

Namespaces = Mapping[str, type[BaseModel]]
Values = dict[str, dict[str, Any]]
"""By namespace, then by field."""


def parse_flags(argv: Sequence[str], namespaces: Namespaces) -> Values:
    """Sort `--name value...` and `--name=value` into namespaces; a bare name is a root option or a field of env.

    Raises:
        UsageError: an unknown name, a missing value, a word that belongs to no flag.
    """
    given: Values = {namespace: {} for namespace in namespaces}
    for name, words in flag_words(argv):
        namespace, _, key = name.rpartition(NAMESPACE_SEP)
        if not namespace and key not in namespaces[ROOT].model_fields:
            namespace = ENV_NAMESPACE
        if namespace not in namespaces or key not in namespaces[namespace].model_fields:
            raise UsageError(f"unknown option --{name}", nearest(name, known_names(namespaces), prefix="--"))
        given[namespace][key] = flag_value(name, words, namespaces[namespace].model_fields[key].annotation)
    return given


def known_names(namespaces: Namespaces) -> list[str]:
    """Every name a flag can have, both spellings of env's fields."""
    names = [
        NAMESPACE_SEP.join(filter(None, (namespace, name)))
        for namespace, model in namespaces.items()
        for name in model.model_fields
    ]
    return [*names, *namespaces[ENV_NAMESPACE].model_fields]


def flag_words(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its words. A value may start with one dash, so negative numbers need no special spelling."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--") or word == "--":
            raise UsageError(f"unexpected argument {word!r}", "options look like --group_size 8")
        name, equals, value = word[2:].partition("=")
        position += 1
        words = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            words.append(argv[position])
            position += 1
        yield name.replace("-", "_"), words


def flag_value(name: str, words: list[str], annotation: Any) -> Any:
    """The raw value of a flag: text, or a list, dict or None where the field's type and the words say so.

    Raises:
        UsageError: no word where one is needed, several where one is allowed, broken JSON.
    """
    kinds = [get_origin(kind) or kind for kind in alternatives(annotation)]
    is_list = any(kind in (list, tuple, set, frozenset) for kind in kinds)
    if not words:
        if bool in kinds:
            return True
        raise UsageError(f"--{name} needs a value", f"--{name} {'A B C' if is_list else 'VALUE'}")
    if type(None) in kinds and words in (["None"], ["null"], ["none"]):
        return None
    if is_list and not (len(words) == 1 and words[0].startswith("[")):
        return words
    if len(words) > 1:
        raise UsageError(f"--{name} takes one value, got {words}", f"quote it: --{name} '{' '.join(words)}'")
    if is_list or any(_holds_fields(kind) for kind in kinds):
        return _from_json(name, words[0])
    return words[0]


def _holds_fields(kind: Any) -> bool:
    return kind is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _from_json(name: str, word: str) -> Any:
    try:
        # YAML reads JSON too, and forgives single quotes.
        return yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise UsageError(f"--{name}: {word!r} is neither JSON nor YAML") from error
