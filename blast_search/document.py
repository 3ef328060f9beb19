"""A short document as blocks, written as Markdown or as one self-contained HTML page.

All text is plain and is escaped here, in one place: names from files cannot become markup.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Code(str):
    """Text to be set as code: layer names, candidates."""

    __slots__ = ()


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Notice:
    """The verdict: a heading word, a sentence, and "good", "bad" or "plain"."""

    title: str
    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Table:
    """Columns whose number is below `text_columns` hold words, the others numbers.

    `strong` is the row to emphasise; `stacked` shows each row as a card on a narrow screen.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    strong: int | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Picture:
    png: bytes
    file: str
    description: str


@dataclass(frozen=True)
class Details:
    """A table folded away behind one line."""

    summary: str
    table: Table


Block = Paragraph | Notice | Table | Picture | Details


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def clean(text: object) -> str:
    """One line of printable text."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(printable.split())


def pick(value: Any, *keys: str) -> Any:
    """A nested value of a JSON object, or None where any part of the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> float | None:
    """A JSON value as a finite number, or None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def show(value: Any, spec: str = ".3f") -> str:
    """A number as text, "-" where there is none."""
    found = number(value)
    return "-" if found is None else format(found, spec)


def interval_of(value: Any) -> tuple[float, float] | None:
    """[low, high] of a JSON file, or None."""
    ends = [number(end) for end in value] if isinstance(value, list) else []
    match ends:
        case [float(low), float(high)]:
            return low, high
    return None


def show_range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {_md(title)}"]
    for section in sections:
        if section.title:
            parts.append(f"## {_md(section.title)}")
        parts += [_md_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    line = clean(text)
    if isinstance(text, Code) and line:
        # A code span ends at the first run of as many backticks as it began with.
        longest = max((len(run) for run in re.findall("`+", line)), default=0)
        pad = " " if line.startswith("`") or line.endswith("`") else ""
        fence = "`" * (longest + 1)
        return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")
    line = html.escape(line, quote=False)
    return re.sub(r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _md_block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _md(text)
        case Notice(title, text):
            return f"**{_md(title)}** {_md(text)}"
        case Picture(_, file, description):
            return f"![{_md(description)}]({file})"
        case Details(summary, table):
            opening = f"<details><summary>{html.escape(clean(summary))}</summary>"
            return f"{opening}\n\n{_md_block(table)}\n\n</details>"
        case Table(head, rows, text_columns, strong):
            rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
            lines = [[_md(cell) for cell in head], rule]
            for index, row in enumerate(rows):
                mark = "**" if index == strong else ""
                lines.append([f"{mark}{_md(cell)}{mark}" for cell in row])
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #57606a; --page: #ffffff;
  --panel: #f4f6f8; --rule: #d0d7de; --good: #0a7a52; --bad: #b3420b; --plain: #57606a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #a0a8b2;
  --page: #14171b; --panel: #1e2329; --rule: #3a424c; --good: #3fc38d; --bad: #f08a4b;
  --plain: #a0a8b2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 58rem; color: var(--text);
  background: var(--page); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--rule); }
p { margin: .6rem 0; max-width: 46rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.notice { margin: 1rem 0; padding: .75rem 1rem; background: var(--panel);
  border-left: .35rem solid var(--plain); border-radius: .25rem; font-size: 1.05rem; }
.notice b { color: var(--plain); }
.good { border-color: var(--good); } .good b { color: var(--good); }
.bad { border-color: var(--bad); } .bad b { color: var(--bad); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
.stacked table { width: 100%; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; overflow-wrap: normal; }
td { white-space: nowrap; }
th { vertical-align: bottom; color: var(--quiet); font-weight: 600; }
td.word { white-space: normal; overflow-wrap: break-word; }
.word { text-align: left; }
.stacked td code { overflow-wrap: anywhere; }
td code { white-space: nowrap; }
tr.strong td { font-weight: 700; background: var(--panel); }
img { display: block; width: 100%; height: auto; max-width: 52rem; background: #fff;
  border: 1px solid var(--rule); border-radius: .4rem; }
summary { cursor: pointer; padding: .4rem 0; }
@media (max-width: 40rem) {
  .stacked thead { display: none; }
  .stacked table, .stacked tbody, .stacked tr, .stacked td { display: block; width: 100%; }
  .stacked tr { margin: 0 0 1rem; border: 1px solid var(--rule); border-radius: .4rem;
    overflow: hidden; }
  .stacked td code { white-space: normal; }
  .stacked td { display: flex; justify-content: space-between; gap: 1rem; }
  .stacked td:last-child { border-bottom: 0; }
  .stacked td::before { content: attr(data-label); color: var(--quiet); font-weight: 400;
    text-align: left; white-space: nowrap; }
  .stacked td.word:not(:first-child) { text-align: right; }
  .stacked td.word:first-child { font-weight: 700; background: var(--panel); }
  .stacked td.word:first-child::before { content: none; }
}
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page without scripts and without other files."""
    body = [f"<h1>{_html(title)}</h1>"]
    for section in sections:
        blocks = "\n".join(_html_block(block) for block in section.blocks)
        heading = f"<h2>{_html(section.title)}</h2>\n" if section.title else ""
        body.append(f"<section>\n{heading}{blocks}\n</section>")
    content = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_html(clean(title))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    escaped = html.escape(clean(text))
    return f"<code>{escaped}</code>" if isinstance(text, Code) else escaped


def _html_block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Notice(title, text, tone):
            return f'<div class="notice {tone}"><b>{_html(title)}</b> {_html(text)}</div>'
        case Picture(png, _, description):
            data = base64.b64encode(png).decode()
            return f'<img src="data:image/png;base64,{data}" alt="{_html(description)}">'
        case Details(summary, table):
            line = f"<summary>{_html(summary)}</summary>"
            return f"<details>{line}\n{_html_block(table)}\n</details>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    kinds = [' class="word"' if i < table.text_columns else "" for i in range(len(table.head))]
    head = "".join(f"<th{k}>{_html(c)}</th>" for k, c in zip(kinds, table.head, strict=True))
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(
            f'<td{kind} data-label="{_html(label)}"><span>{_html(cell)}</span></td>'
            for kind, label, cell in zip(kinds, table.head, row, strict=True)
        )
        mark = ' class="strong"' if index == table.strong else ""
        rows.append(f"<tr{mark}>{cells}</tr>")
    kind = "wide stacked" if table.stacked else "wide"
    body = "\n".join(rows)
    return (
        f'<div class="{kind}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
