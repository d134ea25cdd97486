"""Any plain ViT of timm made reducing: what timm's models can, importance, rotation, pooling."""

import copy
import io
import pickle

import pytest
import timm
import torch
from conftest import DESIGN, draw_batch, randomise
from stage_helpers import run_stage
from timm.layers import apply_rot_embed_cat
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import models.vit
from models import count_gmacs, describe, make_reducing
from models.reduction import ReducedTokens, heaviest_members, merge_tokens
from models.trace import unmerge
from models.vit import Attended, ReducingTransformer, attend, gather_rope, timm_class

FAMILIES = {
    "deit": "deit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "siglip": "vit_base_patch16_siglip_224",
    "siglip_gap": "vit_base_patch16_siglip_gap_224",
    "post_norm": "vit_base_patch16_xp_224",
    "parallel": "vit_small_patch16_18x2_224",
    "side_by_side": "vit_pwee_patch16_reg1_gap_256",
    "eva": "eva_giant_patch14_224",
    "eva02": "eva02_tiny_patch14_224",
    "eva02_post_norm": "eva02_enormous_patch14_clip_224",
    "dinov3": "vit_small_patch16_dinov3",
    "mixed": "vit_small_patch16_rope_mixed_224",
    "pe": "vit_pe_core_tiny_patch16_384",
}
DISTINCT = ("distilled", "siglip", "side_by_side", "dinov3", "mixed")
every_family = pytest.mark.parametrize("family", FAMILIES)
IMG_SIZE = (40, 32)  # 5 x 4 patches
images = draw_batch(2, 3, *IMG_SIZE)


def build(family: str, **changes: object) -> nn.Module:
    """timm's model, small, with random weights."""
    torch.manual_seed(0)
    small = {"img_size": IMG_SIZE, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return randomise(timm.create_model(FAMILIES[family], **small | {"num_classes": 5} | changes))


def convert(family: str, keep_rate: object = 0.5, **changes: object) -> ReducingTransformer:
    return make_reducing(build(family, **changes), keep_rate, **DESIGN)


# What timm's models can -------------------------------------------------------------------------


def test_the_object_its_modules_and_its_parameters_stay() -> None:
    model = build("eva02").train()
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    modules, parameters = [*model.modules()], dict(model.named_parameters())
    state = torch.get_rng_state()
    assert make_reducing(model) is model
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert all(new is parameters[name] for name, new in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def saved(model: nn.Module, family: str) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build(family)
    nn.init.zeros_(other.patch_embed.proj.weight)
    other.load_state_dict(torch.load(file))
    return make_reducing(other, (0.8, 0.6, 0.5), **DESIGN).eval()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("family", DISTINCT)
@torch.no_grad()
def test_copies_compute_the_same_and_are_independent(family: str, way: str) -> None:
    model = convert(family, (0.8, 0.6, 0.5))
    expected = model(images)
    if way == "save":
        other = saved(model, family)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(images), expected)
    assert other.reduction_settings() == model.reduction_settings()
    other.set_keep_rate(0.2)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("family", ["deit", "eva02", *DISTINCT])
def test_compiles_without_a_graph_break(family: str) -> None:
    torch._dynamo.reset()
    model = make_reducing(build(family, depth=2), 0.5, reduction_loc=(0,))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.forward_with_assignments, backend=counter, fullgraph=True)
    for batch_size in (2, 5, 3):
        batch = draw_batch(batch_size, 3, *IMG_SIZE)
        torch._dynamo.mark_dynamic(batch, 0)  # an error where the batch size becomes a constant
        with torch.no_grad():
            outputs, assignments = compiled(batch)
            expected, expected_assignments = model.forward_with_assignments(batch)
        assert counter.frame_count == 1
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)
        assert torch.equal(assignments[0], expected_assignments[0])


@every_family
@torch.no_grad()
def test_new_classifier_and_input_size_are_timms(family: str) -> None:
    dense, model = build(family), convert(family, 1.0)
    for network in (dense, model):
        torch.manual_seed(1)
        network.reset_classifier(7)
        network.set_input_size((32, 48))
        randomise(network)
    larger = draw_batch(2, 3, 32, 48)
    expected = dense(larger)
    assert expected.shape == (2, 7)
    torch.testing.assert_close(model(larger), expected, rtol=0, atol=1e-5)
    model.set_keep_rate(0.5)
    assert [stage.num_tokens for stage in model.stages()] == [24, 12, 6]
    model.reset_classifier(0)
    assert model(larger).shape == (2, 64)


