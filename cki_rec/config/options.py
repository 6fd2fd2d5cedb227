"""Every option and its type, one class a section; values live in ``conf/``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cki_rec.config.data_options import Data


@dataclass(slots=True, kw_only=True)
class Cross:
    """Cross network of DCN and DCNv2."""

    layers: int
    structure: str
    """DCNv2: ``parallel`` to the MLP, or ``stacked`` below it."""
    rank: int | None
    """DCNv2: rank of the low-rank mixture's matrices; null: one full matrix a layer."""
    experts: int
    """DCNv2: matrices in the mixture, where ``rank`` is given."""


@dataclass(slots=True, kw_only=True)
class Attention:
    """Local activation unit of DIN."""

    pairs: list[Any]
    """``[[targets, histories], ...]``, each a field or a list of fields of equal count, which are
    concatenated; empty: every history with the categorical field of its table."""
    length: int
    """The latest ids of a history that are attended to."""
    hidden: list[int]
    activation: str
    """``dice``, ``prelu``, ``relu``, ``sigmoid`` or ``tanh``."""
    dropout: float
    softmax: bool
    """Weights of a row's history sum to one."""


@dataclass(slots=True, kw_only=True)
class Streams:
    """The second of FinalMLP's two streams, and what joins them."""

    hidden: list[int]
    dropout: float
    batch_norm: bool
    heads: int
    """Of the bilinear fusion; divides the last width of both streams."""
    selection: bool
    """Feature gates before the streams, each from a context of its own."""
    gate_hidden: list[int]
    contexts: list[list[str]]
    """Fields that each stream's gate depends on; an empty list: a learned vector."""


@dataclass(slots=True, kw_only=True)
class Model:
    """One network."""

    name: str
    """A row of ``cki_rec.models.MODELS``."""
    embedding_dim: int
    hidden: list[int]
    activation: str
    """Of the MLP: ``relu``, ``dice``, ``prelu``, ``sigmoid`` or ``tanh``."""
    batch_norm: bool
    """Between a hidden layer and its activation."""
    dropout: float
    init_std: float
    """Standard deviation of initial embeddings."""
    matrix_std: float | None
    """Standard deviation of initial matrices, those of one output apart, beside biases uniform
    within 1 / sqrt(inputs); null: Xavier uniform and zero biases."""
    histories: bool
    """Feed histories: to DIN's attention, to other models as mean-pooled fields."""
    cross: Cross
    attention: Attention
    streams: Streams


@dataclass(slots=True, kw_only=True)
class Monitor:
    """Weights of validation metrics; their sum decides which epoch is best."""

    auc: float
    log_loss: float
    gauc: float


@dataclass(slots=True, kw_only=True)
class Train:
    """Optimization of one model."""

    start: dict[str, Any] | None
    """The training that this one goes on from, as config deltas of it, ``{data.part: 0}`` (its own
    start is null unless they name one: chains nest), or a checkpoint, ``{path: a}``; null: initial
    weights."""
    epochs: int
    batch_size: int
    """Rows of a step, all processes together."""
    embeddings: str
    """``fused`` (looked-up rows alone are trained, in the backward pass) or ``dense`` (Adam on
    whole tables, a copy per process)."""
    learning_rate: float
    """Adam."""
    table_learning_rate: float
    """Of ``fused`` embeddings."""
    table_optimizer: str
    """Of ``fused`` embeddings: ``rowwise_adagrad`` (one accumulator a row) or ``adagrad``."""
    table_l2: float
    """L2 as a term of the loss: on looked-up embeddings (``fused``, times their squared norm per
    row) or on whole tables (``dense``, times half their squared norm)."""
    monitor: Monitor
    min_gain: float
    """An epoch is better if the monitored sum rises by more than this."""
    plateau_factor: float
    """Learning rates times this after an epoch that is not better."""
    min_learning_rate: float
    """Learning rates fall no lower."""
    patience: int
    """Stop after this many epochs in a row that are not better."""
    gradient_clip: float | None
    """Largest norm of the gradient of all parameters that Adam trains; null: any."""
    precision: str
    """``fp32`` or ``bf16`` (autocast of the dense network)."""
    compile: bool
    """torch.compile of the dense network."""
    ema: float | None
    """Decay of an exponential moving average of all weights, which is evaluated and kept; null:
    none."""


@dataclass(slots=True, kw_only=True)
class Align:
    """How sources are brought into a shared basis before they are merged."""

    by: str
    """``none``, ``weights`` or ``activations`` (hidden units by their activations on rows)."""
    starts: int
    """Starts of the search; the best end is taken."""


@dataclass(slots=True, kw_only=True)
class Learn:
    """Training inside a merge."""

    what: str
    """``none``, ``gates`` (of the method, all else frozen) or ``trunk`` (gates, and the parameters
    out of ``merge.scope``)."""
    epochs: int
    learning_rate: float
    """Learning rate of Adam."""


