"""Chat templates: finding them in a model directory, and rendering as transformers does.

The environment is that of ``transformers.utils.chat_template_utils``: Jinja's immutable sandbox
(templates are untrusted programs), ``trim_blocks``, ``lstrip_blocks``, loop controls,
``raise_exception``, ``strftime_now``, a ``tojson`` without HTML escapes, ``{% generation %}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tpirt.errors import TokenizerError
from tpirt.files import read_regular, stand_in
from tpirt.types import Message


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        origin: its file, for error messages.

    Raises:
        TokenizerError: invalid Jinja; the message has the file, line and reason.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.origin = origin
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise TokenizerError(
                f"{origin}: the chat template is not valid Jinja (line {exc.lineno}): {exc.message}"
            ) from exc
        except (jinja2.TemplateError, RecursionError, SyntaxError) as exc:
            raise TokenizerError(f"{origin}: the chat template cannot be used: {exc}") from exc

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Render a conversation to the text the model was trained on, special tokens included.

        Args:
            messages: the turns, oldest first; at least one.
            special_tokens: ``bos_token`` and the like, as template variables.
            add_generation_prompt: end with the header of an assistant's turn.

        Raises:
            TokenizerError: no messages, or the template rejects them or fails; the message has
                the template's reason.
        """
        if not messages:
            raise TokenizerError("chat: expected at least one message, got none")
        variables: dict[str, Any] = {"tools": None, "documents": None, **special_tokens}
        variables["messages"] = [{"role": m.role, "content": m.content} for m in messages]
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(variables)
        except Exception as exc:  # a template is a program: it can fail in any way
            reason = str(exc) or type(exc).__name__
            raise TokenizerError(f"{self.origin}: the chat template failed: {reason}") from exc


def find_chat_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Load the chat template of a model directory; None if it has none.

    In order: ``chat_template.jinja``, ``additional_chat_templates/default.jinja``,
    ``chat_template`` in ``tokenizer_config.json``, ``chat_template.json`` (older processors).
    If there are additional templates without a "default", transformers 5 fails; this function
    continues with the configuration. An empty template is none.

    Raises:
        TokenizerError: a file cannot be read or does not contain a template.
    """
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (path / name).is_file() and (source := read_text(path / name)).strip():
            return ChatTemplate(source, str(path / name))
    legacy = path / "chat_template.json"
    for file, value in (
        (path / "tokenizer_config.json", config.get("chat_template")),
        (legacy, read_json(legacy).get("chat_template") if legacy.is_file() else None),
    ):
        if value is not None and value != [] and (source := _default_of(value, file)).strip():
            return ChatTemplate(source, str(file))
    return None


def read_text(file: Path) -> str:
    """Read a UTF-8 file without its byte order mark; TokenizerError naming it where that fails."""
    try:
        text = read_regular(file).decode("utf-8-sig")
    except OSError as exc:
        raise TokenizerError(f"{file}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"{file}: not UTF-8 text (byte {exc.start})") from exc
    if other := stand_in(text[:64].encode()):
        raise TokenizerError(f"{file}: this is {other}")
    return text


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with one JSON object; raises TokenizerError with its name otherwise."""
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as exc:
        raise TokenizerError(
            f"{file}: not valid JSON ({exc}); it may be truncated, download it again"
        ) from exc
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _default_of(value: object, file: Path) -> str:
    """The template in a ``chat_template`` entry: a string, or the "default" of a named list."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {str(t.get("name")): t.get("template") for t in value if isinstance(t, dict)}
    elif isinstance(value, dict):
        named = value
    else:
        raise TokenizerError(
            f"{file}: chat_template: expected the text of a template, got {json.dumps(value)}; "
            "write one into chat_template.jinja, or remove the entry"
        )
    template = named.get("default")
    if not isinstance(template, str):
        names = ", ".join(sorted(map(str, named))) or "none"
        raise TokenizerError(
            f'{file}: chat_template: expected a template named "default", got {names}; '
            "write the one to use into chat_template.jinja"
        )
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _new_dict  # not the class, which gives access to its attributes
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text; rendered as is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render_body(self, caller: Macro) -> str:
        text: str = caller()
        return text


class _Namespace(Namespace):
    """``namespace(...)`` without underscore names, as in transformers, for the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that namespace(self=...) is valid
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: {name!r} is not allowed")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
