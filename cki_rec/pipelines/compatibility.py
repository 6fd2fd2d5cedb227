"""What fits and what differs between checkpoints, one finding a line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Merge, UserError
from cki_rec.data.encoding import tokens
from cki_rec.data.schema import random_batch
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.alignment import agreement, random_element
from cki_rec.merging.params import Params, generator
from cki_rec.merging.projection import table_products, transform
from cki_rec.merging.symmetry import Symmetry
from cki_rec.models import build_model
from cki_rec.models.comparison import decides, differences
from cki_rec.pipelines import matching, merging

State = Literal["ok", "differs", "impossible"]
ROWS = 512
"""Random rows that declared symmetries are tried on."""
SHOWN = 4
"""Names of a list that are shown."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    """``differs``: worth knowing, and no obstacle."""
    reason: str


def architecture(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[Finding]:
    """Yield in which options of their networks later checkpoints differ from the first."""
    first, found = checkpoints[0].model, 0
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        is_other = saved.model.name != first.name
        for key, (own, other) in differences(first, saved.model).items():
            if is_other and key != "name":
                continue
            state: State = "impossible" if is_other or decides(key, first) else "differs"
            found += 1
            yield Finding("architecture", state, f"model.{key}: {own}, in {name} {other}")
    if not found:
        yield Finding("architecture", "ok", f"{first.name}, all options equal")


def features(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[Finding]:
    """Yield which features differ, or their order."""
    first, found = checkpoints[0].schema.features, 0
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        other = saved.schema.features
        if other == first:
            continue
        found += 1
        lacks = [f.name for f in first if f not in other]
        more = [f.name for f in other if f not in first]
        parts = [f"lacks {_listed(lacks)}"] if lacks else []
        parts += [f"has {_listed(more)} (by name, table and kind)"] if more else []
        reason = " and ".join(parts) or "has the same in another order"
        yield Finding("features", "impossible", f"{name} {reason}")
    if not found:
        yield Finding("features", "ok", f"{len(first)}, in the same order")


def vocabularies(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Any]],
    is_joined: bool,
) -> Iterator[Finding]:
    """Yield per table, and per field of scaled numbers, whether rows mean the same.

    Args:
        checkpoints: As they were trained.
        names: Theirs.
        rows: Of tables whose token lists are known (``pipelines.vocabularies.Joined.rows``).
        is_joined: Whether they are to be joined by token.
    """
    first = checkpoints[0].schema
    for table, digest in first.vocabulary_hashes.items():
        hashes = [saved.schema.vocabulary_hashes.get(table) for saved in checkpoints]
        check = f"vocabulary {table}" if table in first.table_sizes else f"numbers {table}"
        if all(own == digest for own in hashes):
            size = first.table_sizes.get(table)
            kind = "hashed ids" if digest.startswith(tokens.HASHED) else f"hash {digest[:12]}"
            yield Finding(check, "ok", f"{kind}, {size:,} rows" if size else kind)
            continue
        others = [n for n, own in zip(names, hashes, strict=True) if own != digest]
        reason = f"another one in {_listed(others)}"
        if table in rows:
            facts = rows[table]
            each = " and ".join(f"{size:,}" for size in facts["of_each"])
            reason += f": {each} tokens, {facts['of_all']:,} shared by all"
        if is_joined and table in rows:
            yield Finding(check, "differs", f"{reason}; joined to {rows[table]['tokens']:,}")
        else:
            nulls = ",".join(["null"] * len(checkpoints))
            mend = f"; join them: merge.vocabularies=[{nulls}]" if table in rows else ""
            yield Finding(check, "impossible", reason + mend)


def tensors(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[Finding]:
    """Yield which tensors are missing or of another shape or dtype."""
    first, found = checkpoints[0].params, 0
    for saved, name in zip(checkpoints[1:], names[1:], strict=True):
        for key in dict.fromkeys([*first, *saved.params]):
            own, other = (_form(params, key) for params in (first, saved.params))
            if own != other:
                found += 1
                yield Finding("tensors", "impossible", f"{key}: {own}, in {name} {other}")
    if not found:
        entries = sum(tensor.numel() for tensor in first.values())
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in first.values()})
        yield Finding("tensors", "ok", f"{len(first)}, {entries:,} entries, {_listed(dtypes)}")


def finite(checkpoints: Sequence[Checkpoint], names: Sequence[str], merges: bool) -> list[Finding]:
    """Return which tensors have NaN or infinite entries."""
    found = [
        Finding(
            "finite",
            "impossible" if merges else "differs",
            f"{key} of {name}: {bad:,} of {tensor.numel():,} entries are NaN or infinite",
        )
        for saved, name in zip(checkpoints, names, strict=True)
        for key, tensor in saved.params.items()
        if (bad := int((~tensor.isfinite()).sum()))
    ]
    return found or [Finding("finite", "ok", "no NaN, no infinity")]


def evidence(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], options: Merge
) -> list[Finding]:
    """Return whether all have row counts, and accumulators of which form."""
    lacking = [name for saved, name in zip(checkpoints, names, strict=True) if not saved.counts]
    is_needed = merging.uses_counts(options)
    if lacking:
        state: State = "impossible" if is_needed else "differs"
        why = f"merge.method={options.method} needs them" if is_needed else "not needed"
        counts = Finding("row counts", state, f"none in {_listed(lacking)}; {why}")
    else:
        seen = [sum(int(c.sum()) for c in saved.counts.values()) for saved in checkpoints]
        looked = " and ".join(f"{count:,}" for count in seen)
        counts = Finding(
            "row counts", "ok", f"of {len(checkpoints[0].counts)} tables; lookups: {looked}"
        )
    forms = [_accumulators(saved.accumulators) for saved in checkpoints]
    if len(set(forms)) == 1:
        return [counts, Finding("accumulators", "ok", forms[0])]
    each = "; ".join(f"{form} in {name}" for form, name in zip(forms, names, strict=True))
    clash = len({form for form in forms if form != "none"}) > 1
    return [counts, Finding("accumulators", "impossible" if clash else "differs", each)]


def alignment(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    options: Merge,
    seed: int,
    owners: Mapping[str, Tensor],
) -> Iterator[Finding]:
    """Yield what the network's symmetries move, whether they hold, and how well sources agree.

    Args:
        checkpoints: Sources that fit together and are finite.
        names: Theirs.
        options: Whether alignment is asked for.
        seed: Of random rows and of elements of symmetries.
        owners: Of rows of joined tables (``pipelines.vocabularies.Joined``).
    """
    first = checkpoints[0]
    symmetries, models = matching.symmetries_of(first), [c.params for c in checkpoints]
    if not symmetries:
        yield Finding("alignment", "differs", "the model declares no symmetry: nothing to align")
        return
    groups = Counter((symmetry.kind, symmetry.size) for symmetry in symmetries)
    for (kind, size), number in groups.items():
        alike = [s for s in symmetries if (s.kind, s.size) == (kind, size)]
        moved = list(dict.fromkeys(p.parameter for s in alike for p in s.slices))
        each = f"{number} x {kind.replace('_', ' ')} of {size}"
        yield Finding("alignment", "ok", f"{each}, moving {_listed([_short(m) for m in moved])}")
    state: State = "differs" if options.align.by == "none" else "impossible"
    try:
        _try_symmetries(first, models, names, symmetries, seed)
        yield Finding("symmetries", "ok", f"random ones leave scores of {ROWS} random rows alone")
    except UserError as error:
        yield Finding("symmetries", state, str(error))
    if len(models) > 1:
        counts = merging.counts_of(checkpoints, False)
        votes = merging.votes_of(models, counts, owners)
        products = table_products(models, matching.moved_tables(symmetries), votes)
        cosine = agreement(models, symmetries, products)
        yield Finding("agreement", "ok", f"mean cosine {cosine:.3f} of what could be aligned, now")


def memory(checkpoints: Sequence[Checkpoint], options: Merge) -> Finding:
    """Return an estimate of what integration holds at once, beside what this machine has."""
    sources = sum(
        _bytes(c.params) + _bytes(c.accumulators) + _bytes(c.counts) for c in checkpoints
    )
    params = sum(_bytes(c.params) for c in checkpoints)
    total = sources + params // len(checkpoints)
    total += sources if options.vocabularies else 0
    total += params if options.method in ("cki", "random") else 0  # a weight per entry
    if matching.is_led(options, checkpoints[0]):  # the best so far and the next
        total += 2 * params // len(checkpoints)
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state: State = "ok" if total < has else "differs"
    return Finding("memory", state, f"about {total / 2**20:,.1f} MiB of {has / 2**20:,.0f} MiB")


def _try_symmetries(
    saved: Checkpoint,
    models: Sequence[Params],
    names: Sequence[str],
    symmetries: Sequence[Symmetry],
    seed: int,
) -> None:
    draw = generator(seed, "check")
    network = build_model(saved.schema, saved.model, torch.device("cpu")).eval()
    batch = random_batch(saved.schema, ROWS, seed)
    for model, name in zip(models, names, strict=True):
        moved = transform(model, symmetries, [random_element(s, draw) for s in symmetries])
        with torch.no_grad():
            scores, own = (functional_call(network, m, (batch,)) for m in (moved, model))
        matching.check_scores(scores, own, name)


def _form(params: Params, key: str) -> str:
    if key not in params:
        return "missing"
    return f"{str(params[key].dtype).removeprefix('torch.')} {tuple(params[key].shape)}"


def _accumulators(found: Params) -> str:
    if not found:
        return "none"
    forms = {
        "one a row" if t.ndim == 1 or t.shape[-1] == 1 else "one a value" for t in found.values()
    }
    return f"{len(found)} tables, {' or '.join(sorted(forms))}"


def _bytes(params: Params) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def _short(parameter: str) -> str:
    table = table_of(parameter)
    return f"table {table}" if table else parameter


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
