"""All checks of a merge, before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cki_rec.checkpoints import Checkpoint, describe, outline
from cki_rec.config import (
    Config,
    Merge,
    UserError,
    check_source,
    nearest,
    preset_method,
    with_delta,
)
from cki_rec.data.dataset import MANIFEST
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed
from cki_rec.engine.networks import declared
from cki_rec.merging.methods import METHODS
from cki_rec.merging.params import MergeError
from cki_rec.merging.registry import Method
from cki_rec.merging.result import Recipe
from cki_rec.merging.search import AUTO
from cki_rec.merging.traits import logit_scale_of
from cki_rec.models import build_model
from cki_rec.pipelines import compatibility, vocabularies
from cki_rec.pipelines.provenance import check_data, check_rows
from cki_rec.pipelines.references import REFERENCES, Reference
from cki_rec.pipelines.sources import Sources
from cki_rec.plugins import load, load_class, source_digest

RECIPE = {"merge.method": Recipe().method, "merge.recipes": [], "merge.refine": "none"}
"""Options from which a recipe starts."""
TRAINING_ROWS = frozenset({"fisher", "moments"})
"""Inputs of methods that are computed on training rows."""
ROWS = ("training", "random")
"""Rows of a refinement that need no path."""
INSTEAD = "use merge=evidence or merge=aligned_weights, or start it without torchrun"
JOINT = "joint"
"""Label of the reference that is one model, trained on the rows of all sources."""


def entry_of(options: Merge) -> Method | Reference | None:
    """Return the configured method or reference; None for a search over recipes.

    Raises:
        UserError: There is none of that name; the message holds the nearest one. Or a plugin
            cannot be imported.
    """
    for plugin in options.plugins:
        load(plugin, "merge.plugins")
    name = options.method
    if name == AUTO:
        return None
    if name not in METHODS and name not in REFERENCES:
        known = [AUTO, *METHODS, *REFERENCES]
        raise UserError(f"merge.method={name}: {nearest(name, known)}one of {', '.join(known)}")
    return METHODS[name] if name in METHODS else REFERENCES[name]


def source_of(options: Merge) -> str | None:
    """Return the digest of the source of a method that a plugin registered; None for others."""
    entry = entry_of(options)
    return source_digest(entry.function) if isinstance(entry, Method) else None


def method_of(options: Merge) -> Method:
    """Return the configured merge method; the configuration is known to have one."""
    return METHODS[options.method]


def is_single_model(options: Merge) -> bool:
    """Return whether the result is one model of unchanged size."""
    entry = entry_of(options)
    return not isinstance(entry, Reference) or entry.single_model


def is_encoded(folder: str) -> bool:
    """Return whether a folder holds an encoded data set."""
    return (Path(folder) / MANIFEST).is_file()


def is_refined_search(options: Merge) -> bool:
    """Return whether the best model of a search is refined too."""
    return options.method == AUTO and options.effort == "refine" and options.refine != "none"


def recipes_of(config: Config) -> list[Config]:
    """Return the merges that ``auto`` searches."""
    return [
        with_delta(
            config,
            RECIPE | {f"merge.{key}": value for key, value in recipe.items()},
            f"merge.recipes[{place}]",
        )
        for place, recipe in enumerate(config.merge.recipes)
    ]


def needs_of(options: Merge) -> frozenset[str]:
    """Return the inputs that the configured method or reference needs."""
    entry = entry_of(options)
    return frozenset({"score"}) if entry is None else entry.needs(options.options)


def needs_base(config: Config) -> bool:
    """Return whether the method, or a recipe of the search, needs a base model."""
    merges = recipes_of(config) if config.merge.method == AUTO else [config]
    return any("base" in needs_of(each.merge) for each in merges)


def without_unused(config: Config) -> Config:
    """Return the configuration without vocabularies to join if there is one model alone."""
    if len(config.merge.sources) > 1 or needs_base(config):
        return config
    return replace(config, merge=replace(config.merge, vocabularies=[]))


def needs_counts(options: Merge) -> bool:
    """Return whether the merge needs row counts."""
    return "counts" in needs_of(options) or options.tables == "evidence"


def needs_labels(options: Merge) -> bool:
    """Return whether the merge reads labels of validation rows, whatever the network."""
    return (
        options.recalibrate
        or options.refine != "none"
        or options.learn.what != "none"
        or "score" in needs_of(options)
    )


def needs_activations(options: Merge) -> bool:
    """Return whether the method, the alignment or the repair runs models on training rows."""
    is_aligned = options.align.by == "activations" or options.repair != "none"
    return bool(TRAINING_ROWS & needs_of(options)) or (len(options.sources) > 1 and is_aligned)


def needs_rows(options: Merge) -> bool:
    """Return whether the merge reads rows of the data set."""
    return needs_labels(options) or needs_activations(options)


def check_options(config: Config) -> None:
    """Check all options of a merge that can be checked without files.

    Raises:
        UserError: An unknown method or option, or options that exclude each other.
    """
    options = config.merge
    entry = entry_of(options)
    check_deltas(config)
    if config.model.module is not None:
        _check_class(config)
    if options.refine != "none" and options.rows not in ROWS and not is_encoded(options.rows):
        raise UserError(
            f"merge.rows={options.rows}: no encoded data set; use {' or '.join(ROWS)}, or the"
            " folder of a data set that cki-rec prepare wrote"
        )
    _check_processes(options, entry)
    if entry is None:
        if options.vocabularies and not config.data.vocabularies:
            raise UserError(
                "merge.vocabularies: merge.method=auto searches on validation rows, which are not"
                " encoded with the joined vocabularies. Use merge=evidence, which reads no rows,"
                " or set data.vocabularies=[FOLDER,...] to the encoded data sets of the sources"
            )
        _check_recipes(config)
        return
    if options.vocabularies:
        num_bases = int("base" in needs_of(options))
        vocabularies.check_folders(options.vocabularies, len(options.sources) + num_bases)
    where = f"merge.method={options.method}"
    if isinstance(entry, Reference):
        if options.options:
            raise UserError(f"merge.options: {where} has no options")
        for name, is_set in {
            f"ablation={options.ablation}": options.ablation != "none",
            "recalibrate=true": options.recalibrate and options.refine == "none",
            f"refine={options.refine}": options.refine != "none" and not entry.single_model,
            f"repair={options.repair}": options.repair != "none",
            f"learn.what={options.learn.what}": options.learn.what != "none",
        }.items():
            if is_set:
                raise UserError(f"merge.{name}: {where} merges no parameters; leave it out")
        if options.vocabularies and not config.data.vocabularies:
            raise UserError(
                f"merge.vocabularies: {options.label} ({where}) merges no parameters; leave it out"
                " for this method, use merge=evidence, or"
                " data.vocabularies=[FOLDER,...], the encoded data sets of the sources"
            )
        return
    try:
        entry.check(options.options, len(options.sources))
    except MergeError as error:
        raise UserError(f"merge.options: {error}") from None
    if options.learn.what == "gates" and not entry.can_learn(options.options):
        raise UserError(f"merge.learn.what=gates: {where} has no gate to learn")
    is_mean = options.scope == "all" and options.biases == "merge"
    if options.repair != "none" and not (entry.averages_dense and is_mean):
        means = " or ".join(name for name, known in METHODS.items() if known.averages_dense)
        raise UserError(
            f"merge.repair={options.repair} requires method={means}, scope=all and biases=merge"
            f" (got {options.method}, {options.scope}, {options.biases}); use merge.repair=none"
        )
    if options.vocabularies and not config.data.vocabularies and needs_labels(options):
        readers = {
            "merge.recalibrate=true": options.recalibrate,
            f"merge.refine={options.refine}": options.refine != "none",
            f"merge.learn.what={options.learn.what}": options.learn.what != "none",
            where: True,
        }
        reader = next(name for name, reads in readers.items() if reads)
        raise UserError(
            f"merge.vocabularies: {reader} reads rows, which are not encoded with the joined"
            " vocabularies; leave it out, or set data.vocabularies=[FOLDER,...] to the encoded"
            " data sets of the sources"
        )
    if options.vocabularies and options.learn.what == "trunk":
        raise UserError(
            "merge.vocabularies: merge.learn.what=trunk trains on tables of the first source,"
            " which lack rows of others; use merge.learn.what=gates"
        )
    if "base" in entry.needs(options.options):
        if options.align.by != "none" and len(options.sources) > 2:
            raise UserError(
                f"{where}: more than two sources are aligned to their mean, but the base is not;"
                " use merge.align.by=none"
            )
        if options.base is None:
            raise UserError(
                f"{where} needs the model that all sources started from; set"
                " merge.base={path: ...}, or {train.epochs: 0} for their initial weights, as"
                " suite=shards does"
            )


def _check_class(config: Config) -> None:
    """Check that the user's network can be recalibrated, before sources are trained.

    Raises:
        UserError: It cannot, or it cannot be imported.
    """
    assert config.model.module is not None
    network = load_class(config.model.module)
    is_trained = any("path" not in source for source in config.merge.sources)
    if is_trained and config.merge.recalibrate and not hasattr(network, "logit_scale"):
        raise _no_logit_scale(f"model.module={config.model.module}")


def check_logit_scale(config: Config, models: Sources) -> None:
    """Check that checkpoints named by path can be recalibrated.

    Raises:
        UserError: Their network declares no ``logit_scale``.
    """
    if config.merge.recalibrate and "path" in config.merge.sources[0]:
        saved = describe(models.merged[0].folder, distributed.share())
        network = build_model(saved.schema, saved.model, torch.device("meta"))
        if logit_scale_of(network) is None:
            raise _no_logit_scale(models.merged[0].name)


def _no_logit_scale(name: str) -> UserError:
    return UserError(
        f"{name}: the network declares no logit_scale(), which merge.recalibrate=true changes; add"
        " the method (see CONTRIBUTING.md, Add a model) or use merge.recalibrate=false"
    )


def check_deltas(config: Config) -> None:
    """Check that sources and bases are named by options that a training reads."""
    for name, options in (("merge", config.merge), ("suite", config.suite)):
        for place, delta in enumerate(options.sources):
            check_source(delta, f"{name}.sources[{place}]")
        check_source(options.base or {}, f"{name}.base")


def check_label(config: Config) -> None:
    """Check that the label of the configured merge is not the name of another method.

    Raises:
        UserError: Tables would explain the row as that method.
    """
    label, method = config.merge.label, config.merge.method
    named = label if label in (AUTO, *METHODS, *REFERENCES) else preset_method(label)
    is_joint = len(config.merge.sources) == 1
    if named not in (None, method) or (label == JOINT and not is_joint):
        raise UserError(
            f"merge.label={label} is the name of another merge than this one (method={method});"
            f" choose another label, or merge={label}"
        )


def _check_recipes(config: Config) -> None:
    if not config.merge.recipes:
        raise UserError("merge.recipes is empty: auto has nothing to choose from")
    for place, recipe in enumerate(recipes_of(config)):
        try:
            if recipe.merge.method == AUTO or isinstance(entry_of(recipe.merge), Reference):
                raise UserError(f"{recipe.merge.method} makes no model to choose")
            check_options(recipe)
        except UserError as error:
            raise UserError(f"merge.recipes[{place}]: {error}") from None


def _check_processes(options: Merge, entry: Method | Reference | None) -> None:
    """Check that a merge can run on the present number of processes."""
    if distributed.world_size() == 1:
        return
    if isinstance(entry, Method) and not entry.row_wise:
        raise UserError(
            f"merge.method={options.method} is not registered with row_wise=True, so it needs"
            f" whole models in one process; {INSTEAD}"
        )


def check_rows_fit(
    config: Config,
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    dataset: EncodedDataset,
) -> None:
    """Check that the rows of a data set may be read for a merge.

    All sources must fit if labels are read, else the first.

    Raises:
        UserError: A source was trained on other rows or tokens, or rows would choose a source but
            are encoded with the vocabulary of one.
    """
    options = config.merge
    check_encoding(config, checkpoints[0])
    reads_labels = needs_labels(options) or has_anchor(options, checkpoints[0])
    judged = checkpoints if reads_labels else checkpoints[:1]
    fits = check_rows if isinstance(entry_of(options), Reference) else check_data
    for checkpoint, name in zip(judged, names, strict=False):
        fits(checkpoint, dataset, name)


def has_anchor(options: Merge, saved: Checkpoint) -> bool:
    """Return whether the repair copies modules from one source, chosen on validation rows."""
    if options.repair != "project" or len(options.sources) == 1:
        return False
    return bool(declared(saved).elementwise)


def check_encoding(config: Config, saved: Checkpoint) -> None:
    """Check that the rows are encoded with the vocabulary of the merged model, if they choose.

    Raises:
        UserError: They are not.
    """
    is_joined = config.merge.vocabularies and not config.data.vocabularies
    if is_joined and has_anchor(config.merge, saved):
        raise UserError(
            "merge.repair=project chooses a source by validation rows. These are not encoded with"
            " the joined vocabularies; use repair=select_units, or set"
            " data.vocabularies=[FOLDER,...] to the encoded data sets of the sources"
        )


def check_sources(config: Config, sources: Sources, dataset: EncodedDataset | None) -> None:
    """Check that sources and base hold the same network and fit the rows, by their outlines.

    Args:
        config: The configuration. If it joins vocabularies, rows are checked after that.
        sources: The models.
        dataset: The rows that are read; None: no rows.

    Raises:
        UserError: A damaged checkpoint, the first difference, or rows that do not fit.
    """
    models = [*sources.merged, *([sources.base] if sources.base else [])]
    outlines = [outline(model.folder, distributed.share()) for model in models]
    names = [model.name for model in models]
    is_joined = bool(config.merge.vocabularies)
    compatibility.require(compatibility.compare(outlines, names, is_joined))
    if dataset is not None and not is_joined:
        check_rows_fit(config, outlines[: len(sources.merged)], names, dataset)
