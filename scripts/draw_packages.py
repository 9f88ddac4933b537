"""Draw the packages of viladiff and their imports into docs/architecture.md, from the source.

    python scripts/draw_packages.py           write the picture
    python scripts/draw_packages.py --check   exit with 1 where the picture is not current

An arrow points from the package that imports to the one that is imported. Imports of all kinds count, within functions
and for types too. An arrow is left out where a longer path says the same.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = re.compile(r"```mermaid\n.*?```", re.S)


def package_imports() -> dict[str, set[str]]:
    """Return the packages that each package imports; ``losses`` is a module that counts as one."""
    packages = {path.parent.name for path in (ROOT / "viladiff").glob("*/__init__.py")} | {"losses"}
    arrows: dict[str, set[str]] = {name: set() for name in packages}
    for path in sorted((ROOT / "viladiff").rglob("*.py")):
        package = path.relative_to(ROOT / "viladiff").with_suffix("").parts[0]
        if package not in packages:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "viladiff":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                arrows[package] |= {name.split(".")[1] for name in names} & packages - {package}
    return arrows


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Return the packages that ``start`` imports, directly or by way of others."""
    seen: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += arrows[name]
    return seen


def picture(arrows: dict[str, set[str]]) -> str:
    """Return a mermaid graph of the arrows that no longer path replaces."""
    lines = ["```mermaid", "graph TD"]
    for package in sorted(arrows):
        for other in sorted(arrows[package]):
            if not any(other in reachable(arrows, middle) for middle in arrows[package] - {other}):
                lines.append(f"    {package} --> {other}")
    return "\n".join([*lines, "```"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the packages of viladiff into docs/architecture.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the picture is not current")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    drawn = PICTURE.sub(lambda _: picture(package_imports()), page, count=1)
    if args.check and drawn != page:
        print("docs/architecture.md: the picture of the packages is not current; run python scripts/draw_packages.py")
        return 1
    if not args.check:
        PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
