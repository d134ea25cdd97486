"""The baselines against slow loops, and against their published arithmetic."""

import itertools
import math

import pytest
import reference
import torch
from stage_helpers import (
    assert_complete,
    assert_same_bits,
    draw_images,
    draw_stage,
    draw_tokens,
    lone_tokens,
    merge_images,
    run_stage,
)

from models.reduction import density_peaks, token_budget

# Density peaks over all tokens


@pytest.mark.parametrize("tokens", ["normal", "blobs", "far", "duplicates", "few", "equal", "zero"])
@pytest.mark.parametrize(
    "num_tokens, keep_rate",
    [(1, 0.5), (2, 0.5), (3, 0.5), (12, 0.1), (25, 0.4), (25, 0.9), (9, 1.0)],
)
def test_dpcknn(tokens, num_tokens, keep_rate):
    (x, importance), expected = draw_stage(
        "dpcknn", 3, num_tokens, 8, tokens, "distinct", keep_rate
    )
    assignment = run_stage("dpcknn", x, importance, keep_rate).assignment
    kept = token_budget(num_tokens, keep_rate).kept
    assert_complete(assignment, (3, num_tokens), kept)
    assert torch.equal(assignment, expected)
    if kept < num_tokens:
        assert torch.equal(assignment, density_peaks(x, kept))
    reduced = run_stage("dpcknn", x, importance, keep_rate)
    assert torch.equal(reduced.assignment, expected)
    plain_mean = merge_images(x, torch.ones(3, num_tokens), expected, kept)
    torch.testing.assert_close(reduced.tokens, plain_mean, rtol=1e-5, atol=1e-4)
    assert torch.equal(
        reduced.sizes, torch.zeros(3, kept).scatter_add(1, expected, torch.ones(3, num_tokens))
    )


# ToMe


def bipartite_soft_matching(metric: list[list[float]], num_merged: int) -> list[set[int]]:
    """Groups of ToMe's `bipartite_soft_matching(class_token=False)`, restated as a loop."""
    even, odd = range(0, len(metric), 2), range(1, len(metric), 2)
    units = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in metric]
    node_max, node_idx = {}, {}
    for a in even:
        scores = [sum(p * q for p, q in zip(units[a], units[b], strict=True)) for b in odd]
        node_max[a] = max(scores)
        node_idx[a] = odd[scores.index(max(scores))]
    edge_idx = sorted(even, key=lambda a: -node_max[a])
    merged, unmerged = edge_idx[:num_merged], edge_idx[num_merged:]
    groups = [{a} for a in unmerged]
    groups += [{b} | {a for a in merged if node_idx[a] == b} for b in odd]
    return groups


@pytest.mark.parametrize("num_tokens, keep_rate", [(2, 0.5), (7, 0.6), (30, 0.7), (31, 0.55)])
def test_tome_step_groups_like_bipartite_soft_matching(num_tokens, keep_rate):
    (x, _), _ = draw_stage("tome", 4, num_tokens, 12, "shifted", "distinct", keep_rate)
    kept = token_budget(num_tokens, keep_rate).kept
    assignment = run_stage("tome", x, x[..., 0], keep_rate).assignment
    for metric, row in zip(x.tolist(), assignment.tolist(), strict=True):
        expected = bipartite_soft_matching(metric, num_tokens - kept)
        actual = [{n for n, k in enumerate(row) if k == group} for group in range(kept)]
        assert sorted(map(sorted, actual)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("tokens", ["normal", "shifted", "blobs", "equal", "zero"])
@pytest.mark.parametrize(
    "num_tokens, keep_rate",
    [
        (1, 0.5),
        (2, 0.5),
        (3, 0.3),
        (12, 0.1),
        (24, 0.5),
        (25, 0.9),
        (25, 0.3),
        (40, 0.01),
        (9, 1.0),
    ],
)
def test_tome_over_any_number_of_steps(tokens, num_tokens, keep_rate):
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 9, (num_tokens,), generator=generator).float()
    (x,), expected = draw_images(
        3,
        lambda generator: (draw_tokens(tokens, num_tokens, 10, generator),),
        lambda image, margin: reference.tome(image, sizes.tolist(), keep_rate, margin),
    )
    sizes = sizes.expand(3, -1)
    kept = token_budget(num_tokens, keep_rate).kept
    assignment = run_stage("tome", x, x[..., 0], keep_rate, sizes).assignment
    assert_complete(assignment, (3, num_tokens), kept)
    assert torch.equal(assignment, expected)
    reduced = run_stage("tome", x, x[..., 0], keep_rate, sizes=sizes)
    weighted = merge_images(x, sizes, expected, kept)
    torch.testing.assert_close(reduced.tokens, weighted, rtol=1e-5, atol=1e-5)
    assert torch.equal(reduced.sizes, torch.zeros(3, kept).scatter_add(1, expected, sizes))


