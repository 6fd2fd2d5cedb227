"""Pages that ``make docs`` generates: from conf/, the registry of methods, files of the root."""

from __future__ import annotations

import csv
import inspect
import posixpath
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from cki_rec.help_text import EXAMPLES, PIPELINES
from cki_rec.merging.methods import METHODS
from cki_rec.merging.options import in_yaml
from cki_rec.merging.registry import Method
from cki_rec.pipelines.method_list import NEEDS, STEPS
from cki_rec.pipelines.references import REFERENCES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIES = {
    "how_to/contributing.md": "CONTRIBUTING.md",
    "reference/data.md": "data/README.md",
    "explanation/architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page -> file of the repository that it shows."""
MEASURED = ("all_methods", "splicing_movielens_1m", "refinement_movielens_1m", "quickstart")
"""Experiments of which a method's row is shown; the first one that measured it."""


METHOD_OF = {"random_splice": "random"}
"""Label in tables -> method, where they differ."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {
        "reference/commands.md": commands(),
        "reference/options.md": options(),
        "reference/methods.md": methods(),
        **{page: (ROOT / source).read_text() for page, source in COPIES.items()},
    }
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages, or show the name of the file."""
    uri = page.file.src_uri
    home = posixpath.dirname(posixpath.join("docs", uri))
    if uri in COPIES:
        home = posixpath.dirname(COPIES[uri])
    pages = {source: page for page, source in COPIES.items()}
    pages |= {posixpath.join("docs", file.src_uri): file.src_uri for file in files}

    def lead(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        source = posixpath.normpath(posixpath.join(home, path))
        if source not in pages:
            return text if text.startswith("`") else f"{text} (`{source}`)"
        inside = posixpath.relpath(pages[source], posixpath.dirname(uri) or ".")
        return f"[{text}]({inside}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", lead, part)
        for part in parts
    )


