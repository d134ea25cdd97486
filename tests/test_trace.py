"""Following patches through the stages, against slow loops and hand-worked cases."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch

from models.trace import PatchKind, compose_assignments, trace_patches

DROPPED, SINGLE, PAIR, CLUSTER, MIXED, WAITING = (int(kind) for kind in PatchKind)


class Shape(NamedTuple):
    """What tracing reads of a stage."""

    num_outputs: int
    num_clusters: int
    waits: bool = False


def make_assignments(shapes, *, num_patches, drop, batch=3, seed=0):
    """Draws assignments in which every output token has a member; `drop` allows -1."""
    generator = torch.Generator().manual_seed(seed)
    assignments, num_tokens = [], num_patches
    for shape in shapes:
        low = -1 if drop else 0
        assignment = torch.randint(low, shape.num_outputs, (batch, num_tokens), generator=generator)
        for row in assignment:
            order = torch.randperm(num_tokens, generator=generator)[: shape.num_outputs]
            row[order] = torch.arange(shape.num_outputs)
        assignments.append(assignment)
        num_tokens = shape.num_outputs
    return assignments


def trace_slowly(assignments, shapes):
    """One image at a time: a token is the list of its patches, and the set of its merges' kinds."""
    results = []
    for b in range(assignments[0].shape[0]):
        tokens = [([patch], set()) for patch in range(assignments[0].shape[1])]
        stages = []
        for assignment, shape in zip(assignments, shapes, strict=True):
            outputs = []
            for k in range(shape.num_outputs):
                members = [tokens[n] for n in range(len(tokens)) if assignment[b, n] == k]
                patches = [patch for member in members for patch in member[0]]
                merges = set().union(*(member[1] for member in members))
                if len(members) > 1:
                    is_cluster = k >= shape.num_outputs - shape.num_clusters
                    merges.add(CLUSTER if is_cluster else PAIR)
                outputs.append((patches, merges))
            tokens = outputs
            rows = [(-1, DROPPED, 0)] * assignments[0].shape[1]
            for k, (patches, merges) in enumerate(tokens):
                kind = MIXED if len(merges) > 1 else next(iter(merges), SINGLE)
                for patch in patches:
                    rows[patch] = (k, kind, len(patches))
            stages.append(rows)
        results.append(stages)
    return results


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_trace_equals_a_loop_over_token_lists(drop, seed):
    shapes = [Shape(20, 6), Shape(11, 0), Shape(7, 1), Shape(7, 7), Shape(2, 1)]
    assignments = make_assignments(shapes, num_patches=30, drop=drop, seed=seed)
    traces = trace_patches(assignments, shapes)
    expected = trace_slowly(assignments, shapes)
    assert len(traces) == len(shapes)
    for i, trace in enumerate(traces):
        for b in range(3):
            rows = list(
                zip(
                    trace.group[b].tolist(),
                    trace.kind[b].tolist(),
                    trace.size[b].tolist(),
                    strict=True,
                )
            )
            assert rows == expected[b][i]


def test_composition_is_nested_indexing_and_dropped_stays_dropped():
    first = torch.tensor([[0, 1, -1, 2, 1], [2, 1, 0, -1, -1]])
    second = torch.tensor([[1, 0, -1], [-1, 0, 1]])
    third = torch.tensor([[0, 0], [-1, 0]])
    composed = compose_assignments([first, second, third])
    assert composed[0].tolist() == first.tolist()
    assert composed[1].tolist() == [[1, 0, -1, -1, 0], [1, 0, -1, -1, -1]]
    assert composed[2].tolist() == [[0, 0, -1, -1, 0], [0, -1, -1, -1, -1]]
    assert all(tensor.dtype == torch.int64 for tensor in composed)


def test_composition_does_not_share_memory_with_its_input():
    first = torch.arange(4).expand(2, 4).clone()
    compose_assignments([first])[0].fill_(-1)
    assert first.tolist() == [[0, 1, 2, 3]] * 2


