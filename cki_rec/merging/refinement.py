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

from cki_rec.merging.calling import call, evaluating
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
from cki_rec.merging.teachers import Lookups, Teacher, mean_teacher, routed, routing_table

Stage = Literal["maps", "all"]
STAGES: tuple[Stage, ...] = ("maps", "all")
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
    _check_options(stages, steps, learning_rate, share, start, len(sources.models))
    quality = None if score is None else checked_score(score, sources)
    first, lead = _start(start, sources, quality)
    plan = Plan(teacher, share, route, tuple(stages), steps, learning_rate)
    with evaluating(module):
        fitted = fit(
            *(plan, module, sources, counts_of(counts, sources), batches),
            *(first, lead, quality, progress or (lambda *_: None)),
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


def fit(
    plan: Plan,
    module: nn.Module,
    sources: Sources,
    counts: Sequence[Params],
    batches: Iterable[Any],
    start: Params,
    lead: int | None,
    score: Score | None,
    progress: Callable[[str, int, int], None],
) -> Fitted:
    """Return the model of a plan, in the form of ``sources``; the best by score if there is one.

    Args:
        plan: Teacher and schedule.
        module: The network, in evaluation mode.
        sources: The sources.
        counts: Row counts in the form of the sources.
        batches: Rows without labels.
        start: The first parameters.
        lead: The source that ``start`` is; None: another model.
        score: Quality of parameters.
        progress: See ``refine``.
    """
    targets = Targets(plan, module, sources, counts, start, batches)
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
            batch, target = targets.next()
            with maps.applied() if maps else nullcontext():
                output = call(module, batch, {**sources.copied, **fixed, **fitted})
            loss = (output - target).square().mean()
            if not math.isfinite(value := float(loss.detach())):
                raise MergeError(
                    f"refine: the loss is {value} at step {step}; lower learning_rate"
                )
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            if score is not None and step in checks:
                value = best.scores[f"{stage} {step}"] = score(candidate := current())
                if value > max(v for n, v in best.scores.items() if n != f"{stage} {step}"):
                    best.params = candidate
                below = below + 1 if value < first else 0
                if below == 2:
                    break
        params, done = current(), done + plan.steps
    progress("done", done, done)
    if score is None:
        best.params = params
    elif best.params is start:
        best.warnings.append("refine: no step is above the score of the start, which is returned")
    return best


class Targets:
    """Batches and the teacher's outputs on them, computed once if the batches are a list.

    Args:
        plan: The teacher.
        module: The network.
        sources: The sources.
        counts: Row counts in the form of the sources.
        start: The first parameters.
        batches: Rows without labels.
    """

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        sources: Sources,
        counts: Sequence[Params],
        start: Params,
        batches: Iterable[Any],
    ) -> None:
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise MergeError(
                f"batches is one {type(batches).__name__}; pass a list of batches, [x]"
            )
        self._plan, self._module, self._sources = plan, module, sources
        self._start, self._batches = start, batches
        self._known: dict[int, Tensor] | None = {} if isinstance(batches, list | tuple) else None
        self._lookups, self._counts_KV = None, torch.empty(0)
        if plan.teacher == "router":
            table = _router_table(plan.route, counts, sources)
            self._lookups = Lookups(module, table)
            self._counts_KV = torch.stack([source[table].cpu() for source in counts])
        self._number, self._all = 0, self._endless()

    def next(self) -> tuple[Any, Tensor]:
        """Return the next batch and its target outputs.

        Raises:
            MergeError: There are no more batches, or the teacher gives NaN.
        """
        place, batch = next(self._all)
        self._number += 1
        if self._known is None:
            return batch, self._target(batch)
        if place not in self._known:
            self._known[place] = self._target(batch)
        return batch, self._known[place]

    def _endless(self) -> Iterator[tuple[int, Any]]:
        while True:
            before = self._number
            yield from enumerate(self._batches)
            if self._number == before:
                if not before:
                    raise MergeError("batches is empty; pass at least one batch")
                raise MergeError(
                    f"batches ended after {before} of them; pass a list, a DataLoader, or an"
                    " iterator without an end"
                )

    @torch.no_grad()
    def _target(self, batch: Any) -> Tensor:
        outputs = []
        for k, model in enumerate(self._sources.models):
            with self._lookups.recorded() if self._lookups and k == 0 else nullcontext():
                outputs.append(_output(self._module, batch, {**self._sources.copied, **model}))
        stacked = torch.stack(outputs)
        teacher = self._plan.teacher
        if self._lookups is not None:
            shares = self._lookups.shares(self._counts_KV, len(outputs[0])).to(stacked.device)
            target = routed(stacked, shares)
        elif callable(teacher):
            target = teacher(batch, stacked)
            if not isinstance(target, Tensor) or target.shape != outputs[0].shape:
                shape = tuple(target.shape) if isinstance(target, Tensor) else type(target)
                raise MergeError(
                    f"teacher returned {shape}; the outputs are {tuple(outputs[0].shape)}"
                )
        else:
            target = mean_teacher(batch, stacked)
        if self._plan.share != 1:
            own = _output(self._module, batch, {**self._sources.copied, **self._start})
            target = self._plan.share * target + (1 - self._plan.share) * own
        if not bool(target.isfinite().all()):
            raise MergeError(
                f"refine: the teacher gives NaN or infinite outputs on batch {self._number - 1}"
            )
        return target


def _output(module: nn.Module, batch: Any, params: Params) -> Tensor:
    output = call(module, batch, params)
    if not isinstance(output, Tensor) or not output.ndim or not output.is_floating_point():
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MergeError(
            f"refine: the module returns {kind}; it must return one floating tensor, a row per row"
            " of the batch"
        )
    return output


def _router_table(route: str | None, counts: Sequence[Params], sources: Sources) -> str:
    if not counts:
        raise MergeError(
            "teacher='router' needs row counts of every source (counts); without them use"
            " teacher='mean'"
        )
    table = sources.tied.get(route, route) if route else routing_table(counts)
    if table is None:
        raise MergeError(
            "teacher='router': all sources have seen the same ids equally often; use"
            " teacher='mean', or name a table (route)"
        )
    if table not in counts[0]:
        known = ", ".join(counts[0])
        raise MergeError(f"route={route}: no counts of this table; counts are of {known}")
    return table


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
    stages: Sequence[Stage],
    steps: int,
    learning_rate: float,
    share: float,
    start: Model | int | None,
    num_models: int,
) -> None:
    if isinstance(stages, str) or not stages or any(stage not in STAGES for stage in stages):
        raise MergeError(f"stages={stages!r}: pass ('all',), ('maps',) or ('maps', 'all')")
    if steps < 1 or not learning_rate > 0 or not 0 < share <= 1:
        raise MergeError(
            f"steps={steps}, learning_rate={learning_rate}, share={share}: must be positive, and"
            " share at most 1"
        )
    if isinstance(start, int) and not 0 <= start < num_models:
        raise MergeError(f"start={start}: there are sources 0 to {num_models - 1}")
    if "maps" in stages and (stages[0] != "maps" or not (start is None or isinstance(start, int))):
        raise MergeError(
            "stages: maps comes first and begins as a source; pass start as its number"
        )
    if share != 1 and isinstance(start, int | None):
        raise MergeError(
            f"share={share}: the rest of the teacher is the output of start; pass a merged model"
        )
