"""The table of the zoo, from measured lines alone."""

from __future__ import annotations

from typing import Any

SHOWN = 6
"""Axes that the table lists per model and reason; the rest is counted."""
HEADS = "model package kind groups frozen seconds runs error distance agreement change two".split()
TITLES = {
    "kind": "field",
    "groups": "groups: kind, size x number",
    "frozen": "reasons for frozen axes",
    "seconds": "CPU seconds of the search",
    "runs": "runs",
    "error": "largest change of an output",
    "distance": "distance to a moved copy, then aligned",
    "agreement": "agreement with it, then aligned",
    "change": "change of the outputs by an average with it, then aligned",
    "two": "average of two random models",
}


def table(lines: list[dict[str, Any]]) -> str:
    """Return the Markdown page of all entries."""
    packages = {f"{x['package']} {x['version']}" for x in lines}
    versions = {", ".join(f"{k} {v}" for k, v in x["versions"].items()) for x in lines}
    text = ["# Models of others", "", "Written by `make bench-zoo`, see README.md.", ""]
    text += [_row([TITLES.get(head, head) for head in HEADS]), _row(["---"] * len(HEADS))]
    text += [_row(cells(line)) for line in lines]
    text += ["", "## Groups and frozen axes", ""]
    for line in lines:
        text += details(line)
    text.append("Packages: " + ", ".join(sorted(packages)) + ".")
    text.append("")
    text += [f"Versions: {found}." for found in sorted(versions)]
    return "\n".join(text) + "\n"


def cells(line: dict[str, Any]) -> list[str]:
    """Return the cells of one entry; steps that a failure left out are blank."""
    values = {
        "model": line["name"],
        "package": line["package"],
        "kind": line["kind"],
        "groups": groups_of(line),
        "frozen": str(len(line["frozen"])) if "frozen" in line else "",
        "seconds": f"{line['seconds']:.1f}" if "seconds" in line else "",
        "runs": str(line.get("runs", "")),
        "error": f"{line['error']:.0e}" if "error" in line else "",
        "distance": _pair(line, "distance", ".2g"),
        "agreement": _pair(line, "agreement", ".3f"),
        "change": _pair(line, "average_change", ".1g"),
        "two": {True: "finite", False: "not finite"}.get(line.get("finite", ""), ""),
    }
    return [values[head] for head in HEADS]


def groups_of(line: dict[str, Any]) -> str:
    """Return the groups in words, such as ``rotation 8 x 2``."""
    if "groups" not in line:
        return f"failed: {line['failed']}"
    words = [f"{kind.replace('_', ' ')} {size} x {n}" for kind, size, n in line["groups"]]
    return ", ".join(words) or "none"


def details(line: dict[str, Any]) -> list[str]:
    """Return the paragraph of one entry: axes that no group moves, and reasons of the search."""
    text = [f"**{line['name']}** ({line['package']})."]
    if "failed" in line:
        text[0] += f" Failed: {line['failed']}."
    if "axes" in line:
        fixed = line["fixed"]
        text[0] += f" Groups move {line['axes'] - len(fixed)} of {line['axes']} axes."
        text[0] += f" Fixed: {_some(fixed)}." if fixed else ""
    reasons = line.get("frozen", [])
    text += ["", *(f"- {shortened(reason)}" for reason in reasons)] if reasons else []
    return [*text, ""]


def shortened(reason: str) -> str:
    """Return a reason with the first of its axes only."""
    axes, separator, why = reason.rpartition(": operation ")
    return f"{_some(axes.split(', '))}{separator}{why}" if separator else reason


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
    return shown + (f" and {more} more" if more > 0 else "")


def _pair(line: dict[str, Any], key: str, form: str) -> str:
    if key not in line:
        return ""
    return f"{line[f'{key}_before']:{form}} -> {line[key]:{form}}"


def _row(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"