@pytest.mark.parametrize("family", ["deit", *DISTINCT])
def test_gradient_checkpointing_changes_nothing_but_memory(family: str) -> None:
    results = []
    for enabled in (False, True):
        model = convert(family, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enabled)
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        outputs = model(images)
        outputs.square().sum().backward()
        assert len(calls) == (8 if enabled else 4)
        results.append([outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 20
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)


@every_family
def test_layer_decay_and_weight_decay_are_timms(family: str) -> None:
    dense, model = build(family), convert(family)
    assert model.no_weight_decay() == dense.no_weight_decay()
    assert model.group_matcher() == dense.group_matcher()
    groups = [
        create_optimizer_v2(network, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
        for network in (dense, model)
    ]
    scales, expected = (
        [(g["lr_scale"], g["weight_decay"], g["param_names"]) for g in optimizer.param_groups]
        if "param_names" in optimizer.param_groups[0]
        else [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
        for optimizer in groups
    )
    assert scales == expected and len({scale for scale, *_ in scales}) > 4


def test_distilled_heads_are_averaged_or_a_pair() -> None:
    model = convert("distilled")
    with torch.no_grad():
        tokens = model.forward_features(images)
        heads = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
        torch.testing.assert_close(model(images), (heads[0] + heads[1]) / 2)
        model.set_distilled_training(True)
        pair = model.train()(images)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(pair, heads)
    assert model.forward_with_assignments(images)[1][0].shape == (2, 20)


@pytest.mark.parametrize("family", ["deit", "dinov3", "mixed"])
def test_dropped_patches_and_other_image_sizes(family: str) -> None:
    model = convert(family, patch_drop_rate=0.5).train()
    outputs, assignments = model.forward_with_assignments(images)
    assert outputs.isfinite().all()
    assert [assignment.shape[1] for assignment in assignments] == [10, 5, 3]
    model = convert(family, dynamic_img_size=True)
    with torch.no_grad():
        _, assignments = model.forward_with_assignments(draw_batch(2, 3, 48, 64))
    assert [assignment.shape[1] for assignment in assignments] == [48, 24, 12]


@every_family
def test_operations_are_counted(family: str) -> None:
    dense, model = build(family), convert(family, 1.0)
    gmacs = count_gmacs(model)
    assert count_gmacs(dense) <= gmacs < 1.25 * count_gmacs(dense), "importance is added"
    model.set_keep_rate(0.5)
    assert count_gmacs(model) < 0.8 * gmacs
    assert describe(model).count("\n") == 8


# Converting once more, and in vain --------------------------------------------------------------


@torch.no_grad()
def test_converting_again_equals_converting_once() -> None:
    settings = {"keep_rate": (0.4, 0.9), "reduction_loc": (0, 3), "reduction": "tome"}
    settings |= {"importance": "received", "cluster_ratio": 0.2, "merge_weights": "mean"}
    model = make_reducing(convert("dinov3"), **settings)
    once = make_reducing(build("dinov3"), **settings)
    assert model.reduction_settings() == once.reduction_settings()
    assert model.reduction_settings().items() >= settings.items()
    assert [type(block) for block in model.blocks] == [type(block) for block in once.blocks]
    assert torch.equal(model(images), once(images))


def record(model: nn.Module) -> list:
    return [(type(module), dict(vars(module))) for module in (model, *model.blocks)]


@pytest.mark.parametrize("start", [build, convert])
def test_a_failing_check_leaves_the_model_as_it_was(monkeypatch, start) -> None:
    model = start("eva02")
    before, expected = record(model), model(images)

    def attend_wrongly(*args, **kwargs) -> Attended:
        attended = attend(*args, **kwargs)
        return attended._replace(y=1.01 * attended.y)

    monkeypatch.setattr(models.vit, "attend", attend_wrongly)
    with pytest.raises(ValueError, match=r"Eva computes something else.*differs by 0\.0"):
        make_reducing(model, 0.8, reduction_loc=(0, 1), reduction="evit")
    monkeypatch.undo()
    assert record(model) == before
    assert torch.equal(model(images), expected)
    with pytest.raises(ValueError, match="keep_rate"):
        make_reducing(model, 0)
    assert record(model) == before


def test_a_wrong_number_of_tokens_fails_the_check(monkeypatch) -> None:
    keep = models.vit.reduce_tokens
    monkeypatch.setattr(models.vit, "reduce_tokens", lambda stage, rate: keep(stage, 1.0))
    model = build("deit")
    with pytest.raises(ValueError, match="20 patch tokens are left, not 3"):
        make_reducing(model, 0.5)
    assert type(model) is VisionTransformer
    assert make_reducing(model, 0.5, check=False) is model


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("swin_tiny_patch4_window7_224", {}, "a SwinTransformer cannot be made reducing; timm's V"),
        ("resnet18", {}, "a ResNet cannot be made reducing"),
        ("beit_base_patch16_224", {}, "a Beit cannot be made reducing"),
        ("vit_small_r26_s32_224", {}, "a VisionTransformer with a HybridEmbed has no grid"),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "block 0 is a DiffParallelScalingBlock, which"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "block 0 has a DiffAttention, whose importance"),
        ("deit_tiny_patch16_224", {"reduction_loc": (3, 12)}, r"0 \.\. 11, got \[3, 12\]"),
        ("deit_tiny_patch16_224", {"reduction_loc": (2.5,)}, r"0 \.\. 11, got \[2.5\]"),
        ("vit_base_patch16_siglip_224", {"importance": "class"}, "'class' needs a class token"),
        ("deit_tiny_patch16_224", {"importance": "row"}, "importance must be one of .*'row'"),
        ("deit_tiny_patch16_224", {"keep_rate": 0}, r"keep_rate must be in \(0, 1\], got 0"),
        ("deit_tiny_patch16_224", {"keep_rate": (0.5, 1.2, 1)}, r"keep_rate must be .*got 1.2"),
        ("deit_tiny_patch16_224", {"reduction": "nonsense"}, "unknown reduction 'nonsense'"),
    ],
)
def test_what_cannot_reduce_is_refused(name: str, kwargs: dict, words: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = record(model) if hasattr(model, "blocks") else None
    with pytest.raises(ValueError, match=words) as caught:
        make_reducing(model, **kwargs)
    assert "\n" not in str(caught.value)
    assert before is None or record(model) == before


def test_refusals_of_poolings_and_of_no_model() -> None:
    with pytest.raises(ValueError, match="a str cannot be made reducing"):
        make_reducing("deit_tiny_patch16_224")
    model = build("deit", global_pool="prr")
    with pytest.raises(ValueError, match="pooling AttentionPoolPrr counts on the whole patch"):
        make_reducing(model)


# Importance, rotation, pooling ------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("family", ["deit", "dinov2", "eva02", "dinov3", "mixed"])
@torch.no_grad()
def test_importance_is_read_off_the_attention_matrix(family: str, importance: str) -> None:
    model = make_reducing(build(family), importance=importance)
    attn, prefix = model.blocks[1].attn, model.num_prefix_tokens
    x = draw_batch(3, 20 + prefix, 64)
    rope = None
    if getattr(model, "rope", None) is not None:
        rope = model.rope.get_embed(shape=[5, 4])
        rope = rope[1] if family == "mixed" else rope
    tokens, row, *_ = attend(attn, x, rope=rope, importance=importance, bias=None)
    assert torch.equal(tokens, attn(x) if rope is None else attn(x, rope=rope))

    weight = [attn.q_proj, attn.k_proj] if attn.qkv is None else None
    q, k = (p(x) for p in weight) if weight else attn.qkv(x).chunk(3, dim=-1)[:2]
    if getattr(attn, "q_bias", None) is not None:
        q = q + attn.q_bias
    q, k = (y.reshape(3, -1, 2, 32).transpose(1, 2) for y in (q, k))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        for y in (q, k):
            half = getattr(attn, "rotate_half", False)
            y[:, :, prefix:] = apply_rot_embed_cat(y[:, :, prefix:], rope, half=half)
    matrix = (q @ k.mT / 32**0.5).softmax(dim=-1).mean(dim=1)  # (B, L, L)
    expected = matrix[:, 0] if importance == "class" else matrix.mean(dim=1)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(row.sum(dim=1), torch.ones(3))


@torch.no_grad()
def test_importance_of_attention_beside_the_mlp() -> None:
    block = convert("side_by_side").blocks[1]
    x = draw_batch(2, 21, 64)
    _, q, k, _ = block.in_proj(block.in_norm(x)).split(block.in_split, dim=-1)
    q, k = (y.reshape(2, 21, 2, 32) for y in (q, k))
    q, k = block.q_norm(q).transpose(1, 2), block.k_norm(k).transpose(1, 2)
    matrix = (q @ k.mT / 32**0.5).softmax(dim=-1).mean(dim=1)
    expected = matrix[:, 0] if block.settings.importance == "class" else matrix.mean(dim=1)
    torch.testing.assert_close(block.attend(x, None, None).importance, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_importance_of_parallel_attentions_is_their_mean() -> None:
    block = convert("parallel").blocks[1]
    x = draw_batch(2, 21, 64)
    rows = [
        attend(branch.attn, branch.norm(x), rope=None, importance="class", bias=None).importance
        for branch in block.attns
    ]
    torch.testing.assert_close(block.attend(x, None, None).importance, (rows[0] + rows[1]) / 2)


@torch.no_grad()
def test_importance_by_default() -> None:
    assert convert("deit").settings.importance == convert("dinov3").settings.importance == "class"
    model = convert("siglip")
    assert model.settings.importance == model.blocks[1].settings.importance == "received"
    reduced = model.blocks[1](draw_batch(2, 20, 64))
    assert (reduced.importance >= 0).all()
    torch.testing.assert_close(reduced.importance.sum(dim=1), torch.ones(2))


def test_heaviest_member_and_ties() -> None:
    assignment = torch.tensor([[1, 0, 1, -1, 0, 1], [0, 0, 1, 1, 1, -1]])
    weights = torch.tensor([[0.1, 0.3, 0.2, 0.9, 0.3, 0.2], [0.0, 0.0, 0.1, 0.5, 0.4, 0.9]])
    assert heaviest_members(assignment, weights, 2).tolist() == [[1, 2], [0, 3]]


def rotate_slowly(rope: Tensor, reduced: ReducedTokens) -> Tensor:
    """(B, ..., K, E) of a rope (B, ..., N, E)."""
    images_out = []
    for own, groups, weights in zip(rope, reduced.assignment, reduced.weights, strict=True):
        rows = []
        for group in range(int(groups.max()) + 1):
            members = (groups == group).nonzero()[:, 0].tolist()
            rows.append(own[..., max(members, key=lambda n: (float(weights[n]), -n)), :])
        images_out.append(torch.stack(rows, dim=-2))
    return torch.stack(images_out)


@pytest.mark.parametrize("method", ["bat", "evit", "tome", "topk", "dpcknn"])
@pytest.mark.parametrize("family", ["dinov3", "mixed"])
@torch.no_grad()
def test_tokens_carry_the_rotation_of_their_heaviest_member(family: str, method: str) -> None:
    # The first stage of EViT fuses one token: as many leave as enter, in another order.
    model = make_reducing(build(family), (0.95, 0.6, 0.6), reduction=method, **DESIGN)
    ropes, stages = [], {}
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, inputs: ropes.append(inputs[1]))
        if block.stage is not None:
            hook = lambda _, inputs, reduced, index=index: stages.update({index: reduced})  # noqa: E731
            block.register_forward_hook(hook)
    model(images)
    given = model.rope.get_embed(shape=[5, 4])
    expected = [given] * 4 if family == "dinov3" else [*given]
    expected = [rope.expand(2, *rope.shape) for rope in expected]  # (B, (H,) N, E) by block
    for index, rope in enumerate(ropes):
        own = expected[index].unsqueeze(1) if family == "dinov3" else expected[index]
        assert torch.equal(rope.broadcast_to(own.shape), own), f"block {index}"
        if index in stages:
            expected = [rotate_slowly(later, stages[index]) for later in expected]
    assert sorted(stages) == [1, 2, 3]


def test_no_rotation_stays_none() -> None:
    assert gather_rope(None, None, is_mixed=False) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deit", {"global_pool": "avg"}),
        ("deit", {"global_pool": "avg", "pool_include_prefix": True}),
        ("dinov2", {"global_pool": "avgmax"}),
        ("dinov2", {"global_pool": "max"}),
        ("deit", {"global_pool": "token"}),
        ("siglip", {}),
        ("dinov2", {"global_pool": "map"}),
        ("dinov2", {"global_pool": "map", "pool_include_prefix": True}),
        ("siglip_gap", {}),
        ("dinov3", {}),
        ("pe", {}),
        ("pe", {"num_reg_tokens": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_pooling_equals_repeating_each_merged_token(family: str, changes: dict) -> None:
    model = convert(family, **changes)
    tokens, sizes, _, _ = model.run_blocks(images)
    tokens = model.norm(tokens)
    assert sizes.shape == (2, 3) and (sizes.sum(dim=1) == 20).all() and sizes.max() > 1
    prefix = model.num_prefix_tokens
    repeated = torch.stack([
        torch.cat([own[:prefix], own[prefix:].repeat_interleave(count.long(), dim=0)])
        for own, count in zip(tokens, sizes, strict=True)
    ])  # fmt: skip
    expected = timm_class(model).pool(model, repeated)
    torch.testing.assert_close(model.pool(tokens, sizes=sizes), expected, rtol=0, atol=1e-6)
    logits = model.head(model.fc_norm(expected))
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)
    assert model.bfloat16()(images.bfloat16()).isfinite().all()


# Dense features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bat", "tome", "dpcknn", "topk"])
def test_unmerge_puts_the_mean_of_a_group_on_each_member(method: str) -> None:
    x = draw_batch(2, 20, 6)
    sizes = torch.ones(2, 20)
    importance = draw_batch(2, 20, seed=1).softmax(dim=-1)
    first = run_stage(method, x, importance, 0.6)
    merged = merge_tokens(x, sizes, first.assignment, 12)
    importance = draw_batch(2, 12, seed=2).softmax(dim=-1)
    second = run_stage(method, merged, importance, 0.5, first.sizes)
    twice = merge_tokens(merged, first.sizes, second.assignment, 6)
    features = unmerge(twice, [first.assignment, second.assignment])
    for b in range(2):
        group = [int(second.assignment[b][g]) if g >= 0 else -1 for g in first.assignment[b]]
        for patch in range(20):
            members = [n for n in range(20) if group[n] == group[patch]]
            mean = x[b, members].mean(dim=0) if group[patch] >= 0 else torch.zeros(6)
            torch.testing.assert_close(features[b, patch], mean)
    assert unmerge(x, []) is x
    # Merging again what was put back gives the tokens back.
    torch.testing.assert_close(
        merge_tokens(unmerge(merged, [first.assignment]), sizes, first.assignment, 12), merged
    )


@every_family
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@torch.no_grad()
def test_intermediates_at_keep_rate_1_are_timms(family: str, output_fmt: str) -> None:
    dense, model = build(family), convert(family, 1.0)
    prefix = dense.num_prefix_tokens > 0
    for changes in (
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, 2], "intermediates_only": True, "return_prefix_tokens": prefix},
    ):
        expected = dense.forward_intermediates(images, output_fmt=output_fmt, **changes)
        result = model.forward_intermediates(images, output_fmt=output_fmt, **changes)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    if isinstance(model, VisionTransformer):
        for only in (False, True):
            changes = {
                "output_dict": True,
                "intermediates_only": only,
                "return_prefix_tokens": True,
            }
            expected = dense.forward_intermediates(images, output_fmt=output_fmt, **changes)
            result = model.forward_intermediates(images, output_fmt=output_fmt, **changes)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
        layers = [network.get_intermediate_layers(images, 2) for network in (model, dense)]
        torch.testing.assert_close(*layers, rtol=0, atol=1e-5)


