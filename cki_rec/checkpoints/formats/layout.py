"""The parts of a checkpoint of another program: the model, optimizer state, counts of rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cki_rec.checkpoints.formats.stored import Entry, Stored

MODELS = (
    *("model", "state_dict", "model_state_dict", "model_state", "module_state", "net", "network"),
    *("params", "weights"),
)
"""First parts of names that hold the model."""
OPTIMIZERS = frozenset(
    {"optimizer", "optim", "opt", "optimizers", "optimizer_state", "optimizer_states"}
    | {"optimizer_state_dict", "optim_state_dict", "accumulator"}
)
"""First parts of names that hold optimizer state."""
COPIES = frozenset(
    {"ema", "model_ema", "ema_state_dict", "ema_model", "average", "adam", "counts"}
)
"""First parts of names that are beside a model."""
WRAPPERS = ("module", "_orig_mod")
"""Parts of names that parallel and compiled modules add."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of names of buffers of batch norms."""
COUNTS = ("counts", "count")
"""Last parts of names of training rows per table row."""
SCORES = ("scores", "score", "timestamps", "timestamp")
"""Last parts of names of scores of dynamic tables: uses (LFU), or the time of the last one."""


@dataclass(slots=True)
class Layout:
    """The model of a checkpoint, under the names of its network."""

    names: dict[str, str]
    """Tensors of the model -> full names."""
    entries: dict[str, Entry]
    """Their shapes, of transposed ones after that, and types."""
    state: dict[str, dict[str, tuple[Stored, str]]]
    """Parameter -> optimizer state by its name, as ``exp_avg_sq``: checkpoint and full name."""
    counts: dict[str, tuple[Stored, str]]
    """Table -> training rows that looked each row up."""
    scores: dict[str, tuple[Stored, str]]
    """Table -> another measure of use per row."""
    prefix: str
    """Beginning of all full names of the model."""
    notes: list[str] = field(default_factory=list)
    """Parts that were left out, and why."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Parameter groups of the optimizer."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How names of a checkpoint become those of a network."""

    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements, in order."""
    transposed: tuple[str, ...] = ()
    """Regular expressions of matrices that are stored transposed, by their new names."""
    known: Collection[str] = ()
    """Names of the network, if it is known."""
    parameters: Sequence[str] = ()
    """Names of its parameters, in order."""

    def name(self, name: str) -> str:
        """Return the new name of a tensor."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_transposed(self, name: str) -> bool:
        """Return whether a tensor is stored transposed."""
        return any(re.fullmatch(pattern, name) for pattern in self.transposed)

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the network as it is stored, or the other way round."""
        return tensor.t().contiguous() if self.is_transposed(name) else tensor


def layout(
    stored: Stored,
    naming: Naming | None = None,
    counts: Stored | None = None,
    optimizer: Stored | None = None,
) -> Layout:
    """Return the parts of a checkpoint.

    Args:
        stored: The checkpoint.
        naming: Changes of names, and the names of the network.
        counts: Another file, of counts by table.
        optimizer: Another file, of optimizer state.
    """
    naming = naming or Naming()
    full = _model_names(stored)
    cleaned, prefix = _without_prefix(full, naming)
    names = {naming.name(name): long for name, long in cleaned.items()}
    entries = {
        name: _shown(stored.entries[long], naming.is_transposed(name))
        for name, long in names.items()
    }
    result = Layout(names, entries, {}, {}, {}, prefix)
    if len(names) < len(cleaned):
        result.notes.append("several tensors have one name after the changes of names")
    held = set(full)
    rest = [(stored, name, name) for name in stored.entries if name not in held]
    if optimizer is not None:
        rest += [(optimizer, f"optimizer.{name}", name) for name in optimizer.entries]
    if counts is not None:
        rest += [(counts, f"{name}.counts", name) for name in counts.entries]
    rest += [(stored, long, long) for name, long in names.items() if _kind(name)]
    result.groups = [*stored.groups, *(optimizer.groups if optimizer else [])]
    old_names = {name: naming.name(name) for name in cleaned}
    _add_evidence(result, rest, old_names)
    for holder, key in [*result.counts.values(), *result.scores.values()]:
        for name in [n for n, long in names.items() if holder is stored and long == key]:
            if naming.known and name not in naming.known:  # beside the network, not of it
                del result.names[name], result.entries[name]
    _add_numbered(result, rest, naming)
    return result


def _model_names(stored: Stored) -> list[str]:
    """Return the full names of the model's tensors."""
    heads = {name.split(".")[0] for name in stored.entries}
    roots = [root for root in MODELS if root in heads]
    if roots and heads <= {*MODELS, *OPTIMIZERS, *COPIES}:
        return [name for name in stored.entries if name.startswith(f"{roots[0]}.")]
    return [name for name in stored.entries if name.split(".")[0] not in OPTIMIZERS]


