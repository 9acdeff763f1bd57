"""What the server raised is what the client raises."""

from __future__ import annotations

import pytest

from atroposlib.errors import (
    AtroposError,
    ConfigError,
    FencedError,
    ProtocolError,
    StoreUnavailableError,
    error_from_wire,
)


@pytest.mark.parametrize("kind", [ConfigError, FencedError, StoreUnavailableError])
def test_an_error_crosses_the_wire_as_its_type_with_its_text(kind: type[AtroposError]) -> None:
    error = error_from_wire(kind.code, "the text", kind.status)

    assert type(error) is kind
    assert str(error) == "the text"


def test_a_type_that_refines_another_in_some_process_is_not_taken_for_it() -> None:
    class OwnConfigError(ConfigError):
        pass

    assert OwnConfigError.code == ConfigError.code
    assert type(error_from_wire("config", "the text", 400)) is ConfigError


@pytest.mark.parametrize(("status", "kind"), [(418, ProtocolError), (500, AtroposError)])
def test_an_unknown_code_is_told_by_its_status(status: int, kind: type[AtroposError]) -> None:
    assert type(error_from_wire("of a newer server", "the text", status)) is kind
