"""Makes the example of docs/your-data.md, carries out the page's commands on it, and draws the page's pictures.

python scripts/your_data.py DIRECTORY [--pictures docs/pictures]

The training takes minutes on a CPU. A DIRECTORY of an earlier call is gone on with; lists and model are made anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "your-data.md"
COUNT, NEW = 60, 6
"""Photographs in the example, and new ones to label."""
SHOWN, SIDE = 3, 220
"""New photographs in the picture, and the height of each in pixels."""


def photographs() -> ModuleType:
    """Load the tests' pieces of real photographs, with masks by colour."""
    path = ROOT / "tests" / "photographs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(place: Path) -> None:
    """Write photos/ without lists, half of it without masks, and new/ with photographs of other sizes."""
    source = photographs()
    source.write(place / "photos", COUNT, labelled=COUNT // 4, val=COUNT // 4, sizes=(96, 200))
    shutil.rmtree(place / "photos" / "splits")
    (place / "new").mkdir()
    for index in range(COUNT, COUNT + NEW):
        photo = source.piece(index, (150, 300))
        Image.fromarray(photo.pixels).save(place / "new" / f"{photo.name}.jpg", quality=92)


def commands() -> list[str]:
    """Return the page's commands, in order."""
    return re.findall(r"^```sh\n(viladiff .*?)\n```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def strip(place: Path) -> Image.Image:
    """Photograph, overlay and confidence of the first new photographs, a row each."""
    rows = []
    for path in sorted((place / "new").iterdir())[:: NEW // SHOWN][:SHOWN]:
        out = place / "predictions"
        three = (path, out / "overlays" / path.name, out / "confidence" / f"{path.stem}.png")
        rows.append([_scaled(Image.open(one).convert("RGB")) for one in three])
    width = max(sum(image.width + 8 for image in row) - 8 for row in rows)
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + 8) - 8), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * (image.width + 8), i * (SIDE + 8)))
    return sheet


def _scaled(image: Image.Image) -> Image.Image:
    return image.resize((round(image.width * SIDE / image.height), SIDE), Image.Resampling.BICUBIC)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data, run the commands, draw; return the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path, metavar="DIRECTORY", help="where the example is made")
    parser.add_argument("--pictures", type=Path, help="where the page's pictures go; none are drawn without")
    given = parser.parse_args(arguments)
    if not (given.place / "photos").is_dir():
        make(given.place)
    for again in ("photos/splits", "model"):
        shutil.rmtree(given.place / again, ignore_errors=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command in commands():
        print(f"$ {command}", flush=True)
        status = subprocess.run(["bash", "-c", command], cwd=given.place, env={**os.environ, "PATH": path}).returncode
        if status:
            return status
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        # A palette of 256 colours is enough for both, and a quarter of the bytes.
        for name, image in (
            ("check", Image.open(given.place / "data-check" / "mosaic.png")),
            ("predictions", strip(given.place)),
        ):
            image.convert("RGB").quantize(256).save(given.pictures / f"your-data-{name}.png", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
