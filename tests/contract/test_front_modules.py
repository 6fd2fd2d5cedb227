"""Modules of every kind at the front door: wrapped inside, stateful, random, parametrized."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import cki_rec
from cki_rec import MergeError, align, assess, find_symmetries, merge, verify
from cki_rec.merging.symmetry import Slice, Symmetry

ROWS = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))


class Compiled(nn.Module):
    """A module like that of ``torch.compile``, which takes seconds to import."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod = inner

    def forward(self, x):
        return self._orig_mod(x)


class Outer(nn.Module):
    def __init__(self, wrap=lambda inner: inner):
        super().__init__()
        self.encoder, self.out = wrap(mlp()), nn.Linear(1, 1)

    def forward(self, x):
        return self.out(self.encoder(x))


class Stateful(nn.Module):
    """A forward that writes into a floating and into an integer buffer, and draws numbers."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.mean += x.mean(0)
        return self.inner(x + 0.01 * torch.randn_like(x))


def state(*models):
    return [tensor.clone() for m in models for tensor in m.state_dict().values()]


def is_same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("wrap", [Compiled, nn.DataParallel])
def test_submodules_may_be_wrapped(wrap):
    plain, one, two = Outer(), Outer(wrap), Outer(wrap)
    dicts = [model.state_dict() for model in (one, two)]
    words = {"align": "weights", "batches": [ROWS]}
    for sources in ([one, two], dicts):
        plain.load_state_dict(merge(sources, module=plain, **words).params)
        one.load_state_dict(merge(sources, module=one, **words).params)
    mixed = merge([one, plain.state_dict()])
    one.load_state_dict(mixed.params)
    base = merge([one, two], "ties", base=plain, density=0.5)
    one.load_state_dict(base.params)
    symmetries = find_symmetries(plain, ROWS)
    assert merge([one, two], align="weights", symmetries=symmetries).alignment is not None
    assert len(verify(one, symmetries, ROWS)) == len(symmetries)
    counts = [{"encoder.0.weight": torch.arange(8)}, {"encoder.0.weight": torch.ones(8)}]
    assert merge([one, two], "evidence", counts=counts).shares is not None


def test_marks_of_compiled_submodules_are_taken_off_dictionaries():
    params = merge([Outer(Compiled).state_dict() for _ in range(2)]).params
    Outer().load_state_dict(params)


def test_wrapped_modules_are_searched_inside():
    plain = mlp()
    for wrapped in (nn.DataParallel(plain), Compiled(plain)):
        assert find_symmetries(wrapped, ROWS) == find_symmetries(plain, ROWS)


def test_a_forward_that_writes_or_draws_changes_nothing():
    one, two = Stateful(), Stateful()
    before, random_state = state(one, two), torch.get_rng_state()
    words = {"module": one, "batches": [ROWS], "align": "activations"}
    results = [merge([one, two], repair="least_squares", **words).params for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    align([one, two], find_symmetries(one, ROWS), by="activations", module=one, batches=[ROWS])
    assess([one, two], module=one, batches=[ROWS])
    assert is_same(before, state(one, two))
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_score_may_change_its_argument():
    one, two = mlp(), mlp()
    before = state(one, two)

    def score(params):
        for tensor in params.values():
            tensor.zero_()
        return 1.0

    result = merge([one, two], "auto", score=score)
    assert is_same(before, state(one, two))
    assert bool(result.params["0.weight"].any())


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, orthogonal])
@pytest.mark.parametrize("how", ["weights", "activations"])
def test_parametrized_modules_are_merged(parametrize, how):
    models = [mlp(), mlp()]
    for model in models:
        parametrize(model[0])
    result = merge(models, align=how, repair="rescale", module=models[0], batches=[ROWS])
    models[0].load_state_dict(result.params)


def test_symmetries_of_a_normed_weight_are_found():
    module = mlp()
    weight_norm(module[0])
    (symmetry,) = find_symmetries(module, ROWS)
    assert symmetry.size == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_batches_follow_the_type_of_the_computation(dtype):
    models = [mlp().to(dtype), mlp().to(dtype)]
    module, batch = (mlp(), ROWS) if dtype == torch.float64 else (models[0], ROWS.to(dtype))
    words = {"align": "activations", "repair": "least_squares", "batches": [batch]}
    result = merge(models, module=module, **words)
    assert {tensor.dtype for tensor in result.params.values()} == {dtype}


def test_gradients_are_taken_whatever_the_mode_of_the_caller():
    words = {"align": "weights", "repair": "select_units", "batches": [ROWS]}
    models = [mlp(), mlp()]
    expected = merge(models, module=models[0], **words).params
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = merge(models, module=models[0], **words).params
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_symmetries_are_found_in_inference_mode():
    module = mlp()
    expected = find_symmetries(module, ROWS)
    with torch.inference_mode():
        assert len(find_symmetries(module, ROWS)) == len(expected) == 1
        inner = mlp()
        assert len(verify(inner, find_symmetries(inner, ROWS), ROWS.clone())) == 1


def test_models_may_be_an_iterator():
    models = [mlp(), mlp()]
    symmetries = find_symmetries(models[0], ROWS)
    assert len(align(iter(models), symmetries).models) == 2
    assert merge(iter(models)).params.keys() == models[0].state_dict().keys()


def test_infinite_outputs_are_compared():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            mask = torch.tensor([False, True, False])
            return self.inner(x).masked_fill(mask, -math.inf)

    models = [Masked(), Masked()]
    result = merge(models, align="weights", module=models[0], batches=[ROWS])
    assert result.alignment is not None


SEQUENCE = find_symmetries(mlp(), ROWS)


def merge_on(models, batch, **words):
    words = {"symmetries": SEQUENCE, "align": "activations", **words}
    return merge(models, module=models[0], batches=[batch], **words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: merge_on(m, torch.ones(4, 7)), "module fails on a batch"),
        (lambda m: merge_on(m, {"y": ROWS}), "module fails on a batch"),
        (lambda m: merge_on(m, ROWS * math.nan), "2.weight: activations are NaN or"),
        (lambda m: merge_on(m, ROWS * math.nan, align="weights"), "no finite number on this"),
        (lambda m: merge_on(m, ROWS * math.nan, align="none", repair="rescale"), "on batches"),
        (lambda m: merge_on(m, ROWS[:0]), "batches with rows"),
        (lambda m: find_symmetries(m[0].state_dict(), ROWS), "module is a "),
        (lambda m: find_symmetries(m[0], ROWS * math.nan), "no finite number on these inputs"),
        (lambda m: find_symmetries(m[0], ROWS[:0]), "no finite number on these inputs"),
        (lambda m: find_symmetries(m[0], ROWS, tolerance="x"), "tolerance='x': must be"),
        (lambda m: verify(m[0], None, ROWS), "symmetries is a NoneType"),
        (lambda m: verify(m[0], [3], ROWS), "symmetries holds a int"),
        (lambda m: align(m, None), "symmetries is a NoneType"),
        (lambda m: align(m, SEQUENCE, anchor="0"), "anchor='0': there are 2"),
        (lambda m: align(m, SEQUENCE, tables="0.weight"), "tables='0.weight': pass a list"),
        (lambda m: align(m, SEQUENCE, module=3), "module is a int"),
        (lambda m: align(m, [Symmetry("signs", 9, (Slice("2.bias", 0),))]), "2.bias: .* 9 units"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(cki_rec.MergeError, match=message) as caught:
        call([mlp(), mlp()])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MergeError)
