"""Print the installed version of each package that pyproject.toml names, beside its bounds."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("captions", "coco", "trackers", "onnx", "sweeps")
"""Those that users install; of ``dev``, ``docs`` and ``minilm`` any version will do."""


def bounded() -> list[Requirement]:
    """Return the requirements that have bounds."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for name in EXTRAS for text in project["optional-dependencies"][name]]
    return [Requirement(text) for text in [*project["dependencies"], *extras]]


def main() -> int:
    """Print a line a package; return 1 if one that is installed is outside its bounds."""
    wrong = 0
    for one in bounded():
        try:
            found = version(one.name)
        except PackageNotFoundError:
            found = "-"
        outside = found != "-" and not one.specifier.contains(found, prereleases=True)
        wrong |= outside
        print(f"{one.name} {found} ({one.specifier}){' OUTSIDE' if outside else ''}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
