"""Every option and its type, one class a section; values live in ``conf/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cki_rec.config.data_options import Data
from cki_rec.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Source,
    section,
)
from cki_rec.config.texts import Name


@section
class Cross:
    """Cross network of DCN and DCNv2."""

    layers: Positive
    structure: Literal["parallel", "stacked"]
    """DCNv2: ``parallel`` to the MLP, or ``stacked`` below it."""
    rank: Positive | None
    """DCNv2: rank of the low-rank mixture's matrices; null: one full matrix a layer."""
    experts: Positive
    """DCNv2: matrices in the mixture, if ``rank`` is set."""


@section
class Attention:
    """Local activation unit of DIN."""

    pairs: list[Any]
    """``[[targets, histories], ...]``, each a field or a list of fields of equal count, which are
    concatenated; empty: every history with the categorical field of its table."""
    length: Positive
    """The latest ids of a history that are attended to."""
    hidden: list[Positive]
    activation: Literal["relu", "dice", "prelu", "sigmoid", "tanh"]
    """``dice``, ``prelu``, ``relu``, ``sigmoid`` or ``tanh``."""
    dropout: Fraction
    softmax: bool
    """Weights of a row's history sum to one."""


@section
class Streams:
    """The second of FinalMLP's two streams, and the fusion of both."""

    hidden: list[Positive]
    dropout: Fraction
    batch_norm: bool
    heads: Positive
    """Of the bilinear fusion; divides the last width of both streams."""
    selection: bool
    """Feature gates before the streams, each from a context of its own."""
    gate_hidden: list[Positive]
    contexts: list[list[str]]
    """Fields that each stream's gate depends on; an empty list: a learned vector."""


@section
class Model:
    """One network."""

    name: str
    """A row of ``cki_rec.models.MODELS``; with ``module``, the name of its class."""
    module: str | None
    """A network of your own: ``package.module:Class`` or ``path/to/file.py:Class``; null: the row
    ``name``."""
    embedding_dim: Positive
    hidden: list[Positive]
    activation: Literal["relu", "dice", "prelu", "sigmoid", "tanh"]
    """Of the MLP: ``relu``, ``dice``, ``prelu``, ``sigmoid`` or ``tanh``."""
    batch_norm: bool
    """Between a hidden layer and its activation."""
    dropout: Fraction
    init_std: NonNegativeFloat
    """Standard deviation of initial embeddings."""
    matrix_std: PositiveFloat | None
    """Standard deviation of initial matrices, those of one output apart, beside biases uniform
    within 1 / sqrt(inputs); null: Xavier uniform and zero biases."""
    histories: bool
    """Feed histories: to DIN's attention, to other models as mean-pooled fields."""
    cross: Cross
    attention: Attention
    streams: Streams

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.module is not None:
            self.name = self.module.rpartition(":")[2]
        return self


@section
class Monitor:
    """Weights of validation metrics; their sum decides which epoch is best."""

    auc: float
    log_loss: float
    gauc: float

    @model_validator(mode="after")
    def _check(self) -> Monitor:
        if not any((self.auc, self.log_loss, self.gauc)):
            raise ValueError("auc, log_loss and gauc: one must not be 0")
        return self


@section
class Train:
    """Optimization of one model."""

    start: Source | None
    """The training that this one continues, as config deltas ``{data.part: 0}`` or as a checkpoint
    ``{path: a}``; null: initial weights. The start of that training is null unless the deltas set
    it."""
    epochs: NonNegative
    batch_size: Positive
    """Rows of a step, all processes together."""
    embeddings: Literal["fused", "dense"]
    """``fused`` (looked-up rows alone are trained, in the backward pass) or ``dense`` (Adam on
    whole tables, a copy per process)."""
    learning_rate: NonNegativeFloat
    """Adam."""
    table_learning_rate: NonNegativeFloat
    """Of ``fused`` embeddings."""
    table_optimizer: Literal["rowwise_adagrad", "adagrad"]
    """Of ``fused`` embeddings: ``rowwise_adagrad`` (one accumulator a row) or ``adagrad``."""
    table_l2: NonNegativeFloat
    """L2 as a term of the loss: on looked-up embeddings (``fused``, times their squared norm per
    row) or on whole tables (``dense``, times half their squared norm)."""
    monitor: Monitor
    min_gain: NonNegativeFloat
    """An epoch is better if the monitored sum rises by more than this."""
    plateau_factor: NonNegativeFloat
    """Learning rates times this after an epoch that is not better."""
    min_learning_rate: NonNegativeFloat
    """Learning rates fall no lower."""
    patience: Positive
    """Stop after this many epochs in a row that are not better."""
    gradient_clip: PositiveFloat | None
    """Largest norm of the gradient of all parameters that Adam trains; null: any."""
    precision: Literal["fp32", "bf16"]
    """``fp32`` or ``bf16`` (autocast of the dense network)."""
    compile: bool
    """torch.compile of the dense network."""
    ema: Fraction | None
    """Decay of an exponential moving average of all weights, which is evaluated and saved; null:
    none."""


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
    """Sources as config deltas, ``[{seed: 1}, {seed: 2}]``, or paths, ``[a, {path: b}]``."""
    base: Source | None
    """The model that all sources started from, named like a source; null: there is none."""
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
    """Network of other programs' models: ``package.module:function``, ``file.py:function``."""
    batches: str | None
    """Of them: a function that returns batches of inputs, or (inputs, labels)."""
    data: str | None
    """Of them: a csv or Parquet file; columns are arguments of the network, and ``label``."""
    format: Literal["safetensors", "torch", "dcp"] | None  # of their result
    evidence: Literal["auto", "counts", "optimizer", "scores", "none"]  # of trained rows
    table_names: list[str]
    """Of them: regular expressions of names of tables; empty: lookups of the network, or names."""
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