def test_tome_carries_sizes_to_the_next_stage():
    (x,), _ = draw_images(
        2,
        lambda generator: (draw_tokens("shifted", 28, 10, generator),),
        lambda image, margin: reference.tome(image, [1.0] * 28, 0.15, margin),
    )
    first = run_stage("tome", x, x[..., 0], 0.5)
    second = run_stage("tome", first.tokens, first.tokens[..., 0], 0.5, sizes=first.sizes, index=1)
    # Each final token is the plain mean of all the patches it stands for.
    composed = second.assignment.gather(1, first.assignment)
    patches = merge_images(x, torch.ones(2, 28), composed, 7)
    torch.testing.assert_close(second.tokens, patches, rtol=1e-5, atol=1e-5)
    assert second.sizes.sum(1).tolist() == [28, 28]


# Random


def assign_random(x, keep_rate, **changes):
    return run_stage("random", x, x[..., 0], keep_rate, **changes).assignment


def test_random_keeps_one_fixed_permutation():
    x = torch.randn(5, 40, 3)
    state = torch.get_rng_state()
    assignment = assign_random(x, 0.3, index=1, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert_complete(assignment, (5, 40), 12)
    assert torch.equal(assignment, assignment[:1].expand(5, -1))
    assert int((assignment[0] >= 0).sum()) == 12
    torch.manual_seed(123)
    again = assign_random(torch.zeros(2, 40, 9), 0.3, index=1, seed=7)
    assert torch.equal(again, assignment[:2])


def test_random_keep_rates_share_the_permutation():
    x = torch.zeros(1, 50, 2)
    kept = [
        set((assign_random(x, rate, index=0, seed=0)[0] >= 0).nonzero()[:, 0].tolist())
        for rate in (0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    assert [len(tokens) for tokens in kept] == [5, 15, 25, 40, 50]
    for fewer, more in itertools.pairwise(kept):
        assert fewer < more


def test_random_differs_between_seeds_and_stages():
    x = torch.zeros(1, 60, 2)
    kept = {
        tuple((assign_random(x, 0.5, index=stage, seed=seed)[0] >= 0).tolist())
        for stage in range(6)
        for seed in range(10)
    }
    assert len(kept) == 60  # no (seed, stage) repeats another, nor swaps with it


def test_random_gives_every_token_a_chance():
    x = torch.zeros(1, 10, 2)
    counts = sum((assign_random(x, 0.3, index=0, seed=seed)[0] >= 0).int() for seed in range(400))
    # 120 expected; the standard deviation of a fair draw is 9.
    assert counts.sum() == 1200
    assert counts.min() >= 75
    assert counts.max() <= 165


# EViT


def evit_stage(tokens, attention, keep_rate):
    """EViT's published arithmetic on one image: kept tokens by attention, then the fused token."""
    left = math.ceil(keep_rate * len(tokens))
    if left == len(tokens):
        return tokens
    by_attention = sorted(range(len(tokens)), key=lambda n: attention[n], reverse=True)
    fused = [
        sum(attention[n] * tokens[n][d] for n in by_attention[left:]) for d in range(len(tokens[0]))
    ]
    return [tokens[n] for n in by_attention[:left]] + [fused]


@pytest.mark.parametrize(
    "num_tokens, keep_rate, num_outputs",
    [
        (40, 0.7, (29, 22)),
        (24, 0.5, (13, 8)),
        (9, 0.3, (4, 3)),
        (6, 0.8, (6, 6)),
        (3, 0.01, (2, 2)),
    ],
)
def test_evit_over_two_stages(num_tokens, keep_rate, num_outputs):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(3, num_tokens, 6, generator=generator)
    sizes = torch.ones(3, num_tokens)
    expected = x.tolist()
    for stage in range(2):
        attention = torch.rand(x.shape[:2], generator=generator) / x.shape[1]
        reduced = run_stage("evit", x, attention, keep_rate, sizes=sizes, index=stage)
        images = zip(expected, attention.tolist(), strict=True)
        expected = [evit_stage(tokens, weights, keep_rate) for tokens, weights in images]
        assert reduced.tokens.shape == (3, num_outputs[stage], 6)
        torch.testing.assert_close(reduced.tokens, torch.tensor(expected), rtol=1e-5, atol=1e-6)
        for b, n, group in lone_tokens(reduced.assignment):
            if group < num_outputs[stage] - 1:
                assert_same_bits(reduced.tokens[b, group], x[b, n])
        assert (reduced.sizes.sum(1) == num_tokens).all()
        x, sizes = reduced.tokens, reduced.sizes
