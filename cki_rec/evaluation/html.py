"""One standalone report page: no script, no network, readable on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import pandas as pd

from .display import (
    METHOD_NOTES,
    METRIC_NAMES,
    delong_columns,
    display_frame,
    facts,
    method_name,
    number,
    p_value,
)
from .display import notes as reading_notes

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff;
  --line: #d5dae0; --band: #f4f6f8; --link: #0060a8; --good: #00694a; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3adb8; --page: #14171b;
  --line: #363d45; --band: #1d2127; --link: #79b8ff; --good: #4fd1a5;
  --bad: #ffa36b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line);
  padding-bottom: .25rem; }
p, ul, dl { max-width: 48rem; }
ul { padding-left: 1.2rem; }
li { margin: .35rem 0; }
a { color: var(--link); }
nav a { display: inline-block; margin: 0 1rem .3rem 0; padding: .15rem 0; }
dl { display: grid; grid-template-columns: fit-content(9.5rem) 1fr;
  gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .875rem; }
caption { text-align: left; padding: .5rem .75rem; color: var(--soft); }
caption span { display: inline-block; max-width: 82vw; position: sticky; left: .75rem; }
th, td { padding: .4rem .55rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; min-width: 4rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  font-weight: 600; min-width: 8rem; max-width: 11rem; white-space: normal;
  overflow-wrap: break-word; }
tbody tr:nth-child(even) > * { background: var(--band); }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.range { display: block; color: var(--soft); font-size: .85em; }
.better { color: var(--good); }
.worse { color: var(--bad); }
figure { margin: 1rem 0 1.6rem; }
figcaption { color: var(--soft); margin-bottom: .4rem; }
figure .scroll { background: #ffffff; margin: 0; }
figure svg { display: block; height: auto; }
pre { overflow-x: auto; background: var(--band); border: 1px solid var(--line);
  border-radius: 6px; padding: .75rem; font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; }
"""


def report_page(
    title: str,
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    figures: Mapping[str, str],
    notes: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    methods: Mapping[str, str] | None = None,
    suites: Mapping[str, str] | None = None,
) -> str:
    """Return a standalone HTML page of one experiment.

    Args:
        title: Plain text, as are all texts below; they are escaped here.
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
        figures: Caption -> SVG text; the caption also names the figure to screen readers.
        notes: Paragraphs under the title: what was asked, what came out.
        provenance: Rows of the last table, such as versions, commit, seconds.
        methods: Method -> one sentence on what it is; added to ``display.METHOD_NOTES``.
        suites: Suite -> one sentence on what its parents differ in.

    Returns:
        HTML text; the same arguments give the same bytes.
    """
    names = list(summary["suite"].unique())
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    links = [(f"suite-{index}", str(suite)) for index, suite in enumerate(names)]
    links += [("figures", "Figures")] if figures else []
    links += [("methods", "Methods"), ("reading", "How to read"), ("again", "Reproduce")]
    links += [("provenance", "Provenance")] if provenance else []
    anchors = "".join(f'<a href="#{target}">{escape(text)}</a>' for target, text in links)
    parts.append(f'<nav aria-label="Sections">{anchors}</nav>')
    shown = display_frame(summary)
    for (target, _), suite in zip(links, names, strict=False):
        of_suite = runs[runs["suite"] == suite]
        parts.append(_heading(target, f"Suite: {suite}"))
        parts.append(f"<p>{escape(suites[suite])}</p>" if suites and suite in suites else "")
        known = {k: v for k, v in facts(of_suite).items() if k != "Command"}
        parts.append(_definitions(known))
        parts.append(_summary_table(suite, shown[shown["suite"] == suite]))
        parts.append(_runs_table(suite, of_suite))
    if figures:
        parts.append(_heading("figures", "Figures"))
        parts += [_figure(caption, svg) for caption, svg in figures.items()]
    parts.append(_heading("methods", "What each method is"))
    described = METHOD_NOTES | dict(methods or {})
    present = [name for name in runs["method"].unique() if name in described]
    parts.append(_definitions({method_name(name, False): described[name] for name in present}))
    parts.append(_heading("reading", "How to read the tables and how intervals were made"))
    parts.append(_bullets(reading_notes(summary, runs)))
    parts.append(_heading("again", "How to reproduce"))
    commands = "\n".join(dict.fromkeys(runs["command"]))
    parts.append(f'<pre tabindex="0">{escape(commands)}</pre>')
    if provenance:
        parts.append(_heading("provenance", "Provenance"))
        rows = [(escape(str(k)), [escape(str(v))]) for k, v in provenance.items()]
        parts.append(_table("Where the numbers come from.", ["", "value"], rows, "text"))
    return _document(title, "\n".join(part for part in parts if part))


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _heading(target: str, text: str) -> str:
    return f'<h2 id="{target}">{escape(text)}</h2>'


