"""What vtprune's installed metadata asks for, and what is installed of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

CORE = "core"
REQUIRED = (CORE, "eval")  # the command line needs both
EXTRA = re.compile(r'extra == "([^"]+)"')
OK, MISSING, WRONG, ELSEWHERE = "ok", "missing", "wrong version", "not for this platform"


@dataclass(frozen=True)
class Dependency:
    """A requirement of ``group``, ``core`` or an extra; ``installed`` is None when it is not."""

    group: str
    name: str
    wanted: str
    installed: str | None
    status: str


def dependencies() -> tuple[Dependency, ...]:
    """Returns the requirements in the installed metadata, each under the least extra that has it.

    So an extra that only joins others, such as ``all``, has none of its own.
    """
    groups: dict[str, dict[str, Requirement]] = {}
    for requirement in _requirements():
        plain = str(requirement).partition(";")[0].strip()
        for group in EXTRA.findall(str(requirement.marker)) or [CORE]:
            groups.setdefault(group, {})[plain] = requirement
    found = []
    for group in sorted(groups, key=lambda name: (name not in REQUIRED, name)):
        wanted = groups[group]
        for plain in wanted:
            if not any(plain in g and g.keys() < wanted.keys() for g in groups.values()):
                found.append(_dependency(group, plain, wanted[plain]))
    return tuple(found)


def _requirements() -> Iterator[Requirement]:
    try:
        texts = metadata.requires("vtprune") or []
    except metadata.PackageNotFoundError:  # a source tree on the path is no installation
        texts = ["vtprune"]
    for text in texts:
        requirement = Requirement(text)
        # 'vtprune[eval]' inside an extra: those requirements are listed under eval already.
        if requirement.extras == set() or canonicalize_name(requirement.name) != "vtprune":
            yield requirement


def _dependency(group: str, wanted: str, requirement: Requirement) -> Dependency:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed = None
    if requirement.marker and not requirement.marker.evaluate({"extra": group}):
        status = ELSEWHERE
    elif not installed:
        status = MISSING
    else:
        status = OK if _satisfies(installed, requirement) else WRONG
    return Dependency(group, canonicalize_name(requirement.name), wanted, installed, status)


def _satisfies(installed: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        return False
