"""How values, durations and errors are written for people, everywhere in the same way."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote, unquote, unquote_plus

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

LONGEST_VALUE = 160
"""Characters of a value in an error."""
LONGEST_LINE = 1000
"""Characters of a line of an error; the longest that lists allowed names has some 800."""
MOST_LINES = 40
"""Lines of an error that has one a fault."""
HIDDEN = "***"
"""What stands for a password."""
_SECRET_NAME = re.compile(r"passw|\bpass\b|pwd|passphrase|secret|token|api_?key|access_?key|\bauth\b", re.IGNORECASE)
_SECRET_WITHIN = re.compile(rf"(?:{_SECRET_NAME.pattern})[\w.-]*\s*=\s*([^;&\s]+)", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&;]([^\s=&;?]+)=)([^&;]+)")
"""Of a URL, whose name may be encoded."""
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but for tabs and ends of lines, and those that change the direction of writing."""
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First signs of a cell that a spreadsheet computes, in either width."""


def format_seconds(seconds: float | None, unknown: str = "—") -> str:
    """Format seconds: ``2 h 5 min``, ``3 min 20 s``, ``8 s``; ``unknown`` for None."""
    if seconds is None:
        return unknown
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_value(value: object, digits: int | None = None) -> str:
    """Format a value as it is typed for a field: ``none``, ``true``, ``a,b``; floats in full, or to so many digits."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(format_value(item, digits) for item in value)
    return f"{value:.{digits}g}" if digits is not None and isinstance(value, float) else str(value)


def shown(value: object, most: int = LONGEST_VALUE) -> str:
    """Return a value as Python writes it, control characters escaped, cut to ``most`` characters."""
    if isinstance(value, str | bytes) and len(value) > most:
        return cut(repr(value[:most]), most - 3) + "..."
    try:
        return cut(repr(value), most)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return cut(reprlib.repr(value), most) if isinstance(value, list | tuple | dict) else type(value).__name__


def first_names(names: Sequence[str], most: int) -> str:
    """Return names with commas between them, and the number of those beyond the first ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def cut(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters, the middle left out; the end of an error says what to do."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[len(text) - end :]}"


def one_line(text: str, most: int = LONGEST_LINE) -> str:
    """Return a text in one line of at most ``most`` characters, without anything that a terminal would obey."""
    text = cut(text, 4 * most)
    if not text.isprintable():
        text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return cut(text, most)


def printable(text: str) -> str:
    """Return a text in which all that a terminal would obey is escaped, but for tabs and ends of lines."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def print_text(*parts: object, error: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Print as ``print`` does, ``printable`` and without passwords; on standard error if asked to.

    For whatever may hold names, captions or messages of others; a test admits no other ``print``.
    """
    text = hide_passwords(printable(" ".join(map(str, parts))))
    print(text, file=sys.stderr if error else sys.stdout, end=end, flush=flush)


def plain_cell(value: object) -> object:
    """Return a cell of a CSV file: text that a spreadsheet would compute has an apostrophe before it; numbers stay."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip()[:1] in _FORMULA and text.strip("-") else text
    return text


