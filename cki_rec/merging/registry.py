"""The registry of merge methods: the only place where methods are looked up by name.

A method is a function of several models. It returns mixing weights, which ``mixing.mix`` applies,
or the parameters of the new model. Its parameters without a default are inputs (fields of
``MergeInputs``), those with a default are its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from torch import Tensor

from cki_rec.merging.options import check_arguments
from cki_rec.merging.params import MergeError, MixingWeights, Params
from cki_rec.merging.rows import Rows
from cki_rec.merging.symmetry import Symmetry

Score = Callable[[Params], float]
"""Quality of a model on validation rows, larger is better: in the pipelines the AUC."""
Needs = Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]]
Function = TypeVar("Function", bound=Callable[..., Params])


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The inputs of methods, besides the models. A field that no method needs may be empty."""

    seed: int = 0
    """Seed of random draws."""
    counts: Sequence[Params] = ()
    """Per source, under the name of each table: ``(V,)`` training rows that looked a row up."""
    fisher: Sequence[Params] = ()
    """Per source and parameter: the diagonal of the Fisher information, in its shape."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Per weight of a Linear: ``(K, I, K, I)`` float64, the mean over rows of the products of its
    inputs in every two sources; I = inputs + 1, the last input being the constant 1."""
    symmetries: Sequence[Symmetry] = ()
    """Symmetries of the sources' network, always present."""
    base: Params | None = None
    """The model that all sources started from."""
    score: Score | None = None
    """Validation AUC of a model."""
    gates: Mapping[str, Tensor | None] | None = None
    """Learned parameters of the method; None: those that it starts from."""
    statistics: Mapping[str, Tensor] | None = None
    """Facts about whole parameters (``Method.statistics``); None: computed from the models."""
    first_rows: Mapping[str, int] = field(default_factory=dict)
    """Number of the first row of parameters of which the models hold some rows."""


COMPUTED = ("statistics", "first_rows")
"""Inputs that every merge provides; a parameter of a method may have a default for them."""


