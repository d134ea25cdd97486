"""Methods as their authors published them, against slow loops of their arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny, draw_batch
from stage_helpers import run_stage
from torch import Tensor

from arguments import get_args_parser, model_arguments
from models import REDUCTIONS, count_gmacs, make_reducing
from models.reduction import ReductionSettings
from models.vit import attend
from models.weights import merged_settings

IMAGES = draw_batch(3, 3, 32, 48)  # 4 x 6 patches


def heads_of(block, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention matrix (H, L, L), keys and values (H, L, d) of one image's tokens x (L, D)."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).reshape(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + sizes.log()
    return logits.softmax(dim=-1), k, v


def attend_slowly(block, x: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    return x + block.attn.proj((attention @ values).transpose(0, 1).flatten(1))


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b / (a.norm() * b.norm())).clamp(max=1 - 1e-6))


def soft_matching(keys: Tensor, num_pairs: int, num_protected: int) -> list[list[int]]:
    """ToMe's bipartite soft matching, one image: the members of every output token, in order.

    Tokens (L, d) at even places are sources, at odd ones targets; the first `num_protected`, class
    and distillation token, are never merged. Sources that stay come first, then the targets.
    """
    sources, targets = range(0, len(keys), 2), range(1, len(keys), 2)
    edges = {}
    for a in sources:
        free = [b for b in targets if a >= num_protected and b >= num_protected]
        if free:
            edges[a] = max(free, key=lambda b, a=a: (cosine(keys[a], keys[b]), -b))
    ranked = sorted(edges, key=lambda a: (-cosine(keys[a], keys[edges[a]]), a))
    merged = {a: edges[a] for a in ranked[:num_pairs]}
    kept = [[a] for a in sources if a not in merged]
    groups = [[b, *(a for a, mate in merged.items() if mate == b)] for b in targets]
    first = [g for g in kept + groups if g[0] < num_protected]  # class, then distillation token
    return sorted(first) + [g for g in kept + groups if g[0] >= num_protected]


def merge_groups(x: Tensor, sizes: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    totals = torch.stack([sizes[g].sum() for g in groups])
    sums = torch.stack([(sizes[g, None] * x[g]).sum(dim=0) for g in groups])
    return sums / totals[:, None], totals


def run_tome_slowly(model, image: Tensor, r: int, num_protected: int = 1) -> Tensor:
    """Last tokens of one image: r tokens less in every block, on keys, sizes in the attention."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    sizes = torch.ones(len(x))
    for block in model.blocks:
        attention, keys, values = heads_of(block, x, sizes)
        x = attend_slowly(block, x, attention, values)
        num_pairs = min(r, (len(x) - num_protected) // 2)
        groups = soft_matching(keys.mean(dim=0), num_pairs, num_protected)
        x, sizes = merge_groups(x, sizes, groups)
        x = x + block.mlp(block.norm2(x))
    return x


@pytest.mark.parametrize("r", [1, 2, 5, 40])
@torch.no_grad()
def test_tome_as_published(r: int) -> None:
    model = build_tiny(img_size=(32, 48), depth=4, reduction="tome", tome_r=r)
    make_reducing(model, reduction="tome", tome_r=r)
    assert model.reduction_loc == (0, 1, 2, 3) and model.settings.is_proportional
    slow = torch.stack([run_tome_slowly(model, image, r) for image in IMAGES])
    features = model.norm(slow)
    torch.testing.assert_close(model.forward_features(IMAGES), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(IMAGES), model.head(features[:, 0]), rtol=0, atol=1e-4)
    lengths = [stage.num_outputs for stage in model.stages()]
    expected, num_tokens = [], 24
    for _ in range(4):
        num_tokens -= min(r, num_tokens // 2)
        expected.append(num_tokens)
    assert lengths == expected
    assert torch.equal(make_reducing(model, 1.0, **vars(model.settings))(IMAGES), dense(IMAGES))


def dense(images: Tensor) -> Tensor:
    return build_tiny(img_size=(32, 48), depth=4, reduction="none")(images)


@torch.no_grad()
def test_tome_as_published_with_a_distillation_token() -> None:
    import timm
    from conftest import randomise

    torch.manual_seed(0)
    small = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = randomise(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **small))
    make_reducing(model, reduction="tome", tome_r=4)
    slow = torch.stack([run_tome_slowly(model, image, 4, num_protected=2) for image in IMAGES])
    features = model.norm(slow)
    torch.testing.assert_close(model.forward_features(IMAGES), features, rtol=0, atol=1e-5)


def run_ppt_slowly(model, image: Tensor, rates: tuple[float, ...], threshold: float):
    """Last tokens of one image, and by stage whether it was pruned."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    sizes, pruned = torch.ones(len(x)), []
    for index, block in enumerate(model.blocks):
        attention, keys, values = heads_of(block, x, sizes)
        x = attend_slowly(block, x, attention, values)
        if index in model.reduction_loc:
            scores = (attention[:, 0].sum(dim=0) * values.norm(dim=-1).square().sum(0).sqrt())[1:]
            scores = scores / scores.sum()
            kept = -int(-rates[len(pruned)] * len(scores) // 1)
            pruned.append(bool(scores.var() >= threshold))
            if pruned[-1]:
                order = scores.argsort(descending=True)[:kept]
                groups = [[0], *([1 + int(n)] for n in order)]
            else:
                groups = soft_matching(keys.mean(dim=0), len(scores) - kept, 1)
            x, sizes = merge_groups(x, sizes, groups)
        x = x + block.mlp(block.norm2(x))
    return x, pruned


@torch.no_grad()
def test_ppt_as_published() -> None:
    rates = (0.8, 0.6, 0.7)
    model = build_tiny(
        img_size=(32, 48), depth=5, reduction="ppt", reduction_loc=(1, 2, 3), keep_rate=rates,
        proportional_attention="auto",
    )  # fmt: skip
    images = draw_batch(6, 3, 32, 48)
    variances = [run_ppt_slowly(model, image, rates, 0.0)[1] for image in images]
    assert all(map(all, variances)), "a threshold of 0 always prunes"
    seen = set()
    for threshold in (0.0, 1e-4, 2e-4, 5e-4, 1e-3, 1.0):
        model.set_reduction("ppt", ppt_threshold=threshold)
        slow = [run_ppt_slowly(model, image, rates, threshold) for image in images]
        features = model.norm(torch.stack([tokens for tokens, _ in slow]))
        torch.testing.assert_close(model.forward_features(images), features, rtol=0, atol=1e-5)
        seen |= {(stage, was) for _, pruned in slow for stage, was in enumerate(pruned)}
        _, assignments = model.forward_with_assignments(images)
        for stage, assignment in enumerate(assignments):
            drops = (assignment == -1).any(dim=1).tolist()
            assert drops == [pruned[stage] for _, pruned in slow]
    assert len(seen) == 6, "every stage prunes some images and pools others"


# Proportional attention --------------------------------------------------------------------------


@torch.no_grad()
def test_proportional_attention_equals_repeating_each_merged_token() -> None:
    model = build_tiny(img_size=(32, 48), reg_tokens=2)
    attn, prefix = model.blocks[2].attn, 3
    x = draw_batch(2, prefix + 7, 32)
    sizes = torch.tensor([[1.0, 3, 1, 2, 5, 1, 4], [2, 2, 2, 1, 1, 1, 8]])
    bias = F.pad(sizes.log(), (prefix, 0))
    got = attend(attn, x, rope=None, importance="class", bias=bias)
    for b in range(2):
        count = torch.cat([torch.ones(prefix), sizes[b]]).long()
        repeated = x[b].repeat_interleave(count, dim=0)
        first = count.cumsum(0) - count  # where each token stands among the repeated ones
        all_out = attend(attn, repeated[None], rope=None, importance="class", bias=None)
        torch.testing.assert_close(got.y[b], all_out.y[0, first], rtol=0, atol=1e-5)
        rows = torch.stack([part.sum() for part in all_out.importance[0].split(count.tolist())])
        torch.testing.assert_close(got.importance[b], rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["bat", "evit", "dpcknn", "tome"])
@torch.no_grad()
def test_proportional_attention_of_a_whole_model(method: str) -> None:
    """A block after a stage sees each token as often as the patches that it stands for."""
    model = build_tiny(
        img_size=(32, 48), depth=3, reduction_loc=(1,), reduction=method, keep_rate=0.4,
        proportional_attention="on",
    )  # fmt: skip
    outputs = []
    model.blocks[1].register_forward_hook(lambda block, inputs, output: outputs.append(output))
    logits, last = model(IMAGES), model.blocks[2]
    stage = outputs[0]
    assert stage.sizes.max() > 1 and (stage.sizes.sum(dim=1) == 24).all()
    for b in range(3):
        count = F.pad(stage.sizes[b].long(), (1, 0), value=1)
        repeated = stage.tokens[b].repeat_interleave(count, dim=0)
        attention, _, values = heads_of(last, repeated)
        tokens = attend_slowly(last, repeated, attention, values)[:1]
        tokens = tokens + last.mlp(last.norm2(tokens))
        expected = model.head(model.norm(tokens[0]))
        torch.testing.assert_close(logits[b], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, make_reducing(model, proportional_attention="off")(IMAGES))


def test_another_method_does_not_inherit_proportional_attention() -> None:
    model = build_tiny(proportional_attention="on")
    model.set_reduction("evit")
    assert not model.settings.is_proportional
    model.set_reduction("bat")
    assert model.settings.is_proportional
    model.set_reduction("evit", proportional_attention="on")
    assert model.settings.is_proportional
    off = build_tiny(proportional_attention="off")
    off.set_reduction("ppt")
    assert not off.settings.is_proportional


def test_auto_is_the_methods_own() -> None:
    own = {name for name in REDUCTIONS if ReductionSettings(name).is_proportional}
    assert own == {"bat", "tome", "dpcknn", "ppt"}
    for name in REDUCTIONS:
        assert ReductionSettings(name, proportional_attention="on").is_proportional
        assert not ReductionSettings(name, proportional_attention="off").is_proportional


@torch.no_grad()
def test_bf16_logits_of_proportional_attention() -> None:
    model = build_tiny(img_size=(32, 48), depth=4, keep_rate=0.5, proportional_attention="on")
    expected, assignments = model.forward_with_assignments(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        got, own = model.forward_with_assignments(IMAGES)
    if all(torch.equal(a, b) for a, b in zip(own, assignments, strict=True)):
        assert (got.float() - expected).norm() <= 1e-2 * expected.norm()
    assert model.bfloat16()(IMAGES.bfloat16()).isfinite().all()


# Settings ---------------------------------------------------------------------------------------


def test_costs_are_equal_at_a_keep_rate(small_model) -> None:
    """Of the methods with three stages and one budget; EViT has a token more, Evo-ViT its own."""
    tokens, gmacs = {}, {}
    for method in ("bat", "topk", "tome", "dpcknn", "random", "ppt"):
        small_model.set_reduction(method)
        for keep_rate in (0.7, 0.3):
            small_model.set_keep_rate(keep_rate)
            lengths = [stage.num_outputs for stage in small_model.stages()]
            tokens.setdefault(keep_rate, set()).add(tuple(lengths))
            gmacs.setdefault(keep_rate, []).append(count_gmacs(small_model))
    small_model.set_reduction("bat")
    small_model.set_keep_rate(0.7)
    assert tokens == {0.7: {(138, 97, 68)}, 0.3: {(59, 18, 6)}}
    for values in gmacs.values():
        assert max(values) < 1.02 * min(values)  # the choice of the groups


def test_published_costs(small_model) -> None:
    make_reducing(small_model, 0.5, reduction="evo", reduction_loc=(4, 8))
    assert count_gmacs(small_model) == pytest.approx(3.033, abs=5e-4)
    make_reducing(small_model, reduction="ppt", tome_r=50)
    assert [stage.num_outputs for stage in small_model.stages()] == [146, 96, 48]  # half at most
    make_reducing(small_model, reduction="tome", tome_r=13)
    assert small_model.stages()[-1].num_outputs == 40
    make_reducing(small_model)


@torch.no_grad()
def test_clustering_by_keys_and_over_all_neighbours() -> None:
    x, importance = draw_batch(2, 30, 8), draw_batch(2, 30, seed=1).softmax(dim=1)
    plain = run_stage("bat", x, importance)
    for changes in ({"density_neighbors": 0}, {"density_neighbors": 1}, {"merge_weights": "size"}):
        assert not torch.equal(run_stage("bat", x, importance, **changes).tokens, plain.tokens)
    # The tokens stand in for their keys there, so that both features choose alike.
    by_keys = run_stage("bat", x, importance, features="keys")
    assert torch.equal(by_keys.assignment, plain.assignment)
    all_of_them = run_stage("bat", x, importance, density_neighbors=30)
    whole = run_stage("bat", x, importance, density_neighbors=0)
    assert torch.equal(all_of_them.assignment, whole.assignment)
    model = build_tiny(img_size=(32, 48))
    (tokens, _), (keys, _) = (
        (model.set_reduction("bat", features=name), model.forward_with_assignments(IMAGES)[1])[1]
        for name in ("tokens", "keys")
    )
    assert not torch.equal(tokens, keys)


WHERE = {"keep_rate": 0.7, "reduction_loc": (1, 2)}
BAT = {"reduction": "bat", "cluster_ratio": 0.4, "keep_rate": 0.7, "reduction_loc": (1, 2)}
TOME = {"reduction": "tome", "tome_r": 13, "keep_rate": 0.7, "proportional_attention": "on"}
TOME |= {"reduction_loc": (0, 1, 2)}
VARIANT = {"reduction": "tome", "keep_rate": 0.7, "reduction_loc": (1, 2), "features": "tokens"}


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        (BAT, {"keep_rate": 0.5}, BAT | {"keep_rate": 0.5}),
        (BAT, {"reduction": "bat"}, BAT),
        # Of another method only where and how much stays.
        (
            BAT,
            {"reduction": "evit"},
            {"reduction": "evit", "keep_rate": 0.7, "reduction_loc": (1, 2)},
        ),
        (
            BAT,
            {"reduction": "tome", "tome_r": 5},
            {"reduction": "tome", "tome_r": 5},
        ),
        (
            BAT,
            {"reduction": "ppt", "tome_r": 5},
            {"reduction": "ppt", "tome_r": 5, "reduction_loc": (1, 2)},
        ),
        (TOME, {"reduction": "bat"}, {"reduction": "bat", "keep_rate": 0.7}),
        (TOME, {"tome_r": 8}, TOME | {"tome_r": 8}),
        (TOME, {"keep_rate": 0.5}, {"reduction": "tome", "keep_rate": 0.5}),
        (VARIANT, {"tome_r": 5}, {"reduction": "tome", "tome_r": 5}),
        (
            {"model_name": "x"} | BAT,
            {"reduction": "none"},
            {"model_name": "x", "reduction": "none", "keep_rate": 0.7, "reduction_loc": (1, 2)},
        ),
    ],
    ids=str,
)
def test_settings_of_another_method_are_left_behind(settings, changes, expected) -> None:
    assert merged_settings(settings, changes) == expected


def test_flags_are_over_the_checkpoint_and_variants_over_flags() -> None:
    args = get_args_parser().parse_args(
        ["--reduction", "ppt", "--tome-r", "3", "--proportional-attention", "off"]
    )
    stored = {"model_name": "bat_deit_tiny_patch16_224"} | BAT
    given = model_arguments(args, stored)
    assert (given["reduction"], given["tome_r"], given["reduction_loc"]) == ("ppt", 3, (1, 2))
    assert given["proportional_attention"] == "off" and "cluster_ratio" not in given
    own = model_arguments(args, stored, {"reduction": "bat", "match_ratio": 0.2, "tome_r": None})
    assert (own["reduction"], own["match_ratio"], own["tome_r"]) == ("bat", 0.2, None)
    assert own["cluster_ratio"] == 0.4 and own["proportional_attention"] == "off"
