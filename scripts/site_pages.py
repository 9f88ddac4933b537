"""MkDocs hook: pages of the documentation site that are made from the code, the README and the published reports.

Links that leave docs/ in the Markdown files, so that they work in a checkout, are led to the pages made here, or to the
text of the link alone where the site has no such page.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from viladiff.cli.methods import method_rows, published_lines
from viladiff.methods import METHODS
from viladiff.runs.config import RunConfig, fields_help, override

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "reports" / "published"
RESULTS = {"table5": "Table 5", "protocol": "The protocol"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of docs/."""
    files.append(File.generated(config, "index.md", content=front_page()))
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "security.md", content=security))
    for name, text in method_pages():
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    for name in RESULTS:
        folder = PUBLISHED / name
        text = (folder / "table.md").read_text(encoding="utf-8")
        files.append(File.generated(config, f"results/{name}.md", content=site_links(text, f"results/{name}.md")))
        for picture in sorted((folder / "figures").glob("*.png")):
            files.append(File.generated(config, f"results/figures/{picture.name}", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page that leave docs/ to the pages of the site."""
    return site_links(markdown, page.file.src_uri)


def front_page() -> str:
    """Return the README, with links as from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](reports/published/table5/figures/", "](results/figures/")
    return text.replace("](reports/published/", "](../reports/published/")


def site_links(text: str, page: str) -> str:
    """Return Markdown whose links are of the site: ``page`` is the address of the page below docs/."""
    up = "../" * page.count("/")

    def led(found: re.Match[str]) -> str:
        words, target, part = found[1], found[2], found[3] or ""
        docs = ROOT / "docs"
        stays = docs in (docs / page).parent.joinpath(target).resolve().parents
        if "://" in target or stays:
            return found[0]
        for name in RESULTS:
            if target.endswith(f"published/{name}/table.md"):
                return f"[{words}]({up}results/{name}.md{part})"
        return words

    return LINK.sub(led, text)


def method_pages() -> Iterator[tuple[str, str]]:
    """Yield name and Markdown of the list of methods and of a page for each."""
    rows = method_rows()
    listed = "\n".join(
        f"| [{row['method']}]({row['method']}.md) | {_where(row)} | {row['paper'] or '-'} |" for row in rows
    )
    yield "index", f"# Methods\n\n| method | published | paper |\n| --- | --- | --- |\n{listed}\n"
    for row in rows:
        yield row["method"], method_page(row)


def method_page(row: dict[str, Any]) -> str:
    """Return the page of a method: paper, losses, cost, published settings, fields."""
    name = row["method"]
    kind = METHODS[name]
    cfg = override(RunConfig(), {"method.name": name})
    about = importlib.import_module(kind.__module__).__doc__ or ""
    title, _, rest = about.strip().partition("\n")
    facts = {
        "paper": f"{row['paper']} ({_where(row)})" if row["paper"] else "none: a control",
        "inputs of a step": row["views"],
        "networks beside the student": row["keeps"] or "none",
        "passes of a step": row["passes"] or "-",
        "revision": row["revision"],
    }
    settings = published_lines(kind.published) or ["none declared"]
    fields = "\n".join(
        f"| `{one.path}` | {_cell(one.kind)} | `{one.default}` | {_cell(one.text)} |"
        for one in fields_help("method", cfg)
    )
    return "\n".join(
        [
            f"# {name}",
            f"{title}\n\n{rest.strip()}\n",
            *(f"- {what}: {value}" for what, value in facts.items()),
            "\nf, b: a batch forward and backward through encoder and decoder; df, db: through a decoder alone.\n",
            f"```sh\nviladiff train method.name={name} data.split=183\n```\n",
            "## Published settings\n",
            *(f"- {_plain(line)}" for line in settings),
            "\n## Fields\n",
            "| field | type | default | meaning |\n| --- | --- | --- | --- |",
            fields,
            "",
        ]
    )


def _where(row: dict[str, Any]) -> str:
    return f"{row['venue']} {row['year']}" if row["paper"] else "-"


def _cell(text: str) -> str:
    return _plain(" ".join(text.split()).replace("|", "\\|"))


def _plain(text: str) -> str:
    """Return text whose brackets, underscores and stars are not read as Markdown."""
    return re.sub(r"([\[\]*<>])", r"\\\1", text.replace("``", "`"))
