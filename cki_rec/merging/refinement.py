"""Fit a merged model to a teacher made of its sources, without labels.

No label is read. But sources may have memorized labels of their training rows, and their outputs
on these rows show it. Random rows, and rows that no source has seen, are free of that.

Shape legend: K sources, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from cki_rec.merging.calling import evaluating
from cki_rec.merging.inputs import (
    Sources,
    base_of,
    check_module,
    checked_score,
    counts_of,
    network_of,
    sources_of,
)
from cki_rec.merging.params import MergeError, Params, check_finite
from cki_rec.merging.registry import Score
from cki_rec.merging.result import MergeResult
from cki_rec.merging.states import Model
from cki_rec.merging.table_maps import TableMaps
from cki_rec.merging.targets import Targets, output_of
from cki_rec.merging.teachers import Teacher

Stage = Literal["maps", "all"]
SCHEDULES = (("all",), ("maps",), ("maps", "all"))
SHARE = 0.75
"""Share of the sources in a routed teacher of ``merge``; the rest is the merged model."""
CHECKS = 4
"""Scores per stage: after each quarter of its steps."""


def refine(
    models: Sequence[Model],
    *,
    module: nn.Module,
    batches: Iterable[Any],
    start: Model | int | None = None,
    teacher: Literal["mean", "router"] | Teacher = "mean",
    share: float = 1.0,
    counts: Sequence[Mapping[str, Any]] = (),
    route: str | None = None,
    stages: Sequence[Stage] = ("all",),
    steps: int = 1000,
    learning_rate: float = 2e-3,
    score: Score | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeResult:
    """Fit the PARAMETERS of one model to outputs of its sources, without labels.

    The loss is the mean squared difference to the teacher's outputs, the optimizer is Adam with a
    cosine schedule. Dropout is off, and statistics of batch norms stay.

    Args:
        models: The sources, as for ``merge``.
        module: Their network. It returns one tensor, a row per row of the batch.
        batches: Rows without labels, as for ``merge``; read again from the start when they end.
        start: The first parameters: a merged model, or the number of a source. None: the source
            with the best ``score``, or the first.
        teacher: ``mean`` output of the sources; ``router``: the mean weighted by how often each
            source has seen the ids of the row; or a function (batch, outputs ``(K, B, ...)``) ->
            ``(B, ...)``.
        share: Share of the sources in the teacher. The rest is the output of ``start``.
        counts: Per source and table ``(V,)``, the training rows that looked each row up.
        route: The table whose ids route. None: that whose counts differ most between sources.
        stages: ``maps`` fits one linear map per table from the rows of all sources, and all other
            parameters; it begins as a source. ``all`` fits all parameters.
        steps: Steps of each stage.
        learning_rate: First learning rate.
        score: Quality of a state dict on validation rows. It is measured four times per stage, and
            the best model is returned, ``start`` included. Two values in a row below that of
            ``start`` end a stage.
        dtype: Floating type of the result; None: that of the first source.
        progress: Called with the name of a stage, the number of steps done, and that of all.

    Returns:
        The new model. ``scores`` has a value per check. A warning is given if ``start`` was
        returned.

    Raises:
        MergeError: Inputs that do not fit, no batches, or a teacher with NaN.

    References:
        FedDF (Lin et al., NeurIPS 2020): the mean of the sources is the start, and that of their
        outputs the teacher. Ensembled CTR Prediction via Knowledge Distillation (Zhu et al., CIKM
        2020).

    Differs:
        Teachers are routed by the counts of a row's ids, the start is merged by evidence and
        alignment, and tables can be fitted by linear maps.
    """
    module = network_of(module)
    sources = sources_of(models, dtype, module)
    check_module(module, sources)
    check_finite(sources.models)
    _check_options(teacher, route, stages, steps, learning_rate)
    _check_start(start, share, stages, len(sources.models))
    quality = None if score is None else checked_score(score, sources)
    first, lead = _start(start, sources, quality)
    plan = Plan(teacher, share, route, tuple(stages), steps, learning_rate)
    with evaluating(module):
        targets = Targets(
            *(plan.teacher, plan.share, plan.route, module, sources),
            *(counts_of(counts, sources), first, batches),
        )
        fitted = fit(
            *(plan, module, sources, targets, first, lead, quality),
            progress or (lambda *_: None),
        )
    return MergeResult(
        sources.restored(fitted.params),
        None,
        recipe=str(plan),
        scores=fitted.scores,
        warnings=fitted.warnings,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """The way to refine a model; see ``refine``."""

    teacher: Literal["mean", "router"] | Teacher = "mean"
    share: float = 1.0
    route: str | None = None
    stages: tuple[Stage, ...] = ("all",)
    steps: int = 1000
    learning_rate: float = 2e-3

    def __str__(self) -> str:
        name = self.teacher if isinstance(self.teacher, str) else "own teacher"
        facts = [f"refine={name}"]
        if self.share != 1:
            facts.append(f"share={self.share:g}")
        if self.stages != ("all",):
            facts.append(f"stages={'+'.join(self.stages)}")
        return ", ".join([*facts, f"steps={self.steps}"])


@dataclass(slots=True)
class Fitted:
    """The best model of a refinement."""

    params: Params
    scores: dict[str, float] = field(default_factory=dict)
    """Per check its score, the start included; empty without a score."""
    warnings: list[str] = field(default_factory=list)


@torch.inference_mode(False)  # gradients are on, whatever the mode of the caller
def fit(
    plan: Plan,
    module: nn.Module,
    sources: Sources,
    targets: Iterator[tuple[Any, Tensor]],
    start: Params,
    lead: int | None,
    score: Score | None,
    progress: Callable[[str, int, int], None],
) -> Fitted:
    """Return the model of a plan, in the form of ``sources``; the best by score if there is one.

    Args:
        plan: The schedule.
        module: The network, in evaluation mode.
        sources: The sources.
        targets: Batches without labels, and the teacher's outputs on them; without an end.
        start: The first parameters.
        lead: The source that ``start`` is; None: another model.
        score: Quality of parameters.
        progress: See ``refine``.
    """
    best = Fitted(start)
    first = -math.inf
    if score is not None:
        first = best.scores["start"] = score(start)
    trainable = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    params, done = start, 0
    for stage in plan.stages:
        maps = None
        if stage == "maps":
            assert lead is not None
            maps = TableMaps(module, sources.models, lead, sources.tied.values())
        mapped = maps.maps if maps else {}
        fixed = {n: t for n, t in params.items() if n not in trainable or n in mapped}
        fitted = {n: t.clone().requires_grad_() for n, t in params.items() if n not in fixed}
        if maps is not None:
            maps.maps = {n: t.clone().requires_grad_() for n, t in maps.maps.items()}

        def current(
            fixed: Params = fixed, fitted: Params = fitted, maps: TableMaps | None = maps
        ) -> Params:
            tables = maps.tables() if maps else {}
            now = {**fixed, **{n: t.detach().clone() for n, t in fitted.items()}, **tables}
            return {name: now[name] for name in start}

        leaves = [*fitted.values(), *(maps.maps.values() if maps else ())]
        adam = torch.optim.Adam(leaves, lr=plan.learning_rate)
        schedule, below = CosineAnnealingLR(adam, plan.steps), 0
        checks = {-(-plan.steps * part // CHECKS) for part in range(1, CHECKS + 1)}
        for step in range(1, plan.steps + 1):
            progress(stage, done + step - 1, plan.steps * len(plan.stages))
            batch, target = next(targets)
            with maps.applied() if maps else nullcontext():
                output = output_of(module, batch, {**sources.copied, **fixed, **fitted})
            loss = (output - target).square().mean()
            if not loss.requires_grad:
                raise MergeError(
                    "refine: the outputs have no gradient; run no part of the module within"
                    " torch.no_grad, and detach nothing"
                )
            if not math.isfinite(value := float(loss.detach())):
                raise MergeError(
                    f"refine: the loss is {value} at step {step}; lower learning_rate"
                )
            adam.zero_grad()
            loss.backward()
            for leaf in leaves:
                if leaf.grad is not None and leaf.grad.is_sparse:  # of nn.Embedding(sparse=True)
                    leaf.grad = leaf.grad.to_dense()
            adam.step()
            schedule.step()
            if score is not None and step in checks:
                value = best.scores[f"{stage} {step}"] = score(candidate := current())
                if value > max(v for n, v in best.scores.items() if n != f"{stage} {step}"):
                    best.params = candidate
                below = below + 1 if value < first else 0
                if below == 2:
                    break
        params = best.params if below == 2 else current()
        done += plan.steps
    progress("done", done, done)
    if score is None:
        best.params = params
    elif best.params is start:
        best.warnings.append("refine: no step is above the score of the start, which is returned")
    return best


def _start(
    start: Model | int | None, sources: Sources, score: Score | None
) -> tuple[Params, int | None]:
    """Return the first parameters, and the number of the source that they are."""
    if start is None:
        scores = [score(model) for model in sources.models] if score else [0.0]
        start = scores.index(max(scores))
    if isinstance(start, int):
        return sources.models[start], start
    first = base_of(start, sources, "start")
    check_finite([first], "start")
    return first, None


def _check_options(
    teacher: str | Teacher,
    route: str | None,
    stages: Sequence[Stage],
    steps: int,
    learning_rate: float,
) -> None:
    if teacher not in ("mean", "router") and not callable(teacher):
        raise MergeError(f"teacher={teacher!r}: pass 'mean', 'router' or a function")
    if route is not None and teacher != "router":
        raise MergeError(f"route={route} requires teacher='router'; leave it out")
    if isinstance(stages, str) or tuple(stages) not in SCHEDULES:
        raise MergeError(f"stages={stages!r}: pass ('all',), ('maps',) or ('maps', 'all')")
    if not isinstance(steps, int) or steps < 1 or not learning_rate > 0:
        raise MergeError(
            f"steps={steps}, learning_rate={learning_rate}: pass a positive whole number and a"
            " positive number"
        )


def _check_start(
    start: Model | int | None, share: float, stages: Sequence[Stage], num_models: int
) -> None:
    if not 0 < share <= 1:
        raise MergeError(f"share={share}: must be above 0, and at most 1")
    is_source = isinstance(start, int | None)
    if isinstance(start, int) and not 0 <= start < num_models:
        raise MergeError(f"start={start}: there are sources 0 to {num_models - 1}")
    if "maps" in stages and not is_source:
        raise MergeError("stages: maps begins as a source; pass start as its number")
    if share != 1 and is_source:
        raise MergeError(
            f"share={share}: the rest of the teacher is the output of start; pass a merged model"
        )
