"""Records of evaluated models by older versions, brought to the words of this one.

Version 0.1.0 called sources parents, and named some methods otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "best_parent": "best_source",
    "newest_parent": "newest_source",
    "aligned_evidence": "auto",
    "control_frozen": "ablation_frozen",
    "control_permuted": "ablation_permuted",
    "control_random": "ablation_random",
    "control_shuffled": "ablation_shuffled",
    "control_uniform": "ablation_uniform",
}
"""Method label of version 0.1.0 -> label of this version."""


def current_name(method: str) -> str:
    """Return today's label of a method or baseline."""
    return RENAMED.get(method, method)


def current(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of any version with today's labels; a record of today is unchanged."""
    result = dict(record["result"])
    result["method"] = current_name(result["method"])
    if result["difference"]:
        result["difference"] = {current_name(k): v for k, v in result["difference"].items()}
    config = {**record["config"]}
    if "parents" in config:
        config["sources"] = config.pop("parents")
    return {**record, "result": result, "config": config}
