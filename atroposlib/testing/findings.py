"""What a check of an environment found: each finding says what is wrong and how to mend it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from atroposlib.errors import AtroposError

Severity: TypeAlias = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    check: str
    """Name of the check."""
    severity: Severity
    """error: cannot be trained on. warning: works, but hardly as meant. info: good to know."""
    message: str
    fix: str = ""
    where: str = ""
    """FILE:LINE in the author's code, where that is known."""


class EnvCheckError(AtroposError):
    """check_env found errors in an environment."""

    code = "env_check"


@dataclass
class CheckReport:
    """The findings of one environment and what was run to get them."""

    env_name: str
    findings: list[Finding] = field(default_factory=list)
    items: int = 0
    groups: int = 0
    sequences: int = 0
    requests: int = 0
    """Completions that the mock inference server gave, the outage at the end left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""
    is_evaluated: bool = False

    @property
    def errors(self) -> list[Finding]:
        """Findings that keep the environment from being trained on."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that an author should look at."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def add(self, *findings: Finding) -> None:
        """Add findings that are not there yet: one a check and place, however many groups show it."""
        known = {(finding.check, finding.message) for finding in self.findings}
        for finding in findings:
            if (finding.check, finding.message) not in known:
                known.add((finding.check, finding.message))
                self.findings.append(finding)

    def raise_for_errors(self) -> None:
        """For tests.

        Raises:
            EnvCheckError: with every error and its fix.
        """
        if not self.ok:
            lines = [f"{finding.check}: {finding.message}; {finding.fix}" for finding in self.errors]
            raise EnvCheckError(f"environment {self.env_name}: " + "\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}
