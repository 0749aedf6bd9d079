"""What an annotation means where it stands: in which class, with which type variables.

Owns what is said of names and type variables that mean nothing there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import typing_extensions

from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.hints import Scope, UnreadableError, UnresolvedNameError, substitute

UNIONS = (typing.Union, types.UnionType)
LITERALS = (typing.Literal, typing_extensions.Literal)
ALIASES: tuple[Any, ...] = (
    typing_extensions.TypeAliasType,
    getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
)
TRANSPARENT = (typing.Annotated, typing.Final)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an annotation stands."""

    where: str
    """Channel and field, for errors."""
    scope: Scope
    variables: Mapping[Any, Any]
    owner: type

    def read(self, annotation: Any) -> Any:
        """Return the type that an annotation means, without what only type checkers care for.

        Raises:
            ChannelError: a name is not defined, or a type variable stands for nothing.
        """
        while True:
            try:
                annotation = self.scope.resolve(annotation)
            except UnresolvedNameError as exc:
                raise ChannelError(
                    f"{self.where}: the name {exc.name!r} in its annotation {exc.annotation!r} is not defined when the "
                    f"program runs: import or define it in {self.scope.module}, at the top and not only under "
                    "`if TYPE_CHECKING`."
                ) from None
            except UnreadableError as exc:
                raise ChannelError(f"{self.where}: {exc}.") from exc
            if isinstance(annotation, typing.TypeVar):
                annotation = self._stands_for(annotation)
            elif annotation is typing_extensions.Self:
                return self.owner
            elif isinstance(typing.get_origin(annotation), ALIASES):
                alias = typing.get_origin(annotation)
                given = dict(zip(alias.__type_params__, typing.get_args(annotation), strict=False))
                annotation = substitute(self.value_of(alias), given)
            elif hasattr(annotation, "__supertype__"):  # NewType
                annotation = annotation.__supertype__
            elif typing.get_origin(annotation) in TRANSPARENT:
                annotation = typing.get_args(annotation)[0]
            else:
                return annotation

    def _stands_for(self, variable: Any) -> Any:
        found = self.variables.get(variable, variable)
        if found is variable:
            default = getattr(variable, "__default__", typing_extensions.NoDefault)
            if default is typing_extensions.NoDefault or default is None:
                raise ChannelError(
                    f"{self.where} has the type variable {variable.__name__}, which stands for nothing here: declare a "
                    f"subclass with a type in its place, such as class IntBox(Box[int])."
                )
            found = default
        return found

    def value_of(self, alias: Any) -> Any:
        """Return what a `type X = …` stands for."""
        try:
            return alias.__value__
        except NameError as exc:
            raise ChannelError(
                f"{self.where}: the name {exc.name!r} in the type {alias.__name__} is not defined when the program "
                f"runs: import or define it in {alias.__module__}, at the top and not only under `if TYPE_CHECKING`."
            ) from None

    def flattened(self, annotations: Iterable[Any]) -> Iterable[Any]:
        """Return the types of a union, and of the unions in it."""
        for annotation in annotations:
            hint = self.read(annotation)
            while isinstance(hint, ALIASES):
                hint = self.read(self.value_of(hint))
            if typing.get_origin(hint) in UNIONS:
                yield from self.flattened(typing.get_args(hint))
            elif typing.get_origin(hint) in LITERALS:
                # Told apart by their types, each with all its values.
                by_type: dict[type, list[Any]] = {}
                for value in typing.get_args(hint):
                    by_type.setdefault(type(value), []).append(value)
                yield from (typing.Literal[tuple(values)] for values in by_type.values())
            else:
                yield hint
