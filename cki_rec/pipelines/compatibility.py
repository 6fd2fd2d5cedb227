"""Differences between checkpoints that are to be merged, one finding a line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cki_rec.checkpoints import Checkpoint
from cki_rec.config import UserError
from cki_rec.data.encoding import tokens
from cki_rec.engine import sharded
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.networks import merging_network
from cki_rec.merging.alignment import agreement, table_products
from cki_rec.merging.params import MergeError, Params, generator
from cki_rec.merging.steps import Network, row_weights_of
from cki_rec.merging.symmetry import check_scores, random_element, scores_of, transform
from cki_rec.models.comparison import decides, differences
from cki_rec.pipelines.evidence import counts_of, kind_of

State = Literal["ok", "differs", "impossible"]
SHOWN = 4
"""Names of a list that are shown."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    """``differs``: a fact that does not prevent the merge."""
    reason: str


def require(findings: Iterable[Finding]) -> None:
    """Raise the first finding that makes a merge impossible.

    Raises:
        UserError: There is one.
    """
    for finding in findings:
        if finding.state == "impossible":
            raise UserError(f"sources cannot be merged: {finding.check}: {finding.reason}")


def compare(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    is_joined: bool = False,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Return the differences of later checkpoints from the first; outlines are enough.

    Args:
        checkpoints: Checkpoints as they were trained.
        names: Their names.
        is_joined: Vocabularies are to be joined by token, so tables may differ in their rows.
        rows: Facts about tables whose token lists are known (``vocabularies.Joined.rows``).
    """
    return [
        *_architecture(checkpoints, names),
        *_features(checkpoints, names),
        *_vocabularies(checkpoints, names, rows or {}, is_joined),
        *_tensors(checkpoints, names, is_joined),
        _accumulators(checkpoints, names),
    ]


def _architecture(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[Finding]:
    first, num_differences = checkpoints[0].model, 0
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        is_other = saved.model.name != first.name
        for key, (left, right) in differences(first, saved.model).items():
            if is_other and key != "name":
                continue
            state: State = "impossible" if is_other or decides(key, first) else "differs"
            num_differences += 1
            yield Finding("architecture", state, f"model.{key}: {left}, in {name} {right}")
    if not num_differences:
        yield Finding("architecture", "ok", f"{first.name}, all options equal")


def _features(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[Finding]:
    first, are_equal = checkpoints[0].schema.features, True
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        other = saved.schema.features
        if other == first:
            continue
        are_equal = False
        missing = [f.name for f in first if f not in other]
        more = [f.name for f in other if f not in first]
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"has {_listed(more)} (by name, table and kind)"] if more else []
        reason = " and ".join(parts) or "has the same in another order"
        yield Finding("features", "impossible", f"{name} {reason}")
    if are_equal:
        yield Finding("features", "ok", f"{len(first)}, in the same order")


def _vocabularies(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Any]],
    is_joined: bool,
) -> Iterator[Finding]:
    """Yield per table, and per field of scaled numbers, whether rows have the same meaning."""
    first = checkpoints[0].schema
    for table, digest in first.vocabulary_hashes.items():
        hashes = [saved.schema.vocabulary_hashes.get(table) for saved in checkpoints]
        check = f"vocabulary {table}" if table in first.table_sizes else f"numbers {table}"
        if all(other == digest for other in hashes):
            size = first.table_sizes.get(table)
            kind = "hashed ids" if digest.startswith(tokens.HASHED) else f"hash {digest[:12]}"
            yield Finding(check, "ok", f"{kind}, {size:,} rows" if size else kind)
            continue
        others = [n for n, other in zip(names, hashes, strict=True) if other != digest]
        reason = f"differs in {_listed(others)}"
        if table in rows:
            facts = rows[table]
            each = " and ".join(f"{size:,}" for size in facts["of_each"])
            reason += f": {each} tokens, {facts['of_all']:,} shared by all"
        if is_joined:
            union = f"; joined to {rows[table]['tokens']:,}" if table in rows else ""
            yield Finding(check, "differs", reason + union)
        else:
            nulls = ",".join(["null"] * len(checkpoints))
            join = f"join tables by token: merge.vocabularies=[{nulls}]"
            if table not in first.table_sizes:
                join = "give the field the transform ln_squared, edges or token in all data sets"
            fix = f"; train on one encoded data set, or {join}"
            yield Finding(check, "impossible", reason + fix)


