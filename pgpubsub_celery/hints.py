"""What the annotations of a class mean: names become types, type variables what a subclass made of them.

Owns the resolving of annotations, for channels and for the dataclasses inside them. Never decides which types are
supported (`codecs`). Exists because `typing.get_type_hints` fails as a whole, without saying which field, and knows
neither the names of a function that a class is declared in nor type variables.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

LOCAL_NAMES = "_local_names"
"""Attribute of a class: what names of its annotations meant in the function that declares it."""

_CLASS_VAR = re.compile(r"\s*(\w+\s*\.\s*)*ClassVar\b")
_INIT_VAR = re.compile(r"\s*(\w+\s*\.\s*)*InitVar\b")
_CLASS_BODY_FLAGS = 0x1  # CO_OPTIMIZED: of functions, not of class bodies


class UnresolvedNameError(Exception):
    """An annotation has a name that means nothing at run time; `name` is that name."""

    def __init__(self, name: str, annotation: str) -> None:
        super().__init__(f"{name!r} in the annotation {annotation!r} is not defined")
        self.name = name
        self.annotation = annotation


class UnreadableError(Exception):
    """An annotation cannot be evaluated."""


def own_annotations(cls: type) -> dict[str, Any]:
    """Return the annotations in the body of `cls`, unresolved: types, strings or forward references."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return dict(annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF))
    return dict(inspect.get_annotations(cls))


def is_class_variable(annotation: Any) -> bool:
    """Whether an unresolved annotation is a ClassVar, so that dataclasses make no field of it."""
    if isinstance(annotation, str):
        return _CLASS_VAR.match(annotation) is not None
    return annotation is typing.ClassVar or typing.get_origin(annotation) is typing.ClassVar


def is_init_variable(annotation: Any) -> bool:
    """Whether an unresolved annotation is an InitVar."""
    import dataclasses

    if isinstance(annotation, str):
        return _INIT_VAR.match(annotation) is not None
    return annotation is dataclasses.InitVar or isinstance(annotation, dataclasses.InitVar)


def remember_local_names(cls: type, frame: types.FrameType | None, also: Any = None) -> None:
    """Keep what the annotations of `cls`, and the one `also`, name from the function around the class statement.

    `frame` is the one that was called for the class statement.

    Names of modules can be looked up whenever they are needed; those of a function are gone when it has ended.
    """
    if LOCAL_NAMES in cls.__dict__ or "<locals>" not in cls.__qualname__:
        return  # dataclass(slots=True) makes a second class of the first, names included
    while frame is not None and frame.f_code.co_name == "__init_subclass__":
        frame = frame.f_back
    scopes: list[Mapping[str, Any]] = []
    while frame is not None and frame.f_locals is not frame.f_globals:
        scopes.append(frame.f_locals)
        if frame.f_code.co_flags & _CLASS_BODY_FLAGS:
            break
        frame = frame.f_back
    kept: dict[str, Any] = {}
    waiting = list(_names_in([*own_annotations(cls).values(), also]))
    while waiting:
        name = waiting.pop()
        found = next((scope[name] for scope in scopes if name in scope), None)
        if name in kept or found is None:
            continue
        kept[name] = found
        if isinstance(found, type):
            # A dataclass of the same function; what its annotations name is needed too.
            waiting.extend(_names_in(own_annotations(found).values()))
    setattr(cls, LOCAL_NAMES, kept)


def _names_in(annotations: Any) -> Iterator[str]:
    for annotation in annotations:
        source = annotation.__forward_arg__ if isinstance(annotation, typing.ForwardRef) else annotation
        if isinstance(source, str):
            yield from re.findall(r"[^\W\d]\w*", source)
        else:
            yield from _names_in(typing.get_args(annotation))