@section
class Finetune:
    """Short training of a merged model on all data."""

    epochs: NonNegative
    """0: none."""
    learning_rate: NonNegativeFloat
    table_learning_rate: NonNegativeFloat
    objective: Literal["labels", "teacher", "both"]
    """``labels``, the ``teacher`` of ``merge.refine`` (``none``: as ``auto``), or ``both``."""


@section
class Evaluate:
    """Metrics and intervals."""

    plugins: list[str]
    """Modules with metrics of your own: ``package.module`` or ``path/to/file.py``."""
    bootstrap: Annotated[int, Field(ge=100)]
    """Resamples."""
    resample: Literal["user", "row"]
    """Unit of resampling: ``user`` (rows of a user depend on each other) or ``row``."""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: NonNegative
    disjoint_files: bool
    """Assert that raw files of the models that are not in this data set hold no test row. It is
    required if there are such files; cki_rec cannot verify it."""


@section
class Runtime:
    """Folders, devices and logging; never part of a run's identity."""

    out: str
    """Folder of run directories."""
    reports: str
    """Folder of reports, one folder per name."""
    encoded: str
    """Folder of encoded data sets."""
    device: Literal["auto", "cpu", "cuda"]
    """``auto``, ``cpu`` or ``cuda``."""
    threads: NonNegative
    """CPU threads per process; 0: all cores, shared by the processes of this machine."""
    sharding: Literal["table_wise", "row_wise", "column_wise", "planner"]
    """Of fused tables over processes: ``table_wise``, ``row_wise``, ``column_wise`` or ``planner``
    (torchrec chooses)."""
    kernels: Literal["torch", "fbgemm"]
    """Of lookups in fused tables on CPU: ``torch`` or ``fbgemm``. CUDA always has FBGEMM's."""
    resume: Literal["auto", "never"]
    """``auto`` (an unfinished training goes on from its last checkpoint) or ``never``."""
    checkpoint_steps: NonNegative
    """Steps between checkpoints of an unfinished training; 0: none."""
    checkpoint_minutes: NonNegativeFloat
    """Minutes between them; 0: none."""
    keep: Positive
    """The latest checkpoints kept of an unfinished training."""
    log_steps: NonNegative
    """Steps between lines of steps.jsonl and TensorBoard; 0: one an epoch."""
    tensorboard: bool
    """Write TensorBoard events beside steps.jsonl."""
    chunk_mb: Positive
    """Raw text that is encoded at a time, in MiB; no result depends on it."""
    workers: Positive
    """Processes that encode; 1: this process, whose threads use all cores. No result depends on
    it."""
    engine: Literal["processes", "ray"]
    """Where they run: ``processes`` (of this machine) or ``ray`` (tasks of a cluster)."""
    force: bool
    """Repeat a run that is already recorded."""


@section
class Suite:
    """The sources that methods are compared with, and the model that they start from."""

    name: str
    sources: list[Source]
    """The sources that every method of the suite is compared with, as config deltas."""
    base: Source | None
    """The model that all of them come from, as a config delta; null: there is none."""


@section
class Config:
    """The whole configuration."""

    name: Name
    """Experiment the run is reported under."""
    suite: Suite
    seed: NonNegative
    """Of everything random but the split."""
    check_only: bool
    """``merge`` reports whether the sources fit together, and does nothing else."""
    run: str | None
    """Model that ``export`` reads: a run directory, a checkpoint folder or a run id under
    ``runtime.out``."""
    format: Literal["pt2", "onnx"]
    """Format that ``export`` writes: ``pt2`` (torch.export) or ``onnx``."""
    data: Data
    model: Model
    train: Train
    merge: Merge
    assess: Assess
    finetune: Finetune
    evaluate: Evaluate
    runtime: Runtime
