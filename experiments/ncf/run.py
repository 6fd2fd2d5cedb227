"""Merge recommenders that strangers have trained: neural collaborative filtering on MovieLens 1M.

Three authors published checkpoints of the same architectures with the same ids. This script
merges pairs of them with every recipe, and fits the better one to their mean logit (``refine``).
It measures HR@10 and NDCG@10 on the published test rows, and writes ``results.jsonl`` and
``table.md`` beside it. Rows of ``results.jsonl`` are not measured again: delete it to repeat all.

Merges look at rated pairs of users and items, or at half rated and half random ones. Refinements
look at random pairs, which need no data, or at rated ones. No other label is read. Choices are
made by the AUC of rated training pairs over random ones.

    CKI_REC_DATA=path/to/data python experiments/ncf/run.py
"""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import cki_rec

Params = dict[str, Tensor]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""(users, items) -> logits."""
Row = dict[str, Any]

HERE = Path(__file__).parent
COLUMNS = (("hr", 4), ("ndcg", 4), ("valid_auc", 4), ("seconds", 1))
USERS, ITEMS = 6040, 3706
ROWS, BATCH, SEEDS = 100_000, 4096, (1, 2, 3)
PAIRS = {
    "MLP": ("hexiangnan_MLP_1501652038", "zhongqiangwu_MLP_1575898018"),
    "GMF": ("hexiangnan_GMF_8_1501651698", "wyl6_GMF_8_1565438230"),
}
ACTIVATIONS = {"align": "activations"}
CLOSED_FORM = "auto, effort=closed_form"
RECIPES: dict[str, dict[str, Any]] = {
    "average": {},
    "slerp": {"method": "slerp"},
    "average, aligned by weights": {"align": "weights"},
    "average, aligned by activations": ACTIVATIONS,
    "the same, repair=rescale": {**ACTIVATIONS, "repair": "rescale"},
    "the same, repair=least_squares": {**ACTIVATIONS, "repair": "least_squares"},
    "the same, repair=select_units": {**ACTIVATIONS, "repair": "select_units"},
    "the same, repair=project": {**ACTIVATIONS, "repair": "project"},
    CLOSED_FORM: {"method": "auto", "effort": "closed_form"},
    "auto": {"method": "auto"},
}
"""Recipe -> arguments of ``cki_rec.merge``."""
REFINED = "better source, refined"
STEPS = 3000
"""Steps of each stage of a refinement."""


class MLP(nn.Module):
    """The MLP of He et al., WWW 2017, section 3.3."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(USERS, dim)
        self.item_embedding = nn.Embedding(ITEMS, dim)
        self.layer1, self.layer2 = nn.Linear(2 * dim, dim), nn.Linear(dim, dim // 2)
        self.layer3, self.prediction = nn.Linear(dim // 2, dim // 4), nn.Linear(dim // 4, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Return ``(B,)`` logits."""
        x = torch.cat([self.user_embedding(users), self.item_embedding(items)], -1)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x).relu()
        return self.prediction(x).squeeze(-1)


class GMF(nn.Module):
    """Generalized matrix factorization of He et al., WWW 2017, section 3.2."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(USERS, dim)
        self.item_embedding = nn.Embedding(ITEMS, dim)
        self.prediction = nn.Linear(dim, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Return ``(B,)`` logits."""
        product = self.user_embedding(users) * self.item_embedding(items)
        return self.prediction(product).squeeze(-1)


def main() -> int:
    """Measure all recipes; return the exit code."""
    data = Path(os.environ.get("CKI_REC_DATA", "")) / "ml1m_ncf_checkpoints"
    if not data.is_dir():
        print("ncf: set CKI_REC_DATA to the folder of ml1m_ncf_checkpoints", file=sys.stderr)
        return 2
    test = read_test(data)
    rated = without(read_ratings(data.parent / "ml-1m.zip"), test)
    known = read_results()
    rows = [row for pair in PAIRS for row in measure_pair(pair, data, rated, test, known)]
    write(rows)
    return 0


def measure_pair(
    architecture: str,
    data: Path,
    rated: Tensor,
    test: tuple[Tensor, Tensor],
    known: dict[tuple[str, str, str, int], Row],
) -> list[Row]:
    """Return one row of results per model, ensemble and recipe; ``known`` ones are kept."""
    module = {"MLP": MLP, "GMF": GMF}[architecture]()
    names = PAIRS[architecture]
    sources = [load_file(data / "safetensors" / f"{name}.safetensors") for name in names]

    def logits(params: Params, users: Tensor, items: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(module, params, (users, items))

    def row(recipe: str, scores: Tensor, **facts: Any) -> Row:
        hits, gains = hits_and_gains(scores)
        return {"pair": architecture, "recipe": recipe, "hr": hits, "ndcg": gains, **facts}

    def mean(users: Tensor, items: Tensor, squash: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([squash(logits(source, users, items)) for source in sources]).mean(0)

    models: dict[str, Scorer] = {
        **{name: partial(logits, source) for name, source in zip(names, sources, strict=True)},
        "ensemble, mean logit": partial(mean, squash=Tensor.clone),
        "ensemble, mean probability": partial(mean, squash=Tensor.sigmoid),
    }
    rows = []
    for name, scorer in models.items():
        aucs = [validation_auc(rated, seed)(scorer) for seed in SEEDS]
        rows.append(row(name, scorer(*test), valid_auc=round(sum(aucs) / len(aucs), 6)))

    def measure(
        recipe: str, sample: str, seed: int, make: Callable[[], cki_rec.MergeResult]
    ) -> None:
        if (key := (architecture, recipe, sample, seed)) not in known:
            started = time.perf_counter()
            result = make()
            facts = {"sample": sample, "seed": seed, "chosen": str(result.recipe)}
            facts["seconds"] = round(time.perf_counter() - started, 2)
            facts |= {"valid_auc": round(score(result.params), 6), "cpu": cpu()}
            known[key] = row(recipe, logits(result.params, *test), **facts)
            print(json.dumps(known[key]), flush=True)
        rows.append(known[key])

    for seed in SEEDS:
        valid_auc = validation_auc(rated, seed)

        def score(params: Params, valid_auc: Callable[[Scorer], float] = valid_auc) -> float:
            return valid_auc(partial(logits, params))

        for sample, pairs in samples(rated, seed).items():
            batches = [(batch[:, 0], batch[:, 1]) for batch in pairs.split(BATCH)]
            words = {"module": module, "batches": batches, "score": score, "seed": seed}
            for recipe, options in RECIPES.items():
                options = {"method": "average", **options, **words}
                measure(recipe, sample, seed, partial(cki_rec.merge, sources, **options))
        endless = {"random": random_batches(seed), "rated": rated_batches(rated, seed)}
        for sample, batches in endless.items():
            measure(REFINED, sample, seed, partial(refined, module, sources, batches, score))
    return rows


def refined(
    module: nn.Module,
    sources: list[Params],
    batches: Iterator[tuple[Tensor, Tensor]],
    score: Callable[[Params], float],
) -> cki_rec.MergeResult:
    """Return the better source by ``score``, fitted to the mean logit of all sources."""
    return cki_rec.refine(
        sources,
        module=module,
        batches=batches,
        start=max(range(len(sources)), key=lambda k: score(sources[k])),
        stages=("maps", "all"),
        steps=STEPS,
        learning_rate=2e-3,
    )


def random_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random users and items ``(B,)`` without end: no data is needed."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        users = torch.randint(USERS, (BATCH,), generator=draw)
        yield users, torch.randint(ITEMS, (BATCH,), generator=draw)


def rated_batches(rated: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield users and items ``(B,)`` of rated pairs without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = rated[torch.randint(len(rated), (BATCH,), generator=draw)]
        yield chosen[:, 0], chosen[:, 1]


def read_results() -> dict[tuple[str, str, str, int], Row]:
    """Return the rows of ``results.jsonl`` that are of a merge."""
    path = HERE / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(r["pair"], r["recipe"], r["sample"], r["seed"]): r for r in rows if "seed" in r}


def read_ratings(archive: Path) -> Tensor:
    """Return ``(R, 2)`` rated pairs: user - 1, and items by first appearance."""
    with zipfile.ZipFile(archive) as files:
        lines = files.read("ml-1m/ratings.dat").decode("latin-1").splitlines()
    items: dict[str, int] = {}
    pairs = [line.split("::")[:2] for line in lines]
    return torch.tensor([[int(u) - 1, items.setdefault(i, len(items))] for u, i in pairs])


def read_test(data: Path) -> tuple[Tensor, Tensor]:
    """Return users and items ``(6040, 100)``; the first item of a row is the rated one."""
    rated = [line.split("\t") for line in (data / "ml-1m.test.rating").read_text().splitlines()]
    lines = (data / "ml-1m.test.negative").read_text().splitlines()
    items = [[int(r[1]), *map(int, n.split("\t")[1:])] for r, n in zip(rated, lines, strict=True)]
    users = torch.tensor([int(r[0]) for r in rated])
    return users[:, None].expand(-1, len(items[0])), torch.tensor(items)


def without(rated: Tensor, test: tuple[Tensor, Tensor]) -> Tensor:
    """Return the rated pairs that are no test pairs."""
    users, items = test
    held_out = users[:, 0] * ITEMS + items[:, 0]
    return rated[~torch.isin(rated[:, 0] * ITEMS + rated[:, 1], held_out)]


def samples(rated: Tensor, seed: int) -> dict[str, Tensor]:
    """Return ``(R, 2)`` pairs to look at: rated ones, or half of them random as in training."""
    draw = torch.Generator().manual_seed(seed)
    chosen = rated[torch.randperm(len(rated), generator=draw)[:ROWS]]
    users = torch.randint(USERS, (ROWS // 2,), generator=draw)
    random = torch.stack([users, torch.randint(ITEMS, (ROWS // 2,), generator=draw)], 1)
    return {"rated": chosen, "rated and random": torch.cat([chosen[: ROWS // 2], random])}


def validation_auc(rated: Tensor, seed: int) -> Callable[[Scorer], float]:
    """Return a function (scorer) -> AUC of rated pairs over random ones."""
    draw = torch.Generator().manual_seed(1000 + seed)
    chosen = rated[torch.randperm(len(rated), generator=draw)[:ROWS]]
    others = torch.randint(ITEMS, (len(chosen),), generator=draw)
    users, items = chosen[:, 0].repeat(2), torch.cat([chosen[:, 1], others])
    labels = np.repeat([1, 0], len(chosen))
    return lambda scorer: float(roc_auc_score(labels, scorer(users, items).numpy()))


def hits_and_gains(scores: Tensor) -> tuple[float, float]:
    """Return HR@10 and NDCG@10 of ``(U, 100)`` scores, the rated item first.

    Ties count against the rated item.
    """
    ranks = (scores[:, 1:] >= scores[:, :1]).sum(1)
    gains = torch.where(ranks < 10, 1 / torch.log2(ranks + 2.0), 0.0)
    return float((ranks < 10).double().mean()), float(gains.double().mean())


def write(rows: list[Row]) -> None:
    """Write ``results.jsonl``, and ``table.md`` with means over seeds."""
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        "# Neural collaborative filtering of three authors, merged",
        "",
        f"MovieLens 1M; published test rows: {USERS:,} users, one rated item and 99 others each."
        f" Activations: {ROWS:,} pairs. Refinement: {2 * STEPS:,} steps of {BATCH:,} new pairs."
        f" Means of {len(SEEDS)} draws, half the range in brackets.",
        "",
        "| pair | model | pairs | HR@10 | NDCG@10 | AUC that auto compares | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(map(_key, rows)):
        same = [row for row in rows if _key(row) == key]
        cells = [_cell([row[name] for row in same if name in row], n) for name, n in COLUMNS]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    for pair in PAIRS:
        for search in (CLOSED_FORM, "auto"):
            same = [row for row in rows if (row["pair"], row["recipe"]) == (pair, search)]
            chosen = ", ".join(sorted({row["chosen"] for row in same}))
            lines += ["", f"{pair}: {search} chose {chosen}."]
    processors = " or ".join(dict.fromkeys(row["cpu"] for row in rows if "cpu" in row))
    versions = f"torch {torch.__version__}, {processors}"
    lines += ["", f"{versions}. Command: python experiments/ncf/run.py."]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


def cpu() -> str:
    """Return the widest vector instructions that torch uses, and the number of threads."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _key(row: Row) -> tuple[str, str, str]:
    return row["pair"], row["recipe"], row.get("sample", "")


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" [{half:.{digits}f}]" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