def commands() -> str:
    """Return the page of all commands."""
    lines = ["# Commands", "", "```", "cki-rec <pipeline> [group=choice] [key=value] [-m]", "```"]
    lines += [
        "`cki-rec <pipeline> --help` prints the options of a pipeline, and `-m` sweeps over"
        " comma-separated values.",
        "Exit codes: 0 done, 1 a bug or a lost process, 2 a mistake in the input, 130"
        " interrupted.",
    ]
    for pipeline, summary in PIPELINES.items():
        lines += ["", f"## {pipeline}", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["```", f"cki-rec {pipeline} {EXAMPLES[pipeline]}", "```"]
    return "\n".join(lines) + "\n"


def options() -> str:
    """Return the page of all options, their values and meanings, from ``conf/``."""
    lines = [
        "# Options",
        "Every option is in a file of `conf/`, with its value and meaning. Set one on the command"
        " line with `GROUP.KEY=VALUE`, and choose a file with `GROUP=CHOICE`.",
    ]
    for group in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        choices = sorted(path.stem for path in group.glob("*.yaml"))
        if not choices or group.name in ("experiment", "hydra"):
            continue
        lines += ["", f"## {group.name}", f"Choices: {', '.join(f'`{c}`' for c in choices)}."]
        if "default" in choices:
            lines += ["", "| option | default | meaning |", "|---|---|---|"]
            rows = _rows(group.name, (group / "default.yaml").read_text())
            lines += rows
            empty = [row.split("`")[1] for row in rows if " | `null` | " in row]
            for choice in choices:  # sections that are null in the default
                own = _rows(group.name, (group / f"{choice}.yaml").read_text())
                own = [row for row in own if row.split("`")[1].rpartition(".")[0] in empty]
                if own:
                    lines += ["", f"With `{group.name}={choice}`:", ""]
                    lines += ["| option | value | meaning |", "|---|---|---|", *own]
    lines += ["", "## Of the root", "", "| option | default | meaning |", "|---|---|---|"]
    lines += _rows("", (ROOT / "conf/config.yaml").read_text())
    return "\n".join(lines) + "\n"


def _rows(group: str, text: str) -> list[str]:
    """Return a table row per option of a YAML file, with its comment."""
    rows, path = [], [(-1, group)]
    for line in text.splitlines():
        if not (found := re.match(r"( *)([\w.]+):(?: +(.*?))?(?: +# (.*))?$", line)):
            continue
        indent, key, value, meaning = len(found[1]), found[2], found[3] or "", found[4] or ""
        if value.startswith("# "):
            value, meaning = "", value[2:]
        while path[-1][0] >= indent:
            path.pop()
        name = ".".join(part for _, part in [*path, (indent, key)] if part)
        path.append((indent, key))
        if key in ("defaults", "hydra") or name.startswith("hydra."):
            continue
        if value or meaning:
            shown = f"`{value}`" if value else ""
            escaped = meaning.replace("|", "\\|")
            rows.append(f"| `{name}` | {shown} | {escaped} |")
    return rows


def methods() -> str:
    """Return the page of all methods: formula, options, needs, cost, paper, measured row."""
    measured = _measured()
    lines = [
        "# Methods",
        "A method makes one model of several. Set it with `merge=NAME`, and its options with"
        " `merge.options.NAME=VALUE`.",
        "The measured row is the mean over seeds in the named experiment of the repository."
        " A method without one was not measured there.",
    ]
    for name, method in METHODS.items():
        lines += ["", f"## {name}", "", *_described(inspect.getdoc(method.function) or "")]
        lines += ["", *_facts(method), *measured.get(name, [])]
    lines += ["", "# References", "They combine or choose sources, and merge no parameters."]
    for name, reference in REFERENCES.items():
        lines += ["", f"## {name}", f"{reference.summary}.", *measured.get(name, [])]
    lines += ["", "# Steps"]
    for name, (summary, option, needs, cost, source) in STEPS.items():
        lines += ["", f"## {name}", f"{summary}.", "", f"- Option: `{option}`"]
        lines += [f"- Needs: {needs}", f"- Cost: {cost}", f"- Reference: {source}"]
    return "\n".join(lines) + "\n"


def _described(docstring: str) -> list[str]:
    """Return a docstring without its list of arguments, its formulas in TeX."""
    parts = re.split(r"\n\n(?=(?:Args|Returns|Raises|Reference|References|Differs):\n)", docstring)
    kept = [part for part in parts if not re.match(r"(Args|Returns|Raises):\n", part)]
    text = "\n\n".join(kept)
    text = re.sub(r"^(References?|Differs):\n((?: {4}.*\n?)+)", _section, text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. math:: (.*(?:\n +.*)*)$", r"\n\\[ \1 \\]\n", text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"\\( \1 \\)", text)
    return text.replace("``", "`").splitlines()


def _section(match: re.Match[str]) -> str:
    title, body = match[1], re.sub(r"^ {4}", "", match[2], flags=re.MULTILINE)
    return f"**{title}:** {body}"


def _facts(method: Method) -> list[str]:
    needs = [NEEDS[need] for need in sorted(method.needs({}))]
    processes = "any number" if method.row_wise else "one, which holds whole tables"
    facts = [f"- Needs: {', '.join(dict.fromkeys(needs)) or 'the models only'}"]
    facts += [f"- Options: {', '.join(f'`{n}={in_yaml(v)}`' for n, v in method.options.items())}"]
    facts = facts if method.options else facts[:1]
    return [*facts, f"- Processes: {processes}", f"- Cost: {method.cost}"]


def _measured() -> dict[str, list[str]]:
    """Return, per method, its mean AUC and the difference to the best source, as lines."""
    result: dict[str, list[str]] = {}
    for experiment in MEASURED:
        earlier = set(result)
        path = ROOT / "experiments" / experiment / "runs.csv"
        if not path.exists():
            continue
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        differences: dict[tuple[str, str], list[float]] = defaultdict(list)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("finetuned", "") in ("", "none", "False"):
                    values[row["method"], row["suite"]].append(float(row["auc"]))
                    if difference := row.get("auc_minus_best_source"):
                        differences[row["method"], row["suite"]].append(float(difference))
        for (label, suite), aucs in values.items():
            name = METHOD_OF.get(label, label)
            line = f"- Measured in `{experiment}`, {suite}: AUC {fmean(aucs):.4f}"
            if found := differences[label, suite]:
                line += f", {fmean(found):+.4f} against the best source"
            if name not in earlier:
                result.setdefault(name, []).append(f"{line} ({len(aucs)} seeds)")
    return result
