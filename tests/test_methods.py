"""What every method promises of a whole stage."""

import pytest
import torch
from conftest import build_tiny, draw_batch
from stage_helpers import (
    assert_complete,
    assert_same_bits,
    draw_bat,
    draw_importance,
    draw_stage,
    draw_tokens,
    lone_tokens,
    merge_images,
    run_stage,
)
from torch import Tensor

from models import describe, find_keep_rate
from models.reduction import (
    REDUCTIONS,
    Reduction,
    bat_assignment,
    density_peaks,
    match_pairs,
    token_budget,
)

METHODS = ("none", "topk", "evit", "dpcknn", "tome", "random", "evo", "ppt", "bat")


@pytest.mark.parametrize("method", METHODS)
def test_registry_gives_complete_assignments(method):
    generator = torch.Generator().manual_seed(3)
    for num_tokens in (1, 2, 3, 7, 24):
        x = torch.randn(2, num_tokens, 8, generator=generator)
        importance = torch.rand(2, num_tokens, generator=generator)
        for keep_rate in (0.01, 0.25, 0.5, 0.8, 1.0):
            budget = token_budget(num_tokens, keep_rate)
            identity = method == "none" or budget.kept == num_tokens
            assignment = run_stage(method, x, importance, keep_rate).assignment
            if identity:
                assert torch.equal(assignment, torch.arange(num_tokens).expand(2, -1))
                assert assignment.dtype == torch.int64
            else:
                assert_complete(assignment, (2, num_tokens), budget.kept + (method == "evit"))
                drops = method in ("topk", "random", "evo", "ppt")  # these scores vary: PPT prunes
                assert bool((assignment == -1).any()) == drops


def test_registry_names_and_trailing_clusters():
    assert set(REDUCTIONS) == set(METHODS)
    budget = token_budget(196, 0.7)
    counts = {name: REDUCTIONS[name].num_clusters(budget) for name in METHODS}
    assert counts == {
        "none": 0,
        "topk": 0,
        "evit": 1,
        "dpcknn": 138,
        "tome": 0,
        "random": 0,
        "evo": 0,
        "ppt": 0,
        "bat": 55,
    }


