"""Every option and its type, one class a section; values live in ``conf/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cki_rec.config.data_options import Data
from cki_rec.config.merge_options import Assess, Merge
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
class SequenceOptions:
    """Encoders of histories: SASRec and GRU4Rec."""

    pairs: list[Any]
    """``[[targets, histories], ...]``, as for ``Attention``."""
    length: Positive
    """The latest ids of a history that are read."""
    layers: Positive
    """Self-attention blocks, or layers of the GRU."""
    hidden: Positive
    """Width of feed-forward layers, or of the GRU."""
    heads: Positive
    """SASRec: heads of attention; divides the width of a history."""
    dropout: Fraction
    """Of embeddings, and of the outputs of SASRec's layers."""


@section
class Bottom:
    """The bottom MLP of DLRM, which reads numbers."""

    hidden: list[Positive]
    """Widths before the last layer, which has the embeddings' width."""


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
    """Feed histories: to DIN's attention and to the encoders of SASRec and GRU4Rec; to other
    models as mean-pooled fields."""
    cross: Cross
    attention: Attention
    streams: Streams
    sequence: SequenceOptions | None
    """Of SASRec and GRU4Rec; null: of other networks."""
    bottom: Bottom | None
    """Of DLRM; null: of other networks."""

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
    new_rows: Literal["oov", "mean"]
    """Initial table rows of tokens that the start lacks: its ``oov`` row, or the ``mean`` of its
    rows of tokens."""
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
class Finetune:
    """Short training of a merged model on all data."""

    epochs: NonNegative
    """0: none."""
    learning_rate: NonNegativeFloat
    table_learning_rate: NonNegativeFloat
    objective: Literal["labels", "teacher", "both"]
    """``labels``, the ``teacher`` of ``merge.refine`` (``none``: as ``auto``), or ``both``."""


@section
class Ranking:
    """Ranks of liked items among sampled ones."""

    negatives: Positive
    """Items drawn for each liked row, without repeats, from those that its user did not like."""
    draw: Literal["uniform", "popularity"]
    """``uniform``, or by ``popularity``: the number of training rows that like an item."""
    seed: NonNegative
    """Of the draw."""


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
    ranking: Ranking | None
    """Measure HR@k and NDCG@k of liked items; null: not."""
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
    """Experiment the run is reported under; of ``train``, ``merge`` and ``finetune`` the name of
    the model."""
    suite: Suite
    seed: NonNegative
    """Of everything random but the split."""
    check_only: bool
    """``merge`` reports whether the sources fit together, and does nothing else."""
    run: str | None
    """Model that ``export`` and ``predict`` read: a name, a run directory, a checkpoint folder or
    a run id under ``runtime.out``."""
    input: str | None
    """Raw rows that ``predict`` scores: csv or Parquet."""
    output: str | None
    """Scores that ``predict`` writes: csv or Parquet."""
    format: Literal["pt2", "onnx", "delta"]
    """Format that ``export`` writes: ``pt2`` (torch.export), ``onnx``, or ``delta``: the rows that
    differ from ``merge.base``."""
    int8: bool
    """``export`` stores embeddings as int8, with one scale per row."""
    delete: Literal["none", "leftovers", "all"]
    """``clean`` deletes ``none`` of its list, ``leftovers`` and caches, or ``all``."""
    data: Data
    model: Model
    train: Train
    merge: Merge
    assess: Assess
    finetune: Finetune
    evaluate: Evaluate
    runtime: Runtime
