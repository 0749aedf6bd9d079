"""What is refused of a channel once its decorator has run, and the modules that it names are imported.

Called when a listener is declared for it or a message emitted: the first moments when a mistake can be told from a
declaration that is not complete yet.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from pgpubsub_celery.channels.declaration import TRIGGER_FIELDS, Channel, TriggerChannel, check_field_name, path_of
from pgpubsub_celery.channels.keys import keys_of
from pgpubsub_celery.channels.tables import captured_columns, declared_defaults, renamed_columns
from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.fieldtypes import codec_of
from pgpubsub_celery.hints import is_class_variable, own_annotations

_checked: weakref.WeakSet[type[Channel]] = weakref.WeakSet()


def check_declared(cls: type[Channel]) -> None:
    """Refuse a class that cannot be used as a channel.

    Raises:
        ChannelError: says what is wrong with the declaration, and how to write it.
    """
    if cls in _checked:
        return
    given: Any = cls
    if not (isinstance(given, type) and issubclass(given, Channel)):
        raise ChannelError(f"{given!r} is not a channel: expected a subclass of Channel.")
    if cls in (Channel, TriggerChannel):
        raise ChannelError(f"{cls.__name__} itself is not a channel: declare a subclass of it.")
    if issubclass(cls, TriggerChannel):
        captured_columns(cls)
        renamed_columns(cls)
        declared_defaults(cls)
    else:
        _check_dataclass(cls)
        for field in channel_field_names(cls):
            check_field_name(cls, field)  # of a dataclass that is mixed in
        codec_of(cls, path_of(cls))
    keys_of(cls)
    _checked.add(cls)


def _check_dataclass(cls: type[Channel]) -> None:
    if "__dataclass_fields__" not in cls.__dict__:
        fields = [name for name, annotation in own_annotations(cls).items() if not is_class_variable(annotation)]
        if fields or not dataclasses.is_dataclass(cls):
            raise ChannelError(
                f"{path_of(cls)} is not a dataclass: write @dataclass above class {cls.__name__}"
                f"{f', so that {fields[0]!r} becomes a field of it' if fields else ''}."
            )


def channel_field_names(cls: type[Channel]) -> tuple[str, ...]:
    """Return the names that listeners of the channel may take: its fields, or old and new."""
    if issubclass(cls, TriggerChannel):
        return TRIGGER_FIELDS
    fields = getattr(cls, "__dataclass_fields__", None)
    return () if fields is None else tuple(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
