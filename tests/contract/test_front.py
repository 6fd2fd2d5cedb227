"""The public library: models in, state dict out, and the rules of docs/python.md."""

from __future__ import annotations

import copy
import hashlib
import inspect
import subprocess
import sys

import pytest
import torch
from samples import ROOT
from test_readme import blocks
from torch import nn

import cki_rec
from cki_rec.merging.api import merge
from cki_rec.merging.params import MergeError
from cki_rec.merging.registry import RESERVED

DOCS = (ROOT / "docs" / "python.md").read_text()
FORBIDDEN = (
    *("torchrec", "fbgemm_gpu", "hydra", "omegaconf", "polars", "pandas", "sklearn"),
    *("matplotlib", "pydantic", "rich", "jinja2", "joblib", "tensorboard", "tqdm"),
)


class Net(nn.Module):
    """Two tables, a batch norm, a tied output and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.mlp = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()
        )
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.item.weight
        self.register_buffer("ids", torch.arange(3))

    def forward(self, user, item):
        scores = self.out(self.mlp(torch.cat([self.user(user), self.item(item)], 1)))
        return scores[:, 0]


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape).abs() + 0.1 * ("var" in name))
        else:
            tensor.fill_(seed)
    return model


def draw(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"table": (6, 3), "weight": (4, 3), "bias": (4,)}
    return {n: torch.randn(s, generator=noise).to(dtype) for n, s in shapes.items()}


def batches(number: int = 2):
    noise = torch.Generator().manual_seed(9)
    return [
        (
            torch.randint(0, 6, (80,), generator=noise),
            torch.randint(0, 5, (80,), generator=noise),
        )
        for _ in range(number)
    ]


def digest(*values) -> str:
    total = hashlib.sha256()
    for value in values:
        items = value.state_dict().items() if isinstance(value, nn.Module) else value.items()
        for name, tensor in items:
            total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


PREAMBLE = """
import sys


for name in FORBIDDEN:  # as if they were not installed: torch looks for some of them
    sys.modules[name] = None

import time

start = time.perf_counter()
import cki_rec

assert "torch" not in sys.modules
seconds = time.perf_counter() - start
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.mlp = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)
        )

    def forward(self, user, item):
        return self.mlp(torch.cat([self.user(user), self.item(item)], 1))[:, 0]


torch.manual_seed(0)
a, b, c, module = Net(), Net(), Net(), Net()
batches = [(torch.randint(0, 9, (200,)), torch.randint(0, 7, (200,))) for _ in range(2)]
example_inputs = batches[0]
n_a, n_b = (
    {"user.weight": torch.randint(0, 9, (9,)), "item.weight": torch.randint(0, 9, (7,))}
    for _ in range(2)
)
wanted = torch.randn(200)


def validation_auc(params):
    copied = Net()
    copied.load_state_dict(params)
    with torch.no_grad():
        return -float((copied.eval()(*batches[0]) - wanted).square().mean())


