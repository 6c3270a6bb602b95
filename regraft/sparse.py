"""Documents without what did not happen: a field that is as by default changes no byte of an older one."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


def without_defaults(content: dict[str, Any], model: BaseModel, names: Sequence[str]) -> dict[str, Any]:
    """Leave these fields out of what a model was turned into, where they are as by default.

    Args:
        content: what pydantic made of `model`; changed in place.
        model: the model.
        names: its fields.
    """
    fields = type(model).model_fields
    for name in names:
        if getattr(model, name) == fields[name].get_default(call_default_factory=True):
            content.pop(name, None)
    return content