@pytest.mark.parametrize("tokens_kind", ["normal", "duplicates"])
@pytest.mark.parametrize("method", ["bat", "topk", "evit"])
def test_permuting_tokens_permutes_groups(method, tokens_kind):
    (x, importance), _ = draw_bat(4, 30, 8, tokens_kind, "distinct", 0.6, 0.4, 0.3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    before = run_stage(method, x, importance, 0.6, match_ratio=0.3)
    after = run_stage(method, x[:, order], importance[:, order], 0.6, match_ratio=0.3)
    assert torch.equal(after.assignment, before.assignment[:, order])
    torch.testing.assert_close(after.tokens, before.tokens, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.sizes, before.sizes)


@pytest.mark.parametrize("tokens_kind", ["normal", "duplicates", "few", "equal"])
@pytest.mark.parametrize("method", METHODS)
def test_groups_do_not_depend_on_the_batch(method, tokens_kind):
    (x, importance), _ = draw_stage(method, 6, 33, 16, tokens_kind, "ties", 0.4)
    together = run_stage(method, x, importance, 0.4)
    for images in ([0], [3], [5, 1], [4, 4, 2, 0]):
        alone = run_stage(method, x[images], importance[images], 0.4)
        assert torch.equal(alone.assignment, together.assignment[images])
        torch.testing.assert_close(alone.tokens, together.tokens[images], rtol=1e-6, atol=1e-6)


def test_functions_of_a_stage_are_the_same_inside_autocast():
    (x, importance), expected = draw_bat(3, 40, 16, "shifted", "distinct", 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bat_assignment(x, importance, 0.4), expected)
        clusters, groups = density_peaks(x, 13), match_pairs(x, 9)
    assert torch.equal(clusters, density_peaks(x, 13))
    assert torch.equal(groups, match_pairs(x, 9))


@pytest.mark.parametrize("merge_weights", ["importance", "mean"])
@pytest.mark.parametrize("importance_kind", ["distinct", "zero"])
def test_bat_stage_merges_by_importance(merge_weights, importance_kind):
    (x, importance), expected = draw_bat(3, 30, 8, "blobs", importance_kind, 0.5, 0.4, 0.4)
    sizes = torch.randint(1, 6, (3, 30)).float()
    reduced = run_stage(
        "bat", x, importance, 0.5, match_ratio=0.4, sizes=sizes, merge_weights=merge_weights
    )
    assert torch.equal(reduced.assignment, expected)
    weights = importance if merge_weights == "importance" else torch.ones_like(importance)
    merged = merge_images(x, weights, expected, 15)
    torch.testing.assert_close(reduced.tokens, merged, rtol=1e-5, atol=1e-6)
    assert torch.equal(reduced.sizes, torch.zeros(3, 15).scatter_add(1, expected, sizes))
    for b, n, group in lone_tokens(expected):
        assert_same_bits(reduced.tokens[b, group], x[b, n])


@pytest.mark.parametrize("method", METHODS)
def test_identity_stages_return_their_input(method):
    x, importance = torch.randn(2, 12, 4), torch.rand(2, 12)
    reduced = run_stage(method, x, importance, 1.0)
    assert_same_bits(reduced.tokens, x)
    assert torch.equal(reduced.sizes, torch.ones(2, 12))
    assert torch.equal(reduced.assignment, torch.arange(12).expand(2, -1))


@pytest.mark.parametrize("importance_kind", ["distinct", "ties", "zero"])
@pytest.mark.parametrize("tokens_kind", ["normal", "duplicates", "equal", "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_through_a_stage_are_finite(method, tokens_kind, importance_kind):
    generator = torch.Generator().manual_seed(0)
    x = draw_tokens(tokens_kind, 20, 6, generator)[None].requires_grad_()
    importance = draw_importance(importance_kind, 20, generator)[None].requires_grad_()
    reduced = run_stage(method, x, importance, 0.4, match_ratio=0.5)
    reduced.tokens.backward(torch.randn(reduced.tokens.shape, generator=generator))
    assert not reduced.assignment.requires_grad
    assert x.grad.isfinite().all()
    weightless = method == "evit" and importance_kind == "zero"  # a sum with weights of zero
    reached = (reduced.assignment >= 0) & ~(weightless & (reduced.assignment == 8))
    assert torch.equal((x.grad != 0).any(-1), reached)
    if importance.grad is not None:
        assert importance.grad.isfinite().all()
    if tokens_kind == "normal" and importance_kind != "zero" and method in ("bat", "evit"):
        row = reduced.assignment[0]
        merged = torch.tensor([row.tolist().count(group) > 1 for group in row.tolist()])
        assert torch.equal(importance.grad[0] != 0, merged)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_inputs_are_decided_in_float32(method):
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    importance = torch.rand(2, 40, generator=torch.Generator().manual_seed(5)).bfloat16()
    low = run_stage(method, x, importance)
    full = run_stage(method, x.float(), importance.float())
    assert torch.equal(low.assignment, full.assignment)


def test_a_method_of_ones_own_is_a_function_and_a_registry_line(monkeypatch):
    def my_method(stage, budget):
        position = torch.arange(stage.x.shape[1], device=stage.x.device)
        return (position % budget.kept).expand(stage.x.shape[0], -1)

    monkeypatch.setitem(REDUCTIONS, "mine", Reduction(my_method))
    model = build_tiny(reduction="mine", keep_rate=0.5)
    with torch.no_grad():
        logits, assignments = model.forward_with_assignments(draw_batch(2, 3, 32, 32))
    assert logits.shape == (2, 4)
    assert assignments[1].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
    assert "reduction mine" in describe(model) and find_keep_rate(model, 1.0) == 1.0


WRONG = {
    "with an index 2": lambda groups: groups + 1,
    "with an index -2": lambda groups: groups.masked_fill(groups == 0, -2),
    "with an empty group": lambda groups: groups.masked_fill(groups == 1, 0),
    "a torch.float32": Tensor.float,
    "a torch.int32": Tensor.int,
    "a list": Tensor.tolist,
    "of shape (2, 3)": lambda groups: groups[:, 1:],
    "of shape (4,)": lambda groups: groups[0],
}


@pytest.mark.parametrize("problem", WRONG)
def test_wrong_assignment_of_ones_own(monkeypatch, problem):
    """Four tokens, two groups; only in the second image, where that is possible."""
    groups = torch.tensor([[0, -1, 1, 0], [0, 1, 1, 0]])
    wrong = WRONG[problem](groups)
    if torch.is_tensor(wrong) and wrong.shape == groups.shape and wrong.dtype == groups.dtype:
        wrong[0] = groups[0]
    given = [wrong, groups]
    monkeypatch.setitem(REDUCTIONS, "mine", Reduction(lambda stage, budget: given.pop()))
    run_stage("mine", torch.randn(2, 4, 3), torch.rand(2, 4))
    with pytest.raises(ValueError) as error:
        run_stage("mine", torch.randn(2, 4, 3), torch.rand(2, 4))
    assert f"'mine' gave an assignment {problem};" in str(error.value)
    assert "(2, 4)" in str(error.value) and "0 .. 1" in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_stage_hands_out_the_importance_and_the_weights_of_its_merge(method):
    x, importance = torch.randn(2, 20, 4), torch.rand(2, 20)
    sizes = torch.randint(1, 6, (2, 20)).float()
    ones = torch.ones(2, 20)
    for keep_rate, merge_weights in ((1.0, "importance"), (0.4, "importance"), (0.4, "mean")):
        reduced = run_stage(method, x, importance, keep_rate, sizes, merge_weights=merge_weights)
        assert torch.equal(reduced.importance, importance)
        if method == "none" or keep_rate == 1.0:
            assert torch.equal(reduced.weights, ones)
            continue
        by_importance = ones if merge_weights == "mean" else importance
        fused = torch.where(reduced.assignment < 8, ones, importance)
        own = {"dpcknn": ones, "tome": sizes, "ppt": sizes, "evit": fused}
        assert torch.equal(reduced.weights, own.get(method, by_importance))
        num_outputs = reduced.tokens.shape[1]
        merged = merge_images(x, reduced.weights, reduced.assignment, num_outputs, method != "evit")
        torch.testing.assert_close(reduced.tokens, merged, rtol=1e-5, atol=1e-5)


def test_unknown_method_lists_the_choices():
    with pytest.raises(ValueError, match=r"tokens_of_doom.*bat"):
        run_stage("tokens_of_doom", torch.randn(1, 4, 2), torch.rand(1, 4))
