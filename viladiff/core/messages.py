"""How values and durations are written for people, everywhere in the same way."""

from __future__ import annotations

import errno


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
