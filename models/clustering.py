"""Clustering and matching tokens: the arithmetic that the methods share.

Letters as in `models/reduction.py`. Everything is computed in float32 whatever the autocast type,
with shapes that never depend on the data; equal values are ordered by index. Imports torch only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_COSINE = 1 - 1e-6  # exact duplicates tie here instead of being ranked by rounding
SMALL_PRODUCT = 16  # rows up to which `inner_products` avoids the matrix product
# Of a matrix of tokens by tokens this many elements are in memory at a time (all of it at 224
# pixels), but as many rows at least, since more blocks make larger graphs.
BLOCK_ELEMENTS, BLOCK_ROWS = 2**17, 128
QUERY_ROWS = 512  # queries whose attention logits are in memory at a time


@contextmanager
def ieee_float32(device_type: str) -> Iterator[None]:
    """Arithmetic in true float32: autocast off, and TF32 off as well on a GPU in eager mode.

    No process-wide setting is touched on a CPU, nor in a compiled or exported graph, which cannot
    switch one. There, true float32 is promised while torch's float32 precision is at its default:
    a CPU with bfloat16 units rounds matrix products when
    `torch.backends.mkldnn.matmul.fp32_precision` (or the setting above it) asks for less.

    Args:
        device_type: "cpu", "cuda", ...: whose autocast is switched off.
    """
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    switched = device_type == "cuda" and not torch.compiler.is_compiling()
    matmul = torch.backends.cuda.matmul
    if switched:
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        if autocast:
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        if switched:
            matmul.fp32_precision = precision


def matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product in float32 under any autocast: (B, I, D) x (B, D, J) -> (B, I, J)."""
    with ieee_float32(left.device.type):
        return left.float() @ right.float()


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of tokens, bit-identical for bit-identical tokens wherever they stand.

    Matrix products of few rows are rounded by position in some CPU libraries, which would order
    duplicates at random; few rows are therefore multiplied and summed one by one.

    Args:
        left: (B, I, D) tokens.
        right: (B, J, D) tokens.

    Returns:
        (B, I, J) float32 inner products.
    """
    if min(left.shape[1], right.shape[1]) <= SMALL_PRODUCT:
        return (left.float().unsqueeze(2) * right.float().unsqueeze(1)).sum(dim=-1)
    return matmul_float32(left, right.transpose(-2, -1))


def gather_tokens(x: Tensor, token_idx: Tensor) -> Tensor:
    """Picks tokens by index: whole rows are copied, several times faster than `Tensor.gather`.

    Args:
        x: (B, N, D) tokens.
        token_idx: (B, L) int64 indices into the N tokens.

    Returns:
        (B, L, D) the picked tokens, bit for bit.
    """
    batch, num_tokens, dim = x.shape
    image = torch.arange(batch, device=x.device).unsqueeze(1)  # (B, 1)
    if not x.is_contiguous():  # as without the prefix tokens: rows of a view need all of it copied
        return x[image, token_idx]
    index = (token_idx + image * num_tokens).flatten()
    return x.view(batch * num_tokens, dim).index_select(0, index).view(*token_idx.shape, dim)


def descending_rank(values: Tensor) -> Tensor:
    """(B, N) int64 rank of each of the values (B, N), 0 = largest; equal ones rank by index."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    position = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, position)


