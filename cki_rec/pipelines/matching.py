"""Around a merge: bring sources into one frame before it, repair the result after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Merge, UserError
from cki_rec.data.schema import random_batch
from cki_rec.engine import distributed, sharded
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.alignment import align
from cki_rec.merging.selection import Score
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MixingWeights, Params
from cki_rec.merging.projection import project_tables, anchor_weights
from cki_rec.merging.alignment import table_products
from cki_rec.merging.symmetry import transform
from cki_rec.merging.repair import fit_layers, rescale
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.merging.symmetry import Symmetry
from cki_rec.models import build_model
from cki_rec.models.attention import ActivationUnit
from cki_rec.models.cross_network import CrossNetMix, CrossNetV2
from cki_rec.models.final_mlp import FeatureGate

CHECKED_ROWS = 512
TOLERANCE = 1e-5
COORDINATEWISE = (ActivationUnit, CrossNetV2, CrossNetMix, FeatureGate)
"""Modules that multiply coordinates of embeddings one by one."""


def looks_at_rows(options: Merge) -> bool:
    """Return whether alignment or repair run the sources on training rows."""
    return options.align.by == "activations" or options.repair != "none"


def is_led(options: Merge, saved: Checkpoint) -> bool:
    """Return whether repair takes a part of the network whole from one source, which leads."""
    if options.repair != "project" or len(options.sources) == 1:
        return False
    return bool(coordinatewise(build_model(saved.schema, saved.model, torch.device("meta"))))


def aligned(
    options: Merge,
    models: Sequence[Params],
    counts: Sequence[Params],
    saved: Checkpoint,
    observe: ActivationStatistics | None,
    seed: int,
) -> tuple[list[Params], dict[str, Any] | None]:
    """Return the sources in one frame, and how well they agree there and did before.

    They are moved where they are: ``models`` are then in that frame, too.

    Raises:
        UserError: An aligned source does not give its own scores any more.
    """
    if options.align.by == "none" or len(models) == 1:
        return list(models), None
    symmetries = symmetries_of(saved)
    moments = None
    if options.align.by == "activations":
        assert observe is not None
        moments = observe(models).second
    products = table_products(models, moved_tables(symmetries), counts)
    products = sharded.total(products, saved.schema)
    found = align(models, symmetries, products, moments, starts=options.align.starts, seed=seed)
    found = distributed.from_first(found)  # other machines may round otherwise
    held = sharded.local_schema(saved.schema)
    network = build_model(held, saved.model, torch.device("cpu")).eval()
    batch = random_batch(held, CHECKED_ROWS, seed)
    moved = []
    for k, (model, elements) in enumerate(zip(models, found.elements, strict=True)):
        with torch.no_grad():
            own = functional_call(network, model, (batch,))
            moved.append(transform(model, symmetries, elements, in_place=True))
            scores = functional_call(network, moved[k], (batch,))
        check_scores(scores, own, f"merge.sources[{k}]")
    facts = {
        "by": options.align.by,
        "agreement": found.agreement,
        "agreement_before": found.agreement_before,
        "sweeps": found.sweeps,
    }
    return moved, facts


def check_scores(scores: Tensor, own: Tensor, name: str) -> None:
    """Check that a source that was only moved scores rows as it did before.

    Raises:
        UserError: By name, if a logit differs by more than 1e-5 of the largest, or of 1.
    """
    error = float((scores - own).abs().max())
    if not error <= TOLERANCE * max(1.0, float(own.abs().max())):
        raise UserError(
            f"{name}: alignment changed its scores by {error:.1e}; its network does not have the"
            " symmetries that its model declares; use merge.align.by=none"
        )


def accumulators(merged: Params, options: Merge) -> Params:
    """Return Adagrad accumulators that fit moved tables.

    One a row is the same in every frame; of one a column, the mean over the row is.
    """
    if options.align.by == "none" and options.repair != "project":
        return merged
    return {
        name: tensor
        if tensor.ndim < 2 or tensor.shape[1] == 1
        else tensor.mean(1, keepdim=True).expand_as(tensor).contiguous()
        for name, tensor in merged.items()
    }


def symmetries_of(saved: Checkpoint) -> list[Symmetry]:
    """Return what the network of a checkpoint declares."""
    network = build_model(saved.schema, saved.model, torch.device("meta"))
    found: list[Symmetry] = network.symmetries()  # type: ignore[operator]
    return found


def rotations_of(symmetries: Sequence[Symmetry]) -> list[Symmetry]:
    """Return the symmetries in which coordinates may be mixed."""
    return [symmetry for symmetry in symmetries if symmetry.kind == "rotation"]


def moved_tables(symmetries: Sequence[Symmetry]) -> list[str]:
    """Return the tables that symmetries move."""
    names = [part.parameter for symmetry in symmetries for part in symmetry.slices]
    return [name for name in dict.fromkeys(names) if table_of(name)]


def repaired(
    options: Merge,
    merged: Params,
    models: Sequence[Params],
    weights: MixingWeights,
    counts: Sequence[Params],
    saved: Checkpoint,
    observe: ActivationStatistics | None,
    score: Score | None,
) -> tuple[Params, MixingWeights, dict[str, Any] | None]:
    """Return the merged model after ``merge.repair``, its mixing weights, and who leads.

    All sources have equal shares in what layers are fitted to. Where a part comes whole from one
    source (``reduce``), each is tried, and the model with the best ``score`` is returned, the
    first of equals. At most two models are held beside sources and merged model.
    """
    if options.repair == "none" or len(models) == 1:
        return merged, weights, None
    assert observe is not None
    symmetries, shares = symmetries_of(saved), [1 / len(models)] * len(models)
    if options.repair == "rescale":
        return rescale(merged, models, shares, observe, symmetries), weights, None
    if options.repair != "project":
        tables = {name: tensor for name, tensor in merged.items() if table_of(name)}
        on_merged_tables = [{**model, **tables} for model in models]
        selects_units = options.repair == "select_units"
        fitted = fit_layers(merged, on_merged_tables, shares, observe, symmetries, selects_units)
        return fitted, weights, None
    products = table_products(models, moved_tables(rotations_of(symmetries)), counts)
    whole = coordinatewise(observe.network)
    readers = _linear_weights(observe.network) - whole
    reduced = project_tables(merged, models, symmetries, products, weights, readers)
    if not whole:
        return fit_layers(reduced, models, shares, observe, symmetries, True), weights, None
    assert score is not None
    best, scores = reduced, list[float]()
    for lead in range(len(models)):
        own = anchor_weights(weights, symmetries, readers, whole, lead)
        led = mix([{name: model[name] for name in own} for model in models], own)
        fitted = fit_layers(reduced | led, models, shares, observe, symmetries, True, whole)
        scores.append(score(fitted))
        if scores[-1] > max(scores[:-1], default=-1.0):
            best = fitted
    lead = scores.index(max(scores))
    own = anchor_weights(weights, symmetries, readers, whole, lead)
    return best, weights | own, {"source": lead, "valid_auc": scores}


def coordinatewise(network: nn.Module) -> set[str]:
    """Return the parameters and statistics of modules that cannot read a projection."""
    inside = [f"{n}." for n, m in network.named_modules() if isinstance(m, COORDINATEWISE)]
    return {name for name in network.state_dict() if name.startswith(tuple(inside))}


def _linear_weights(network: nn.Module) -> set[str]:
    return {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Linear)}
