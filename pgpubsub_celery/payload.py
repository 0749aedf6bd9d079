"""A message to its stored payload and back.

Owns what a user is told when a message does not fit its channel, or a stored payload no longer does: channel, field,
value, expected type. How the values of a type become JSON is `fieldtypes`'.

A payload is an object of the channel's fields. Rows outlive releases: a field that a payload lacks has its default, one
that the channel no longer has is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgpubsub_celery.channels import Channel, TriggerChannel, check_declared, path_of
from pgpubsub_celery.errors import ChannelError, DecodeError, PayloadError, did_you_mean
from pgpubsub_celery.fieldtypes import Codec, Dataclass, MismatchError, codec_of, show

NESTED = "it contains itself, or is nested too deeply"


def build_message(channel: type[Channel], fields: Mapping[str, Any]) -> Channel:
    """Return a message from keyword arguments, checked.

    Raises:
        PayloadError: a field is unknown or missing, or a value is not of its field's type.
        ChannelError: the class cannot be used as a channel.
    """
    known = _codec_of(channel).fields
    names = [field.name for field in known]
    for name in fields:
        if name not in names:
            raise PayloadError(_unknown(channel, name, names))
    for field in known:
        if field.required and field.name not in fields:
            raise PayloadError(f"{channel.name()}: {field.name} is missing: expected {field.codec.expected}.")
    try:
        message = channel(**fields)
    except Exception:
        # A __post_init__ that stumbles over a wrong type: the type is the news.
        for field in known:
            if field.name in fields:
                _encode(channel, field.codec, fields[field.name], f".{field.name}")
        raise
    encode_message(message)
    return message


def encode_message(message: Channel) -> dict[str, Any]:
    """Return a message's payload, which `json.dumps` can write and jsonb store.

    Raises:
        PayloadError: a value is not of its field's type.
        ChannelError: the class cannot be used as a channel.
    """
    channel = type(message)
    payload: dict[str, Any] = _encode(channel, _codec_of(channel), message)
    return payload


def decode_message(channel: type[Channel], payload: Mapping[str, Any]) -> Channel:
    """Return the message of a stored payload.

    Raises:
        DecodeError: a value is missing or not one of its field's type, or the channel's `__post_init__` refused them.
        ChannelError: the class cannot be used as a channel.
    """
    codec = _codec_of(channel)
    if not isinstance(payload, Mapping):
        raise DecodeError(
            f"{channel.name()}: the payload is {show(payload)}: expected an object of the channel's fields."
        )
    try:
        message: Channel = codec.decode(payload if type(payload) is dict else dict(payload))
    except MismatchError as exc:
        raise DecodeError(_told(channel, exc)) from exc.__cause__
    except RecursionError:
        raise DecodeError(f"{channel.name()}: the payload cannot be read: {NESTED}.") from None
    return message


_checked: dict[Any, Dataclass] = {}
"""The codecs of channels that are declared as they must be."""


def _codec_of(channel: type[Channel]) -> Dataclass:
    codec = _checked.get(channel)
    if codec is None:
        check_declared(channel)
        if issubclass(channel, TriggerChannel):
            raise ChannelError(
                f"{channel.name()} is a trigger channel: it has no messages, its table's rows are its payload."
            )
        codec = _checked[channel] = codec_of(channel, path_of(channel))
    return codec


def _encode(channel: type[Channel], codec: Codec, value: Any, step: str = "") -> Any:
    try:
        return codec.encode(value)
    except MismatchError as exc:
        raise PayloadError(_told(channel, exc.under(step))) from exc.__cause__
    except RecursionError:
        raise PayloadError(f"{channel.name()}: {show(value)} cannot be stored: {NESTED}.") from None


def _told(channel: type[Channel], exc: MismatchError) -> str:
    return f"{channel.name()}: {exc.path.removeprefix('.') or 'the message'} {exc}."


def _unknown(channel: type[Channel], name: str, names: list[str]) -> str:
    if name in getattr(channel, "__dataclass_fields__", {}):
        return f"{channel.name()}: {name} is set by the channel itself (init=False): leave it out."
    return (
        f"{channel.name()} has no field {name!r}: expected some of {', '.join(names) or 'none'}."
        f"{did_you_mean(str(name), names)}"
    )