"""
ENDING = """
assert all(name in dir(cki_rec) and hasattr(cki_rec, name) for name in cki_rec.__all__)
words = {"module": module, "batches": batches, "score": validation_auc}
result = cki_rec.merge([a, b], "auto", **words, effort="closed_form")
assert validation_auc(result.params) >= max(map(validation_auc, (a.state_dict(), b.state_dict())))
assert result.scores[result.recipe] == max(result.scores.values()), result.scores
assert len(result.scores) == 8, result.scores
print("seconds", seconds)
"""


def test_the_docs_run_with_torch_numpy_and_scipy_only():
    codes = ["\n".join(lines) for info, lines in blocks(DOCS) if info == "python"]
    program = f"FORBIDDEN = {FORBIDDEN}\n{PREAMBLE}\n" + "\n".join([*codes, ENDING])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recipe: mine, temperature=2.0" in done.stdout
    assert float(done.stdout.split()[-1]) < 0.5  # 0.1 s on a quiet machine


def test_the_block_of_the_issue_is_in_the_docs():
    assert 'merged = cki_rec.merge([a, b], "ties", base=c, density=0.2)' in DOCS
    assert "@cki_rec.method(needs=" in DOCS


def test_public_names_are_declared_once_for_editors_and_once_for_use():
    source = inspect.getsource(cki_rec)
    block = source.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    typed = {
        (name.strip(), line.split()[1].removeprefix("cki_rec."))
        for line in block.splitlines()
        if line.strip().startswith("from ")
        for name in line.split(" import ")[1].split(",")
    }
    assert typed == set(cki_rec._NAMES.items())
    assert set(cki_rec.__all__) == {*cki_rec._NAMES, "COMMAND_VARIABLE", "project_root"}
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        _ = cki_rec.mergee


def test_arguments_of_merge_are_reserved():
    parameters = inspect.signature(merge).parameters.values()
    assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} == RESERVED


@pytest.mark.parametrize("method", ["average", "ties", "evidence", "slerp", "auto", "pruning"])
def test_inputs_stay_as_they_are_and_results_are_new(method):
    a, b, base = net(1), net(2), net(3)
    for model in (a, b):
        model.train()
    counts = [{"user.weight": torch.arange(6)}, {"user.weight": torch.ones(6)}]
    before = digest(a, b, base, *counts)
    words = {"base": base, "counts": counts, "module": a, "batches": batches()}
    words |= {"score": lambda state: float(state["mlp.0.bias"][0])}
    words |= {} if method in ("auto", "slerp", "ties", "pruning") else {"align": "weights"}
    result = merge([a, b], method, **words)
    assert digest(a, b, base, *counts) == before
    assert all(part.training for part in a.modules())
    a.load_state_dict(result.params)
    held = {t.untyped_storage().data_ptr() for m in (a, b, base) for t in m.state_dict().values()}
    assert not held & {t.untyped_storage().data_ptr() for t in result.params.values()}
    assert not any(tensor.requires_grad for tensor in result.params.values())


def test_one_model_is_copied():
    a = draw(1)
    merged = merge([a]).params
    assert all(torch.equal(merged[n], a[n]) and merged[n] is not a[n] for n in a)


def test_integers_come_from_the_first_and_norms_are_averaged():
    a, b = net(1), net(2)
    merged = merge([a, b]).params
    assert torch.equal(merged["ids"], a.ids)
    assert merged["mlp.1.num_batches_tracked"] == 1
    mean = (a.mlp[1].running_var + b.mlp[1].running_var) / 2
    assert torch.allclose(merged["mlp.1.running_var"], mean)
    assert list(merged) == list(a.state_dict())


@pytest.mark.parametrize("as_dict", [False, True])
def test_tied_tensors_stay_tied(as_dict):
    models = [net(k) for k in (1, 2)]
    sources = [m.state_dict() for m in models] if as_dict else models
    result = merge(sources)
    assert result.params["out.weight"] is result.params["item.weight"]
    assert "out.weight" not in result.shares
    mean = (models[0].item.weight + models[1].item.weight) / 2
    assert torch.allclose(result.params["out.weight"], mean)


def test_copies_of_a_tensor_that_the_module_ties_are_merged_once():
    """State dicts that were read from files hold it twice."""
    copies = [{n: t.clone() for n, t in net(seed).state_dict().items()} for seed in (1, 2)]
    sample = [(torch.randint(0, 6, (64,)), torch.randint(0, 5, (64,)))]
    words = {"module": net(3), "batches": sample, "align": "activations"}
    merged = merge(copies, "average", **words).params
    assert merged["out.weight"].equal(merged["item.weight"])
    copies[1]["out.weight"] += 1
    with pytest.raises(MergeError, match=r"out.weight: one tensor with item.weight in module"):
        merge(copies, "average", **words)


def test_tensors_tied_in_one_source_only_are_named():
    a, b = net(1).state_dict(), net(2).state_dict()
    b["out.weight"] = b["out.weight"].clone()
    assert merge([a, b]).params["out.weight"] is not None  # equal values may be tied
    b["out.weight"] += 1
    with pytest.raises(MergeError, match=r"out.weight: one tensor with item.weight in source 0"):
        merge([a, b])
    assert not torch.equal(*(merge([b, a]).params[n] for n in ("out.weight", "item.weight")))


def test_counts_and_symmetries_may_name_a_tied_tensor_by_either_name():
    models = [net(1), net(2)]
    count = [torch.arange(5), torch.arange(5).flip(0)]
    results = [
        merge(models, "evidence", counts=[{name: c} for c in count]).params["item.weight"]
        for name in ("item.weight", "out.weight")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("types", "dtype", "expected"),
    [
        ((torch.bfloat16, torch.float32), None, torch.bfloat16),
        ((torch.float16, torch.float16), torch.float32, torch.float32),
        ((torch.float32, torch.float64), None, torch.float32),
    ],
)
def test_types_are_widened_and_restored(types, dtype, expected):
    models = [draw(k, t) for k, t in enumerate(types)]
    merged = merge(models, dtype=dtype).params
    wide = [{n: t.double() for n, t in model.items()} for model in models]
    for name in merged:
        assert merged[name].dtype == expected
        mean = (wide[0][name] + wide[1][name]) / 2
        assert torch.allclose(merged[name].double(), mean, atol=1e-2 if dtype is None else 1e-6)


class Compiled(nn.Module):
    """A module like that of ``torch.compile``; test_wrappers has real ones."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod = inner


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner


def test_wrappers_are_taken_off():
    a, b = net(1), net(2)
    plain = merge([a, b]).params
    wrapped = [nn.DataParallel(a), Compiled(b)]
    assert all(torch.equal(plain[n], t) for n, t in merge(wrapped).params.items())
    states = [{f"module._orig_mod.{n}": t for n, t in m.state_dict().items()} for m in (a, b)]
    assert list(merge(states).params) == list(plain)
    mixed = {**draw(1), "module.bias": torch.ones(2)}
    assert set(merge([mixed, mixed]).params) == set(mixed)
    outer = [Wrapped(a), Wrapped(b)]
    assert all(name.startswith("module.") for name in merge(outer).params)
    states = [model.state_dict() for model in outer]
    outer[0].load_state_dict(merge(states, module=outer[0]).params)


def test_the_same_seed_gives_the_same_bits():
    models = [draw(k) for k in range(3)]
    one, two, other = (
        merge(models, "dare", base=draw(9), scale=1.0, seed=seed).params for seed in (4, 4, 5)
    )
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_batches_of_every_form_give_the_same():
    torch.manual_seed(0)
    models = [net(1), net(2)]
    module = copy.deepcopy(models[0])
    words = {"align": "weights", "module": module, "repair": "rescale"}
    forms = [
        lambda batch: batch,
        list,
        lambda batch: {"user": batch[0], "item": batch[1]},
    ]
    results = [
        merge(models, batches=(form(batch) for batch in batches()), **words).params
        for form in forms
    ]
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in results[0])
