"""Build step: the tables and sweeps of the checkout become data of the wheel, since they live beside their scripts."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling looks for a class of this name
    """Puts ``ablations/*.toml`` and ``tune/*.toml`` below ``viladiff/shipped/`` of a wheel that is no editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for folder in ("ablations", "tune"):
            for path in sorted(Path(self.root, folder).glob("*.toml")):
                build_data["force_include"][str(path)] = f"viladiff/shipped/{folder}/{path.name}"
