"""The database's URL: where it is configured, and how it is shown without its password."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import parse_qs, unquote, urlsplit

from atroposlib.data.config import DataConfig
from atroposlib.errors import DataError

VARIABLES = ("ATLAS_DB_URL", "ATLAS_DATABASE_URL")
SCHEMES = ("postgresql", "postgres")


def database_url(config: DataConfig, variables: Mapping[str, str] = os.environ) -> str:
    """The URL of db_url, else of the first variable that is set.

    Raises:
        DataError: there is none, or it is no Postgres URL; does not show it.
    """
    given = config.db_url.get_secret_value() if config.db_url is not None else None
    name, url = next(
        ((name, url) for name, url in [("db_url", given), *((name, variables.get(name)) for name in VARIABLES)] if url),
        ("", ""),
    )
    if not url:
        raise DataError(f"loader=runtime_pg needs db_url, or the variable {' or '.join(VARIABLES)}")
    if not _is_sound(url):
        raise DataError(
            f"{name} is not as expected: postgresql://USER:PASSWORD@HOST:PORT/NAME, special characters percent-encoded "
            "(@ is %40, / is %2F); it is not shown here, because it may hold a password"
        )
    return url


def without_password(url: str) -> str:
    """The URL for messages: no password, no options."""
    parts = urlsplit(url)
    user = f"{parts.username}@" if parts.username else ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{user}{host}{parts.path}"


def scrubbed(message: str, url: str) -> str:
    """A message of the database's, without the password."""
    parts = urlsplit(url)
    found = [parts.password, *parse_qs(parts.query).get("password", [])]
    for secret in {form for raw in found if raw for form in (raw, unquote(raw))}:
        message = message.replace(secret, "***")
    return message


def _is_sound(url: str) -> bool:
    """Whether every part is where it belongs, so that no part of a password stands elsewhere."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    is_split = not any("@" in part for part in (parts.path, parts.query, parts.fragment)) and not parts.fragment
    return parts.scheme in SCHEMES and has_port and is_split
