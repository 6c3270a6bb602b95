"""Chat templates compiled as transformers compiles them, without importing it: that takes longer than a thousand rows.

The environment is the one of `transformers.utils.chat_template_utils` (5.23), safeguards included: a sandbox that changes
nothing, no dictionary class to break out with, no underscored names in a namespace. `tokenizer.py` uses it only where both
were seen to render alike, and a test compares them on every template of the tests.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4)
def compiled(template: str) -> Any:
    """Return the `jinja2.Template`.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says; here it is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

        def _rendered(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **given: Any) -> None:
            self, *rest = args
            content = dict(*rest, **given)
            for name in content:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, content)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template names {name!r} in a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_now, dict=_Dictionary(), namespace=Namespace
    )
    return environment.from_string(template)


class _Dictionary:
    """Makes dictionaries in a template, and is no class that leads to others."""

    def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
        return dict(*args, **given)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - as transformers; `regraft.chat` lets it stand still
