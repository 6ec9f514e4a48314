"""The report as one HTML page that needs nothing else: pictures are inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from hpc_kfac.reporting.drawing import Picture

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 1rem/1.45 system-ui, sans-serif; color: #111;
  background: #fff; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #999; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
details { font-size: .875rem; color: #333; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ccc; white-space: nowrap; }
.note { color: #333; font-size: .9rem; }
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        pictures: side by side where there is room.
        table: rows of words below them, the head first; none for no table.
        notes: sentences below that.
    """

    title: str
    pictures: list[Picture] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def page(title: str, head: Section, sections: Sequence[Section], reload: int | None = None) -> str:
    """The HTML text.

    Args:
        title: of the page.
        head: table and notes at the top.
        sections: the parts.
        reload: seconds after which a browser is to load the page again; None for never.
    """
    refresh = f'<meta http-equiv="refresh" content="{reload}">\n' if reload is not None else ""
    parts = [_body(head), *(f"<h2>{escape(section.title)}</h2>\n{_body(section)}" for section in sections)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{refresh}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _body(section: Section) -> str:
    parts = []
    if section.pictures:
        parts.append('<div class="pictures">\n' + "\n".join(map(_figure, section.pictures)) + "\n</div>")
    if section.table:
        parts.append(_table(section.table))
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    alt = escape(picture.alt)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">'
        f"<figcaption><details><summary>In words</summary>{alt}</details></figcaption></figure>"
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(word)}</th>' for word in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in body]
    return '<div class="table" tabindex="0"><table>\n' + "\n".join(lines) + "\n</table></div>"