def _tensors(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], is_joined: bool
) -> Iterator[Finding]:
    first, are_equal = checkpoints[0].params, True
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        types = list[str]()
        for key in dict.fromkeys([*first, *saved.params]):
            ignore_rows = is_joined and table_of(key) is not None
            left, right = (_form(params, key, ignore_rows) for params in (first, saved.params))
            if left == right:
                continue
            are_equal = False
            if key not in first or key not in saved.params:
                missing, other = (names[0], right) if key not in first else (name, left)
                yield Finding(
                    "tensors", "impossible", f"{key}: {' '.join(other)}, is missing in {missing}"
                )
            elif (
                left[1] == right[1]
                and first[key].is_floating_point()
                and saved.params[key].is_floating_point()
            ):
                types.append(f"{key}: {left[0]}, in {name} {right[0]}")
            else:
                yield Finding(
                    "tensors",
                    "impossible",
                    f"{key}: {' '.join(left)}, in {name} {' '.join(right)}",
                )
        if types:
            more = f" and {len(types) - 1} more" if len(types) > 1 else ""
            yield Finding("tensors", "differs", f"{types[0]}{more}; merged in float32 or wider")
    if are_equal:
        entries = sum(tensor.numel() for tensor in first.values())
        dtypes = sorted({type_name(tensor) for tensor in first.values()})
        yield Finding("tensors", "ok", f"{len(first)}, {entries:,} entries, {_listed(dtypes)}")


def _accumulators(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Finding:
    forms = [_accumulator_form(saved.accumulators) for saved in checkpoints]
    if len(set(forms)) == 1:
        return Finding("accumulators", "ok", forms[0])
    each = "; ".join(f"{form} in {name}" for form, name in zip(forms, names, strict=True))
    if len({form for form in forms if form != "none"}) == 1:
        return Finding("accumulators", "differs", each)
    fix = "; train all with the same train.table_optimizer"
    return Finding("accumulators", "impossible", each + fix)


def finite(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], is_required: bool
) -> list[Finding]:
    """Return the tensors that have NaN or infinite entries, in the rows of any process."""
    findings = []
    for saved, name in zip(checkpoints, names, strict=True):
        bad_of = sharded.total({n: _bad(t) for n, t in saved.params.items()}, saved.schema)
        for key, bad in bad_of.items():
            if bad:
                tensor, table = saved.params[key], table_of(key)
                size = tensor.numel()
                if table is not None:
                    size = saved.schema.table_sizes[table] * tensor[:1].numel()
                state: State = "impossible" if is_required else "differs"
                what = f"{int(bad):,} of {size:,} entries are NaN or infinite"
                findings.append(Finding("finite", state, f"{key} of {name}: {what}"))
    return findings or [Finding("finite", "ok", "no NaN, no infinity")]


def _bad(tensor: Tensor) -> Tensor:
    """Return how many entries are NaN or infinite."""
    return torch.tensor(0) if tensor.sum().isfinite() else (~tensor.isfinite()).sum()


def row_counts(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    is_needed: bool,
    method: str,
    evidence: str,
) -> list[Finding]:
    """Return whether all checkpoints have row counts, or the measure that replaces them.

    Args:
        checkpoints: The sources.
        names: Their names.
        is_needed: The merge cannot do without.
        method: ``merge.method``.
        evidence: ``merge.evidence``.
    """
    try:
        kind = kind_of(checkpoints, evidence)
    except UserError as error:
        return [Finding("evidence", "impossible", str(error))]
    if kind == "optimizer" or evidence == "none":
        state: State = "impossible" if is_needed and kind == "none" else "ok"
        return [Finding("evidence", state, f"{kind} (merge.evidence={evidence})")]
    missing = [name for saved, name in zip(checkpoints, names, strict=True) if not saved.counts]
    if missing:
        state = "impossible" if is_needed else "differs"
        why = f"merge.method={method} needs them" if is_needed else "not needed"
        return [Finding("row counts", state, f"none in {_listed(missing)}; {why}")]
    sums = [
        sharded.total({t: c.sum() for t, c in saved.counts.items()}, saved.schema, str)
        for saved in checkpoints
    ]
    lookups = [sum(int(count) for count in each.values()) for each in sums]
    each = " and ".join(f"{count:,}" for count in lookups)
    return [
        Finding("row counts", "ok", f"of {len(checkpoints[0].counts)} tables; lookups: {each}")
    ]