@every_family
@torch.no_grad()
def test_intermediates_of_merged_tokens_have_the_full_grid(family: str) -> None:
    model = convert(family)
    last, maps = model.forward_intermediates(images, return_prefix_tokens=True)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(last, model.forward_features(images))
    assert last.shape == (2, prefix + 3, 64) and len(maps) == 4
    if prefix:
        assert all(tokens.shape == (2, prefix, 64) for _, tokens in maps)
        maps = [features for features, _ in maps]
    assert all(features.shape == (2, 64, 5, 4) for features in maps)
    counts = [len(features[0].flatten(1).T.unique(dim=0)) for features in maps]
    assert counts == [20, 10, 5, 3], "a map holds as many vectors as there are tokens"
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("family", ["deit", "dinov3"])
@torch.no_grad()
def test_timms_feature_extractor_takes_a_reducing_model(family: str) -> None:
    model = convert(family)
    maps = model.forward_intermediates(images, [1, 2], intermediates_only=True)
    network = FeatureGetterNet(model, out_indices=(1, 2))
    for features, expected in zip(network(images), maps, strict=True):
        torch.testing.assert_close(features, expected)
    assert network.model.reduction_loc == (1, 2), "the last block is pruned, its stage with it"
    network.model.set_keep_rate((1.0, 0.3))
    assert [stage.num_outputs for stage in network.model.stages()] == [20, 6]
