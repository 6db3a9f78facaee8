"""The one grammar for passes and targets: `name{key=value,...}`, and lists of them separated by commas.

    quantize-int8
    quantize-int8{calibration=percentile,exclude=["/conv1/Conv",logits]}
    cpu{mcpu=cascadelake,threads=1}
    simplify,fold-batch-norm,quantize-int8{calibration=mse}

A value is a bare word, a double-quoted string (JSON escapes), or a list `[a,b]` of these. What a word means
(integer, float, boolean, choice) is decided by the field it is bound to, so the grammar needs no types.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from graphopt.errors import SpecError, nearest

T = TypeVar("T")
Value = str | tuple[str, ...]

_TOKEN = re.compile(r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\],=])|(?P<word>[^\s{}\[\],="]+))')


@dataclass(frozen=True)
class Spec:
    """A parsed `name{key=value,...}`: option values are still text."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}{{{','.join(f'{k}={_format_value(v)}' for k, v in self.options.items())}}}"


def parse(text: str) -> Spec:
    """Parse exactly one spec. Raises SpecError."""
    specs = parse_list(text)
    if len(specs) != 1:
        raise SpecError(f"expected one name, found {len(specs)} in {text!r}")
    return specs[0]


def parse_list(text: str) -> tuple[Spec, ...]:
    """Parse a comma-separated list of specs; empty text is the empty list. Raises SpecError."""
    reader = _Reader(text)
    specs: list[Spec] = []
    while not reader.at_end():
        if specs:
            reader.expect(",")
        specs.append(_read_spec(reader))
    return tuple(specs)


def bind(spec: Spec, cls: type[T], kind: str) -> T:
    """Build the dataclass `cls` from the options of `spec`; `kind` ("pass", "target") names it in errors.

    Raises SpecError for an unknown option or a value that its field's type refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    values: dict[str, Any] = {}
    for key, value in spec.options.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = nearest(name, fields)
            known = ", ".join(sorted(fields)) or "none"
            hint = f"did you mean {near!r}?" if near else f"its options are: {known}"
            raise SpecError(f"{kind} {spec.name!r} has no option {key!r}", hint=hint)
        try:
            values[name] = _convert(value, hints[name])
        except ValueError as error:
            raise SpecError(f"{kind} {spec.name!r}: option {key}={_format_value(value)}: {error}") from None
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise SpecError(f"{kind} {spec.name!r}: {error}") from None


def unbind(name: str, instance: Any) -> Spec:
    """The shortest spec that binds back to `instance`: options at their default are left out."""
    options: dict[str, Value] = {}
    for f in dataclasses.fields(instance):
        if not f.init:
            continue
        value = getattr(instance, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default:
            options[f.name] = _as_text(value)
    return Spec(name, options)


def _as_text(value: Any) -> Value:
    if isinstance(value, (tuple, list, frozenset)):
        return tuple(str(_as_text(v)) for v in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)


def _format_value(value: Value) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(_format_value(v) for v in value)}]"
    plain = re.fullmatch(r'[^\s{}\[\],="]+', value)
    return value if plain else json.dumps(value)


def _convert(value: Value, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(hint)
        if type(None) in choices and value == "none":
            return None
        return _convert(value, next(c for c in choices if c is not type(None)))
    if origin is tuple:
        items = value if isinstance(value, tuple) else (value,)
        return tuple(_convert(item, typing.get_args(hint)[0]) for item in items)
    if isinstance(value, tuple):
        raise ValueError("a list is not allowed here")
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        for choice in allowed:
            if str(choice) == value:
                return choice
        near = nearest(value, [str(a) for a in allowed])
        raise ValueError(
            f"must be one of {', '.join(str(a) for a in allowed)}" + (f"; did you mean {near!r}?" if near else "")
        )
    if hint is bool:
        if value.lower() in ("true", "yes", "1", "on"):
            return True
        if value.lower() in ("false", "no", "0", "off"):
            return False
        raise ValueError("must be true or false")
    if hint is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError("must be an integer") from None
    if hint is float:
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be a number") from None
    return value


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise SpecError(f"cannot read {text[position:].strip()!r} in {text!r}")
            kind = typing.cast(str, match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.position = 0

    def at_end(self) -> bool:
        return self.position == len(self.tokens)

    def peek(self) -> str | None:
        if self.at_end():
            return None
        kind, text, _ = self.tokens[self.position]
        return text if kind == "mark" else None

    def expect(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.complaint(f"expected {mark!r}")
        self.position += 1

    def name(self, what: str) -> str:
        """A bare word: names are never quoted, so that they print as they parse."""
        if not self.at_end() and self.tokens[self.position][0] == "string":
            raise self.complaint(f"expected {what} without quotes")
        return self.word(what)

    def word(self, what: str) -> str:
        if self.at_end():
            raise self.complaint(f"expected {what}")
        kind, text, _ = self.tokens[self.position]
        if kind == "mark":
            raise self.complaint(f"expected {what}")
        self.position += 1
        if kind == "string":
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                raise self.complaint(f"{text} is not a valid quoted string") from None
        return text

    def complaint(self, what: str) -> SpecError:
        where = "at the end" if self.at_end() else f"at column {self.tokens[self.position][2] + 1}"
        return SpecError(f"{what} {where} of {self.text!r}", hint="the grammar is name{key=value,...},name,...")


def _read_spec(reader: _Reader) -> Spec:
    name = reader.name("a name")
    options: dict[str, Value] = {}
    if reader.peek() == "{":
        reader.expect("{")
        while reader.peek() != "}":
            if options:
                reader.expect(",")
            key = reader.name("an option name")
            if key in options:
                raise reader.complaint(f"option {key!r} given twice,")
            reader.expect("=")
            options[key] = _read_value(reader)
        reader.expect("}")
    return Spec(name, options)


def _read_value(reader: _Reader) -> Value:
    if reader.peek() != "[":
        return reader.word("a value")
    reader.expect("[")
    items: list[str] = []
    while reader.peek() != "]":
        if items:
            reader.expect(",")
        items.append(reader.word("a value"))
    reader.expect("]")
    return tuple(items)
