"""How many tokens a stage keeps, and how it spends them. Letters as in `models/reduction.py`."""

import math
from typing import NamedTuple


class TokenBudget(NamedTuple):
    """How many tokens of a stage play which part; ``attentive - pairs + clusters == kept``.

    Attributes:
        kept: output tokens K.
        clusters: clusters C made of the inattentive tokens.
        pairs: attentive tokens P that are merged into a look-alike.
        attentive: attentive tokens A.
        inattentive: inattentive tokens M = N - A.
    """

    kept: int
    clusters: int
    pairs: int
    attentive: int
    inattentive: int


def check_fraction(name: str, value: float, *, zero: bool) -> None:
    """Raises ValueError unless the value lies in [0, 1], or in (0, 1] when zero is not allowed."""
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def token_budget(
    num_tokens: int, keep_rate: float, cluster_ratio: float = 0.4, match_ratio: float = 0.1
) -> TokenBudget:
    """Splits the K tokens that a keep rate allows into unmerged, matched and clustered ones.

    Args:
        num_tokens: patch tokens N that enter the stage, at least 1.
        keep_rate: K / N, in (0, 1]; K is rounded up.
        cluster_ratio: share of K spent on clusters, in [0, 1]; 0 drops the inattentive tokens.
        match_ratio: pairs per token that is not a cluster, in [0, 1].

    Returns:
        The budget; (N, 0, 0, N, 0) when the stage keeps everything.

    Raises:
        ValueError: an argument is outside its range.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    check_fraction("keep_rate", keep_rate, zero=False)
    check_fraction("cluster_ratio", cluster_ratio, zero=True)
    check_fraction("match_ratio", match_ratio, zero=True)
    kept = max(1, math.ceil(keep_rate * num_tokens - 1e-9))
    if kept >= num_tokens:
        return TokenBudget(num_tokens, 0, 0, num_tokens, 0)
    clusters = 0
    if cluster_ratio > 0:
        clusters = min(max(1, _round_half_up(cluster_ratio * kept)), max(kept - 1, 1))
    plain = kept - clusters
    pairs = min(_round_half_up(match_ratio * plain), num_tokens - kept, plain)
    attentive = plain + pairs
    return TokenBudget(kept, clusters, pairs, attentive, num_tokens - attentive)


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)
