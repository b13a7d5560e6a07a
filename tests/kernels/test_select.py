"""The method's kernel against fp64: shortlist, plan and weights for every rule and setting; ties; padding; lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.select import Rule, Selection, Settings, select
from tests.kernels.cases import DEVICE, random, rounding
from tests.kernels.test_lists import assert_lists_of

ROWS, EXPERTS, TOP_K = 9, 12, 3
# (rows, experts, k), each with its reason.
SIZES = {
    "one row": (1, 8, 3),
    "nothing is a power of two": (5, 12, 3),
    "k = 1": (7, 6, 1),
    "k = E: nothing to choose": (3, 5, 5),
    "one expert": (4, 1, 1),
    "the most rows": (64, 16, 4),
    "the most experts, the most compared at a time": (6, 256, 8),
}
SETTINGS = {
    "B = k: substitution leaves every row the same experts": {"budget": TOP_K},
    "a budget": {"budget": 6},
    "all experts but one": {"budget": EXPERTS - 1},
    "B = E: none": {"budget": EXPERTS},
    "below k: k all the same": {"budget": 1},
    "natural score": {"budget": 5, "natural": True},
    "the root's experts fill the budget": {"budget": TOP_K, "protect_root": True},
    "the root's experts and others": {"budget": 6, "protect_root": True, "natural": True},
    "a coverage that fewer than k hold": {"budget": EXPERTS, "coverage": 0.05},
    "a coverage": {"budget": EXPERTS, "coverage": 0.6},
    "a coverage beats a budget": {"budget": 4, "coverage": 0.9},
    "a coverage of natural weights, the root's experts on top": {
        **{"budget": EXPERTS, "coverage": 0.4, "natural": True, "protect_root": True}
    },
}
rules = pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
policies = pytest.mark.parametrize("truncates", [False, True], ids=["substitution", "truncation"])


def path_weights(num_rows: int) -> Tensor:
    """As a drafter's probabilities of its paths: 1 at the root, then ever less."""
    return torch.exp(-0.4 * torch.arange(num_rows, dtype=torch.float32, device=DEVICE))


def logits(num_rows: int, num_experts: int, seed: int = 7) -> Tensor:
    return random(num_rows, num_experts, seed=seed) * 2


def assert_as_good_as_torch(found: Tensor, plain: Tensor, golden: Tensor) -> None:
    """At most twice as far from fp64 as the reference in fp32; where that is exact, a rounding."""
    off, torchs_off = (float((part.double() - golden).norm()) for part in (found, plain))
    assert off <= 2 * max(torchs_off, rounding(torch.float32) * float(golden.norm()))


def check(logits_TE: Tensor, row_weights_T: Tensor, top_k: int, rule: Rule, settings: dict) -> Selection:
    """The kernel's selection, once all of it has been held against fp64."""
    found = select(
        *(logits_TE, row_weights_T, Settings.on(DEVICE, len(logits_TE), **settings), top_k, rule, torch.float32)
    )
    golden = reference.select(logits_TE.double(), row_weights_T.double(), top_k, rule, **settings)
    plain = reference.select(logits_TE.float(), row_weights_T, top_k, rule, **settings)
    natural_ids_TK, natural_weights_TK, ids_TK, weights_TK, kept_E = golden
    assert torch.equal(found.kept_E, kept_E)
    assert torch.equal(found.natural_ids_TK, natural_ids_TK) and torch.equal(found.ids_TK, ids_TK)
    assert torch.equal(found.weights_TK != 0, weights_TK != 0)
    assert_as_good_as_torch(found.weights_TK, plain[3], weights_TK)
    assert_as_good_as_torch(found.natural_weights_TK, plain[1], natural_weights_TK)
    torch.testing.assert_close(found.score_E.double(), logits_TE.double().softmax(-1).sum(0), atol=0, rtol=5e-6)
    assert_lists_of(found.lists, found.ids_TK, found.weights_TK, logits_TE.shape[1])
    return found


@rules
@policies
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_is_the_formula(settings, truncates, rule):
    """With equal rows for one policy, with rows by path probability for the other, in turns."""
    by_path = (list(SETTINGS.values()).index(settings) + truncates) % 2 == 0
    row_weights_T = path_weights(ROWS) if by_path else torch.ones(ROWS, device=DEVICE)
    check(logits(ROWS, EXPERTS), row_weights_T, TOP_K, rule, {**settings, "truncates": truncates})


@rules
@policies
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_every_size_is_the_formula(size, truncates, rule):
    num_rows, num_experts, top_k = size
    settings = {"budget": (top_k + num_experts) // 2, "truncates": truncates}
    check(logits(num_rows, num_experts), path_weights(num_rows), top_k, rule, settings)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_routers_of_other_types(rule, dtype):
    """Logits are widened before anything else; weights are fp32's, rounded once. (The interpreter cuts bf16 off.)"""
    logits_TE, weights_T = logits(ROWS, EXPERTS).to(dtype), torch.ones(ROWS, device=DEVICE)
    wide = check(logits_TE, weights_T, TOP_K, rule, {"budget": 6})
    narrow = select(logits_TE, weights_T, Settings.on(DEVICE, ROWS, 6), TOP_K, rule, dtype)
    assert narrow.weights_TK.dtype == narrow.natural_weights_TK.dtype == dtype
    assert torch.equal(narrow.ids_TK, wide.ids_TK) and torch.equal(narrow.kept_E, wide.kept_E)
    torch.testing.assert_close(
        narrow.weights_TK.float(), wide.weights_TK, atol=0, rtol=torch.finfo(dtype).eps, check_dtype=False
    )


@policies
def test_equal_logits_go_to_the_lower_id(truncates):
    """Exactly representable: rows of one value, and rows of two values in turns."""
    flat_TE = torch.zeros(4, 10, device=DEVICE)
    found = check(flat_TE, torch.ones(4, device=DEVICE), 3, Rule.RENORMALISED, {"budget": 5, "truncates": truncates})
    assert found.ids_TK.tolist() == [[0, 1, 2]] * 4 and found.kept_E.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    turns_TE = flat_TE + torch.arange(10, device=DEVICE) % 2
    found = check(turns_TE, torch.ones(4, device=DEVICE), 3, Rule.SOFTMAX, {"budget": 7, "truncates": truncates})
    assert found.natural_ids_TK.tolist() == [[1, 3, 5]] * 4
    assert found.kept_E.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5, 7, 9]


