"""Families of other packages, found by entry point and imported only where they are asked for.

The group is `ditas_export.families`; an entry point has its family's name, and names an instance of
`PackagedFamily`. Nothing is imported for checkpoints and files of the families that come with this
package.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points

from ditas_export.errors import CheckpointError
from ditas_export.families.base import AnyFamily, Family
from ditas_export.families.packaged import AnyPackagedFamily, PackagedFamily

GROUP = "ditas_export.families"

RESERVED = ("family", "package")
"""Names in a configuration's record that say whose it is."""


class UnknownFamilyError(CheckpointError):
    """A family that neither this package has nor one that is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A family of another package, imported."""

    family: AnyPackagedFamily
    package: str  # its distribution's name


_LOADED: dict[str, Loaded] = {}
"""By name; what was asked for so far."""


def loaded_families() -> list[AnyFamily]:
    """Return the families of other packages that were asked for so far."""
    return [each.family for each in _LOADED.values()]


def package_of(family: AnyFamily) -> str | None:
    """Return the package that brought a family; None for those of this one."""
    found = _LOADED.get(family.name)
    return found.package if found is not None and found.family is family else None


def installed_names() -> list[str]:
    """Return the names of all families of other packages; imports none."""
    return sorted(entry_points(group=GROUP).names)


def family_named(
    name: str, *, known: Collection[str], package: str | None = None
) -> AnyPackagedFamily:
    """Import the family of a name, and return it.

    Args:
        name: the entry point's and the family's.
        known: names that families of this package go by.
        package: the distribution that is recorded to have it; for messages.

    Raises:
        UnknownFamilyError: no package that is installed brings it.
        CheckpointError: two packages bring it, or what is there is no family; one line.
    """
    if name in _LOADED:
        return _LOADED[name].family
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise UnknownFamilyError(_unknown(name, known, package))
    if len(found) > 1 or name in known:
        packages = sorted(_package(entry) for entry in found)
        raise CheckpointError(
            f"the family {name} is brought by {' and '.join(packages)}"
            f"{', and is known here already' if name in known else ''}; uninstall all but one, or "
            f"rename it"
        )
    entry = found[0]
    try:
        family = _checked(entry, entry.load())
    except Exception as error:  # whatever importing a package of others raises
        raise CheckpointError(
            f"the family {name} of {_package(entry)} does not load: {one_line(error)}"
        ) from error
    _LOADED[name] = Loaded(family=family, package=_package(entry))
    return family


def all_families(known: Collection[str]) -> tuple[list[AnyPackagedFamily], list[str]]:
    """Import every family of other packages; return them, and one line for each left out."""
    families: list[AnyPackagedFamily] = []
    left_out: list[str] = []
    for name in installed_names():
        try:
            families.append(family_named(name, known=known))
        except CheckpointError as error:
            left_out.append(str(error))
    return families, left_out


def one_line(error: Exception) -> str:
    """Return an error of others in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _unknown(name: str, known: Collection[str], package: str | None) -> str:
    """Return what is known instead of a family, and what to do."""
    others = installed_names()
    brought = f"; other packages bring {', '.join(others)}" if others else ""
    remedy = f"install the package {package}" if package else "install the package that brings it"
    return (
        f"the family {name[:40]!r} is not known here: expected {', '.join(known)}{brought}. Of "
        f"another one, {remedy}, with its entry point in {GROUP}"
    )


def _package(entry: EntryPoint) -> str:
    """Return the name of the distribution that an entry point is of."""
    return entry.dist.name if entry.dist is not None else entry.value


def _checked(entry: EntryPoint, found: object) -> AnyPackagedFamily:
    """Return what an entry point named, if it is a family of its name.

    Raises:
        CheckpointError: it is not; says what it lacks.
    """
    if PackagedFamily not in type(found).__mro__:
        raise CheckpointError(f"{entry.value} is no instance below PackagedFamily")
    if unstated := _unstated(type(found)):
        raise CheckpointError(f"{entry.value} does not state {', '.join(unstated)}")
    family: AnyPackagedFamily = found  # type: ignore[assignment]  # by its class, above
    if family.name != entry.name:
        raise CheckpointError(f"{entry.value} calls itself {family.name}")
    if odd := {field.name for field in fields(family.config_type)} & set(RESERVED):
        raise CheckpointError(f"{family.config_type.__name__} has a field {odd.pop()}: rename it")
    return family


def _unstated(kind: type) -> list[str]:
    """Return what a class below `PackagedFamily` leaves to `Family`, which states nothing."""
    names = [name for name in vars(Family) if not name.startswith("_")]
    return [name for name in names if getattr(kind, name) is vars(Family)[name]]
