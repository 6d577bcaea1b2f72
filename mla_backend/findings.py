"""What an examination of this machine (mla_backend/doctor) finds, and what is known when it ends."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command's help must not wait for torch
    from mla_kernels import Problem


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    level: "fault" if the server would not start or would not be served by us.
    what: what was found, on one line.  change: what to do about it.
    """

    level: Literal["ok", "warning", "fault"]
    what: str
    change: str = ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


@dataclass(kw_only=True)
class Examination:
    """Facts by name, in the order in which they are told, and findings."""

    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def ok(self, what: str) -> None:
        self.findings.append(Finding(level="ok", what=what))

    def warn(self, what: str, change: str = "") -> None:
        self.findings.append(Finding(level="warning", what=what, change=change))

    def fault(self, what: str, change: str = "") -> None:
        self.findings.append(Finding(level="fault", what=what, change=change))

    def cannot_import(self, engine: str, error: Exception) -> None:
        self.fault(f"{engine} cannot be imported: {type(error).__name__}: {error!s:.300}", f"reinstall {engine}")

    def does_not_take(self, engine: str, model: str, error: Exception) -> None:
        reason = " ".join(str(error).strip().splitlines()) or "no reason given"
        self.fault(f"{engine} does not take {model}: {type(error).__name__}: {reason[:400]}")

    @property
    def could_serve(self) -> bool:
        return all(finding.level != "fault" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """What the findings come to, on one line."""
        faults, warnings = (sum(one.level == level for one in self.findings) for level in ("fault", "warning"))
        if faults:
            return f"mla_backend would not serve here as asked: {_count(faults, 'fault')} above"
        heed = f"; heed {_count(warnings, 'warning')} above" if warnings else ""
        return f"nothing that was looked at speaks against serving with mla_backend here{heed}"


@contextlib.contextmanager
def parser_errors() -> Iterator[None]:
    """Make the exit of a command line's parser a ValueError with the reason that it printed."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit:
            last = (said.getvalue().strip().splitlines() or ["its parser gives no reason"])[-1]
            raise ValueError(last.partition("error: ")[2] or last) from None


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server as it would start, described by the adapter of its engine.

    layers: with a latent cache, where they can be told.  weight_bytes: of a local checkpoint, on one rank; 0 where none
    is.  memory_share: of a GPU's memory, that the engine would take; 0 where it cannot be told.
    """

    problem: "Problem"
    layers: int | None
    weight_bytes: int
    memory_share: float
