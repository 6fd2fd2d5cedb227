"""The answer of a table in two or three sentences per suite; their words depend on significance.

No test label chooses the model that they are about: it is the merged model with the best
validation AUC. A sentence without its reference is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from cki_rec.evaluation.display import METHOD_NAMES, bounded, is_undefined, method_name, number
from cki_rec.evaluation.tables import BEST_SOURCE, ENSEMBLE, JOINT, difference_column


def verdicts(summary: pd.DataFrame, runs: pd.DataFrame) -> dict[str, list[str]]:
    """Return suite -> its sentences, as plain text.

    Args:
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
    """
    return {
        suite: _sentences(summary[summary["suite"] == suite], runs[runs["suite"] == suite])
        for suite in summary["suite"].unique()
    }


def headline(part: pd.DataFrame, runs: pd.DataFrame) -> tuple[Mapping[Any, Any] | None, int]:
    """Return the merged model of a suite with the best validation AUC, and how many there are.

    Fine-tuned models are considered only if there is no other, and models of fewer seeds than
    others are not. None: no merged model, or no validation AUC to choose one of several.

    Args:
        part: Rows of ``summary_frame`` of one suite.
        runs: Of ``runs_frame``, the runs of that suite.
    """
    merged = part[(part["inference_cost"] == 1) & ~part["method"].isin(METHOD_NAMES)]
    if not merged["finetuned"].all():
        merged = merged[~merged["finetuned"]]
    merged = merged[merged["num_seeds"] == merged["num_seeds"].max()]
    rows = merged.to_dict("records")
    if len(rows) == 1:
        return rows[0], 1
    means = runs.groupby(["method", "finetuned"])["valid_auc"].agg(
        lambda auc: auc.mean(skipna=False)
    )
    scored = [(means[row["method"], row["finetuned"]], row) for row in rows]
    scored = [pair for pair in scored if not is_undefined(pair[0])]
    return max(scored, key=lambda pair: pair[0], default=(None, None))[1], len(rows)


def _sentences(part: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    row, num_merged = headline(part, runs)
    if row is None and num_merged:
        return [f"{num_merged} merged models; none has a validation AUC by which to choose."]
    if row is None:
        rows = part[(part["method"] == BEST_SOURCE) & ~part["finetuned"]].to_dict("records")
        known = [f"The best source has {_auc(best)}." for best in rows]
        return ["No merged model was evaluated.", *known]
    name = method_name(row["method"], row["finetuned"])
    subject = f"{name}, the merged model with the best validation AUC," if num_merged > 1 else name
    first = _comparison(row, BEST_SOURCE)
    costs = part[(part["method"] == ENSEMBLE) & ~part["finetuned"]]["inference_cost"].dropna()
    runs_all = f", which runs {costs.iloc[0]} models per prediction" if len(costs) else ""
    second = _comparison(row, ENSEMBLE, runs_all)
    sentences = [f"{subject} {first or f'has {_auc(row)}'}, over {_seeds(row)}."]
    sentences += [f"It {second}."] if second else []
    joint = part[(part["method"] == JOINT) & ~part["finetuned"]]
    lows = joint[f"{difference_column('auc', BEST_SOURCE)}_low"].dropna()
    return [*sentences, *_recovered(row, is_sure_gain=bool((lows > 0).all()))]


def _comparison(row: Mapping[Any, Any], baseline: str, aside: str = "") -> str:
    """Return a verb, the baseline and the difference in AUC; blank without a difference."""
    column = difference_column("auc", baseline)
    value, low, high = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
    if is_undefined(value):
        return ""
    adjusted = row[f"{column}_holm"]
    is_sure = not is_undefined(adjusted) and adjusted < 1 - row["confidence"]
    doubt = "" if is_sure else ", but not after Holm's correction"
    name = f"the {METHOD_NAMES[baseline]}{aside}"
    difference = bounded(value, low, high, sign=True)
    if is_undefined(low) or is_undefined(high):
        return f"differs from {name} by {difference} in AUC (no interval)"
    if low > 0:
        return f"{'beats' if is_sure else 'is above'} {name}{doubt}: {difference} in AUC"
    if high < 0:
        return f"is below {name}{doubt}: {difference} in AUC"
    return f"does not differ significantly from {name}: {difference} in AUC"


def _recovered(row: Mapping[Any, Any], is_sure_gain: bool) -> list[str]:
    """Return the share of the gain of joint training; nothing if this gain may be 0."""
    share, low, high = (row[f"recovered_share{end}"] for end in ("", "_low", "_high"))
    if is_undefined(share) or not is_sure_gain:
        return []
    percent = f"{number(100 * share, 0)} %"
    if not is_undefined(low) and not is_undefined(high):
        percent += f" [{number(100 * low, 0)}, {number(100 * high, 0)}]"
    gain = "the gain of joint training over the best source"
    if share <= 0:
        return [f"It recovers nothing of {gain}: {percent}."]
    return [f"It recovers {percent} of {gain}."]


def _auc(row: Mapping[Any, Any]) -> str:
    text = bounded(row["auc"], row["auc_low"], row["auc_high"])
    return f"AUC {text}" if text else "no defined AUC"


def _seeds(row: Mapping[Any, Any]) -> str:
    return "one seed" if row["num_seeds"] == 1 else f"{row['num_seeds']} seeds"
