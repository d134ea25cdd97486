"""Budgets against exact decimal arithmetic, and the arguments they refuse."""

import math

import pytest
import reference

from models.reduction import token_budget

RATIOS = (0.0, 0.1, 0.4, 0.5, 0.9, 1.0)


@pytest.mark.parametrize(
    "keep_rate, stages",
    [
        (0.7, [(138, 91, 8, 55), (97, 64, 6, 39), (68, 45, 4, 27)]),
        (0.6, [(118, 78, 7, 47), (71, 47, 4, 28), (43, 29, 3, 17)]),
        (0.5, [(98, 65, 6, 39), (49, 32, 3, 20), (25, 17, 2, 10)]),
        (0.4, [(79, 52, 5, 32), (32, 21, 2, 13), (13, 9, 1, 5)]),
        (0.3, [(59, 39, 4, 24), (18, 12, 1, 7), (6, 4, 0, 2)]),
        (0.2, [(40, 26, 2, 16), (8, 6, 1, 3), (2, 1, 0, 1)]),
    ],
)
def test_budget_of_published_keep_rates(keep_rate, stages):
    num_tokens = 196
    for kept, attentive, pairs, clusters in stages:
        budget = token_budget(num_tokens, keep_rate)
        assert budget == (kept, clusters, pairs, attentive, num_tokens - attentive)
        assert budget._fields == ("kept", "clusters", "pairs", "attentive", "inattentive")
        num_tokens = kept


@pytest.mark.parametrize("cluster_ratio", RATIOS)
@pytest.mark.parametrize("match_ratio", RATIOS)
def test_budget_identities(cluster_ratio, match_ratio):
    for num_tokens in [*range(1, 41), 49, 64, 100, 144, 196, 197, 256, 577]:
        for keep_rate in (0.01, 0.05, 0.1, 0.2, 0.3, 0.35, 0.5, 0.6, 0.7, 0.75, 0.9, 0.99, 1.0):
            budget = token_budget(num_tokens, keep_rate, cluster_ratio, match_ratio)
            expected = reference.budget(num_tokens, keep_rate, cluster_ratio, match_ratio)
            assert tuple(budget) == expected
            assert all(isinstance(count, int) and count >= 0 for count in budget)
            assert budget.attentive - budget.pairs + budget.clusters == budget.kept
            assert budget.attentive + budget.inattentive == num_tokens
            assert budget.inattentive >= budget.clusters
            assert budget.pairs <= budget.attentive // 2


def test_budget_rounds_decimals_as_written():
    assert token_budget(10, 0.7).kept == 7  # 0.7 * 10 is 7, not a rounding error above it
    assert token_budget(100, 0.29).kept == 29  # 0.29 * 100 = 28.999999999999996 in floats
    assert token_budget(100, 0.07).kept == 7  # 0.07 * 100 = 7.000000000000001 in floats
    assert token_budget(50, 0.7, 0.7).clusters == 25  # 24.5 rounds up


def test_identity_and_single_token_budgets():
    assert token_budget(196, 1.0) == (196, 0, 0, 196, 0)
    assert token_budget(196, 0.999) == (196, 0, 0, 196, 0)
    assert token_budget(1, 0.01) == (1, 0, 0, 1, 0)
    assert token_budget(196, 0.001) == (1, 1, 0, 0, 196)
    assert token_budget(196, 0.001, 0.0) == (1, 0, 0, 1, 195)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("num_tokens", (0, 0.5)),
        ("num_tokens", (-3, 0.5)),
        ("keep_rate", (196, 0.0)),
        ("keep_rate", (196, -0.25)),
        ("keep_rate", (196, 1.25)),
        ("keep_rate", (196, math.nan)),
        ("cluster_ratio", (196, 0.5, -0.25)),
        ("cluster_ratio", (196, 0.5, 1.25)),
        ("cluster_ratio", (196, 0.5, math.nan)),
        ("match_ratio", (196, 0.5, 0.4, -0.25)),
        ("match_ratio", (196, 0.5, 0.4, 1.25)),
        ("match_ratio", (196, 1.0, 0.4, math.nan)),
    ],
)
def test_budget_refuses_bad_arguments(name, arguments):
    names = ("num_tokens", "keep_rate", "cluster_ratio", "match_ratio")
    with pytest.raises(ValueError, match=name) as error:
        token_budget(*arguments)
    assert str(arguments[names.index(name)]) in str(error.value)
