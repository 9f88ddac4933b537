"""Base class and helpers of the configuration: fields by dotted path, parsing of text, error messages.

Nothing here knows a field by name; ``viladiff.runs.config`` defines the fields.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from viladiff.config import renamed
from viladiff.core.messages import error_lines, one_line, shown

INTEGER = re.compile(r"[+-]?\d+")
DOTTED = re.compile(r"[a-z]\w*(\.\w+)+|seed")
FIELD_FIRST = re.compile(r"[a-z_]+ [=+] ")
REAL = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and what is allowed, a line each."""

    def __init__(self, text: str) -> None:
        super().__init__(error_lines(text))


class Section(BaseModel):
    """A part of the configuration: frozen, strict about keys, numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class FieldHelp(NamedTuple):
    """One line of ``viladiff config``."""

    path: str
    kind: str
    default: object
    text: str


def parse_overrides(words: Iterable[str]) -> dict[str, str]:
    """Parse ``["a.b=1"]`` to {"a.b": "1"}. Raises ConfigError for a word without "=" and for a repeated field."""
    found: dict[str, str] = {}
    given = list(words)
    for place, word in enumerate(given):
        path, sign, text = word.partition("=")
        path = path.strip()
        if not sign and path.endswith(".toml"):
            raise ConfigError(
                f"{word}: fields are given one by one, as data.split=183; files are for viladiff table and sweep"
            )
        if not sign or not path:
            raise ConfigError(
                f"{shown(word)}: write field=value without spaces around '=', as in {_joined(given[place:])}"
            )
        if path in found:
            raise ConfigError(f"{path}: given twice, as {shown(found[path])} and as {shown(text)}; keep one")
        found[path] = text
    return found


def _joined(words: list[str]) -> str:
    """Return the first word and the value behind it as ``field=value``; an example where they are none."""
    field, value = words[0].rstrip(":"), next((word.lstrip("=") for word in words[1:] if word.strip("=")), "")
    return f"{field}={value}" if DOTTED.fullmatch(field) and value else "data.split=183"


def field_infos(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every field that holds a value rather than a section, by dotted path."""
    found: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        if _is_section(info.annotation):
            found |= field_infos(info.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found[prefix + name] = info
    return found


def iter_fields(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted path, value) of every leaf of an existing section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from iter_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def unflatten(flat: Mapping[str, object]) -> dict[str, Any]:
    """Convert {"a.b": 1} to {"a": {"b": 1}}. Raises ConfigError for a field that is another one's section."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, leaf = path.split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: a field below {name}, which has a value itself; keep one of the two")
        if isinstance(node.get(leaf), dict):
            raise ConfigError(f"{path}: has a value, and fields below it are given too; keep one of the two")
        node[leaf] = value
    return tree


def coerce(section: type[BaseModel], given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Convert ``given``: parse text by each field's type, make lists tuples; unknown names are left for validation.

    Raises ConfigError for a bool that is a number or a number that is a bool, which pydantic would accept.
    """
    out: dict[str, Any] = {}
    for name, value in given.items():
        info = section.model_fields.get(name)
        if info is None:
            out[name] = value
        elif _is_section(info.annotation):
            nested = isinstance(value, Mapping)
            out[name] = coerce(info.annotation, value, f"{prefix}{name}.") if nested else value  # type: ignore[arg-type]
        else:
            out[name] = _coerce_leaf(value, info.annotation, prefix + name)
    return out


def parse(text: str, kind: Any) -> Any:
    """Convert command-line text to a value of type ``kind``; "183" stays text where text is expected.

    "0.8,1.25" is a tuple, "none" is None where None is allowed. Text that does not fit is returned unchanged, so that
    validation can name it.
    """
    origin, args = get_origin(kind), get_args(kind)
    lower = text.strip().lower()
    if kind is bool:
        return {"true": True, "false": False}.get(lower, text)
    if kind is int:
        return int(lower) if INTEGER.fullmatch(lower) else text
    if kind is float:
        return float(lower) if REAL.fullmatch(lower) else text
    if origin is Literal:
        return next((choice for choice in args if str(choice) == text.strip()), text)
    if origin is tuple:
        items = [item.strip() for item in text.strip().strip("()[]").split(",") if item.strip()]
        types = [args[0]] * len(items) if args[-1] is Ellipsis else [*args, *[args[-1]] * len(items)]
        return tuple(parse(item.strip("'\""), one) for item, one in zip(items, types, strict=False))
    if origin in (Union, UnionType):
        if NoneType in args and lower == "none":
            return None
        parsed = (parse(text, member) for member in args if member not in (NoneType, str))
        return next((value for value in parsed if value is not text), text)
    return text


def nearest(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most like ``name``; None where none has a similarity (0 to 1) of ``cutoff``."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` for the known name most like ``name``, or an empty string."""
    match = nearest(name, known, cutoff)
    return f"; did you mean {match!r}?" if match else ""


def unknown_field(path: str, known: Collection[str]) -> str:
    """Return the error for a path that names no field: its new name, or the nearest one and the section's fields."""
    path = one_line(path, 200)
    if path in renamed.FIELDS:
        return f"{path}: renamed; write {renamed.FIELDS[path]}"
    inside = [name for name in known if name.startswith(path + ".")]
    if inside:
        return f"{path}: a section, not a field; set one of {', '.join(inside)}"
    section = path.rpartition(".")[0]
    while section and not any(name.startswith(section + ".") for name in known):
        section = section.rpartition(".")[0]
    depth = len(section) + 1 if section else 0
    siblings = dict.fromkeys(name[depth:].split(".")[0] for name in known if name[:depth] == path[:depth])
    tails = {name.rpartition(".")[2]: name for name in known}
    tail = path.rpartition(".")[2]
    other = renamed.ELSEWHERE.get(tail)
    match = other if other in known else nearest(path, known) or tails.get(nearest(tail, tails) or "")
    hint = f"; did you mean {match!r}?" if match else "."
    return f"{path}: no such field{hint} Allowed in {section or 'a run'}: {', '.join(siblings)}"


def format_errors(error: ValidationError, known: Collection[str], tagged: Collection[str]) -> str:
    """Return one line per error: dotted field, value, allowed values.

    ``tagged``: sections chosen by a tag, which pydantic puts into the location although the user never wrote it.
    """
    lines = []
    for item in error.errors(include_url=False):
        loc = [*item["loc"]]
        if len(loc) > 1 and loc[0] in tagged:
            del loc[1]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
        lines.append(_sentence(path, item, known))
    return "\n".join(dict.fromkeys(lines))


@cache
def field_docs(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstring of each field of a section, read from its source; fields without one are absent."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not (issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(text.value.value))  # type: ignore[union-attr]
    return found


def describe_fields(section: BaseModel, prefix: str = "") -> Iterator[FieldHelp]:
    """Yield path, type, value and explanation of every leaf."""
    texts = field_docs(type(section))
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from describe_fields(value, f"{prefix}{name}.")
        else:
            limits = [_limit(limit) for limit in info.metadata]
            kind = " ".join([format_type(info.annotation), *filter(None, limits)])
            yield FieldHelp(prefix + name, kind, value, texts.get(name, ""))


def format_type(kind: Any) -> str:
    """Format a type for people: ``poly | cosine``, ``int | none``, ``float, float``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(str(choice) for choice in args)
    if origin is tuple:
        return f"{format_type(args[0])}, …" if args[-1] is Ellipsis else ", ".join(format_type(one) for one in args)
    if origin in (Union, UnionType):
        return " | ".join("none" if one is NoneType else format_type(one) for one in args)
    return {str: "text", int: "int", float: "float", bool: "true | false"}.get(kind, str(kind))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _coerce_leaf(value: Any, kind: Any, path: str) -> Any:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, str) and kind is not str:
        value = parse(value, kind)
    elif isinstance(value, list):
        value = tuple(value)
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{path} = {shown(value)}: must be true or false")
    if (
        get_origin(kind) is tuple
        and isinstance(value, tuple)
        and ... not in (parts := get_args(kind))
        and len(value) != len(parts)
    ):
        raise ConfigError(f"{path} = {shown(value)}: must be {len(parts)} values: {format_type(kind)}")
    if isinstance(value, str) and set(members) <= {int, float, NoneType}:
        wanted = "a whole number" if float not in members else "a number"
        meant = f"; write {near}" if (near := _number_in(value, float in members)) else ""
        raise ConfigError(
            f"{path} = {shown(value)}: must be {wanted}{' or none' if NoneType in members else ''}{meant}"
        )
    plain = not any(get_origin(member) is Literal for member in members)
    if isinstance(value, bool) and plain and bool not in members:
        raise ConfigError(f"{path} = {shown(value)}: must be {format_type(kind)}, not true or false")
    return value


def _number_in(text: str, broken: bool) -> str:
    """Return how a number is written that has a decimal comma, a sign of another alphabet or a unit; empty for none.

    broken: whether it may have a fraction; else one such as 1e3 is written out.
    """
    plain = text.strip().replace("\N{MINUS SIGN}", "-").rstrip(",;f").replace("_", "")
    if broken and re.fullmatch(r"[-+]?\d*,\d+(e[-+]?\d+)?", plain, re.IGNORECASE):
        plain = plain.replace(",", ".")
    elif re.fullmatch(r"\d{1,3}(,\d{3})+", plain):
        plain = plain.replace(",", "")
    try:
        number = float(plain)
    except ValueError:
        return ""
    if broken or not math.isfinite(number):
        return plain
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else ""


def _limit(limit: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " ".join(f"{sign} {getattr(limit, name):g}" for name, sign in signs.items() if hasattr(limit, name))


def _sentence(path: str, item: Any, known: Collection[str]) -> str:
    if item["type"] == "extra_forbidden":
        return unknown_field(path, known)
    reason = error_reason(item)
    if item["type"] == "value_error":
        # A section's own check begins with the field that it is about: "steps = 3: ...".
        return reason if not path else f"{path}.{reason}" if FIELD_FIRST.match(reason) else f"{path}: {reason}"
    return f"{path}: {reason}" if item["type"] == "missing" else f"{path} = {shown(item.get('input'))}: {reason}"


def error_reason(item: Mapping[str, Any]) -> str:
    """Return why pydantic refuses a value, in the project's words and without field and value.

    item: an entry of ``ValidationError.errors()``; that of an unknown key is left to the caller.
    """
    kind, value, ctx = item["type"], item.get("input"), item.get("ctx", {})
    if kind == "value_error":
        return str(ctx["error"])
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return f"must be {sign} {ctx[name]:g}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", ctx["expected"])
        if not isinstance(value, str) and str(value) in choices:
            return f"must be text, {str(value)!r}"
        return f"allowed: {', '.join(choices) or ctx['expected']}{did_you_mean(str(value), choices)}"
    for start, reason in _REASONS.items():
        if kind.startswith(start):
            return reason
    return str(item["msg"][0].lower() + item["msg"][1:])


_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": ("≥", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("≤", "le"),
}
_REASONS = {
    "missing": "missing, and it has no default",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "int_": "must be a whole number",
    "float_": "must be a number",
    "model_": "must be a section of fields",
}
"""Reasons by how the type of an error begins."""
