"""Where the database's URL comes from, and that no message shows its password."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import pytest

from atroposlib.data import DataConfig
from atroposlib.data.postgres.queries import count_query, sessions_query
from atroposlib.data.postgres.reader import database
from atroposlib.data.postgres.urls import database_url, scrubbed, without_password
from atroposlib.errors import DataError

URL = "postgresql://u:s3%40cret@h:5432/db?sslmode=require"


def config_of(**over: Any) -> DataConfig:
    return DataConfig.preset("runtime_pg", **over)


def test_the_configuration_comes_before_the_variables() -> None:
    both = {"ATLAS_DB_URL": "postgres://first/db", "ATLAS_DATABASE_URL": "postgres://second/db"}

    assert database_url(config_of(db_url=URL), both) == URL
    assert database_url(config_of(), both) == "postgres://first/db"
    assert database_url(config_of(), {"ATLAS_DATABASE_URL": URL, "ATLAS_DB_URL": ""}) == URL
    with pytest.raises(DataError, match="needs db_url, or the variable ATLAS_DB_URL or ATLAS_DATABASE_URL"):
        database_url(config_of(), {})


@pytest.mark.parametrize(
    "url",
    [
        "host=h password=s3cret",
        "mysql://u:s3cret@h/db",
        "postgresql://u:s3/cret@h/db",
        "postgresql://u:53/cret@h/db",
        "postgresql://u:s3?cret@h/db",
        "postgresql://u:s3#cret@h/db",
        "postgresql://u:s3cret",
        "postgresql://[u:s3cret@h/db",
    ],
)
def test_a_url_that_cannot_be_read_is_not_shown(url: str) -> None:
    with pytest.raises(DataError, match="percent-encoded") as caught:
        database_url(config_of(db_url=url), {})

    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)


def test_what_is_shown_of_a_url() -> None:
    assert without_password(URL) == "postgresql://u@h:5432/db"
    assert without_password("postgres:///db?host=/run&password=x") == "postgres:///db"


def test_messages_are_scrubbed_of_every_spelling() -> None:
    assert scrubbed("bad s3%40cret and s3@cret", URL) == "bad *** and ***"
    assert scrubbed("bad x y", "postgres:///db?password=x%20y") == "bad ***"


def test_without_the_driver_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(DataError, match=r'pip install "psycopg\[binary\]"'), database(config_of(db_url=URL)):
        pass


def test_values_are_parameters() -> None:
    evil = "'; DROP TABLE sessions; --"
    config = config_of(
        learning_key=evil, status_filters=(evil,), review_status_filters=(evil,), start_date=datetime(2026, 1, 1)
    )

    for query in (sessions_query(config), count_query(config), sessions_query(config, session_id=evil)):
        assert "DROP" not in query.text
        assert query.text.count("%s") == len(query.values)