class Scope:
    """Where the annotations of one class are looked up."""

    def __init__(self, cls: type, outer: Mapping[str, Any] | None = None) -> None:
        """`outer`: further names, of the class that has this one in a field."""
        module = sys.modules.get(cls.__module__)
        self.module = cls.__module__
        self.globals: dict[str, Any] = dict(vars(builtins))
        self.globals.update(outer or {})
        self.globals.update(vars(module) if module is not None else {})
        self.locals: dict[str, Any] = {}
        if outer and "<locals>" in cls.__qualname__:
            self.locals.update(outer)
        self.locals[cls.__name__] = cls
        for base in reversed(cls.__mro__):
            self.locals.update(base.__dict__.get(LOCAL_NAMES, {}))
        self.locals.update({one.__name__: one for one in cls.__dict__.get("__type_params__", ())})
        self.names: dict[str, Any] = {**(outer or {}), **self.locals}
        """For the scopes of classes in this one's fields."""

    def resolve(self, annotation: Any) -> Any:
        """Return the type that a string or forward reference means; everything else as it is.

        Raises:
            UnresolvedNameError: a name in it is not defined.
            UnreadableError: it cannot be evaluated for another reason.
        """
        if isinstance(annotation, typing.ForwardRef):
            if sys.version_info >= (3, 14):
                # It knows the scope that it stands in.
                with contextlib.suppress(NameError, AttributeError):
                    return annotation.evaluate()
            annotation = annotation.__forward_arg__
        if not isinstance(annotation, str):
            return annotation
        try:
            return eval(annotation, self.globals, self.locals)  # noqa: S307 - the program's own source
        except NameError as exc:
            raise UnresolvedNameError(exc.name or _first_quoted(exc), annotation) from None
        except AttributeError as exc:
            raise UnresolvedNameError(_first_quoted(exc), annotation) from None
        except Exception as exc:
            raise UnreadableError(
                f"its annotation {annotation!r} cannot be read ({type(exc).__name__}: {exc})"
            ) from exc


def _first_quoted(exc: Exception) -> str:
    quoted = re.findall(r"'([^']*)'", str(exc))
    return quoted[-1] if quoted else str(exc)


def type_variables(cls: type, given: Mapping[Any, Any] | None = None) -> dict[type, dict[Any, Any]]:
    """Return, for `cls` and each of its bases, what the type variables of that base are in `cls`.

    For `class Box(Generic[T])` and `class IntBox(Box[int])`: `{IntBox: {}, Box: {T: int}}`.
    """
    bound: dict[type, dict[Any, Any]] = {cls: dict(given or {})}
    for base in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = typing.get_origin(base)
        if origin is None and isinstance(base, type):
            for known, variables in type_variables(base).items():
                bound.setdefault(known, {}).update(variables)
        elif isinstance(origin, type) and origin not in (typing.Generic, typing.Protocol):
            arguments = [substitute(_known(argument, cls), bound[cls]) for argument in typing.get_args(base)]
            variables = dict(zip(_parameters(origin), arguments, strict=False))
            for known, more in type_variables(origin, variables).items():
                bound.setdefault(known, {}).update(more)
    return bound


def _known(argument: Any, cls: type) -> Any:
    """Return what the text in `Box["Item"]` means, if that is known already; it stands in the module of `cls`."""
    if not isinstance(argument, str | typing.ForwardRef):
        return argument
    try:
        return Scope(cls).resolve(argument)
    except (UnresolvedNameError, UnreadableError):
        return argument


def substitute(annotation: Any, variables: Mapping[Any, Any]) -> Any:
    """Return `annotation` with its type variables replaced by what they are known to be."""
    if isinstance(annotation, typing.TypeVar):
        return variables.get(annotation, annotation)
    # A class has parameters, but it is their owner: only what was made of one, such as list[T], has them as arguments.
    parameters = () if inspect.isclass(annotation) and not typing.get_args(annotation) else _parameters(annotation)
    if not parameters:
        return annotation
    return annotation[tuple(variables.get(parameter, parameter) for parameter in parameters)]


def _parameters(annotation: Any) -> tuple[Any, ...]:
    found = getattr(annotation, "__parameters__", ())
    return found if isinstance(found, tuple) else ()