def hide_passwords(text: str, url: str = "") -> str:
    """Return a text without the passwords of URLs in it, nor those of ``url``, as typed, decoded or encoded."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" not in text and "=" not in text:
        return text
    # Each pattern reads a letter once, whatever a stranger has written: others take hours for a megabyte.
    text = re.sub(r"[^\s'\"]+", _without_password, text)
    return re.sub(r"([?&;]([\w.%-]+)=)([^\s&;'\"]+)", _without_secret, text)


def _without_password(word: re.Match[str]) -> str:
    end = word[0].rfind("@")
    user = re.search(r"://[^:/?#]*:", word[0][: max(end, 0)])  # a user's name may have an @, as Azure's have
    return f"{word[0][: user.end()]}{HIDDEN}{word[0][end:]}" if user else word[0]


def _without_secret(found: re.Match[str]) -> str:
    return f"{found[1]}{HIDDEN}" if _is_secret(found[2], found[3]) else found[0]


def _is_secret(name: str, value: str) -> bool:
    """Return whether a parameter of a URL is a password or, as ``odbc_connect``, has one within."""
    within = unquote_plus(value)
    return bool(_SECRET_NAME.search(unquote(name)) or ("=" in within and _SECRET_NAME.search(within)))


def hidden_url(url: str) -> str:
    """Return a URL, or the word of a command line that has one, without its passwords, whatever signs they have."""
    text = re.sub(r"((?:^|://)[^:/?#]*:)(?!//).*@", rf"\1{HIDDEN}@", url, count=1, flags=re.DOTALL)
    return _PARAMETER.sub(_without_secret, text)


def _secrets(url: str) -> set[str]:
    user = re.search(r"://[^:/?#]*:(.*)@", url, re.DOTALL)
    found = [value for _, name, value in _PARAMETER.findall(url) if _is_secret(name, value)]
    found += [one for value in found for one in _SECRET_WITHIN.findall(unquote_plus(value))]
    # A library may end the password at its first @ or / and take the rest for a host.
    found += [user[1], *(part for part in re.split("[@/:]", user[1]) if len(part) > 3)] if user else []
    return {form for one in found for form in (one, unquote(one), unquote_plus(one), quote(unquote(one), "")) if form}


def error_lines(text: str) -> str:
    """Return an error that has a line for each fault with each line as ``one_line``, the first few of many."""
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {lines[MOST_LINES].count(chr(10)) + 1} more faults"]
    return "\n".join(map(one_line, lines))


def fault_lines(where: object, faults: Iterable[str]) -> str:
    """Return an error with a line for each fault of a file, each once; what a fault quotes cannot begin a line."""
    return error_lines("\n".join(one_line(f"{where}: {fault}") for fault in dict.fromkeys(faults)))


@contextlib.contextmanager
def errors_name(where: object, several: bool = False) -> Iterator[None]:
    """Within the context a ValueError names ``where`` in one line, or one a fault if ``several`` may be raised.

    Its type stays. Input that is nested too deeply for its parser is a ValueError too.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{one_line(str(where))}: nested too deeply") from None
    except ValueError as error:
        text, name = str(error), str(where)
        if name not in text:
            text = f"{name}: {text or type(error).__name__}"
        text = error_lines(text) if several else one_line(" ".join(text.split("\n")))
        if text == str(error):
            raise
        if isinstance(error, UnicodeError):  # whose text is made of its parts
            raise ValueError(text) from error
        error.args = (text,)
        raise


def names_file(read: Callable[Concatenate[A, P], T]) -> Callable[Concatenate[A, P], T]:
    """Decorate a reader whose first argument is a file or folder, with ``errors_name``."""

    @functools.wraps(read)
    def wrapped(place: A, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with errors_name(place):
            return read(place, *args, **kwargs)

    return wrapped


def disk_advice(error: BaseException, resumes: bool = True) -> str:
    """Return the end of a message about a file that the system refuses, which says what to do; empty for others.

    resumes: as of ``run_command``.
    """
    number = (error.errno if isinstance(error, OSError) else None) or 0
    full = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space in your quota",
        errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
    }
    elsewhere = "give this user the right to it, or name another place (runtime.data_root, --runs-dir, --out)"
    refused = {
        errno.EACCES: elsewhere,
        errno.EPERM: elsewhere,
        errno.EROFS: "name another place (--runs-dir, --out), or remount it",
        errno.ENAMETOOLONG: "shorten the name",
        errno.ENOTDIR: "a part of it is a file; name a directory (--runs-dir, --out, runtime.data_root)",
        errno.ELOOP: "it is a link that leads back to itself; remove it",
    }
    if number in full:
        again = "the same command goes on where it stopped" if resumes else "run the same command again"
        return f"; {full[number]}, and {again}"
    return f"; {refused[number]}" if number in refused else ""