def _bullets(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _definitions(values: Mapping[str, str]) -> str:
    pairs = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _summary_table(suite: str, part: pd.DataFrame) -> str:
    part = part.drop(columns="suite")
    part = part[[column for column in part.columns if (part[column] != "").any()]]
    rows = []
    for name, *cells in part.itertuples(index=False):
        rows.append((_breakable(str(name)), [_stacked(str(cell)) for cell in cells]))
    caption = f"{suite}: test metrics per method; blank means undefined or not measured."
    return _table(caption, [str(column) for column in part.columns], rows)


def _runs_table(suite: str, runs: pd.DataFrame) -> str:
    rows, tests = [], delong_columns(runs)
    for run in runs.to_dict("records"):
        cells = [str(run["seed"])]
        cells += [number(run[metric]) for metric in METRIC_NAMES]
        cells += [escape(p_value(run[column])) for column in tests]
        cells.append(escape(str(run["run_id"])))
        rows.append((_breakable(method_name(run["method"], run["finetuned"])), cells))
    columns = ["method", "seed", *METRIC_NAMES.values(), *tests.values(), "run"]
    table = _table(f"{suite}: one row per run.", columns, rows)
    return f"<details><summary>All {len(rows)} runs</summary>{table}</details>"


def _table(
    caption: str, columns: Sequence[str], rows: Sequence[tuple[str, list[str]]], kind: str = ""
) -> str:
    """Return a table that scrolls inside its box; cells are HTML, caption and columns text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    cell = f'<td class="{kind}">' if kind else "<td>"
    body = "\n".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"{cell}{text}</td>" for text in cells)}</tr>'
        for name, cells in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption><span>{label}</span></caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _stacked(cell: str) -> str:
    """Return a summary cell as HTML: value and mark on one line, the interval below."""
    found = re.fullmatch(r"(?P<value>\S+) (?P<range>\[.*\])(?: \((?P<mark>[+-]{1,2})\))?", cell)
    if found is None:
        return escape(cell)
    kind = {"+": "better", "-": "worse", "": ""}[(found["mark"] or "")[:1]]
    mark = f' <span class="{kind}">({found["mark"]})</span>' if kind else ""
    return f'{escape(found["value"])}{mark} <span class="range">{escape(found["range"])}</span>'


def _breakable(name: str) -> str:
    """Return the escaped name with a permission to break after each underscore."""
    return escape(name).replace("_", "_<wbr>")


def _figure(caption: str, svg: str) -> str:
    """Return an inline figure that fills the page but never shrinks until it is unreadable."""
    drawing = svg[svg.index("<svg") :]
    label = escape(caption, quote=True)
    width = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', drawing)
    assert width is not None
    pixels = float(width[1]) * 4 / 3
    size = f'style="width:100%;min-width:{0.72 * pixels:.0f}px"'
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}" {size}', 1).strip()
    return (
        f"<figure><figcaption>{label}</figcaption>"
        f'<div class="scroll" tabindex="0" style="max-width:{1.15 * pixels:.0f}px">'
        f"{drawing}</div></figure>"
    )
