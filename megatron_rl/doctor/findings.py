"""What the doctor says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is; the worst comes first."""

    ERROR = 0
    WARNING = 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        severity: an error would end a run or spoil it; a warning need not.
        what: was looked at.
        found: what must hold and what is there.
        do: what to change.
        hosts: where; empty where it belongs to no node.
    """

    severity: Severity
    what: str
    found: str
    do: str
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" on {', '.join(self.hosts)}" if self.hosts else ""
        return f"{self.severity.name.lower():7}  {self.what}{where}: {self.found} -> {self.do}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was found.

    Attributes:
        findings: the worst first; what several nodes share is said once.
        used: rows of what each part of training is done with here.
        not_checked: what was left out, and why.
        hosts: that were looked at.
        misconfigured: whether the configuration contradicts itself.
    """

    findings: tuple[Finding, ...]
    used: tuple[str, ...]
    not_checked: tuple[str, ...]
    hosts: tuple[str, ...]
    misconfigured: bool

    @property
    def status(self) -> int:
        """Exit status: 2 for a wrong configuration, 1 for any other error, 0 for warnings alone and for nothing."""
        if self.misconfigured:
            return 2
        return int(any(finding.severity is Severity.ERROR for finding in self.findings))

    def __str__(self) -> str:
        errors = sum(finding.severity is Severity.ERROR for finding in self.findings)
        lines = [str(finding) for finding in self.findings]
        lines += ["used here:", *(f"  {row}" for row in self.used)]
        lines += [f"not checked: {reason}" for reason in self.not_checked]
        lines.append(f"{errors} error(s), {len(self.findings) - errors} warning(s); looked at {', '.join(self.hosts)}")
        return "\n".join(lines)


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first; findings that differ in their hosts alone become one."""
    together: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts = together.setdefault(replace(finding, hosts=()), [])
        hosts += [host for host in finding.hosts if host not in hosts]
    joined = [replace(finding, hosts=tuple(hosts)) for finding, hosts in together.items()]
    return tuple(sorted(joined, key=lambda finding: finding.severity))
