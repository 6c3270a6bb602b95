"""Parameters that came after versions had been registered.

A version's identity and the key of its checkpoints digest the sections that made it. A parameter that was added later
is left out of what is digested where it stands at its default: what was trained before it existed is what would be
trained now.
"""

from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from regraft.params import Section


class LateFields(Section):
    """A section of which the fields named in `LATE` are dumped only where they differ from their defaults."""

    LATE: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_late_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unused = {
            name for name in self.LATE if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }
        return {name: value for name, value in handler(self).items() if name not in unused}
