"""The search: for every proposed class, the largest group that trials accept.

Rotations are tried first, then permutations. To an accepted permutation belong the sign patterns
that ``parity`` proposes. A refused class is split into units that may change places two by two.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor

from cki_rec.merging.calling import reason_of
from cki_rec.merging.discovery.parity import Parity, null_space
from cki_rec.merging.discovery.propose import (
    Candidate,
    Graph,
    NoSlices,
    candidates,
    symmetries_of,
)
from cki_rec.merging.discovery.result import Symmetries
from cki_rec.merging.discovery.trace import CONTRACTIONS, Tracer
from cki_rec.merging.discovery.trial import Trial
from cki_rec.merging.discovery.twin import LOOKUPS
from cki_rec.merging.symmetry import Symmetry

MAX_SPLIT, MAX_PARTS = 256, 8
"""Refused classes of at most so many units are split, into at most so many parts."""
NAMED = 4
"""Most axes that a reason names."""
MAX_STACKED = 64
"""A longer axis 0 is no stack of separate parameters."""
UNSTACKED = CONTRACTIONS | {"convolution", *LOOKUPS}
"""Operations that read a matrix as a whole, not as a stack of vectors."""


@dataclass(frozen=True)
class Family:
    """Independent symmetries that were accepted together, one per block."""

    symmetries: list[Symmetry]
    error: float


class Search:
    """One search on one trial.

    Args:
        trial: The twin and its states.
        tolerance: Largest relative change of an output.
    """

    def __init__(self, trial: Trial, tolerance: float) -> None:
        self.trial, self.tolerance = trial, tolerance
        self.reasons = list(trial.notes)

    def result(self) -> Symmetries:
        """Return the symmetries that hold one by one and together."""
        try:
            tracer, classes = self._proposals(set())
        except Exception as error:
            reason = f"everything: the trace failed ({reason_of(error)})"
            return Symmetries(frozen=[reason], runs=self.trial.runs)
        families: list[Family] = []
        stacked = self._stacked(tracer)
        if stacked:
            try:
                _, finer = self._proposals(stacked)
                families = self._settled(finer)
            except Exception as error:
                self.reasons.append(f"rows of {', '.join(stacked)}: {reason_of(error)}")
        moving = {
            (part.parameter, part.axis)
            for family in families
            for symmetry in family.symmetries
            for part in symmetry.slices
        }
        rest = [c for c in classes if not all((m.parameter, m.axis) in moving for m in c.members)]
        families = self._together(families + self._settled(rest))
        pairs = [(s, family.error) for family in families for s in family.symmetries]
        return Symmetries(
            [symmetry for symmetry, _ in pairs],
            [error for _, error in pairs],
            dict.fromkeys(self.reasons),
            self.trial.runs,
        )

    def _proposals(self, stacked: Set[str]) -> tuple[Tracer, list[Candidate]]:
        trial = self.trial
        state, inputs, _ = trial.points[0]
        trial.load(state)
        tracer = Tracer(trial.tensors, stacked)
        with tracer:
            outputs = trial.run(inputs)
        tracer.fix(*(label for tensor in outputs for label in tracer.get(tensor)))
        graph = Graph(tracer)
        for name, nodes in sorted(tracer.unknown.items()):
            self.reasons += _unknown(name, nodes, graph)
        if tracer.reads:
            self.reasons.append(
                f"control flow or shapes depend on values ({', '.join(sorted(tracer.reads))}): the"
                " units that are read stay, and the rest holds for the paths of these inputs"
            )
        return tracer, [c for c in candidates(graph) if not self._moves_rows(c, tracer)]

    def _moves_rows(self, candidate: Candidate, tracer: Tracer) -> bool:
        """Return whether a class moves rows that are read by id: no trial has other ids."""
        shrunk = {name for name, t in self.trial.tensors.items() if id(t) in self.trial.twin.rows}
        looked_up = {name for name, uses in tracer.uses.items() if uses & set(LOOKUPS)}
        return any(m.axis == 0 and m.parameter in shrunk | looked_up for m in candidate.members)

    def _stacked(self, tracer: Tracer) -> set[str]:
        """Return the parameters whose axis 0 may count separate ones, such as experts.

        It does not matter whether the axis moves: experts change places, and units in them too.
        """
        return {
            name
            for name, tensor in self.trial.tensors.items()
            if tensor.ndim > 1
            and 1 < len(tensor) <= MAX_STACKED
            and name in tracer.uses
            and "convolution" not in tracer.uses[name]
            and (tensor.ndim > 2 or not tracer.uses[name] & UNSTACKED)
        }

    def _settled(self, queue: list[Candidate]) -> list[Family]:
        families: list[Family] = []
        queue = list(queue)
        while queue:
            candidate = queue.pop(0)
            try:
                accepted = self._groups(candidate)
                if accepted is None:
                    queue = self._split(candidate) + queue
                    self.reasons.append(
                        f"{_title(candidate)}: no group leaves the outputs as they are"
                    )
                else:
                    families += accepted
            except NoSlices as error:
                self.reasons.append(f"{_title(candidate)}: {error}")
        return families

    def _groups(self, candidate: Candidate) -> list[Family] | None:
        """Return the groups of a class; None: none holds."""
        if candidate.whole_blocks:
            whole = self._accepted(candidate.symmetries("permutation"))
            families = [whole] if whole else []
        else:
            rotation = self._accepted(candidate.symmetries("rotation"))
            families = [rotation] if rotation else self._permutations(candidate)
        if families and not self.trial.is_seen(families[0].symmetries, self.tolerance):
            self.reasons.append(f"{_title(candidate)}: the outputs do not depend on it")
            return []
        return families or None

    def _permutations(self, candidate: Candidate) -> list[Family]:
        """Return the groups of a class whose units change places, with or without signs.

        A single pattern of signs joins the permutation. Several are groups of their own.
        """
        atoms = candidate.atoms()
        everything = frozenset(range(len(atoms)))
        proposals = self._patterns(candidate)
        if len(proposals) == 1:
            signed = self._signed(candidate, proposals[0])
            if signed:
                return [signed]
        permutation = self._accepted(candidate.symmetries("permutation"))
        if permutation is None:
            return []
        patterns: list[frozenset[int]] = []
        families: list[Family] = []
        for pattern in [*proposals, everything]:
            if _spans(patterns, pattern):
                continue
            chosen = [atoms[place] for place in sorted(pattern)]
            signs = self._accepted(
                symmetries_of(chosen, "signs", candidate.blocks, candidate.size)
            )
            if signs and self.trial.is_seen(signs.symmetries, self.tolerance):
                patterns.append(pattern)
                families.append(signs)
        signed = self._signed(candidate, patterns[0]) if len(patterns) == 1 else None
        return [signed] if signed else [permutation, *families]

    def _signed(self, candidate: Candidate, pattern: frozenset[int]) -> Family | None:
        unsigned = frozenset(range(len(candidate.atoms()))) - pattern
        return self._accepted(candidate.symmetries("signed_permutation", unsigned))

    def _accepted(self, symmetries: list[Symmetry]) -> Family | None:
        error = self.trial.searched(symmetries, self.tolerance)
        if error <= self.tolerance:
            error = max(error, self.trial.final(symmetries, self.tolerance))
        return Family(symmetries, error) if error <= self.tolerance else None

    def _patterns(self, candidate: Candidate) -> list[frozenset[int]]:
        atoms = candidate.atoms()
        state, inputs, _ = self.trial.points[0]
        self.trial.load(state)
        parity = Parity(self.trial.tensors, atoms)
        try:
            with parity:
                outputs = self.trial.run(inputs)
        except Exception as error:
            self.reasons.append(f"signs of {_title(candidate)}: {reason_of(error)}")
            return []
        parity.require_zero(*(parity.get(tensor) for tensor in outputs))
        basis = null_space(sorted(parity.equations), len(atoms))
        return [frozenset(i for i in range(len(atoms)) if bits >> i & 1) for bits in basis]

    def _split(self, candidate: Candidate) -> list[Candidate]:
        """Split a refused class into classes of units that may be swapped two by two."""
        if candidate.blocks > 1 or candidate.size > MAX_SPLIT or candidate.whole_blocks:
            return []
        parts: list[list[int]] = []
        for unit in range(candidate.size):
            for part in parts:
                pair = candidate.units([part[0], unit]).symmetries("permutation")
                if self.trial.searched(pair, self.tolerance) <= self.tolerance:
                    part.append(unit)
                    break
            else:
                parts.append([unit])
                if len(parts) > MAX_PARTS:
                    return []
        return [candidate.units(part) for part in parts if 1 < len(part) < candidate.size]

    def _together(self, families: list[Family]) -> list[Family]:
        """Return the families that hold together; of two that do not, the later one is dropped."""
        if not families or self._hold(families):
            return families
        chosen: list[Family] = []
        for family in families:
            if self._hold([*chosen, family]):
                chosen.append(family)
            else:
                first = family.symmetries[0].slices[0]
                self.reasons.append(
                    f"{first.parameter} axis {first.axis}: holds alone, fails with the others"
                )
        return chosen

    def _hold(self, families: list[Family]) -> bool:
        symmetries = [symmetry for family in families for symmetry in family.symmetries]
        return self.trial.final(symmetries, self.tolerance) <= self.tolerance


def _spans(patterns: list[frozenset[int]], pattern: frozenset[int]) -> bool:
    """Return whether a pattern is a sum of others over GF(2)."""
    rows = [sum(1 << place for place in p) for p in patterns]
    target = sum(1 << place for place in pattern)
    for pivot in range(target.bit_length() + max((r.bit_length() for r in rows), default=0)):
        leading = [r for r in rows if r & -r == 1 << pivot]
        rows = [r for r in rows if r & -r != 1 << pivot]
        if leading:
            head = leading[0]
            rows += [r ^ head for r in leading[1:] if r != head]
            if target & -target == 1 << pivot:
                target ^= head
    return target == 0


def _title(candidate: Candidate) -> str:
    member = candidate.members[0]
    count = candidate.size * candidate.blocks
    return f"{member.parameter} axis {member.axis} ({count} units)"


def _unknown(name: str, nodes: list[Tensor], graph: Graph) -> list[str]:
    entries = graph.entries(nodes)
    if not entries:
        return []
    more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
    return [f"{', '.join(entries[:NAMED])}{more}: operation {name} has no rule"]
