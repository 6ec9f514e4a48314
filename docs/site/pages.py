"""MkDocs hooks: pages that stand outside docs/ are part of the site, and links are those of the checkout.

README.md is the first page. A link to a page or picture is turned to where the site has it; one to a file that the site
has not, as a source, becomes plain text. Scripts of the gallery are shown in full below its table.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {  # in the checkout -> on the site
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    **{f"{folder}/README.md": f"{folder}/README.md" for folder in ("benchmarks", "env", "jobs", "logs")},
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def source(page: str) -> str:
    """Where a page of the site stands in the checkout."""
    return {site: path for path, site in OUTSIDE.items()}.get(page, f"docs/{page}")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for path, site in OUTSIDE.items():
        files.append(File.generated(config, site, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links, and shows the gallery's scripts."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        image, words, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source(here)), target))
        site = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None or files.get_file_from_path(site) is None:
            if not (ROOT / path).exists():
                return match[0]  # MkDocs then says that there is no such file
            return words if words.startswith("`") else f"`{words}`"
        return f"{image}[{words}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor})"

    shown = LINK.sub(turned, markdown)
    return shown + scripts() if here == "gallery.md" else shown


def scripts() -> str:
    """All scripts, in the order of the gallery's table."""
    names = re.findall(r"^\| \[(\w+\.py)\]", (ROOT / "docs/gallery.md").read_text(), re.M)
    return "".join(f"\n## {name}\n\n```python\n{(ROOT / 'examples' / name).read_text()}```\n" for name in names)