RESERVED = frozenset(
    {
        *("models", "method", "base", "counts", "symmetries", "module", "batches", "align"),
        *("repair", "refine", "effort", "starts", "score", "dtype", "seed", "progress", "extras"),
    }
)
"""Arguments of ``api.merge``, which no option of a method may be named like."""


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A merge method as users see it."""

    name: str
    summary: str
    needs: tuple[str, ...]
    """Inputs that must be present, with the default options: arguments of ``merge``, ``fisher`` of
    ``Extras``, or ``moments``, made from ``module`` and ``batches``."""
    options: Mapping[str, Any]
    """Option -> default value. None: chosen by ``score``, or published if there is no score."""
    reference: str

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        needs = f"needs {', '.join(self.needs)}; " if self.needs else ""
        return f"{self.name}({options}): {self.summary}; {needs}{self.reference}"


MISSING = {
    "base": "the model that all sources started from (base)",
    "counts": "row counts of every source (counts)",
    "fisher": "the Fisher information of every source (extras, fisher)",
    "moments": "second moments of activations (module and batches)",
    "score": "a score of models on validation rows (score)",
}
"""Input -> its name in messages."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to make one model out of several."""

    name: str
    function: Callable[..., Params]
    summary: str
    """First line of the function's docstring."""
    reference: str
    cost: str
    inputs: tuple[str, ...]
    """Fields of ``MergeInputs`` that the function takes."""
    options: Mapping[str, Any]
    """Option -> default value. None: chosen on validation rows."""
    returns_weights: bool
    """The function returns mixing weights, not parameters."""
    always_needs: Needs
    row_wise: bool
    """A row of a merged table depends on that row of its sources and on ``statistics`` alone. So
    tables can be merged a few rows at a time, or by several processes."""
    reads_values: bool
    """The mixing weights depend on the values of parameters, not on their shapes alone."""
    averages_dense: bool
    """Parameters that are not tables become the plain mean of all sources, which ``repair``
    restores the function of."""
    is_ordered: bool
    """The result depends on the order of the sources."""
    max_models: int | None
    full_weights: bool
    """Mixing weights have an entry per entry of a parameter: they take memory."""
    initial_gates: Callable[..., Tensor | None] | None
    """``initial_gates(name, shape, seed, **options)``: the learnable parameter of one tensor."""
    learnable: Callable[[Mapping[str, Any]], bool] | None
    """Whether gates can be learned with these options."""
    while_learning: Mapping[str, Any]
    """Options that hold while gates are learned: those through which gradients pass."""
    statistics: Callable[..., Tensor | None] | None
    """``statistics(rows, **options)``: facts about one whole parameter that the function reads, by
    ``Rows.reduce``; None: it reads none of this parameter."""
    without_score: Mapping[str, Any]
    """Published values of options that a score would choose, for merges without a score."""

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options for a merge without a score: published values in place of None."""
        chosen = {name for name, value in {**self.options, **options}.items() if value is None}
        return {**options, **{n: v for n, v in self.without_score.items() if n in chosen}}

    def needs(self, options: Mapping[str, Any]) -> frozenset[str]:
        """Return the inputs that must be present with these options.

        A score is among them if an option is None.
        """
        values = {**self.options, **options}
        needs = self.always_needs(values) if callable(self.always_needs) else self.always_needs
        return frozenset(needs) | ({"score"} if None in values.values() else set())

    def info(self) -> MethodInfo:
        """Return the facts that users choose a method by."""
        needs = tuple(sorted(self.needs(self.without_score)))
        options = MappingProxyType(dict(self.options))
        return MethodInfo(self.name, self.summary, needs, options, self.reference)

    def can_learn(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method has gates that can be learned with these options."""
        return self.learnable is not None and self.learnable({**self.options, **options})

    def check(self, options: Mapping[str, Any], num_models: int | None = None) -> None:
        """Check options and the number of models.

        Raises:
            MergeError: An unknown option, a value of the wrong type, or too many models.
        """
        check_arguments(self.name, self.function, self.options, options, RESERVED)
        if self.max_models is not None and num_models is not None and num_models > self.max_models:
            raise MergeError(f"{self.name} takes {self.max_models} models, not {num_models}")

    def check_inputs(
        self, inputs: MergeInputs, options: Mapping[str, Any], num_models: int
    ) -> None:
        """Check that all inputs are there; one model needs a base alone.

        Raises:
            MergeError: An input is missing.
        """
        for name in self.needs(options):
            is_needed = name in self.inputs and (num_models > 1 or name == "base")
            if is_needed and not getattr(inputs, name):
                raise MergeError(f"method {self.name} needs {MISSING[name]}")

    def collect(
        self, rows: Mapping[str, Rows], options: Mapping[str, Any]
    ) -> dict[str, Tensor] | None:
        """Return the facts about whole parameters that the function reads; None: it reads none.

        Args:
            rows: Every parameter that it merges, in blocks of rows.
            options: Options of the method.
        """
        if self.statistics is None:
            return None
        found = {name: self.statistics(each, **options) for name, each in rows.items()}
        return {name: fact for name, fact in found.items() if fact is not None}

    def __call__(
        self, models: Sequence[Params], inputs: MergeInputs, **options: Any
    ) -> Params | MixingWeights:
        """Return the mixing weights or the parameters that the function returns.

        Raises:
            MergeError: An input is missing, the function refuses its arguments, changes the
                models, or returns no dictionary of tensors.
        """
        self.check_inputs(inputs, options, len(models))
        taken = {name: getattr(inputs, name) for name in self.inputs}
        before = _versions(models)
        result = self.function(models, **taken, **options)
        if changed := [name for name, now in _versions(models).items() if now != before[name]]:
            raise MergeError(f"{changed[0][1]}: method {self.name} changes it; work on a copy")
        self._check_result(result)
        return result

    def _check_result(self, result: Any) -> None:
        if not isinstance(result, dict):
            kind = type(result).__name__
            raise MergeError(f"method {self.name} returned a {kind}; return name -> tensor")
        for name, value in result.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise MergeError(f"{name}: method {self.name} returned a {kind}; return tensors")