@dataclass(slots=True, kw_only=True)
class Merge:
    """How several models become one."""

    method: str
    """A registered method, a reference that merges no parameters, or ``auto``."""
    label: str
    """Name of this setting in tables; unique per file of ``conf/merge``."""
    sources: list[dict[str, Any]]
    """Sources as config deltas, ``[{seed: 1}, {seed: 2}]``, or checkpoints, ``[{path: a}]``."""
    base: dict[str, Any] | None
    """The model that all sources started from, named like a source; null: there is none."""
    vocabularies: list[Any]
    """Folders of encoded data sets (null: searched), one per source, then one of the base if the
    method needs it: models with different vocabularies are joined by token. Empty: vocabularies
    must be equal. Rows can be read if ``data.vocabularies`` joins the same."""
    options: dict[str, Any]
    """Options of the method, by name (``cki-rec merge --list``)."""
    recipes: list[dict[str, Any]]
    """For ``auto``: ways to merge the sources, as changes of this section."""
    align: Align
    repair: str
    """After merging: ``none``; ``rescale`` (statistics of hidden units); ``least_squares`` (layers
    fitted to the mean of the sources' layers, on the merged tables); ``select_units`` (also hidden
    units selected from all sources); ``project`` (also tables projected from all sources' spaces;
    element-wise modules are copied, together with their tables, from the source with the best
    validation AUC)."""
    recalibrate: bool
    """Scale and shift the merged model's logit, by its parameters, to fit validation rows."""
    sample: int
    """Training rows that alignment, repair and methods read, without their labels."""
    scope: str
    """Parameters that are merged: ``all``, or of the MLP ``head`` (all of it), its ``hidden``
    layers or its ``output`` layer. Others are the first source's."""
    tables: str
    """Rule for tables: ``same`` as the rest, ``evidence`` or ``first`` (source)."""
    biases: str
    """Rule for vectors: ``merge``, or ``first`` (source, as released)."""
    ablation: str
    """Change of all sources but the first: ``none``, ``permuted`` or ``shuffled``."""
    learn: Learn


@dataclass(slots=True, kw_only=True)
class Finetune:
    """Short training of an integrated model on all data."""

    epochs: int
    """0: none."""
    learning_rate: float
    table_learning_rate: float


@dataclass(slots=True, kw_only=True)
class Evaluate:
    """Metrics and intervals."""

    bootstrap: int
    """Resamples."""
    resample: str
    """Unit of resampling: ``user`` (rows of a user depend on each other) or ``row``."""
    confidence: float
    seed: int
    disjoint_files: bool
    """You say that raw files which only the models were trained on hold no test row: nothing
    checks it. Needed where there are such files."""


@dataclass(slots=True, kw_only=True)
class Runtime:
    """Where and on what things run; never part of a run's identity."""

    out: str
    """Folder of run directories."""
    reports: str
    """Folder of reports, one folder per name."""
    encoded: str
    """Folder of encoded data sets."""
    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    threads: int
    """CPU threads per process; 0: all cores, shared by the processes of this machine."""
    sharding: str
    """Of fused tables over processes: ``table_wise``, ``row_wise``, ``column_wise`` or ``planner``
    (torchrec chooses)."""
    resume: str
    """``auto`` (an unfinished training goes on from its last checkpoint) or ``never``."""
    checkpoint_steps: int
    """Steps between checkpoints of an unfinished training; 0: none."""
    checkpoint_minutes: float
    """Minutes between them; 0: none."""
    keep: int
    """The latest checkpoints kept of an unfinished training."""
    log_steps: int
    """Steps between lines of steps.jsonl and TensorBoard; 0: one an epoch."""
    tensorboard: bool
    """Write TensorBoard events beside steps.jsonl."""
    chunk_mb: int
    """Raw text that is encoded at a time, in MiB; no result depends on it."""
    force: bool
    """Run again what is already recorded."""


@dataclass(slots=True, kw_only=True)
class Suite:
    """What the parents differ in."""

    name: str
    sources: list[dict[str, Any]]
    """The parents that every method of the suite is compared with, as config deltas."""
    base: dict[str, Any] | None
    """The model that all of them come from, as a config delta; null: there is none."""


@dataclass(slots=True, kw_only=True)
class Config:
    """Everything."""

    name: str
    """Experiment the run is reported under."""
    suite: Suite
    seed: int
    """Of everything random but the split."""
    check_only: bool
    """``merge`` reports whether the sources fit together, and does nothing else."""
    select: str | None
    """The one measurement that ``bench`` makes; null: all."""
    run: str | None
    """What ``export`` reads: a run directory, a checkpoint folder or a run id under
    ``runtime.out``."""
    format: str
    """What ``export`` writes: ``pt2`` (torch.export) or ``onnx``."""
    data: Data
    model: Model
    train: Train
    merge: Merge
    finetune: Finetune
    evaluate: Evaluate
    runtime: Runtime
