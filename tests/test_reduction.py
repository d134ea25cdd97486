"""Assignments and merging against slow loops, on random and on adversarial tokens."""

import pytest
import reference
import torch
from stage_helpers import (
    assert_complete,
    assert_same_bits,
    draw_bat,
    draw_images,
    draw_importance,
    draw_tokens,
    lone_tokens,
    merge_images,
    run_stage,
)

from models import clustering
from models.reduction import bat_assignment, density_peaks, match_pairs, merge_tokens, token_budget

# Blocks


@pytest.mark.parametrize("num_rows", [1, 5, 40, 41, 100])
def test_blocks_are_equally_long_and_cover_all_rows(num_rows, monkeypatch):
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 20)
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 1)
    rows, seen = torch.arange(num_rows)[None], []
    result = clustering.in_blocks(lambda block: seen.append(block) or rows[:, block], num_rows, 9)
    assert torch.equal(result, rows)
    assert len(seen) == -(-num_rows // 20)
    assert len({block.stop - block.start for block in seen}) == 1


@pytest.mark.parametrize("kind", ["normal", "duplicates", "equal"])
@pytest.mark.parametrize("cluster_ratio, match_ratio", [(0.0, 0.5), (0.4, 0.1), (1.0, 0.0)])
def test_blocks_change_nothing(kind, cluster_ratio, match_ratio, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([draw_tokens(kind, 300, 64, generator) for _ in range(3)])
    importance = torch.rand(3, 300, generator=generator)
    for rows in (300, 64, 17):
        monkeypatch.setattr(clustering, "BLOCK_ROWS", rows)
        monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 1)
        assignment = bat_assignment(x, importance, 0.5, cluster_ratio, match_ratio)
        merged = merge_tokens(x, importance, assignment, 150)
        if rows == 300:
            expected, tokens = assignment, merged
        assert torch.equal(assignment, expected)
        torch.testing.assert_close(merged, tokens, rtol=0, atol=1e-5)


# Clusters


@pytest.mark.parametrize(
    "kind", ["normal", "blobs", "tight", "wide", "far", "duplicates", "few", "equal", "zero"]
)
@pytest.mark.parametrize(
    "count, dim, num_clusters",
    [(1, 4, 1), (2, 4, 1), (2, 4, 2), (3, 16, 2), (4, 3, 4), (6, 5, 3), (17, 7, 6), (40, 16, 12)],
)
def test_density_peaks(kind, count, dim, num_clusters):
    (x,), expected = draw_images(
        3,
        lambda generator: (draw_tokens(kind, count, dim, generator),),
        lambda tokens, margin: reference.density_peaks(tokens, num_clusters, margin=margin),
    )
    clusters = density_peaks(x, num_clusters)
    assert_complete(clusters, (3, count), num_clusters)
    assert torch.equal(clusters, expected)


@pytest.mark.parametrize("k, dim", [(1, 8), (3, 8), (7, 8), (50, 8), (5, 1)])
def test_density_peaks_with_other_neighbours_and_one_channel(k, dim):
    (x,), expected = draw_images(
        2,
        lambda generator: (draw_tokens("blobs", 20, dim, generator),),
        lambda tokens, margin: reference.density_peaks(tokens, 6, k, margin),
    )
    assert torch.equal(density_peaks(x, 6, k), expected)


def test_density_peaks_of_a_whole_image():
    (x,), expected = draw_images(
        1,
        lambda generator: (draw_tokens("normal", 131, 24, generator),),
        lambda tokens, margin: reference.density_peaks(tokens, 39, margin=margin),
    )
    assert torch.equal(density_peaks(x, 39), expected)


def test_density_peaks_worked_by_hand():
    # On a line: six equal tokens, five equal ones, one in between. All rho but the last one's
    # are 1, so the first token is the densest and takes the largest distance, 16, as its delta.
    line = [0.0] * 6 + [16.0] * 5 + [4.0]
    x = torch.tensor(line).reshape(1, 12, 1)
    assert density_peaks(x, 2).tolist() == [[0] * 6 + [1] * 5 + [0]]
    # The token in between: delta 4, mean squared distance (0 + 4 * 16) / 5 = 12.8, the third.
    assert density_peaks(x, 3).tolist() == [[0] * 6 + [1] * 5 + [2]]
    # Only copies are left: score -inf, lowest index first; a centre stays in its own cluster.
    assert density_peaks(x, 5).tolist() == [[0, 3, 4, 0, 0, 0] + [1] * 5 + [2]]


@pytest.mark.parametrize("dim", [3, 64, 384])
def test_copies_never_both_become_centres(dim):
    generator = torch.Generator().manual_seed(dim)
    pool = torch.randn(20, dim, generator=generator) + 5
    source = torch.cat([torch.arange(20), torch.randint(20, (60,), generator=generator)])
    source = source[torch.randperm(80, generator=generator)]
    for num_clusters in (2, 10, 20):
        clusters = density_peaks(pool[source][None], num_clusters)[0]
        for vector in range(20):
            assert clusters[source == vector].unique().numel() == 1
    assert clusters.unique().numel() == 20


@pytest.mark.parametrize("dim", [17, 64, 192])
def test_copies_tie_exactly_at_every_size(dim):
    # Matrix kernels for small or odd shapes may round two copies of one token differently.
    for count in range(2, 25):
        num_clusters, num_pairs = max(1, 2 * count // 3), count // 3
        (x,), clusters = draw_images(
            2,
            lambda generator, n=count: (draw_tokens("duplicates", n, dim, generator),),
            lambda tokens, margin, c=num_clusters: reference.density_peaks(tokens, c, 5, margin),
        )
        assert torch.equal(density_peaks(x, num_clusters), clusters)
        assert torch.equal(density_peaks(x[1:], num_clusters), clusters[1:])
        (x,), groups = draw_images(
            2,
            lambda generator, n=count: (draw_tokens("duplicates", n, dim, generator),),
            lambda tokens, margin, p=num_pairs: reference.match_pairs(tokens, p, margin),
        )
        assert torch.equal(match_pairs(x, num_pairs), groups)
        assert torch.equal(match_pairs(x[1:], num_pairs), groups[1:])


def test_num_clusters_beyond_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"num_clusters.*7"):
        density_peaks(torch.randn(1, 6, 4), 7)


# Pairs


@pytest.mark.parametrize(
    "kind", ["normal", "blobs", "shifted", "duplicates", "few", "equal", "zero"]
)
@pytest.mark.parametrize(
    "count, num_pairs", [(1, 0), (2, 0), (2, 1), (3, 1), (4, 2), (5, 1), (9, 4), (16, 8), (31, 6)]
)
def test_match_pairs(kind, count, num_pairs):
    (x,), expected = draw_images(
        3,
        lambda generator: (draw_tokens(kind, count, 6, generator),),
        lambda tokens, margin: reference.match_pairs(tokens, num_pairs, margin),
    )
    groups = match_pairs(x, num_pairs)
    assert_complete(groups, (3, count), count - num_pairs)
    assert torch.equal(groups, expected)


def test_match_pairs_worked_by_hand():
    # Sources at 0, 2, 4; targets at 1, 3. Position 4 points exactly along 3, position 0 nearly.
    x = torch.tensor([[[8, 1], [0, 1], [-1, 1], [2, 0], [5, 0]]], dtype=torch.float32)
    assert match_pairs(x, 0).tolist() == [[0, 1, 2, 3, 4]]
    assert match_pairs(x, 1).tolist() == [[0, 1, 2, 3, 3]]
    assert match_pairs(x[:, :4], 1).tolist() == [[2, 0, 1, 2]]  # the target stays, not the source
    assert match_pairs(x[:, :4], 2).tolist() == [[1, 0, 0, 1]]


def test_exact_copies_tie_whatever_the_rounding():
    # Rounding would rank these copies by chance; they count as equally similar.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 1, 384, generator=generator)
    x = base.expand(64, 20, 384) * torch.rand(64, 20, 1, generator=generator).add(0.5)
    expected = [0 if n in (0, 2, 4) else max(0, n - 1 - (n > 2) - (n > 4)) for n in range(20)]
    assert match_pairs(x, 3).tolist() == [expected] * 64


def test_more_pairs_than_targets_are_refused():
    with pytest.raises(ValueError, match=r"num_pairs.*3"):
        match_pairs(torch.randn(1, 5, 4), 3)


# Assignments


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 11, 16])
@pytest.mark.parametrize("keep_rate", [0.01, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_bat_assignment_at_every_size(num_tokens, keep_rate):
    for ratios in ((0.4, 0.1), (0.0, 0.1), (0.4, 0.0), (1.0, 1.0), (0.2, 0.6), (0.0, 0.0)):
        (x, importance), expected = draw_bat(
            2, num_tokens, 8, "normal", "distinct", keep_rate, *ratios
        )
        assignment = bat_assignment(x, importance, keep_rate, *ratios)
        budget = token_budget(num_tokens, keep_rate, *ratios)
        assert_complete(assignment, (2, num_tokens), budget.kept)
        assert torch.equal(assignment, expected)
        num_dropped = 0 if budget.clusters else budget.inattentive
        assert (assignment == -1).sum(1).tolist() == [num_dropped] * 2


@pytest.mark.parametrize("tokens_kind", ["normal", "shifted", "duplicates", "few", "equal", "zero"])
@pytest.mark.parametrize("importance_kind", ["distinct", "ties", "equal", "zero"])
@pytest.mark.parametrize("num_tokens, keep_rate, match_ratio", [(9, 0.3, 0.5), (30, 0.7, 0.3)])
def test_bat_assignment_with_ties(tokens_kind, importance_kind, num_tokens, keep_rate, match_ratio):
    rates = (keep_rate, 0.4, match_ratio)
    (x, importance), expected = draw_bat(2, num_tokens, 8, tokens_kind, importance_kind, *rates)
    assert torch.equal(bat_assignment(x, importance, *rates), expected)


@pytest.mark.parametrize("keep_rate", [0.3, 0.7])
def test_bat_assignment_of_a_whole_image(keep_rate):
    (x, importance), expected = draw_bat(1, 196, 24, "normal", "distinct", keep_rate)
    assert torch.equal(bat_assignment(x, importance, keep_rate), expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 20, 196])
@pytest.mark.parametrize("importance_kind", ["distinct", "ties", "equal", "zero"])
def test_topk_and_evit_assignments(num_tokens, importance_kind):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(3, num_tokens, 4, generator=generator)
    importance = torch.stack(
        [draw_importance(importance_kind, num_tokens, generator) for _ in range(3)]
    )
    for keep_rate in (0.01, 0.3, 0.5, 0.7, 0.9, 1.0):
        kept = reference.budget(num_tokens, keep_rate)[0]
        assignment = run_stage("topk", x, importance, keep_rate).assignment
        assert_complete(assignment, (3, num_tokens), kept)
        assert assignment.tolist() == [reference.topk(v, keep_rate) for v in importance.tolist()]
        assignment = run_stage("evit", x, importance, keep_rate).assignment
        assert_complete(assignment, (3, num_tokens), kept + (kept < num_tokens))
        assert assignment.tolist() == [reference.evit(v, keep_rate) for v in importance.tolist()]


# Merging


def random_merge(seed: int = 0, dropped: bool = True):
    """A random merge of 3 images: x (3, 20, 5), weights (3, 20), assignment into 7 groups."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 20, 5, generator=generator)
    weights = torch.rand(3, 20, generator=generator)
    rest = torch.randint(-1 if dropped else 0, 7, (3, 13), generator=generator)
    assignment = torch.cat([torch.arange(7).expand(3, 7), rest], dim=1)
    order = torch.rand(3, 20, generator=generator).argsort(dim=1)
    return x, weights, assignment.gather(1, order)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_merge_tokens(normalize, dropped):
    for seed in range(5):
        x, weights, assignment = random_merge(seed, dropped)
        merged = merge_tokens(x, weights, assignment, 7, normalize)
        assert merged.shape == (3, 7, 5)
        expected = merge_images(x, weights, assignment, 7, normalize)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_unmerged_tokens_keep_every_bit():
    generator = torch.Generator().manual_seed(0)
    _, weights, assignment = random_merge()
    x = torch.randn(3, 20, 5, generator=generator)
    x = x * 10.0 ** torch.randint(-37, 37, (3, 20, 5), generator=generator)
    x[:, :, 0] = -0.0
    x[:, :, 1] = x[:, :, 1].bfloat16().float()
    weights[:, ::3] = 0
    weights[:, 1::3] = 1e-35
    merged = merge_tokens(x, weights, assignment, 7)
    lone = lone_tokens(assignment)
    assert len(lone) >= 3
    for b, n, group in lone:
        assert_same_bits(merged[b, group], x[b, n])
    assert merged.isfinite().all()


def test_huge_tokens_do_not_touch_other_groups():
    x, weights, assignment = random_merge()
    huge = (assignment == 2) | (assignment == -1)
    big = torch.where(huge[..., None], x * 1e30, x)
    merged = merge_tokens(big, weights, assignment, 7)
    expected = merge_images(big, weights, assignment, 7)
    torch.testing.assert_close(merged[:, 2], expected[:, 2], rtol=1e-5, atol=1e24)
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(merged[:, others], expected[:, others], rtol=1e-5, atol=1e-6)
    for b, n, group in lone_tokens(assignment):
        assert_same_bits(merged[b, group], big[b, n])


def test_groups_without_weight_take_the_plain_mean():
    x, weights, assignment = random_merge()
    weights[(assignment == 0) | (assignment == 4)] = 0
    weights[2] = 0
    merged = merge_tokens(x, weights, assignment, 7)
    expected = merge_images(x, weights, assignment, 7)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-20, 1e-34])
def test_tiny_weights_still_weigh(scale):
    x, weights, assignment = random_merge()
    merged = merge_tokens(x, weights * scale, assignment, 7)
    expected = merge_images(x, weights, assignment, 7)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_dropped_tokens_contribute_nothing():
    x, weights, assignment = random_merge()
    dropped = assignment == -1
    assert dropped.any()
    changed = torch.where(dropped[..., None], 7 * x + 1, x)
    reweighted = torch.where(dropped, 5 * weights + 1, weights)
    for normalize in (True, False):
        before = merge_tokens(x, weights, assignment, 7, normalize)
        after = merge_tokens(changed, reweighted, assignment, 7, normalize)
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)


def test_merging_conserves_total_weight():
    x, weights, assignment = random_merge(dropped=False)
    merged = merge_tokens(x, weights, assignment, 7)
    group_weights = torch.zeros(3, 7).scatter_add(1, assignment, weights)
    total = (group_weights[..., None] * merged).sum(1)
    torch.testing.assert_close(total, (weights[..., None] * x).sum(1), rtol=1e-5, atol=1e-5)
    summed = merge_tokens(x, weights, assignment, 7, normalize=False)
    torch.testing.assert_close(summed.sum(1), total, rtol=1e-5, atol=1e-5)


def test_gradients_match_the_closed_form():
    x, weights, assignment = random_merge()
    x.requires_grad_()
    weights.requires_grad_()
    upstream = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(9))
    merged = merge_tokens(x, weights, assignment, 7)
    merged.backward(upstream)
    for b in range(3):
        for n, group in enumerate(assignment[b].tolist()):
            if group == -1:
                assert not x.grad[b, n].any() and not weights.grad[b, n].any()
                continue
            total = weights[b][assignment[b] == group].sum()
            share, gradient = weights[b, n] / total, upstream[b, group]
            torch.testing.assert_close(x.grad[b, n], share * gradient, rtol=1e-4, atol=1e-5)
            expected = (gradient * (x[b, n] - merged[b, group])).sum() / total
            torch.testing.assert_close(weights.grad[b, n], expected, rtol=1e-4, atol=1e-4)