def _versions(models: Sequence[Params]) -> dict[tuple[int, str], int]:
    """Return how often every tensor was written to; inference tensors do not count."""
    return {
        (k, name): tensor._version
        for k, model in enumerate(models)
        for name, tensor in model.items()
        if not tensor.is_inference()
    }


METHODS: dict[str, Method] = {}
"""Name -> method. ``merging.methods`` fills it on import."""


def method(
    *,
    needs: Needs = (),
    row_wise: bool = False,
    reference: str = "ours",
    cost: str = "one pass over parameters",
    reads_values: bool = True,
    averages_dense: bool = False,
    is_ordered: bool = False,
    max_models: int | None = None,
    full_weights: bool = False,
    initial_gates: Callable[..., Tensor | None] | None = None,
    learnable: Callable[[Mapping[str, Any]], bool] | None = None,
    while_learning: Mapping[str, Any] = MappingProxyType({}),
    statistics: Callable[..., Tensor | None] | None = None,
    without_score: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Function], Function]:
    """Register a function as the merge method of its name.

    Args:
        needs: Inputs that must be present, or a function of the options that returns them.
        row_wise: See ``Method``, as for the other arguments.
        reference: Paper and equation, or "ours".
        cost: Cost besides reading the models, in words.
        reads_values: See ``Method``.
        averages_dense: See ``Method``.
        is_ordered: See ``Method``.
        max_models: Most models; None: any number.
        full_weights: See ``Method``.
        initial_gates: See ``Method``.
        learnable: See ``Method``.
        while_learning: See ``Method``.
        statistics: See ``Method``.
        without_score: See ``Method``.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: The name is taken, or the return annotation is missing. A parameter without a
            default is no input, or an input that is needed is no parameter. An option is named
            like an argument of ``merge``.
    """

    def register(function: Function) -> Function:
        name, parameters = function.__name__, list(inspect.signature(function).parameters.values())
        if not parameters:
            raise ValueError(f"method {name}: its first parameter must be the models")
        parameters = parameters[1:]
        inputs = tuple(p.name for p in parameters if p.default is p.empty or p.name in COMPUTED)
        known = {entry.name for entry in fields(MergeInputs)}
        if name in METHODS and METHODS[name].function.__module__ != function.__module__:
            raise ValueError(f"a method named {name} is registered already")
        if unknown := [parameter for parameter in inputs if parameter not in known]:
            raise ValueError(
                f"method {name}: parameter {unknown[0]} is no input ({', '.join(sorted(known))});"
                " give it a default value to make it an option"
            )
        listed = () if callable(needs) else (needs,) if isinstance(needs, str) else tuple(needs)
        if absent := [need for need in listed if need not in {p.name for p in parameters}]:
            raise ValueError(f"method {name}: needs {absent[0]}, which is no parameter of it")
        options = {p.name: p.default for p in parameters if p.name not in inputs}
        if reserved := [option for option in options if option in RESERVED]:
            raise ValueError(
                f"method {name}: option {reserved[0]} is an argument of merge; rename it"
            )
        returned = get_type_hints(function, include_extras=True).get("return")
        if returned not in (MixingWeights, Params):
            raise ValueError(
                f"method {name}: annotate its result as MixingWeights (a share of every source) or"
                " Params (the parameters themselves)"
            )
        METHODS[name] = Method(
            name=name,
            function=function,
            summary=(inspect.getdoc(function) or "").partition("\n")[0].removesuffix("."),
            reference=reference,
            cost=cost,
            inputs=inputs,
            options=options,
            returns_weights=returned == MixingWeights,
            always_needs=needs if callable(needs) else listed,
            row_wise=row_wise,
            reads_values=reads_values,
            averages_dense=averages_dense,
            is_ordered=is_ordered,
            max_models=max_models,
            full_weights=full_weights,
            initial_gates=initial_gates,
            learnable=learnable,
            while_learning=while_learning,
            statistics=statistics,
            without_score=without_score,
        )
        return function

    return register
