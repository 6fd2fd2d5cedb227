"""Figures as SVG text: metrics with intervals, and mixing weights.

The same input gives the same bytes: ids are salted with a constant, no date is written, and the
user's matplotlib settings are not read. Text stays text in the viewer's sans-serif font.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cki_rec.evaluation.display import METHOD_NAMES, is_undefined, number
from cki_rec.evaluation.metrics import METRICS
from cki_rec.evaluation.tables import BASELINES, difference_column

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Colors of Okabe and Ito: distinct under all common color blindness."""
STAGES = {False: ("direct", COLORS[0], "o", -0.14), True: ("fine-tuned", COLORS[5], "D", 0.14)}
"""Name, color, marker and vertical offset of direct and fine-tuned results."""
MIN_LABELED_SHARE = 0.2
"""Narrower parts of a bar carry no percentage."""
_NOT_NAMES = frozenset(
    {"model", "module", "weight", "embeddings", "embedding", "embedding_bags", "ebc", "tables"}
    | {"table", "embedding_bag_collection", "sparse", "collection"}
)
INK, SOFT, LINE, PAPER = "#1b1f24", "#57606a", "#d5dae0", "#ffffff"
"""Colors of text, soft lines, the grid and the background. A page replaces them."""
ON_COLOR = "#fafafa"
"""Color of text on dark bars, on every page."""
REACH = 4.0
"""A value this many times further below the median than the best is above it is cut off."""
_SETTINGS: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "svg.hashsalt": "cki-rec",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


Render = Callable[[float, float, Callable[[Figure], None]], Any]
"""``svg_text`` or ``drawn``."""


@contextmanager
def _own_settings() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def drawn(width: float, height: float, draw: Callable[[Figure], None]) -> Figure:
    """Return a figure of a size in inches, filled by ``draw``."""
    with _own_settings():
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        draw(figure)
    return figure


def svg_text(width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """Return the SVG text of a figure, as ``drawn`` makes it."""
    with _own_settings():
        figure = drawn(width, height, draw)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", file.getvalue())
    # names of groups repeat between figures of one page; nothing refers to them
    return re.sub(r'<g id="[^"]*">', "<g>", text)


def metric_plot(
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    metric: str,
    baseline: str | None = None,
    *,
    render: Render = svg_text,
) -> Any:
    """Return a dot plot of a metric per method, the best first, one panel per suite.

    Large marks are means over repetitions with their interval, ticks single repetitions.
    Vertical lines show the direct best source and output ensemble.

    Args:
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
        metric: Name of one that has an interval over repetitions.
        baseline: Draws differences to it instead, and the values of the metric beside them. Rows
            that are far below the others become an arrow at the edge.
        render: ``svg_text``, or ``drawn`` for a matplotlib figure.

    Returns:
        SVG text, or as ``render`` gives it.
    """
    suites = list(summary["suite"].unique())
    parts = [summary[summary["suite"] == suite] for suite in suites]
    heights = [0.36 * part["method"].nunique() + 0.9 for part in parts]
    row = METRICS[metric]
    label = f"{row.title} on test rows"
    if baseline is not None:
        label = f"{row.title} minus that of the {METHOD_NAMES[baseline]}"

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(suites), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, suite, part in zip(panels, suites, parts, strict=True):
            _metric_panel(axes, part, runs[runs["suite"] == suite], metric, baseline)
            axes.set_title(suite)
        panels[-1].set_xlabel(f"{label} ({row.better} is better)")
        entries: dict[str, Any] = {}
        for axes in panels:
            marks, names = axes.get_legend_handles_labels()
            entries |= dict(zip(names, marks, strict=True))
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower left", ncols=3, frameon=False
        )

    return render(5.2, max(sum(heights) + 0.9, 3.0), draw)


def mixing_plot(
    records: Sequence[Mapping[str, Any]],
    suite: str | None = None,
    seed: int | None = None,
    methods: Sequence[str] | None = None,
    *,
    render: Render = svg_text,
) -> Any:
    """Return the mixing weights: the share of each source in each tensor.

    Rows are tensors, columns are methods.

    Args:
        records: Of evaluated models; those with ``shares`` and without fine-tuning are drawn.
        suite: Default: the first by name that has shares.
        seed: Repetition. Default: the lowest of the suite.
        methods: Columns in order; default: all, by name.
        render: As for ``metric_plot``.

    Returns:
        SVG text, or as ``render`` gives it; empty when no record has shares.
    """
    results = [record["result"] for record in records]
    results = [r for r in results if r.get("shares") and not r["finetuned"]]
    suite = min((r["suite"] for r in results), default=None) if suite is None else suite
    results = [r for r in results if r["suite"] == suite]
    seed = min((r["seed"] for r in results), default=None) if seed is None else seed
    shares_of = {r["method"]: r["shares"] for r in results if r["seed"] == seed}
    names = sorted(shares_of) if methods is None else [m for m in methods if m in shares_of]
    if not names:
        return ""
    shares_of = {name: shares_of[name] for name in names}
    tensors = tensor_names(list(dict.fromkeys(itertools.chain(*shares_of.values()))))

    def draw(figure: Figure) -> None:
        _mixing_panel(figure, shares_of, tensors)
        figure.suptitle(f"{suite}, repetition {seed}", x=0.01, ha="left", fontweight="bold")

    return render(max(2.2 + 1.25 * len(names), 5.0), 0.3 * len(tensors) + 1.6, draw)


