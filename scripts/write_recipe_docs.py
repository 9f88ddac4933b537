"""Write the tables of the recipes into docs/datasets.md, from viladiff/tables/recipes.

python scripts/write_recipe_docs.py           write the tables
python scripts/write_recipe_docs.py --check   exit with 1 where they are not current
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from viladiff.tables.recipes.listing import recipes_markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "datasets.md"
TABLES = re.compile(r"(<!-- recipes: python scripts/write_recipe_docs.py -->\n).*?(\n<!-- end of recipes -->)", re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the recipes into docs/datasets.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the tables are not current")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    written = TABLES.sub(lambda found: f"{found[1]}\n{recipes_markdown()}\n{found[2]}", page, count=1)
    if args.check and written != page:
        print("docs/datasets.md: the recipes are not current; run python scripts/write_recipe_docs.py")
        return 1
    if not args.check:
        PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
