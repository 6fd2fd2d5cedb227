"""Every option of merges and of their assessment, and its type; values live in ``conf/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cki_rec.config.section import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Source,
    section,
)


@section
class Align:
    """Alignment of the sources to a shared basis before the merge."""

    by: Literal["none", "weights", "activations"]
    """``none``, ``weights`` or ``activations`` (hidden units by their activations on rows)."""
    starts: Positive
    """Starts of the search; the best end is taken."""


@section
class Learn:
    """Training inside a merge."""

    what: Literal["none", "gates", "trunk"]
    """``none``, ``gates`` (of the method, all else frozen) or ``trunk`` (gates, and the parameters
    out of ``merge.scope``)."""
    epochs: Positive
    learning_rate: NonNegativeFloat
    """Learning rate of Adam."""


@section
class Refinement:
    """Fit of a merged model to a teacher made of its sources, without labels."""

    field: str | None
    """The field whose ids choose among the sources; null: the one whose row counts differ most."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the sources in a routed teacher. The rest is the merged model itself."""
    steps: Positive
    """About this many, to the mean logit; whole passes over the rows, two at least."""
    map_steps: NonNegative
    """Steps before them that fit one linear map per table from the rows of all sources, beginning
    as the best source; to the mean logit only, and on one process. 0: from the merged model."""
    routed_steps: Positive
    """Those to a routed teacher, which gains less from a longer fit."""
    passes: Positive
    """Most passes over the rows, whatever the steps."""
    batch_size: Positive
    """Rows of a step, all processes together."""
    learning_rate: NonNegativeFloat
    """Adam, dense parameters; falls to 0 by a cosine."""
    table_learning_rate: NonNegativeFloat
    """Of ``fused`` embeddings; falls likewise."""
    start: Literal["merged", "initial"]
    """``merged``, or for a control ``initial`` weights."""
    control: Literal["none", "start", "first_source", "shuffled"]
    """Change of the teacher for controls: ``none``, the ``start`` itself, the ``first_source``
    alone, or a router whose shares are ``shuffled`` over the rows."""


@section
class Merge:
    """Merge of several models into one."""

    method: str
    """A registered method, a reference that merges no parameters, or ``auto``."""
    plugins: list[str]
    """Modules with methods of your own: ``package.module`` or ``path/to/file.py``."""
    label: str
    """Name of this setting in tables; unique per file of ``conf/merge``."""
    sources: Annotated[list[Source], Field(min_length=1)]
    """Sources as config deltas, ``[{seed: 1}, {seed: 2}]``, or run folders, ``[a, {path: b}]``."""
    base: Source | None
    """The model that all sources started from, named like a source; null: there is none."""
    deltas: list[str]
    """Deltas of ``base`` (``cki-rec export format=delta``) that are merged in place of sources;
    empty: whole models are."""
    write: Literal["model", "delta"]
    """Of deltas: the ``model`` and its delta, or the ``delta`` alone, which reads and writes
    changed rows only."""
    vocabularies: list[str | None]
    """Folders of encoded data sets (null: searched), one per source, then one of the base if the
    method needs it: models with different vocabularies are joined by token. Empty: vocabularies
    must be equal. Rows can be read if ``data.vocabularies`` joins the same."""
    options: dict[str, Any]
    """Options of the method, by name (``cki-rec merge --list``)."""
    recipes: list[dict[str, Any]]
    """For ``auto``: ways to merge the sources, as changes of this section."""
    align: Align
    repair: Literal["none", "rescale", "least_squares", "select_units", "project"]
    """Repair after merging. ``none``. ``rescale``: match the statistics of hidden units.
    ``least_squares``: fit layers to the mean of the sources' layers, on the merged tables.
    ``select_units``: also select hidden units from all sources. ``project``: also project tables
    from all sources' spaces. Then element-wise modules are copied, together with their tables,
    from the source with the best validation AUC."""
    refine: Literal["none", "mean", "router", "auto"]
    """Fit the merged model to outputs of its sources, without labels. ``none``. ``mean``: their
    mean logit. ``router``: weighted by how often each source has seen the row's ids, and mixed
    with the merged model. ``auto``: the better one on validation rows. The merged model stays as
    it is unless it gains on validation rows."""
    rows: str
    """Rows that a refinement reads: ``training``, ``random`` (ids drawn by row counts), or the
    folder of an encoded data set."""
    margin: NonNegativeFloat
    """Of ``auto``: the best source is returned unless a merge is above its validation AUC by this
    many standard errors of the difference."""
    effort: Literal["closed_form", "refine"]
    """Of ``auto``: ``closed_form``, or ``refine`` the best model too."""
    refinement: Refinement
    recalibrate: bool
    """Scale and shift the merged model's logit, by its parameters, to fit validation rows."""
    sample: Positive
    """Training rows that alignment, repair and methods read, without their labels."""
    scope: Literal["all", "head", "hidden", "output"]
    """Parameters that are merged: ``all``, or of the MLP ``head`` (all of it), its ``hidden``
    layers or its ``output`` layer. Others are the first source's."""
    tables: Literal["same", "evidence", "first"]
    """Rule for tables: ``same`` as the rest, ``evidence`` or ``first`` (source)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None
    """Type of the result; null: that of the first source. Sources of different types are merged
    in float32."""
    memory_gb: PositiveFloat | None
    """Memory of all processes of a machine together; tables are then read from disk, merged and
    written in blocks of rows. null: models are held in memory."""
    module: str | None
    """Of checkpoints of other programs: their network, as ``package.module:function`` or
    ``path/to/file.py:function``. The function or class takes no argument. null: unknown."""
    batches: str | None
    """Likewise a function that returns batches of the network's inputs, with labels or without;
    null: none."""
    data: str | None
    """Instead of ``batches`` a csv or Parquet file: columns are named as the arguments of the
    network, and ``label`` if it has labels."""
    format: Literal["safetensors", "torch", "dcp", "dynamicemb"] | None
    """Of the result of checkpoints of other programs; null: that of the first source.
    ``dynamicemb`` is for tables by raw key."""
    evidence: Literal["auto", "counts", "optimizer", "scores", "none"]
    """Of checkpoints of other programs: the measure of how often each table row was trained."""
    table_names: list[str]
    """Likewise regular expressions of the names of embedding tables; empty: those of lookups in
    the network, or names with ``emb``, ``table`` or ``factor``."""
    max_rows: Positive | None
    """Of tables by raw key: most rows of the result; those of least use leave. null: all."""
    biases: Literal["merge", "first"]
    """Rule for vectors: ``merge``, or ``first`` (source, as released)."""
    ablation: Literal["none", "permuted", "shuffled"]
    """Change of all sources but the first: ``none``, ``permuted`` or ``shuffled``."""
    learn: Learn

    @model_validator(mode="after")
    def _check(self) -> Merge:
        if self.learn.what == "trunk" and self.scope == "all":
            raise ValueError(
                "learn.what=trunk trains the parameters out of scope; set merge.scope to head,"
                " hidden or output"
            )
        return self


@section
class Assess:
    """Comparison of models before a merge."""

    align: Literal["none", "weights", "activations"]
    """``none``, ``weights`` or ``activations`` (hidden units by their activations on rows)."""
    barrier: NonNegative
    """Points on the straight line between sources, both ends included, whose validation AUC is
    measured; 0: none, so that no labels are read."""

    @model_validator(mode="after")
    def _check(self) -> Assess:
        if self.barrier in (1, 2):
            raise ValueError(
                f"barrier={self.barrier}: must be 0 (none) or at least 3 (both ends, the middle)"
            )
        return self
