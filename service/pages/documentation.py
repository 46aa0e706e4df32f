"""The OpenAPI document, turned into what the documentation page draws: operations, shapes of data, problems."""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson
from markupsafe import Markup, escape

from domain.statuses import STATUSES
from service.http.problems import Kind

METHODS: Final = ("get", "put", "post", "delete", "patch")
_REFERENCE: Final = "#/components/schemas/"
_LINK: Final = re.compile(r"\[([^\]]+)\]\((/[^)\s]*)\)")
_MARKED: Final = re.compile(rf"``?([^`]+)``?|{_LINK.pattern}")


class Row(NamedTuple):
    """A parameter or a member: its name, its type, whether it must be there, what is said of it."""

    name: str
    kind: Markup
    required: bool
    said: Markup


class Answer(NamedTuple):
    """An answer of an operation: what is said of it, its forms, an example; or which problems it may be."""

    status: str
    said: Markup
    forms: list[tuple[str, Markup]]
    example: str
    problems: Markup


class Operation(NamedTuple):
    """One method on one path."""

    slug: str
    group: str
    method: str
    path: str
    summary: Markup
    said: Markup
    is_open: bool
    parameters: list[Row]
    body: list[tuple[str, Markup]]
    body_example: str
    answers: list[Answer]


class Schema(NamedTuple):
    """A shape of data."""

    name: str
    said: Markup
    members: list[Row]


def operations(document: Mapping[str, Any]) -> list[Operation]:
    """Return what can be asked, in the document's order."""
    return [
        _operation(path, method, item[method], document.get("security", []))
        for path, item in document.get("paths", {}).items()
        for method in METHODS
        if method in item
    ]


def schemas(document: Mapping[str, Any]) -> list[Schema]:
    """Return the named shapes of data, by name."""
    named = document.get("components", {}).get("schemas", {})
    return [
        Schema(name, _rich(schema.get("description", "")), _members(schema))
        for name, schema in sorted(named.items())
    ]


def _operation(path: str, method: str, item: Mapping[str, Any], security: Any) -> Operation:
    content = item.get("requestBody", {}).get("content", {})
    return Operation(
        slug=re.sub(r"[^a-z0-9]+", "-", f"{method} {path}".lower()).strip("-"),
        group=path.split("/")[1],
        method=method.upper(),
        path=path,
        summary=_rich(item.get("summary", "")),
        said=_rich(item.get("description", "")),
        is_open=not item.get("security", security),
        parameters=[
            Row(
                one.get("name", ""),
                _kind(one.get("schema", {})),
                bool(one.get("required")),
                _rich(one.get("description", "")),
            )
            for one in item.get("parameters", [])
        ],
        body=_forms(content),
        body_example=_example(content),
        answers=[
            Answer(
                status,
                _rich(one.get("description", "")),
                _forms(one.get("content", {})),
                _example(one.get("content", {})),
                _problems(one.get("description", "")),
            )
            for status, one in item.get("responses", {}).items()
        ],
    )


def _forms(content: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    return [(media, _kind(form.get("schema", {}))) for media, form in content.items()]


def _example(content: Mapping[str, Any]) -> str:
    for form in content.values():
        if "example" in form:
            return orjson.dumps(form["example"], option=orjson.OPT_INDENT_2).decode()
    return ""


def _problems(text: str) -> Markup:
    """Return the links to kinds of problems in a text: each is explained where it leads."""
    links = [Markup('<a href="{}">{}</a>').format(path, title) for title, path in _LINK.findall(text)]
    return Markup(", ").join(links)


def _members(schema: Mapping[str, Any]) -> list[Row]:
    required = schema.get("required", [])
    return [
        Row(name, _kind(one), name in required, _rich(one.get("description", "")))
        for name, one in schema.get("properties", {}).items()
    ]


def _kind(schema: Mapping[str, Any]) -> Markup:
    """Return the type that a schema describes, in few words."""
    if reference := schema.get("$ref"):
        name = str(reference).removeprefix(_REFERENCE)
        return Markup('<a href="#schema-{}">{}</a>').format(name.lower(), name)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return Markup(" | ").join(_kind(one) for one in schema[key])
    if schema.get("enum") == [*STATUSES]:
        # The longest of the lists, and in most of the shapes; the words for them are there.
        return Markup('<a href="#get-transitions">status</a>')
    if "enum" in schema:
        return Markup(" | ").join(Markup("<code>{}</code>").format(value) for value in schema["enum"])
    kind = schema.get("type", "")
    name = escape(" | ".join(kind) if isinstance(kind, list) else kind)
    if kind == "array":
        return Markup("{} […]").format(_kind(schema.get("items", {})))
    limits = [str(schema["format"])] if "format" in schema else []
    limits += [f"{word} {schema[key]}" for key, word in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    limits += [f"= {schema['default']}"] if "default" in schema else []
    return Markup("{} <small>{}</small>").format(name, ", ".join(limits)) if limits else name


def _rich(text: str) -> Markup:
    """Return a text with its code and its links within this service, and nothing else, marked up."""
    parts, end = [], 0
    for found in _MARKED.finditer(text):
        code, title, path = found.groups()
        parts.append(escape(text[end : found.start()]))
        if code is not None:
            parts.append(Markup("<code>{}</code>").format(code))
        else:
            parts.append(Markup('<a href="{}">{}</a>').format(path, title))
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


# Title, slug (as the problem's type has it), status, explanation.
PROBLEM_KINDS: Final = [(kind.title, kind.slug, kind.status, _rich(kind.meaning)) for kind in Kind]
