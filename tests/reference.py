"""Slow loops that restate the reduction stage for one image, in double precision.

Written from the description of the method and from nothing else: every function walks over tokens
and pairs with plain Python numbers, so that it shares no code, and no clever step, with
`models/reduction.py`.

Double precision and float32 may order two different vectors differently when the gap between them
is near float32 rounding. Each decision therefore notes its gap in a `Margin`, and
`stage_helpers.draw_images` keeps only images whose every decision is clear (or is an exact tie that
the tie rule settles).
"""

import math
from fractions import Fraction

MAX_SIMILARITY = 1 - 1e-6

Token = list[float]


class Margin:
    """Smallest gap, relative to the size of the numbers compared, of all decisions taken."""

    def __init__(self) -> None:
        self.smallest = math.inf

    def note(self, first: float, second: float, scale: float, exact_tie: bool) -> None:
        """Records one comparison.

        Args:
            first: one side of the comparison.
            second: the other side.
            scale: magnitude that float32 rounding is relative to.
            exact_tie: whether equal sides are equal in any arithmetic, such as the distances to
                two bit-identical tokens.
        """
        tie_gap = math.inf if exact_tie else 0.0
        gap = tie_gap if first == second else abs(first - second) / scale
        self.smallest = min(self.smallest, gap)


def budget(
    num_tokens: int, keep_rate: float, cluster_ratio: float = 0.4, match_ratio: float = 0.1
) -> tuple[int, int, int, int, int]:
    """Budget (kept, clusters, pairs, attentive, inattentive) in exact decimal arithmetic."""
    rate, c, m = (Fraction(repr(value)) for value in (keep_rate, cluster_ratio, match_ratio))
    kept = max(1, math.ceil(rate * num_tokens))
    if kept >= num_tokens:
        return num_tokens, 0, 0, num_tokens, 0
    clusters = 0
    if c > 0:
        clusters = max(1, math.floor(c * kept + Fraction(1, 2)))
        clusters = min(clusters, max(kept - 1, 1))
    plain = kept - clusters
    pairs = min(math.floor(m * plain + Fraction(1, 2)), num_tokens - kept, plain)
    attentive = plain + pairs
    return kept, clusters, pairs, attentive, num_tokens - attentive


def rank_by_importance(importance: list[float]) -> list[int]:
    """Rank of each token by falling importance; equal values keep the order of their index."""
    return [
        sum(other > value or (other == value and j < n) for j, other in enumerate(importance))
        for n, value in enumerate(importance)
    ]


def tokens_by_importance(importance: list[float]) -> list[int]:
    """Token indices by falling importance; equal values keep the order of their index."""
    order = [0] * len(importance)
    for n, rank in enumerate(rank_by_importance(importance)):
        order[rank] = n
    return order


def squared_distances(tokens: list[Token]) -> list[list[float]]:
    """Squared Euclidean distances divided by the number of channels, for all pairs."""
    return [
        [
            sum((a - b) * (a - b) for a, b in zip(first, second, strict=True)) / len(first)
            for second in tokens
        ]
        for first in tokens
    ]


def peak_scores(
    tokens: list[Token], squared: list[list[float]], k: int, margin: Margin
) -> tuple[list[float], list[float]]:
    """Score log rho + log delta of each token, and the size float32 rounds it at."""
    count = len(tokens)
    k = min(k, count)
    largest = max(max(row) for row in squared)
    log_rho = [-sum(sorted(row)[:k]) / k for row in squared]
    scores, scales = [], []
    for i in range(count):
        denser = [
            squared[i][j]
            for j in range(count)
            if log_rho[j] > log_rho[i] or (log_rho[j] == log_rho[i] and j < i)
        ]
        delta_squared = min(denser) if denser else largest
        for j in range(count):  # only a token this near can change delta by being denser or not
            if j != i and squared[i][j] <= delta_squared:
                exact_tie = tokens[i] == tokens[j] or log_rho[i] == 0.0 or count == 2
                margin.note(log_rho[i], log_rho[j], largest, exact_tie)
        log_delta = math.log(math.sqrt(delta_squared)) if delta_squared > 0 else -math.inf
        scores.append(log_rho[i] + log_delta)
        scales.append(1 + largest + (0.5 * largest / delta_squared if delta_squared > 0 else 0.0))
    return scores, scales


def density_peaks(
    tokens: list[Token], num_clusters: int, k: int = 5, margin: Margin | None = None
) -> list[int]:
    """Cluster of each token by density peaks; clusters are numbered by falling score."""
    if num_clusters == 1:  # nothing is decided: every token is in the only cluster
        return [0] * len(tokens)
    margin = margin or Margin()
    squared = squared_distances(tokens)
    largest = max(max(row) for row in squared)
    scores, scales = peak_scores(tokens, squared, k, margin)

    left = list(range(len(tokens)))
    centres: list[int] = []
    while len(centres) < num_clusters:
        best = left[0]
        for i in left[1:]:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        centres.append(best)
        for i in left:
            if scores[best] == scores[i] or -math.inf not in (scores[best], scores[i]):
                exact_tie = scores[best] == -math.inf or len(tokens) == 2
                margin.note(scores[best], scores[i], max(scales[best], scales[i]), exact_tie)

    clusters = []
    for i in range(len(tokens)):
        if i in centres:
            clusters.append(centres.index(i))
            continue
        nearest = 0
        for cluster, centre in enumerate(centres):
            if squared[i][centre] < squared[i][centres[nearest]]:
                nearest = cluster
        for cluster, centre in enumerate(centres):
            if cluster != nearest:
                same = tokens[centre] == tokens[centres[nearest]]
                margin.note(squared[i][centre], squared[i][centres[nearest]], largest, same)
        clusters.append(nearest)
    return clusters


