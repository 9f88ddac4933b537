"""Reader of the TOML files of tables and sweeps, with error messages."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from viladiff.config import renamed
from viladiff.config.base import Section, did_you_mean, error_reason
from viladiff.core.messages import one_line, shown


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ValueError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        fix = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}){fix}") from None
    except RecursionError:
        raise ValueError(f"{path}: not TOML that can be read: nested too deeply") from None
    except ValueError as error:  # of TOML, or of an integer of thousands of digits
        raise ValueError(f"{path}: not TOML, or a key twice: {one_line(str(error))}") from None


def strange_values(value: object, where: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Yield the dates and non-finite numbers anywhere in a tree: no field accepts one."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from strange_values(one, (*where, key))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from strange_values(one, (*where, i))
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        yield f"{_place(where)} = {shown(value)}: must be text, a finite number, true, false or a list of those"


def _place(where: Sequence[str | int]) -> str:
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")


def entry_name(kind: str, place: int, label: object) -> str:
    return f"{kind}[{place + 1}] {shown(label)}"


def format_toml_error(
    item: Any,
    tree: Mapping[str, Any],
    top: type[Section],
    sections: Mapping[str, type[Section]],
) -> str:
    """Format one pydantic error of a file of ``top``; ``sections`` are in its lists."""
    loc, value = list(item["loc"]), item.get("input")
    if item["type"] == "json_invalid":  # the file as JSON, which only depth can make so
        return f"nested too deeply ({one_line(item['msg'])})"
    section = sections.get(str(loc[0])) if len(loc) > 1 else None
    entry, rest = "", loc
    if section is not None:
        entry, rest = f"{loc[0]}.{loc[1]}: ", loc[2:]
        if isinstance(loc[1], int):
            found = tree[loc[0]][loc[1]]
            label = (
                next((found[key] for key in ("label", "text", "row") if key in found), "")
                if isinstance(found, dict)
                else found
            )
            entry = f"{entry_name(loc[0], loc[1], label)}: "
    field = _place(rest)
    if item["type"] == "extra_forbidden" and field in renamed.KEYS:
        return f"{entry}{field}: renamed; write {renamed.KEYS[field]}"
    if item["type"] == "extra_forbidden":
        allowed = [name for name in (section or top).model_fields if section or name != "name"]
        return f"{entry}{field}: no such key{did_you_mean(field, allowed) or '.'} Allowed: {', '.join(allowed)}"
    reason = error_reason(item)
    if item["type"] == "missing":
        return f"{entry}{field}: {reason}"
    return f"{entry}{field} = {shown(value)}: {reason}" if field else f"{entry}{reason}, not {shown(value)}"


def listed(labels: Iterable[str], numbers: Iterable[str] = ()) -> str:
    """Format the allowed labels, each behind its number if numbers are given."""
    pairs = zip_longest(numbers, labels, fillvalue="")
    return "Allowed: " + ", ".join(f"{number} {label!r}".lstrip() for number, label in pairs)