def test_equal_scores_go_to_the_lower_id():
    """Two rows that want each other's experts: both pairs of scores are equal, and one of each pair is kept."""
    logits_TE = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]], device=DEVICE)
    found = check(logits_TE, torch.ones(2, device=DEVICE), 1, Rule.SOFTMAX, {"budget": 1, "truncates": True})
    assert found.kept_E.tolist() == [True, False, False, False] and found.weights_TK[1].tolist() == [0.0]
    found = check(logits_TE, torch.ones(2, device=DEVICE), 1, Rule.SOFTMAX, {"budget": 3})
    assert found.kept_E.tolist() == [True, True, True, False]


def without_padding(selection: Selection, num_valid: int) -> list[Tensor]:
    """All that a caller reads of the valid rows."""
    lists = selection.lists
    rows = selection.natural_ids_TK, selection.natural_weights_TK, selection.ids_TK, selection.weights_TK
    return [*(part[:num_valid] for part in rows), selection.kept_E, selection.score_E, lists.experts_A]


@rules
@policies
@pytest.mark.parametrize("settings", [{"budget": 6}, {"budget": EXPERTS}, {"budget": 5, "natural": True}], ids=str)
def test_padding_enters_nothing_whatever_it_holds(settings, truncates, rule):
    num_valid = 6
    moved, row_weights_T = Settings.on(DEVICE, num_valid, **settings, truncates=truncates), path_weights(ROWS)
    found = []
    for filling in (0.0, torch.nan):
        padded_TE, padded_T = logits(ROWS, EXPERTS), row_weights_T.clone()
        padded_TE[num_valid:], padded_T[num_valid:] = filling, filling
        found.append(select(padded_TE, padded_T, moved, TOP_K, rule, torch.float32))
    assert all(map(torch.equal, *(without_padding(one, num_valid) for one in found)))
    for one in found:
        assert not one.weights_TK[num_valid:].any() and not one.natural_weights_TK[num_valid:].any()
        assert ((one.ids_TK >= 0) & (one.ids_TK < EXPERTS)).all()
        assert_lists_of(one.lists, one.ids_TK, one.weights_TK, EXPERTS)
    alone = {**settings, "truncates": truncates}
    exact = check(logits(ROWS, EXPERTS)[:num_valid], row_weights_T[:num_valid], TOP_K, rule, alone)
    assert torch.equal(found[0].ids_TK[:num_valid], exact.ids_TK) and torch.equal(found[0].kept_E, exact.kept_E)
    torch.testing.assert_close(found[0].score_E, exact.score_E)


def test_settings_are_moved_on_the_device_alone():
    """As a replayed graph reads them: the same tensors, other contents."""
    arguments, dtype = (logits(ROWS, EXPERTS), path_weights(ROWS)), torch.float32
    moved = Settings.on(DEVICE, ROWS, EXPERTS)
    for number, settings in enumerate(SETTINGS.values()):
        fresh = Settings.on(DEVICE, 5 + number % 5, **settings, truncates=number % 2 == 0)
        moved.numbers_5.copy_(fresh.numbers_5)
        moved.coverage_1.copy_(fresh.coverage_1)
        found = [select(*arguments, each, TOP_K, Rule.RENORMALISED, dtype) for each in (moved, fresh)]
        assert all(map(torch.equal, *(without_padding(one, ROWS) for one in found)))


def test_the_same_input_gives_the_same_bits():
    arguments = logits(ROWS, EXPERTS), path_weights(ROWS), Settings.on(DEVICE, ROWS, 6), TOP_K, Rule.SOFTMAX
    first, second = (select(*arguments, torch.float32) for _ in range(2))
    assert all(map(torch.equal, without_padding(first, ROWS), without_padding(second, ROWS)))


def test_any_stride_between_rows():
    """A router's logits may be columns of something wider, and row weights every other number of theirs."""
    logits_TE, row_weights_T = logits(ROWS, EXPERTS), path_weights(ROWS)
    wide_TE = torch.cat([logits_TE, torch.full_like(logits_TE, torch.nan)], dim=1)[:, :EXPERTS]
    spread_T = torch.stack([row_weights_T, row_weights_T * torch.nan], dim=1)[:, 0]
    settings = Settings.on(DEVICE, ROWS, 6)
    ours = select(wide_TE, spread_T, settings, TOP_K, Rule.SOFTMAX, torch.float32)
    theirs = select(logits_TE, row_weights_T, settings, TOP_K, Rule.SOFTMAX, torch.float32)
    assert all(map(torch.equal, without_padding(ours, ROWS), without_padding(theirs, ROWS)))


def test_a_selection_without_a_budget_is_the_routers_own():
    found = check(logits(ROWS, EXPERTS), path_weights(ROWS), TOP_K, Rule.RENORMALISED, {"budget": EXPERTS})
    assert torch.equal(found.ids_TK, found.natural_ids_TK)
    assert torch.equal(found.weights_TK, found.natural_weights_TK) and found.kept_E.all()