def class_token_importance(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """The class token's attention row, averaged over heads: BAT's and EViT's importance.

    Args:
        query: (B, H, 1, D / H) the class token's query.
        keys: (B, H, L, D / H) keys of all tokens, prefix tokens included.
        scale: factor on the products, 1 / sqrt(D / H) for a plain ViT.
        bias: (B, L) float32 added to the logits of each key, or None.

    Returns:
        (B, L) float32 attention in [0, 1], summing to 1 over all tokens; differentiable.
    """
    # One row needs no matrix product, which would copy the strided keys first.
    row = ((query.float() * scale) * keys.float()).sum(dim=-1)  # (B, H, L)
    if bias is not None:
        row = row + bias.unsqueeze(1)
    return row.softmax(dim=-1).mean(dim=1)  # (B, L)


def attention_received(
    queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """The attention that a token gets, averaged over queries and heads: without a class token.

    Args:
        queries: (B, H, L, D / H) queries of all tokens.
        keys: (B, H, L, D / H) their keys.
        scale: factor on the products.
        bias: as in `class_token_importance`.

    Returns:
        (B, L) float32 attention in [0, 1], summing to 1 over all tokens; differentiable.
    """
    heads, length = queries.shape[1:3]
    keys, received = keys.flatten(0, 1), 0.0
    for some in queries.split(QUERY_ROWS, dim=2):  # never all L x L logits at once
        logits = matmul_float32((some.float() * scale).flatten(0, 1), keys.mT)
        logits = logits.unflatten(0, (-1, heads))  # (B, H, rows, L)
        if bias is not None:
            logits = logits + bias[:, None, None]
        received = received + logits.softmax(dim=-1).sum(dim=(1, 2))  # (B, L)
    return received / (heads * length)


def in_blocks(function: Callable[[slice], Tensor], num_rows: int, num_columns: int) -> Tensor:
    """A function of the rows of a large matrix, called with some of them at a time.

    Eagerly run, only so much is in memory; a compiler may compute blocks together. All blocks are
    equally long, so the last may overlap the one before: matrix products of one shape round equal
    tokens equally.

    Args:
        function: rows -> (B, rows, *).
        num_rows: rows of the matrix, at least 1.
        num_columns: its columns.

    Returns:
        (B, num_rows, *) the results in order.
    """
    most = max(BLOCK_ROWS, BLOCK_ELEMENTS // num_columns)
    size = math.ceil(num_rows / math.ceil(num_rows / most))
    parts = []
    for start in range(0, num_rows, size):
        first = min(start, num_rows - size)
        parts.append(function(slice(first, first + size))[:, start - first :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SquaredDistances:
    """Squared Euclidean distances divided by the channel count, by rows of the Gram matrix.

    Centring first keeps the products small; the squared norms come from the Gram matrix's own
    diagonal, so bit-identical tokens, and a token and itself, are exactly 0 apart. The last block
    of rows is kept: a single one is computed once, several are computed anew in every pass.
    """

    def __init__(self, x: Tensor) -> None:
        """Takes tokens x (B, M, D)."""
        x = x.float()
        self.centred = x - x.mean(dim=1, keepdim=True)
        self._rows = self._gram = self._squared = None
        self.norms = in_blocks(self._diagonal, x.shape[1], x.shape[1])  # (B, M)

    def __call__(self, rows: slice) -> Tensor:
        """(B, rows, M) float32, >= 0: from some tokens to all of them."""
        if rows != self._rows or self._squared is None:
            gram, norms = self._products(rows), self.norms
            # In place: at these sizes fresh memory costs a CPU more than the arithmetic.
            squared = (norms[:, rows].unsqueeze(2) + norms.unsqueeze(1)).sub_(gram, alpha=2)
            self._squared, self._gram = squared.clamp_(min=0).div_(self.centred.shape[2]), None
        return self._squared

    def _diagonal(self, rows: slice) -> Tensor:
        token = torch.arange(rows.stop - rows.start, device=self.centred.device)
        return self._products(rows)[:, token, token + rows.start]  # (B, rows)

    def _products(self, rows: slice) -> Tensor:
        if rows != self._rows or self._gram is None:
            self._gram = self._squared = None  # free them before the next are there
            self._rows, self._gram = rows, inner_products(self.centred[:, rows], self.centred)
        return self._gram


def density_peaks(x: Tensor, num_clusters: int, k: int = 5) -> Tensor:
    """Clusters tokens around density peaks (BAT's clustering; Rodriguez and Laio, Science 2014).

    With dist the Euclidean distance / sqrt(D): log rho is minus the mean of the k smallest squared
    distances (the token itself counts), delta the distance to the nearest denser token (the largest
    distance of the image if none is denser), and the centres are the tokens with the largest
    log rho + log delta. Among equal densities the lower index is the denser one. Every other token
    joins its nearest centre; ties go to the centre with the higher score, and a centre always
    belongs to its own cluster. Nothing is differentiable.

    Args:
        x: (B, M, D) tokens.
        num_clusters: clusters C, 1 <= C <= M.
        k: neighbours of the density estimate; at most M are used.

    Returns:
        (B, M) int64 cluster of each token in 0 .. C-1; clusters in descending score.

    Raises:
        ValueError: num_clusters is outside 1 .. M.
    """
    num_tokens = x.shape[1]
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"num_clusters must be in 1 .. {num_tokens}, got {num_clusters}")
    squared = SquaredDistances(x.detach())

    # Step 1: density from the k nearest neighbours, in logarithms so that it never saturates.
    def density(rows: slice) -> Tensor:  # (B, rows, 2) with the largest distance
        distances = squared(rows)  # (B, rows, M)
        nearest = distances
        if k < num_tokens:
            nearest = distances.topk(k, dim=-1, largest=False).values  # (B, rows, k)
        return torch.stack([-nearest.mean(dim=-1), distances.amax(dim=-1)], dim=-1)

    log_rho, farthest = in_blocks(density, num_tokens, num_tokens).unbind(dim=-1)  # (B, M) each

    # Step 2: distance to the nearest denser token, denser[b, i, j] = "j is denser than i".
    rank = descending_rank(log_rho)  # (B, M): of equal densities the lower index comes first

    def nearest_denser(rows: slice) -> Tensor:
        denser = rank.unsqueeze(1) < rank[:, rows].unsqueeze(2)  # (B, rows, M)
        return torch.where(denser, squared(rows), torch.inf).amin(dim=-1)

    delta = in_blocks(nearest_denser, num_tokens, num_tokens)  # (B, M)
    delta = torch.where(delta.isinf(), farthest.amax(dim=1, keepdim=True), delta).sqrt()

    # Step 3: centres, best score first; a stable sort breaks ties by index.
    score = log_rho + delta.log()  # log 0 = -inf
    order = score.argsort(dim=-1, descending=True, stable=True)
    centres = order[:, :num_clusters]  # (B, C)

    # Step 4: nearest centre; min returns the first of equals, the one with the higher score.
    def nearest_centre(rows: slice) -> Tensor:
        columns = centres.unsqueeze(1).expand(-1, rows.stop - rows.start, -1)  # (B, rows, C)
        return squared(rows).gather(2, columns).min(dim=-1).indices

    cluster = in_blocks(nearest_centre, num_tokens, num_tokens)  # (B, M)
    own = torch.arange(num_clusters, device=x.device).expand_as(centres)
    return cluster.scatter(1, centres, own)


def match_pairs(x: Tensor, num_pairs: int) -> Tensor:
    """Merges look-alike tokens by bipartite matching (BAT's matching of attentive tokens).

    Tokens at even positions are sources, those at odd positions targets. A source's mate is its
    most cosine-similar target; the P sources with the most similar mates are merged into them. Ties
    go to the lower position; a target may take several sources. Nothing is differentiable.

    Args:
        x: (B, A, D) tokens, in falling importance for BAT.
        num_pairs: sources P to merge, 0 <= P <= floor(A / 2).

    Returns:
        (B, A) int64 group in 0 .. A-P-1, numbered by the rank of the token that stays.

    Raises:
        ValueError: num_pairs is outside 0 .. floor(A / 2).
    """
    order = torch.arange(x.shape[1], device=x.device)
    return _match(x, num_pairs, 0, order)


def match_patches(x: Tensor, num_pairs: int, num_prefix_tokens: int = 1) -> Tensor:
    """ToMe's bipartite soft matching (Bolya et al., ICLR 2023, section 3) of the patch tokens.

    As `match_pairs`, but places are counted from the first prefix token, which is never merged (the
    published code protects the class and the distillation token), and the groups are numbered as
    the published code puts them: sources that stay, then targets. Without a class token it puts the
    former by falling similarity, here they keep their order.

    Args:
        x: (B, N, D) what is compared, of the patch tokens.
        num_pairs: sources to merge, 0 to floor(N / 2).
        num_prefix_tokens: tokens in front of them.

    Returns:
        (B, N) int64 group in 0 .. N-P-1.
    """
    first = num_prefix_tokens % 2  # the first patch at an even place of the sequence
    position = torch.arange(x.shape[1], device=x.device)
    return _match(x, num_pairs, first, torch.cat([position[first::2], position[1 - first :: 2]]))


def nearest_targets(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The most cosine-similar target of every source.

    Args:
        x: (B, N, D) tokens.
        first: 0 or 1, the place of the first source; targets stand between the sources.

    Returns:
        (B, sources) float32 similarity, at most `MAX_COSINE`, and (B, sources) int64 index among
        the targets; ties: the lower one.
    """
    x = x.float()
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    sources, targets = unit[:, first::2], unit[:, 1 - first :: 2]

    def nearest(rows: slice) -> Tensor:
        similarity = inner_products(sources[:, rows], targets).clamp_(max=MAX_COSINE)
        best = similarity.max(dim=-1)  # the first of equals
        return torch.stack([best.values, best.indices.float()], dim=-1)  # exact up to 2^24

    best, mate = in_blocks(nearest, sources.shape[1], targets.shape[1]).unbind(dim=-1)
    return best, mate.long()


def _match(x: Tensor, num_pairs: int, first: int, order: Tensor) -> Tensor:
    """(B, N) groups of `match_pairs`, the sources being `first`, `first` + 2, ...

    `order` (N,) says in which order of the tokens that stay the groups are numbered.
    """
    batch, num_tokens, _ = x.shape
    if not 0 <= num_pairs <= num_tokens // 2:
        raise ValueError(f"num_pairs must be in 0 .. {num_tokens // 2}, got {num_pairs}")
    order = order.expand(batch, -1)  # (B, N)
    stays = torch.ones_like(order, dtype=torch.bool)
    if num_pairs > 0:
        best, mate = nearest_targets(x.detach(), first)
        strongest = best.argsort(dim=-1, descending=True, stable=True)[:, :num_pairs]  # (B, P)
        source = 2 * strongest + first  # (B, P) positions among the N tokens
        target = 2 * mate.gather(1, strongest) + 1 - first
        stays = stays.scatter(1, source, False)
    number = stays.gather(1, order).cumsum(dim=-1) - 1  # (B, N) in that order
    group = torch.empty_like(order).scatter(1, order, number)
    return group if num_pairs == 0 else group.scatter(1, source, group.gather(1, target))