def tensor_names(keys: Sequence[str]) -> dict[str, str]:
    """Return readable names of tensors, tables before layers, otherwise in their order.

    Words without information (``model``, ``embedding_bags``, ``weight``) are dropped unless two
    tensors would then share a name.
    """
    tables = [key for key in keys if "embedding" in key or "table" in key.split(".")]
    ordered = tables + [key for key in keys if key not in tables]
    short = {}
    for key in ordered:
        words = [word for word in key.split(".") if word not in _NOT_NAMES]
        short[key] = ("table " if key in tables else "") + (" ".join(words) or key)
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def _metric_panel(
    axes: Axes, part: pd.DataFrame, runs: pd.DataFrame, metric: str, baseline: str | None
) -> None:
    column = metric if baseline is None else difference_column(metric, baseline)
    is_rising = METRICS[metric].better == "higher"
    ordered = part.sort_values(["finetuned", metric], ascending=[True, not is_rising])
    methods = list(ordered["method"].unique())
    for reference, style in zip(BASELINES, ("--", ":"), strict=True):
        rows = part[(part["method"] == reference) & ~part["finetuned"]]
        values = [0.0] * len(rows) if reference == baseline else rows[column].dropna()
        for value in values:
            axes.axvline(value, color=SOFT, ls=style, lw=1.2, label=METHOD_NAMES[reference])
    floor = -math.inf if baseline is None else _floor(part, column)
    for row in ordered.to_dict("records"):
        name, color, marker, offset = STAGES[bool(row["finetuned"])]
        y = methods.index(row["method"]) + (offset if part["finetuned"].any() else 0.0)
        value, low, high = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
        if row["method"] == baseline and not row["finetuned"]:
            value = 0.0
        if baseline is not None and not row["finetuned"]:
            text = number(row[metric])
            axes.text(
                1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10
            )
        if is_undefined(value):
            continue
        if value < floor:
            axes.plot(floor, y, "<", color=color, ms=8, ls="none")
            continue
        is_row = (runs["method"] == row["method"]) & (runs["finetuned"] == row["finetuned"])
        singles = runs[is_row][column].dropna()
        singles = singles[singles >= floor]
        if len(singles) > 1:
            axes.plot(singles, [y] * len(singles), "|", color=color, ms=9, label="one repetition")
        if not is_undefined(low):
            axes.hlines(y, max(low, floor), high, color=color, lw=1.8)
        if row["method"] in METHOD_NAMES and not row["finetuned"]:
            name, fill, edge = "reference", PAPER, color
        else:
            fill, edge = color, PAPER
        axes.plot(value, y, marker, color=fill, ms=7, mec=edge, mew=1.4, ls="none", label=name)
    if floor > -math.inf:
        axes.set_xlim(left=floor - 0.05 * (axes.get_xlim()[1] - floor))
    axes.set_yticks(range(len(methods)), [METHOD_NAMES.get(method, method) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="y", color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _floor(part: pd.DataFrame, column: str) -> float:
    """Return the value below which rows are cut off; minus infinity if there is none.

    The baseline, at 0, and the whole intervals of the other rows stay in the figure.
    """
    values = part[column].dropna()
    if values.empty:
        return -math.inf
    least = min(values.median() - REACH * (values.max() - values.median()), 0.0)
    if values.min() >= least:
        return -math.inf
    shown = part[part[column] >= least]
    return float(min(shown[f"{column}_low"].min(), shown[column].min(), 0.0))


def _mixing_panel(
    figure: Figure,
    shares_of: Mapping[str, Mapping[str, Sequence[float]]],
    tensors: Mapping[str, str],
) -> None:
    """Draw one column of stacked bars per method, one bar per tensor."""
    axes = figure.subplots()
    for column, shares in enumerate(shares_of.values()):
        for row, key in enumerate(tensors):
            if key in shares:
                _stacked_bar(axes, 1.12 * column, row, shares[key])
    axes.set_xlim(-0.04, 1.12 * len(shares_of))
    axes.set_ylim(len(tensors) - 0.4, -0.6)
    axes.set_yticks(range(len(tensors)), list(tensors.values()))
    columns = [1.12 * column + 0.5 for column in range(len(shares_of))]
    axes.set_xticks(columns, [_wrapped(METHOD_NAMES.get(name, name)) for name in shares_of])
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    axes.spines[:].set_visible(False)
    num_sources = max(len(part) for shares in shares_of.values() for part in shares.values())
    figure.legend(
        handles=[Patch(color=COLORS[source % len(COLORS)]) for source in range(num_sources)],
        labels=[f"source {source + 1}" for source in range(num_sources)],
        loc="outside lower left",
        ncols=4,
        frameon=False,
    )


def _stacked_bar(axes: Axes, left: float, row: int, shares: Sequence[float]) -> None:
    for source, share in enumerate(shares):
        color = COLORS[source % len(COLORS)]
        axes.barh(row, share, left=left, height=0.8, color=color, lw=0)
        if share >= MIN_LABELED_SHARE:
            ink = ON_COLOR if source % len(COLORS) in (0, 2, 5) else "#000000"
            x = left + share / 2
            text = f"{share * 100:.0f}"
            axes.text(x, row, text, color=ink, ha="center", va="center", fontsize=9)
        left += share


def _wrapped(name: str) -> str:
    """Return the name broken at separators into lines of about 12 characters."""
    lines = [""]
    for word in re.findall(r"[^_ ]+[_ ]?", name):
        if lines[-1] and len(lines[-1]) + len(word) > 12:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)