def test_kinds_of_a_hand_worked_case():
    # Stage 1: patches 0 and 1 are matched, 2 stays, 3 and 4 form a cluster, 5 is a cluster alone.
    # Stage 2: the pair stays, the cluster (3, 4) is kept as an attentive token, 2 and 5 cluster.
    # Stage 3: the two clusters are matched; the pair sits alone in a cluster's place.
    assignments = [
        torch.tensor([[0, 0, 1, 2, 2, 3]]),
        torch.tensor([[0, 2, 1, 2]]),
        torch.tensor([[1, 0, 0]]),
    ]
    traces = trace_patches(assignments, [Shape(4, 2), Shape(3, 1), Shape(2, 1)])
    assert traces[0].kind.tolist() == [[PAIR, PAIR, SINGLE, CLUSTER, CLUSTER, SINGLE]]
    assert traces[0].size.tolist() == [[2, 2, 1, 2, 2, 1]]
    assert traces[1].kind.tolist() == [[PAIR, PAIR, CLUSTER, CLUSTER, CLUSTER, CLUSTER]]
    assert traces[1].group.tolist() == [[0, 0, 2, 1, 1, 2]]
    assert traces[2].kind.tolist() == [[PAIR, PAIR, MIXED, MIXED, MIXED, MIXED]]
    assert traces[2].size.tolist() == [[2, 2, 4, 4, 4, 4]]


# Stage 1 makes token 0 by matching patches 0 and 1, leaves patch 2, and makes token 2 by clustering
# patches 3 and 4; the second stage merges two of them and leaves the third.
@pytest.mark.parametrize(
    ("second", "num_clusters", "expected"),
    [
        ([0, 0, 1], 0, [PAIR, PAIR, PAIR, CLUSTER, CLUSTER]),  # pair and patch, matched
        ([1, 1, 0], 1, [MIXED, MIXED, MIXED, CLUSTER, CLUSTER]),  # pair and patch, clustered
        ([0, 1, 1], 0, [PAIR, PAIR, MIXED, MIXED, MIXED]),  # patch and cluster, matched
        ([0, 1, 1], 1, [PAIR, PAIR, CLUSTER, CLUSTER, CLUSTER]),  # patch and cluster, clustered
        ([0, 1, 0], 0, [MIXED, MIXED, SINGLE, MIXED, MIXED]),  # pair and cluster, matched
        ([1, 0, 1], 1, [MIXED, MIXED, SINGLE, MIXED, MIXED]),  # pair and cluster, clustered
        ([1, 0, -1], 2, [PAIR, PAIR, SINGLE, DROPPED, DROPPED]),  # alone in a cluster's place
    ],
)
def test_a_token_keeps_the_kind_of_its_making_or_is_mixed(second, num_clusters, expected):
    assignments = [torch.tensor([[0, 0, 1, 2, 2]]), torch.tensor([second]), torch.tensor([[0, 0]])]
    shapes = [Shape(3, 1), Shape(2, num_clusters), Shape(1, 1)]
    traces = trace_patches(assignments, shapes)
    assert traces[1].kind.tolist() == [expected]
    if MIXED in expected:  # and so it stays
        assert set(traces[2].kind.flatten().tolist()) == {MIXED}


def test_identity_stages_keep_every_kind():
    first = torch.tensor([[0, 0, -1, 1, 1]])
    identity = torch.arange(2)[None]
    traces = trace_patches([first, identity, identity], [Shape(2, 1), Shape(2, 0), Shape(2, 0)])
    for trace in traces:
        assert trace.kind.tolist() == [[PAIR, PAIR, DROPPED, CLUSTER, CLUSTER]]


def test_patches_of_one_token_share_kind_and_size_and_sizes_add_up():
    shapes = [Shape(40, 10), Shape(20, 5)]
    assignments = make_assignments(shapes, num_patches=60, drop=True, batch=4, seed=9)
    for trace in trace_patches(assignments, shapes):
        for group, kind, size in zip(trace.group, trace.kind, trace.size, strict=True):
            counts = Counter(group.tolist())
            seen = {}
            for token, code, number in zip(
                group.tolist(), kind.tolist(), size.tolist(), strict=True
            ):
                assert (code == DROPPED) == (token == -1)
                assert number == (0 if token == -1 else counts[token])
                assert seen.setdefault(token, code) == code


def test_no_stage_no_trace():
    assert compose_assignments([]) == []
    assert trace_patches([], []) == []
