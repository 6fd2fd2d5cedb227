"""Sources of a merge that other programs have written: opened, compared, read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cki_rec.checkpoints.formats import Layout, Stored, is_own, layout, open_stored
from cki_rec.checkpoints.formats.layout import Naming
from cki_rec.config import OF_OTHERS, Config, UserError
from cki_rec.merging.params import Params, is_finite

KEYS = ("path", "names", "transposed", "counts", "optimizer")
"""Entries of a source."""
ARROW = " -> "
"""Between a regular expression and its replacement."""
TABLE = re.compile(r"emb|table|factor|lookup", re.IGNORECASE)
"""Names of matrices that are taken for tables if the network is unknown."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Foreign:
    """One opened checkpoint."""

    path: str
    stored: Stored
    parts: Layout
    naming: Naming
    beside: tuple[Stored, ...] = ()
    """Further files, of counts and optimizer state."""

    def identity(self) -> list[Any]:
        """Return everything that the values of the model and its evidence depend on."""
        naming = [list(map(list, self.naming.renames)), list(self.naming.transposed)]
        return [self.stored.digest(), *naming, *(stored.digest() for stored in self.beside)]

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor of the model, as they are; all of one stored transposed."""
        if self.naming.is_transposed(name):
            return self.naming.restored(name, self.stored.rows(self.parts.names[name]))
        return self.stored.rows(self.parts.names[name], first, stop)

    def tied(self) -> dict[str, str]:
        """Return second names of tensors of the model -> their first names."""
        names = {full: name for name, full in self.parts.names.items()}
        ties = {name: names.get(self.stored.tied.get(full, "")) for full, name in names.items()}
        return {name: first for name, first in ties.items() if first is not None}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the model.

        Raises:
            UserError: It has NaN or infinite entries; names the rows.
        """
        tensor = self.rows(name)
        if tensor.is_floating_point() and not is_finite(tensor):
            bad = ~tensor.isfinite()
            rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten() if bad.ndim else bad[None]
            listed = ", ".join(map(str, rows[:SHOWN].tolist()))
            more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
            raise UserError(
                f"{self.path}: {name} has NaN or infinite entries in row {listed}{more}; train or"
                " repair it before a merge"
            )
        return tensor


def is_foreign(config: Config) -> bool:
    """Return whether a merge has sources of other programs, or a network of its own.

    Raises:
        UserError: It has not, but options for them.
    """
    options = config.merge
    paths = [source["path"] for source in options.sources if "path" in source]
    is_other = any(isinstance(path, str) and not is_own(Path(path)) for path in paths)
    if options.module is not None or is_other:
        return True
    for name, usual in OF_OTHERS.items():
        if (value := getattr(options, name)) != usual:
            raise UserError(
                f"merge.{name}={value}: is for checkpoints of other programs, and all sources are"
                " of cki-rec; leave it out"
            )
    return False


def check_own(config: Config, pipeline: str) -> None:
    """Check that all sources of a merge are of this project.

    Raises:
        UserError: They are not; names the commands that take them.
    """
    if is_foreign(config):
        raise UserError(
            f"{pipeline} needs models that cki-rec has trained, and their data set. Checkpoints of"
            " other programs: cki-rec merge; with merge.module and labelled merge.batches it"
            " reports the AUC of sources and result. Train or score the result with the program"
            " that wrote them"
        )


