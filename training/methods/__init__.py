"""One file a method: its settings, its equation, its row. Shared equations lie in files named after them.

A module of this package that has a METHOD is found by itself (docs/adding-a-method.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

from ...core.errors import OneStepError
from ..settings import Settings, described, nearest

if TYPE_CHECKING:
    from .method import Method

DEFAULT = "dmd"


class Methods(Mapping[str, "Method"]):
    """The methods by name: the usual one, then others that make a LoRA, then the rest. Looked up anew each time, so
    that one more file is one more method."""

    def _found(self) -> dict[str, Method]:
        names = sorted(entry.name for entry in pkgutil.iter_modules(__path__))
        modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
        found = [module.METHOD for module in modules if hasattr(module, "METHOD")]
        return {method.name: method for method in sorted(found, key=_place)}

    def __getitem__(self, name: str) -> Method:
        found = self._found()
        if name not in found:
            raise OneStepError(f"no method {name!r:.60}{nearest(str(name), found)}")
        return found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def values(self) -> ValuesView[Method]:
        return self._found().values()

    def items(self) -> ItemsView[str, Method]:
        return self._found().items()


def _place(method: Method) -> tuple[bool, bool]:
    return method.makes == "adapter", method.name != DEFAULT


METHODS = Methods()


def settings_for(method: str = DEFAULT, **values: Any) -> Settings:
    """The settings of a run of ``method``: what every run has and the method's own, by name. Raises OneStepError for an
    unknown method or setting, and for a value that is out of range."""
    own_type = METHODS[method].settings
    own = {entry.name: values.pop(entry.name) for entry in described(own_type) if entry.name in values}
    known = [entry.name for entry in (*described(Settings), *described(own_type))]
    for unknown in sorted(set(values) - set(known)):
        raise OneStepError(f"{method} has no setting {unknown!r:.60}{_whose(unknown) or nearest(unknown, known)}")
    return Settings(method, own_type(**own), **values)


def _whose(name: str) -> str:
    """A word where a setting belongs to other methods."""
    owners = [other.name for other in METHODS.values() if name in {entry.name for entry in described(other.settings)}]
    if len(owners) > 4:
        return f": it belongs to {', '.join(owners[:3])} and {len(owners) - 3} others"
    return f": it belongs to {' and '.join(owners)}" if owners else ""