def cosine(first: Token, second: Token) -> float:
    """Cosine similarity, counted as 1 - 1e-6 above that; a zero token is similar to nothing."""
    product = sum(a * b for a, b in zip(first, second, strict=True))
    norms = math.sqrt(sum(a * a for a in first)) * math.sqrt(sum(b * b for b in second))
    return min(product / norms, MAX_SIMILARITY) if norms > 0 else 0.0


def find_mates(tokens: list[Token], num_pairs: int, margin: Margin | None = None) -> dict[int, int]:
    """The sources that are merged, each with its target: positions even -> odd."""
    if num_pairs == 0:
        return {}
    margin = margin or Margin()
    best: dict[int, tuple[float, int]] = {}
    for source in range(0, len(tokens), 2):
        for target in range(1, len(tokens), 2):
            similarity = cosine(tokens[source], tokens[target])
            if source not in best or similarity > best[source][0]:
                best[source] = similarity, target

    left = list(best)
    mates: dict[int, int] = {}
    while len(mates) < num_pairs:
        chosen = left[0]
        for source in left[1:]:
            if best[source][0] > best[chosen][0]:
                chosen = source
        left.remove(chosen)
        mates[chosen] = best[chosen][1]

    for source, mate in mates.items():
        similarity = best[source][0]
        for other in left:
            clear = tokens[other] == tokens[source] or similarity == MAX_SIMILARITY
            margin.note(similarity, best[other][0], 1.0, clear)
        for target in range(1, len(tokens), 2):
            if target != mate:
                clear = tokens[target] == tokens[mate] or similarity == MAX_SIMILARITY
                margin.note(similarity, cosine(tokens[source], tokens[target]), 1.0, clear)
    return mates


def match_pairs(tokens: list[Token], num_pairs: int, margin: Margin | None = None) -> list[int]:
    """Group of each token; groups are numbered by the position of the token that stays."""
    mates = find_mates(tokens, num_pairs, margin)
    groups: dict[int, int] = {}
    for position in range(len(tokens)):
        if position not in mates:
            groups[position] = len(groups)
    return [groups[mates.get(position, position)] for position in range(len(tokens))]


def bat(
    tokens: list[Token],
    importance: list[float],
    keep_rate: float,
    cluster_ratio: float = 0.4,
    match_ratio: float = 0.1,
    margin: Margin | None = None,
) -> list[int]:
    """Assignment of one image by decoupling, clustering and matching."""
    count = len(tokens)
    kept, clusters, pairs, attentive, _ = budget(count, keep_rate, cluster_ratio, match_ratio)
    if kept == count:
        return list(range(count))
    order = tokens_by_importance(importance)
    assignment = [-1] * count
    first = order[:attentive]
    for n, group in zip(first, match_pairs([tokens[n] for n in first], pairs, margin), strict=True):
        assignment[n] = group
    if clusters > 0:
        rest = order[attentive:]
        found = density_peaks([tokens[n] for n in rest], clusters, margin=margin)
        for n, cluster in zip(rest, found, strict=True):
            assignment[n] = attentive - pairs + cluster
    return assignment


def topk(importance: list[float], keep_rate: float) -> list[int]:
    """The most attended tokens stay, in their order; the rest are dropped."""
    kept = budget(len(importance), keep_rate)[0]
    if kept == len(importance):
        return list(range(kept))
    return [rank if rank < kept else -1 for rank in rank_by_importance(importance)]


def evit(importance: list[float], keep_rate: float) -> list[int]:
    """The most attended tokens stay, in their order; the rest share one more group."""
    kept = budget(len(importance), keep_rate)[0]
    if kept == len(importance):
        return list(range(kept))
    return [min(rank, kept) for rank in rank_by_importance(importance)]


def dpcknn(tokens: list[Token], keep_rate: float, margin: Margin | None = None) -> list[int]:
    """Density peaks over all tokens, in input order."""
    kept = budget(len(tokens), keep_rate)[0]
    if kept == len(tokens):
        return list(range(kept))
    return density_peaks(tokens, kept, margin=margin)


def tome(
    tokens: list[Token], sizes: list[float], keep_rate: float, margin: Margin | None = None
) -> list[int]:
    """Bipartite matching of even into odd tokens, repeated on the merged ones until K are left."""
    kept = budget(len(tokens), keep_rate)[0]
    assignment = list(range(len(tokens)))
    tokens, sizes = list(tokens), list(sizes)
    while len(tokens) > kept:
        num_merged = min(len(tokens) - kept, len(tokens) // 2)
        step = match_pairs(tokens, num_merged, margin)
        num_groups = len(tokens) - num_merged
        tokens = merge(tokens, sizes, step, num_groups)
        sizes = [
            sum(size for size, group in zip(sizes, step, strict=True) if group == k)
            for k in range(num_groups)
        ]
        assignment = [step[group] for group in assignment]
    return assignment


def merge(
    tokens: list[Token],
    weights: list[float],
    assignment: list[int],
    num_groups: int,
    normalize: bool = True,
) -> list[Token]:
    """Weighted mean (or weighted sum) of each group; zero weights in all give the plain mean."""
    merged = []
    for group in range(num_groups):
        members = [n for n, k in enumerate(assignment) if k == group]
        share = {n: weights[n] for n in members}
        total = sum(share.values())
        if normalize:
            share = {n: w / total if total else 1 / len(members) for n, w in share.items()}
        token = [0.0] * len(tokens[0])
        for n in members:
            for d, value in enumerate(tokens[n]):
                token[d] += share[n] * value
        merged.append(token)
    return merged