def _without_prefix(full: Sequence[str], naming: Naming) -> tuple[dict[str, str], str]:
    """Return short names -> full names, and the prefix: that of wrappers, or of the network."""
    parts = {name: name.split(".") for name in full}
    known = set(naming.known)
    levels: list[tuple[dict[str, str], str, bool]] = []
    for depth in range(min((len(p) for p in parts.values()), default=1)):
        heads = tuple(next(iter(parts.values()))[:depth]) if parts else ()
        if any(tuple(p[:depth]) != heads for p in parts.values()):
            break
        is_usual = all(head in (*WRAPPERS, *MODELS) for head in heads)
        short = {
            ".".join(part for part in p[depth:] if part != "_orig_mod"): name
            for name, p in parts.items()
        }
        if known and {naming.name(name) for name in short} == known:
            return short, _prefix(heads)
        levels.append((short, _prefix(heads), is_usual))
    return next(((s, p) for s, p, is_usual in reversed(levels) if is_usual), ({}, ""))


def _prefix(heads: Sequence[str]) -> str:
    return "".join(f"{head}." for head in heads)


def _shown(entry: Entry, is_transposed: bool) -> Entry:
    return Entry(entry.shape[::-1], entry.dtype) if is_transposed else entry


def _kind(name: str) -> str:
    """Return ``counts`` or ``scores`` if the name of a tensor ends so."""
    last = re.split(r"[._]", name)[-1]
    return "counts" if last in COUNTS else "scores" if last in SCORES else ""


def _add_evidence(
    result: Layout, rest: Sequence[tuple[Stored, str, str]], names: Mapping[str, str]
) -> None:
    """Add optimizer state that names its parameter, counts and scores."""
    stems = {name.rpartition(".")[0] or name: name for name in names if name.endswith("weight")}
    tables = {stem.split(".")[-1]: name for stem, name in stems.items()}
    for holder, name, key in rest:
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        shape = holder.entries[key].shape
        if kind := _kind(name) or ("counts" if parts[0] == "counts" else ""):
            stem = re.sub(r"^counts\.|[._](counts?|scores?|timestamps?)(?=$|[._])", "", name)
            candidates = (stem, stems.get(stem), tables.get(stem.split(".")[-1]))
            found = next((n for n in candidates if n in names), None)
            if found is not None and result.entries[names[found]].shape[:1] == shape:
                held = result.counts if kind == "counts" else result.scores
                held[names[found]] = (holder, key)
            continue
        if parameter := next(_parts_in(parts, names), ""):
            is_whole = ".".join(parts).endswith(f".{parameter}")  # of the accumulators of cki_rec
            entry = parts[0] if is_whole else parts[-1]
            result.state.setdefault(names[parameter], {})[entry] = (holder, key)


def _parts_in(parts: Sequence[str], names: Collection[str]) -> Iterator[str]:
    """Yield the names of parameters inside of a name, the longest first."""
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            if (name := ".".join(parts[start : start + length])) in names:
                yield name


def _add_numbered(result: Layout, rest: Sequence[tuple[Stored, str, str]], naming: Naming) -> None:
    """Add optimizer state by the number of its parameter, as ``torch.optim`` writes it."""
    numbered: dict[str, dict[int, dict[str, tuple[Stored, str]]]] = {}
    for holder, name, key in rest:
        if match := re.fullmatch(r"(.*\b)?state\.(\d+)\.([A-Za-z_]\w*)", name):
            where = numbered.setdefault(match[1] or "", {})
            where.setdefault(int(match[2]), {})[match[3]] = (holder, key)
    if not numbered:
        return
    if len(numbered) > 1:
        result.notes.append("optimizer state left out: several optimizers number parameters alike")
        return
    (states,) = numbered.values()
    names = _numbers(result, naming)
    if isinstance(names, str):
        result.notes.append(f"optimizer state left out: {names}")
        return
    for number, state in states.items():
        name = names.get(number, "")
        shapes = {h.entries[k].shape for key, (h, k) in state.items() if key != "step"}
        if not name or not all(_fits(s, result.entries[name].shape) for s in shapes):
            result.state.clear()
            result.notes.append(
                f"optimizer state left out: parameter {number} has another shape than"
                f" {name or 'any parameter'}"
            )
            return
        result.state[name] = state


def _fits(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    return shape in (parameter, parameter[:1], (*parameter[:1], 1), ())


def _numbers(result: Layout, naming: Naming) -> dict[int, str] | str:
    """Return number -> parameter, or the reason why it is unknown."""
    if all("param_names" in group for group in result.groups) and result.groups:
        pairs = [
            pair
            for group in result.groups
            for pair in zip(group["params"], group["param_names"], strict=True)
        ]
        return {n: name for n, name in pairs if name in result.entries}
    names = list(naming.parameters) or [
        name
        for name, entry in result.entries.items()
        if entry.dtype.is_floating_point and name.split(".")[-1] not in BUFFERS
    ]
    total = sum(len(group["params"]) for group in result.groups)
    if len(result.groups) > 1:
        return "several groups of parameters without names"
    if total and total != len(names):
        return f"{total} parameters in the optimizer, {len(names)} in the model"
    return dict(enumerate(names))
