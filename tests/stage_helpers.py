"""What the tests of the stage share: images with a clear answer, stage inputs, assertions."""

from collections.abc import Callable

import reference
import torch
from conftest import DESIGN
from torch import Tensor

from models.reduction import ReducedTokens, ReductionSettings, Stage, reduce_tokens

MIN_MARGIN = 2e-6  # about 32 float32 roundings


def draw_tokens(kind: str, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """(count, dim) float32 tokens of one image, of one kind of difficulty."""
    normal = torch.randn(count, dim, generator=generator)
    if kind == "equal":
        return normal[:1].expand(count, dim).clone()
    if kind == "zero":
        return torch.zeros(count, dim)
    if kind in ("duplicates", "few"):
        pool = max(1, count // 2) if kind == "duplicates" else min(3, count)
        return normal[torch.randint(pool, (count,), generator=generator)]
    if kind == "blobs":
        centre = 4 * torch.randn(4, dim, generator=generator)
        return centre[torch.randint(4, (count,), generator=generator)] + normal
    scale, offset = {
        "normal": (1, 0),
        "tight": (1e-3, 0),
        "wide": (50, 0),
        "shifted": (1, 2),
        "far": (1, 300),
    }[kind]
    return normal * scale + offset


def draw_importance(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """(count,) float32 importance of one image: attention-like, with or without ties."""
    if kind == "distinct":
        return torch.randn(count, generator=generator).softmax(0) * 0.9
    if kind == "ties":
        return torch.randint(1, 4, (count,), generator=generator) / (4 * count)
    return torch.full((count,), {"equal": 1 / count, "zero": 0.0}[kind])


def draw_images(
    count: int,
    build: Callable[[torch.Generator], tuple[Tensor, ...]],
    solve: Callable[..., list[int]],
    tries: int = 200,
) -> tuple[list[Tensor], Tensor]:
    """Draws images until `count` of them have a clear answer.

    `build` draws the inputs of one image, `solve` assigns it from these as lists, and a margin.

    Returns:
        The inputs, each stacked over the images, and the (count, N) int64 expected assignment.
    """
    images, answers = [], []
    for seed in range(tries):
        inputs = build(torch.Generator().manual_seed(seed))
        margin = reference.Margin()
        answer = solve(*(value.tolist() for value in inputs), margin)
        if margin.smallest >= MIN_MARGIN:
            images.append(inputs)
            answers.append(answer)
        if len(images) == count:
            stacked = [torch.stack(values) for values in zip(*images, strict=True)]
            return stacked, torch.tensor(answers, dtype=torch.int64)
    raise AssertionError(f"only {len(images)} of {tries} images have a clear answer")


def draw_bat(
    count: int, num_tokens: int, dim: int, tokens: str, importance: str, *rates: float
) -> tuple[list[Tensor], Tensor]:
    """Draws images with a clear BAT assignment; `rates` are keep rate, cluster, match ratio."""
    return draw_images(
        count,
        lambda generator: (
            draw_tokens(tokens, num_tokens, dim, generator),
            draw_importance(importance, num_tokens, generator),
        ),
        lambda x, weights, margin: reference.bat(x, weights, *rates, margin=margin),
    )


def assign_by_loop(method, tokens, importance, keep_rate, margin):
    """Assignment of one image; where no loop decides by distance, any image is clear."""
    if method == "bat":
        return reference.bat(tokens, importance, keep_rate, margin=margin)
    if method == "dpcknn":
        return reference.dpcknn(tokens, keep_rate, margin)
    if method == "tome":
        return reference.tome(tokens, [1.0] * len(tokens), keep_rate, margin)
    if method in ("topk", "evit"):
        return getattr(reference, method)(importance, keep_rate)
    return [-1] * len(tokens)  # none, random: checked elsewhere


def draw_stage(method, count, num_tokens, dim, tokens, importance, keep_rate):
    """Images with a clear assignment by `method`: ([x, importance], expected)."""
    return draw_images(
        count,
        lambda generator: (
            draw_tokens(tokens, num_tokens, dim, generator),
            draw_importance(importance, num_tokens, generator),
        ),
        lambda x, weights, margin: assign_by_loop(method, x, weights, keep_rate, margin),
    )


def run_stage(
    method: str,
    x: Tensor,
    importance: Tensor,
    keep_rate: float = 0.5,
    sizes: Tensor | None = None,
    index: int = 0,
    seed: int = 0,
    **settings,
) -> ReducedTokens:
    """One stage; by default the first one, with one patch a token and the default ratios."""
    sizes = torch.ones(x.shape[:2]) if sizes is None else sizes
    chosen = ReductionSettings(reduction=method, reduction_seed=seed, **DESIGN | settings)
    heads = x.unsqueeze(1)  # (B, 1, N, D): keys and values are the tokens themselves
    stage = Stage(x, importance, sizes, chosen, keys=heads, values=heads, index=index)
    return reduce_tokens(stage, keep_rate)


def merge_images(
    x: Tensor, weights: Tensor, assignment: Tensor, num_groups: int, normalize: bool = True
) -> Tensor:
    """(B, num_groups, D) by the slow loop, rounded to float32."""
    images = zip(x.tolist(), weights.tolist(), assignment.tolist(), strict=True)
    return torch.tensor([reference.merge(*image, num_groups, normalize) for image in images])


def lone_tokens(assignment: Tensor) -> list[tuple[int, int, int]]:
    """(image, token, group) of every token alone in its group."""
    return [
        (b, n, group)
        for b, row in enumerate(assignment.tolist())
        for n, group in enumerate(row)
        if group >= 0 and row.count(group) == 1
    ]


def assert_complete(assignment: Tensor, shape: tuple[int, int], num_groups: int) -> None:
    """Every output index occurs in every image, and nothing but these and -1."""
    assert assignment.dtype == torch.int64
    assert assignment.shape == shape
    for row in assignment.tolist():
        assert set(row) - {-1} == set(range(num_groups))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, signs of zeros included."""
    bits = [value.detach().contiguous().view(torch.int32) for value in (actual, expected)]
    assert torch.equal(*bits)
