"""The types that fields may have: from a dataclass's annotations to its codec.

What was sent is what the listener receives, type for type and value for value, whatever Postgres' jsonb makes of
numbers, texts and the order of keys on the way.

Reading order: `codec` (what a codec does), `scalars`, `moments`, `containers`, `choices` (the codecs), `places` (what
an annotation means where it stands), `reader` (from annotation to codec). Pure.
"""

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, show
from pgpubsub_celery.fieldtypes.containers import Dataclass, Field
from pgpubsub_celery.fieldtypes.reader import codec_of

__all__ = ["Codec", "Dataclass", "Field", "MismatchError", "codec_of", "show"]