def alignment(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    is_required: bool,
    seed: int,
    row_mask: Mapping[str, Tensor],
    evidence: str,
) -> Iterator[Finding]:
    """Yield the symmetries of the network, whether they hold, and how well sources agree.

    Args:
        checkpoints: Sources that fit together and are finite.
        names: Their names.
        is_required: The merge aligns its sources.
        seed: Seed of random rows and of elements of symmetries.
        row_mask: Rows of joined tables that each source has (``vocabularies.Joined``).
        evidence: ``merge.evidence``.
    """
    network = merging_network(checkpoints[0], seed, is_aligned=True)
    models = [{name: tensor.float() for name, tensor in s.params.items()} for s in checkpoints]
    if not network.symmetries:
        yield Finding("alignment", "differs", "the model declares no symmetry: nothing to align")
        return
    groups = Counter((symmetry.kind, symmetry.size) for symmetry in network.symmetries)
    for (kind, size), number in groups.items():
        alike = [s for s in network.symmetries if (s.kind, s.size) == (kind, size)]
        moved = list(dict.fromkeys(p.parameter for s in alike for p in s.slices))
        each = f"{number} x {kind.replace('_', ' ')} of {size}"
        yield Finding("alignment", "ok", f"{each}, moving {_listed([_short(m) for m in moved])}")
    try:
        _verify(network, models, names, seed)
        num_rows = len(network.probe)
        yield Finding("symmetries", "ok", f"random ones keep the scores of {num_rows} random rows")
    except MergeError as error:
        yield Finding("symmetries", "impossible" if is_required else "differs", str(error))
    if len(models) > 1:
        counts = counts_of(checkpoints, is_needed=False, kind=evidence)
        row_weights = row_weights_of(models, counts, row_mask, network.tables)
        products = table_products(models, network.moved_tables(), row_weights)
        products = sharded.total(products, checkpoints[0].schema)
        cosine = agreement(models, network.symmetries, products)
        yield Finding("agreement", "ok", f"mean cosine {cosine:.3f} before alignment")


def num_bytes(params: Params) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def _verify(network: Network, models: Sequence[Params], names: Sequence[str], seed: int) -> None:
    draw = generator(seed, "check")
    assert network.module is not None
    for model, name in zip(models, names, strict=True):
        elements = [random_element(s, draw) for s in network.symmetries]
        with torch.no_grad():
            moved = transform(model, network.symmetries, elements)
        after, before = (scores_of(network.module, p, network.probe) for p in (moved, model))
        check_scores(after, before, name)


def _form(params: Params, key: str, ignore_rows: bool) -> tuple[str, str]:
    """Return the type and the shape of a tensor as text; empty texts without the tensor."""
    if key not in params:
        return "", ""
    shape = tuple(params[key].shape)
    return type_name(params[key]), str(("rows", *shape[1:]) if ignore_rows else shape)


def type_name(tensor: Tensor) -> str:
    """Return the name of the type of a tensor, such as ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def note_types(
    result: dict[str, Any],
    sources: Sequence[Checkpoint],
    merged: Iterable[torch.dtype],
    is_set: bool,
) -> None:
    """Store and log the types of a merged model, if sources have several or one is configured."""
    types = sorted({type_name(tensor) for each in sources for tensor in each.params.values()})
    if len(types) > 1 or is_set:
        result["types"] = sorted({str(dtype).removeprefix("torch.") for dtype in merged})
        log.info("  sources of %s; result in %s", ", ".join(types), ", ".join(result["types"]))


def _accumulator_form(accumulators: Params) -> str:
    if not accumulators:
        return "none"
    forms = {
        "one a row" if t.ndim == 1 or t.shape[-1] == 1 else "one a value"
        for t in accumulators.values()
    }
    return f"{len(accumulators)} tables, {' or '.join(sorted(forms))}"


def _short(parameter: str) -> str:
    table = table_of(parameter)
    return f"table {table}" if table else parameter


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