def open_source(
    source: Mapping[str, Any], option: str, module: nn.Module | None, stack: ExitStack
) -> Foreign:
    """Return a source, opened; no value is read.

    Args:
        source: As configured, with ``KEYS``.
        option: The option that holds it, for messages.
        module: The network, if it is known.
        stack: Closes the files.

    Raises:
        UserError: It has other keys, or its files are damaged.
    """
    if not isinstance(path := source.get("path"), str) or (wrong := set(source) - set(KEYS)):
        odd = f"{sorted(wrong)[0]}: no such key" if isinstance(path, str) else "no path"
        raise UserError(
            f"{option}: {dict(source)}, {odd}; checkpoints of other programs are named by"
            f" {', '.join(KEYS)}, all of them in one merge"
        )
    renames = [tuple(str(text).split(ARROW, 1)) for text in _texts(source, "names", option)]
    if any(len(pair) != 2 for pair in renames):
        raise UserError(f"{option}, names: write each as 'EXPRESSION{ARROW}REPLACEMENT'")
    naming = Naming(
        tuple((old, new) for old, new in renames),
        tuple(_texts(source, "transposed", option)),
        () if module is None else tuple(module.state_dict()),
        () if module is None else tuple(name for name, _ in module.named_parameters()),
    )
    try:
        for pattern in (*(old for old, _ in naming.renames), *naming.transposed):
            re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option}: {pattern}: no regular expression ({error})") from None
    stored = _opened(path, stack)
    others = {key: _opened(str(source[key]), stack) for key in KEYS[-2:] if source.get(key)}
    parts = layout(stored, naming, **others)
    return Foreign(path, stored, parts, naming, tuple(others.values()))


def _opened(path: str, stack: ExitStack) -> Stored:
    stored = open_stored(Path(path))
    stack.callback(stored.close)
    return stored


def _texts(source: Mapping[str, Any], key: str, option: str) -> list[str]:
    texts = source.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{option}, {key}: must be a list of texts")
    return texts


def tables_of(config: Config, first: Foreign, module: nn.Module | None) -> list[str]:
    """Return the names of the embedding tables.

    Raises:
        UserError: An expression of ``merge.table_names`` matches no matrix.
    """
    matrices = [
        name
        for name, entry in first.parts.entries.items()
        if len(entry.shape) == 2 and entry.dtype.is_floating_point
    ]
    if patterns := config.merge.table_names:
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in matrices):
                raise UserError(
                    f"merge.table_names: {pattern} matches no matrix; there are"
                    f" {', '.join(matrices[:12])}"
                )
        return [n for n in matrices if any(re.fullmatch(pattern, n) for pattern in patterns)]
    if module is not None:
        lookups = (nn.Embedding, nn.EmbeddingBag)
        held = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, lookups)}
        return [name for name in matrices if name in held]
    held = {*first.parts.counts, *first.parts.scores}
    return [name for name in matrices if TABLE.search(name) or name in held]


def differences(sources: Sequence[Foreign], tables: Sequence[str]) -> list[str]:
    """Return how the tensors of sources differ from those of the first, one text each."""
    first, found = sources[0], list[str]()
    for other in sources[1:]:
        names, others = first.parts.entries, other.parts.entries
        if names.keys() != others.keys() and (hint := _prefix_hint(first, other)):
            found.append(hint)
            continue
        for here, there, has in ((first, other, others), (other, first, names)):
            for name in [n for n in here.parts.entries if n not in has]:
                kind = "table" if name in tables else "tensor"
                found.append(f"{there.path}: {kind} {name} is missing; {here.path} has it")
        for name in [n for n in names if n in others]:
            one, two = names[name], others[name]
            if one.shape != two.shape:
                kind = "rows of tables differ" if name in tables else "shapes differ"
                is_turned = one.shape == two.shape[::-1]
                hint = f"; it is transposed: add {{transposed: ['{name}']}}" if is_turned else ""
                found.append(
                    f"{name}: {kind}, {one.shape} in {first.path}, {two.shape} in {other.path}"
                    f"{hint}"
                )
            elif one.dtype.is_floating_point != two.dtype.is_floating_point:
                found.append(
                    f"{name}: {one.dtype} in {first.path}, {two.dtype} in {other.path}; both must"
                    " be floating, or neither"
                )
    return found


def _prefix_hint(first: Foreign, other: Foreign) -> str:
    """Return the change of names that makes two sources alike, if they differ by a prefix."""
    for here, there in ((first, other), (other, first)):
        if head := _extra_prefix(here.parts.entries, there.parts.entries):
            return (
                f"{there.path}: names begin with '{head}', those of {here.path} do not; name it as"
                f" {{path: {there.path}, names: ['{_without(head)}']}}"
            )
    return ""


def _extra_prefix(short: Collection[str], long: Collection[str]) -> str:
    """Return the prefix that names have more than others; "": they differ otherwise."""
    some = next(iter(short), "")
    heads = {name.removesuffix(some) for name in long if some and name.endswith(some)} - {""}
    return next((h for h in heads if {h + name for name in short} == set(long)), "")


