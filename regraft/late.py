"""Fields that came later, in documents whose digests must not change for it.

A version's identity and the key of its checkpoints digest the sections of `params.yaml` that made it, and reports are
digested too. A field that was added later is left out of what is dumped where it stands at its default: what was made
before it existed is what would be made now.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer


class LateFields(BaseModel):
    """Dumps the fields named in `LATE` only where they differ from their defaults; a base beside `Section` or `Report`."""

    LATE: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_late_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unused = {
            name for name in self.LATE if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }
        return {name: value for name, value in handler(self).items() if name not in unused}
