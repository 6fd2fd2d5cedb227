"""Proposals: nodes of a trace become classes of hidden units that may change places.

Nodes united are one *strand*: all entries that belong to one hidden unit. Strands with alike
entries, equal tags and the same block form a class. Blocks that hold alike classes (the heads of
an attention) may change places as a whole.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cki_rec.merging.discovery.trace import EVERY, Tracer
from cki_rec.merging.symmetry import Kind, Slice, Symmetry


class NoSlices(Exception):
    """Units that slices cannot describe."""


@dataclass(frozen=True)
class Member:
    """Entries of one axis of one parameter.

    ``index[b, i, c]`` is the place of unit ``i`` of block ``b``. All copies ``c`` move alike
    (segments of a flattened axis, gates of a recurrent cell, the entries of a head).
    """

    parameter: str
    axis: int
    index: Tensor
    rows: Tensor
    """Places on axis 0, of the same shape; ``EVERY``: the entries of all places."""
    length: int
    """Size of axis 0."""

    def copies(self) -> list[Member]:
        """Return one member per copy."""
        pairs = zip(self.index.split(1, dim=2), self.rows.split(1, dim=2), strict=True)
        return [replace(self, index=index, rows=rows) for index, rows in pairs]

    def row(self, block: int) -> int:
        """Return the place on axis 0 of the only copy in a block.

        Raises:
            NoSlices: Units lie in different places.
        """
        rows = self.rows[block].unique().tolist()
        if len(rows) > 1:
            raise NoSlices(
                f"the search cannot describe units in different rows of {self.parameter}"
            )
        return int(rows[0])


@dataclass(frozen=True)
class Candidate:
    """A class of units: ``blocks`` times ``size`` of them, and all entries that belong to them."""

    size: int
    blocks: int
    members: tuple[Member, ...]
    whole_blocks: bool = False
    """Whether a unit is a whole block, which can be permuted only."""

    def units(self, chosen: list[int]) -> Candidate:
        """Return the class of some of the units."""
        members = [
            replace(m, index=m.index[:, chosen], rows=m.rows[:, chosen]) for m in self.members
        ]
        return replace(self, size=len(chosen), members=tuple(members))

    def atoms(self) -> list[Member]:
        """Return the members copy by copy: the smallest parts that may change sign alone."""
        return [copy for member in self.members for copy in member.copies()]

    def symmetries(self, kind: Kind, unsigned: frozenset[int] = frozenset()) -> list[Symmetry]:
        """Return one symmetry per block.

        Args:
            kind: Of all of them.
            unsigned: Positions in ``atoms()`` on which signs do not act.
        """
        return symmetries_of(self.atoms(), kind, self.blocks, self.size, unsigned)


def symmetries_of(
    atoms: list[Member],
    kind: Kind,
    blocks: int,
    size: int,
    unsigned: frozenset[int] = frozenset(),
) -> list[Symmetry]:
    """Return one symmetry per block that acts on these members of one copy each."""
    result = []
    for block in range(blocks):
        groups: dict[tuple[str, int, bool, int, int], list[list[int]]] = defaultdict(list)
        for place, atom in enumerate(atoms):
            signed, row = place not in unsigned, atom.row(block)
            key = (atom.parameter, atom.axis, signed, row, atom.length)
            groups[key].append(atom.index[block, :, 0].tolist())
        rows: dict[tuple[Slice, int], list[int]] = defaultdict(list)
        for (parameter, axis, signed, row, length), places in groups.items():
            for starts, width in _runs(places):
                rows[_slice(parameter, axis, starts, width, signed), length].append(row)
        slices = [part for key, places in rows.items() for part in _joined(*key, places)]
        result.append(Symmetry(kind, size, tuple(slices)))
    return result


def _runs(places: list[list[int]]) -> list[tuple[list[int], int]]:
    """Return starts and width of the units that copies make up: consecutive copies are joined."""
    runs: list[tuple[list[int], int]] = []
    for starts in sorted(places):
        if runs:
            (before, width) = runs[-1]
            if all(a + width == b for a, b in zip(before, starts, strict=True)):
                runs[-1] = (before, width + 1)
                continue
        runs.append((starts, 1))
    return runs


def _slice(parameter: str, axis: int, starts: list[int], width: int, signed: bool) -> Slice:
    steps = {b - a for a, b in itertools.pairwise(starts)}
    if steps == {width} or len(starts) == 1:
        return Slice(parameter, axis, starts[0], width, signed)
    if len(steps) == 1 and min(steps) > 0:
        return Slice(parameter, axis, starts[0], width, signed, step=steps.pop())
    return Slice(parameter, axis, 0, width, signed, starts=tuple(starts))


def _joined(rest: Slice, length: int, rows: list[int]) -> list[Slice]:
    """Return slices for places on axis 0: neighbors are joined, and all places need no limit."""
    if EVERY in rows or len(rows) == length:
        return [rest]
    begins = [row for row in sorted(rows) if row - 1 not in rows]
    ends = [row + 1 for row in sorted(rows) if row + 1 not in rows]
    return [replace(rest, within=((0, a, b),)) for a, b in zip(begins, ends, strict=True)]


def candidates(graph: Graph) -> list[Candidate]:
    """Return the classes of units that a trace proposes, and those of whole blocks last."""
    cells: dict[tuple[Any, frozenset[int]], list[int]] = defaultdict(list)
    for strand in [s for s in graph.strands if s not in graph.blocks]:
        alike = graph.kind(strand), tuple(sorted(graph.tags.get(strand, ())))
        cells[alike, frozenset(graph.held.get(strand, ()))].append(strand)
    families = defaultdict(list)  # cells alike but for their tags and the block that holds them
    houses: dict[int, dict[Any, list[int]]] = defaultdict(dict)  # cells by block
    for (alike, several), cell in cells.items():
        if len(cell) > 1:
            families[alike[0], len(cell)].append([[strand] for strand in cell])
        if len(several) == 1:
            houses[next(iter(several))][alike] = cell
    streets = defaultdict(list)  # blocks alike
    for block, house in houses.items():
        if block not in graph.fixed:
            inside = tuple(sorted((alike, len(cell)) for alike, cell in house.items()))
            around = tuple(frozenset(x.get(block, ())) for x in (graph.held, graph.tags))
            strands = [strand for _, cell in sorted(house.items()) for strand in cell]
            streets[graph.kind(block), around, inside].append([block, *strands])
    units = [graph.candidate(family) for family in families.values()]
    several_blocks = [street for street in streets.values() if len(street) > 1]
    return units + [_whole(graph.candidate([street])) for street in several_blocks]


def _whole(candidate: Candidate) -> Candidate:
    """Return a class whose units are whole blocks; a place on axis 0 takes along all it holds."""
    places = {member.parameter for member in candidate.members if member.axis == 0}
    members = [
        member
        for member in candidate.members
        if bool((member.rows == EVERY).all()) or member.parameter not in places
    ]
    return replace(candidate, members=tuple(members), whole_blocks=True)


class Graph:
    """Strands, blocks and tags of a trace."""

    def __init__(self, tracer: Tracer) -> None:
        self.root: dict[int, int] = {}
        self.owners = tracer.owners
        self.order = {key[:2]: place for place, (_, key) in enumerate(tracer.owners)}
        self.lengths = {key[0]: 1 + key[2] for _, key in tracer.owners if key[2] != EVERY}
        self.starts = torch.tensor([start for start, _ in tracer.owners])
        unions = _pairs(tracer.unions)
        for a, b in unions:
            self.unite(a, b)
        self._match_blocks(tracer.parents, unions)
        self.held, self.tags = self.gather(tracer.parents), self.gather(tracer.tags)
        self.loose = torch.ones(tracer.count, dtype=torch.bool)
        self.loose[torch.cat(tracer.fixed)] = False
        self.fixed = self._fixed()
        self.blocks = {p for several in self.held.values() for p in several}
        self.strands: dict[int, dict[tuple[str, int], list[tuple[int, int]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        """Per strand, parameter and axis: rows and places."""
        nodes = self.loose.nonzero().flatten()
        for node, place in zip(nodes.tolist(), self.owner(nodes), strict=True):
            start, (name, axis, row) = self.owners[place]
            if name and self.find(node) not in self.fixed:
                self.strands[self.find(node)][name, axis].append((row, node - start))

    def find(self, x: int) -> int:
        """Return the node that stands for all nodes united with one."""
        root = self.root
        while x in root:
            root[x] = x = root.get(root[x], root[x])
        return x

    def unite(self, a: int, b: int) -> None:
        """Unite two nodes."""
        if self.find(a) != self.find(b):
            self.root[self.find(a)] = self.find(b)

    def gather(self, store: list[Tensor]) -> dict[int, set[int]]:
        """Return the second nodes of pairs by the first, up to unions."""
        held = defaultdict(set)
        for child, parent in _pairs(store):
            held[self.find(child)].add(self.find(parent))
        return held

    def owner(self, nodes: Any) -> Any:
        """Return the positions in ``owners`` of one node or of several."""
        places = torch.searchsorted(self.starts, torch.as_tensor(nodes), right=True) - 1
        return places.tolist()

    def _match_blocks(self, parents: list[Tensor], unions: list[list[int]]) -> None:
        """Unite blocks that several operations name, if they match one to one.

        An operation names blocks of one unit, or of two units that it unites.
        """
        single: dict[int, set[int]] = defaultdict(set)  # as before unions
        for child, parent in _pairs(parents):
            single[child].add(self.find(parent))
        matches = defaultdict(set)
        pairs = [single[a] | single[b] for a, b in unions if a in single and b in single]
        for several in [*self.gather(parents).values(), *single.values(), *pairs]:
            owners = {p: self.owner(p) for p in several}
            if len(set(owners.values())) < len(owners):
                continue  # a unit that several blocks share matches none of them
            for p, q in itertools.combinations(sorted(several), 2):
                matches[owners[p], owners[q]].add((p, q))
        for match in matches.values():
            if len(match) == len({p for p, _ in match}) == len({q for _, q in match}):
                for p, q in match:
                    self.unite(p, q)

    def _fixed(self) -> set[int]:
        named = {*self.root, *self.root.values(), *self.held}
        fixed = {self.find(x) for x in named if not self.loose[x]}
        fixed |= {p for several in self.held.values() for p in several if not self.loose[p]}
        for child, several in list(self.held.items()):
            self.held[child] = several = self._not_shared(several)
            if len(several) > 1 or child in fixed:
                fixed |= several
        return fixed

    def _not_shared(self, blocks: set[int]) -> set[int]:
        """Return the blocks of a unit but for axes of which it is in every block.

        A unit that all blocks share moves with none of them.
        """
        for place in {self.owner(block) for block in blocks} if len(blocks) > 1 else ():
            ends = [start for start, _ in self.owners[place : place + 2]]
            stop = ends[1] if len(ends) > 1 else len(self.loose)
            everything = {self.find(node) for node in range(ends[0], stop)}
            if len(everything) > 1 and everything <= blocks:
                blocks = blocks - everything
        return blocks

    def entries(self, nodes: list[Tensor]) -> list[str]:
        """Return the parameters and axes that nodes, or nodes united with them, belong to."""
        roots = {self.find(node) for part in nodes for node in part.tolist()}
        everything = range(1, len(self.loose))
        places = [x for x in everything if self.find(x) in roots]
        keys = {self.owners[place][1] for place in self.owner(places)} if places else set()
        return sorted({f"{name} axis {axis}" for name, axis, _ in keys if name})

    def kind(self, strand: int) -> tuple[Any, ...]:
        """Return the entries of a strand up to their places."""
        return tuple(sorted((key, len(places)) for key, places in self.strands[strand].items()))

    def candidate(self, units: list[list[list[int]]]) -> Candidate:
        """Return a class from strands, nested as blocks, units and strands that move as one."""
        members = []
        keys = {key for unit in units[0] for strand in unit for key in self.strands[strand]}
        for key in sorted(keys, key=self.order.__getitem__):
            entries = torch.tensor(
                [
                    [
                        [pair for strand in unit for pair in self.strands[strand].get(key, [])]
                        for unit in b
                    ]
                    for b in units
                ]
            )
            rows, index = entries.unbind(-1)
            members.append(Member(*key, index, rows, self.lengths.get(key[0], 1)))
        return Candidate(len(units[0]), len(units), tuple(members))


def _pairs(store: list[Tensor]) -> list[list[int]]:
    if not store:
        return []
    pairs: list[list[int]] = torch.cat(store, 1).unique(dim=1).T.tolist()
    return pairs