def _without(head: str) -> str:
    return f"^{head.replace('.', '[.]')}{ARROW}"


def name_changes(first: Foreign, other: Foreign) -> Naming:
    """Return the names of a source with the changes that make it like the first, if they are sure.

    A common prefix is taken off. Other names are matched where one tensor of both has the shape.
    Matrices of reversed shape are transposed.
    """
    names, others = first.parts.entries, other.parts.entries
    renames = list(other.naming.renames)
    if head := _extra_prefix(names, others):
        renames.append((_without(head).removesuffix(ARROW), ""))
    else:
        one, two = [n for n in names if n not in others], [n for n in others if n not in names]
        for name in two:
            alike = [n for n in one if _is_alike(names[n].shape, others[name].shape)]
            back = [n for n in two if alike and _is_alike(names[alike[0]].shape, others[n].shape)]
            if len(alike) == 1 and len(back) == 1:
                renames.append((f"^{re.escape(name)}$", alike[0]))
    naming = replace(other.naming, renames=tuple(renames))
    turned = [
        naming.name(name)
        for name, entry in others.items()
        if (like := names.get(naming.name(name))) is not None
        and like.shape != entry.shape
        and like.shape == entry.shape[::-1]
    ]
    return replace(naming, transposed=(*naming.transposed, *map(re.escape, turned)))


def _is_alike(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return one in (two, two[::-1])


def check_module(sources: Sequence[Foreign], module: nn.Module) -> None:
    """Check that the network has the tensors of the first source.

    Raises:
        UserError: Names or shapes differ; names the first.
    """
    state, first = module.state_dict(), sources[0]
    absent = [n for n in state if n not in first.parts.entries and n not in ties_of(module, first)]
    unknown = [name for name in first.parts.entries if name not in state]
    if absent or unknown:
        parts = [f"{first.path} lacks {absent[0]}"] if absent else []
        parts += [f"the network has no {unknown[0]}"] if unknown else []
        number = len(absent) + len(unknown)
        more = f" ({number} names differ)" if number > len(parts) else ""
        raise UserError(
            f"merge.module: {' and '.join(parts)}{more}; change names by {{path: ..., names:"
            f" ['EXPRESSION{ARROW}REPLACEMENT']}}"
        )
    for name, entry in first.parts.entries.items():
        if tuple(state[name].shape) != entry.shape:
            raise UserError(
                f"merge.module: {name} is {tuple(state[name].shape)} in the network, {entry.shape}"
                f" in {first.path}"
            )


def ties_of(module: nn.Module, source: Foreign) -> dict[str, str]:
    """Return tied names that a source lacks -> the name of their tensor in it."""
    first: dict[int, str] = {}
    names = list(module.named_parameters(remove_duplicate=False))
    for name, parameter in names:
        if name in source.parts.entries:
            first.setdefault(id(parameter), name)
    return {
        name: first[id(parameter)]
        for name, parameter in names
        if name not in source.parts.entries and id(parameter) in first
    }


def _all_names(source: Foreign, ties: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys([*source.parts.names, *ties]))


def load(everyone: Sequence[Foreign], module: nn.Module | None, num: int) -> list[Params]:
    """Return the tensors of all sources, and of the base after them.

    Args:
        everyone: The sources, then the base, if there is one.
        module: The network, if it is known.
        num: Number of the sources.

    Raises:
        UserError: One has NaN; names tensor and rows. Or two have equal tensors.
    """
    models = []
    for source in everyone:
        ties = source.tied()
        params = {name: source.tensor(name) for name in source.parts.names if name not in ties}
        ties |= {} if module is None else ties_of(module, source)
        models.append({name: params[ties.get(name, name)] for name in _all_names(source, ties)})
    for k, one in enumerate(models[:num]):
        for j in range(k):
            if all(torch.equal(models[j][name], tensor) for name, tensor in one.items()):
                raise UserError(
                    f"merge.sources: {everyone[j].path} and {everyone[k].path} are the same model,"
                    " tensor by tensor; name every model once"
                )
    return models
