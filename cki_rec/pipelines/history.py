"""A finished training: its best epoch and its validation metrics."""

from __future__ import annotations

import logging
import time
from typing import Any

from cki_rec.engine.record import RECORD, Run
from cki_rec.evaluation.metrics import PRIMARY

log = logging.getLogger(__name__)


def log_done(done: Run, start: float) -> None:
    """Log the validation metrics and the folder of a training, and its date if it is older."""
    assert done.record is not None
    finished = (done.path / RECORD).stat().st_mtime
    if finished < start:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(finished))
        log.info("already trained on %s; runtime.force=true trains again", date)
    best = best_epoch(done.record["result"]["history"])
    names = {f"valid_{metric.name}": metric.title for metric in PRIMARY}
    known = {title: best.get(name) for name, title in names.items()}
    shown = [f"{title} {value:.4f}" for title, value in known.items() if value is not None]
    log.info("validation: %s", ", ".join(shown))
    if (auc := best.get("valid_auc")) is not None and auc < 0.5:
        log.warning(
            "  validation AUC %.4f is below 0.5: the model ranks the wrong way round; check the"
            " labels (data.labels) and the learning rate",
            auc,
        )
    log.info("model: %s", done.checkpoint)


def valid_auc(run: Run) -> float:
    """Return the validation AUC of a finished training."""
    assert run.record is not None
    value: float = run.record["result"]["valid_auc"]
    return value


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last epoch whose model was saved."""
    return [epoch for epoch in history if epoch["is_best"]][-1]


def history_summary(history: list[dict[str, Any]]) -> str:
    """Return the number of epochs and the validation AUC of the best one."""
    best, epochs = best_epoch(history), history[-1]["epoch"]
    if epochs == 0:
        return "initial weights"
    auc = f"validation AUC {best['valid_auc']:.4f}"
    if best["epoch"] == 0:
        return f"no epoch is better than the initial weights, {auc}"
    return f"best of {epochs} epochs is {best['epoch']}, {auc}"
