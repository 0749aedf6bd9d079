"""Channels: what users declare, and the registry that they are found in.

Reading order: `declaration` (`Channel`, `TriggerChannel`, and what is refused in the class statement), `checks` (what
is refused later, once it can be known), `tables` (what a trigger channel is about), `keys` (what notifications are
ordered and made unique by), `registry` (finding channels).

Pure: it reads classes and, for trigger channels, the declaration of a table; it never opens a connection. What a value
of a field may be is `fieldtypes`', how a message is stored is `payload`'s.
"""

from pgpubsub_celery.channels.checks import channel_field_names, check_declared
from pgpubsub_celery.channels.declaration import (
    EVERY_DATABASE,
    Channel,
    TriggerChannel,
    _registry,
    databases_of,
    is_in_database,
    listen_name_of,
    path_of,
)
from pgpubsub_celery.channels.keys import Keys, keys_of
from pgpubsub_celery.channels.registry import check_databases, find_channel, registered_channels, select_channels
from pgpubsub_celery.channels.tables import captured_columns, declared_defaults, renamed_columns, table_of

__all__ = [
    "EVERY_DATABASE",
    "Channel",
    "Keys",
    "TriggerChannel",
    "_registry",
    "captured_columns",
    "channel_field_names",
    "check_databases",
    "check_declared",
    "databases_of",
    "declared_defaults",
    "find_channel",
    "is_in_database",
    "keys_of",
    "listen_name_of",
    "path_of",
    "registered_channels",
    "renamed_columns",
    "select_channels",
    "table_of",
]
