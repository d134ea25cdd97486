"""The models: timm's own with every token kept, and stages in the right place otherwise."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, build_tiny, randomise
from timm.models.vision_transformer import Block
from torch import Tensor

from arguments import get_args_parser
from builders import build_model, model_arguments, with_stored_model
from models import REDUCTIONS, count_parameters
from models.bat import BATBlock, ImportanceAttention
from models.grouping import class_token_importance
from models.reduction import StageInputs, reduce_tokens

METHODS = tuple(REDUCTIONS)
REDUCING = tuple(name for name in METHODS if name != "none")
DROPPING = ("topk", "random")
NAMES = ("bat_deit_tiny_patch16_224", "bat_deit_small_patch16_224", "bat_deit_base_patch16_224")
SMALL_SHAPE = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


def draw_batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Equality with timm -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": (64, 96)},
        {"img_size": 48, "patch_size": 8},
        {"img_size": 32, "patch_size": 4, "reg_tokens": 2},
        {"img_size": 64, "qk_norm": True},
        {"img_size": 64, "init_values": 0.3, "global_pool": "avg"},
        {"img_size": 64, "no_embed_class": True, "reg_tokens": 1, "qkv_bias": False},
        {"img_size": 64, "scale_attn_norm": True, "pre_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [{"keep_rate": 1.0}, {"reduction": "none"}], ids=str)
def test_logits_equal_timms_when_every_token_is_kept(changes: dict, kept: dict) -> None:
    keywords = SMALL_SHAPE | changes
    dense = randomise(timm.create_model("deit_tiny_patch16_224", **keywords))
    model = timm.create_model(NAMES[0], reduction_loc=(0, 1, 3), **keywords, **kept).eval()
    model.load_state_dict(dense.state_dict(), strict=True)
    images = draw_batch(3, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        expected = dense(images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        assert expected.std(dim=0).min() > 1e-3, "the images must tell logits apart"
        model = timm.create_model(NAMES[0], reduction_loc=(0, 1, 3), keep_rate=0.5, **keywords)
        model.load_state_dict(dense.state_dict(), strict=True)
        assert (model.eval()(images) - expected).abs().max() > 1e-3, "reducing must matter"


def test_training_equals_timms_with_every_token() -> None:
    """The same numbers are drawn for dropout, in the attention too, and for stochastic depth."""
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.4}
    keywords = SMALL_SHAPE | {"img_size": 64} | rates
    dense = randomise(timm.create_model("deit_tiny_patch16_224", **keywords))
    model = timm.create_model(NAMES[0], reduction_loc=(0, 1, 3), keep_rate=1.0, **keywords)
    model.load_state_dict(dense.state_dict(), strict=True)
    images = draw_batch(8, 3, 64, 64)
    results = []
    for network, training in ((dense, True), (model, True), (dense, False)):
        torch.manual_seed(1)
        results.append(network.train(training)(images))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert (results[2] - results[0]).abs().max() > 1e-2, "dropping must matter"


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_full_size_models_equal_timms(size: str) -> None:
    dense = timm.create_model(f"deit_{size}_patch16_224")
    dense = randomise(dense)
    model = timm.create_model(f"bat_deit_{size}_patch16_224", keep_rate=1.0).eval()
    model.load_state_dict(dense.state_dict(), strict=True)
    images = draw_batch(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "parameters"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)]
)
def test_state_dicts_load_both_ways(size: str, parameters: int) -> None:
    with torch.device("meta"):  # names and shapes decide; no weight is drawn
        dense = timm.create_model(f"deit_{size}_patch16_224")
        model = timm.create_model(f"bat_deit_{size}_patch16_224")
    model.load_state_dict(dense.state_dict(), strict=True, assign=True)
    dense.load_state_dict(model.state_dict(), strict=True, assign=True)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in dense.state_dict().items()}
    assert list(model.state_dict()) == list(dense.state_dict())
    assert count_parameters(model) == parameters


def test_every_registered_name_builds_from_the_flags_of_main() -> None:
    assert timm.list_models("bat_deit_*") == sorted(NAMES)
    for name in timm.list_models("bat_deit_*"):
        typed = get_args_parser().parse_args([
            "--model", name, "--input-size", "32", "48", "--keep-rate", "0.5", "0.9",
            "--reduction", "evit", "--reduction-loc", "0", "2", "--cluster-ratio", "0.3",
            "--match-ratio", "0.2", "--merge-weights", "mean",
            "--model-kwargs", "patch_size=8", "embed_dim=24", "depth=3", "num_heads=3",
        ])  # fmt: skip
        args = with_stored_model(typed, None)
        model = build_model(model_arguments(args, num_classes=5), drop_path_rate=0.1)
        assert (model.reduction, model.reduction_loc) == ("evit", (0, 2))
        assert model.keep_rates == (0.5, 0.9)
        block = model.blocks[2]
        assert (block.cluster_ratio, block.match_ratio, block.merge_weights) == (0.3, 0.2, "mean")
        assert model.eval()(draw_batch(2, 3, 32, 48)).shape == (2, 5)


# Shapes and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_rate", "kept"),
    [
        (0.7, (138, 97, 68)),
        (0.6, (118, 71, 43)),
        (0.5, (98, 49, 25)),
        (0.4, (79, 32, 13)),
        (0.3, (59, 18, 6)),
        (0.2, (40, 8, 2)),
    ],
)
def test_tokens_of_the_published_keep_rates(keep_rate: float, kept: tuple[int, ...]) -> None:
    model = timm.create_model(NAMES[1], embed_dim=24, num_heads=3, num_classes=0).eval()
    model.set_keep_rate(keep_rate)
    images = draw_batch(2, 3, 224, 224)
    with torch.no_grad():
        _, assignments = model.forward_with_assignments(images)
        assert model.forward_features(images).shape == (2, 1 + kept[-1], 24)
    entering = (196, *kept)
    for assignment, num_tokens, num_groups in zip(assignments, entering, kept, strict=False):
        assert assignment.shape == (2, num_tokens) and assignment.dtype == torch.int64
        for row in assignment.tolist():
            assert set(row) == set(range(num_groups)), "every group has a member, none is dropped"
    assert len(assignments) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep_rate", [0.01, 0.35, 0.7, 0.99, 1.0])
def test_stages_say_what_the_forward_pass_does(method: str, keep_rate: float) -> None:
    model = build_tiny(reduction=method, keep_rate=keep_rate, img_size=(32, 48), reg_tokens=1)
    with torch.no_grad():
        features = model.forward_features(draw_batch(3, 3, 32, 48))
        _, assignments = model.forward_with_assignments(draw_batch(3, 3, 32, 48))
    num_tokens = 24
    for stage, assignment in zip(model.stages(), assignments, strict=True):
        assert stage.num_tokens == num_tokens == assignment.shape[1]
        expected = {range(stage.num_outputs)}
        drops = method in DROPPING and stage.num_outputs < num_tokens
        for row in assignment.tolist():
            assert set(row) == {*range(stage.num_outputs), *([-1] if drops else [])}, expected
        num_tokens = stage.num_outputs
    assert features.shape == (3, 2 + num_tokens, TINY["embed_dim"])
    assert [stage.block for stage in model.stages()] == [1, 2]


def test_evit_passes_its_fused_token_on() -> None:
    stages = build_tiny(reduction="evit", keep_rate=0.5).stages()
    assert [(stage.num_tokens, stage.num_outputs) for stage in stages] == [(16, 9), (9, 6)]


@pytest.mark.parametrize("keep_rate", [0.5, (0.9, 0.3), [1.0, 0.5], 1])
def test_set_keep_rate_equals_building_with_it(keep_rate: object) -> None:
    images = draw_batch(2, 3, 32, 32)
    model = build_tiny(keep_rate=0.7, depth=4)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(images)
        model.set_keep_rate(keep_rate)
        built = build_tiny(keep_rate=keep_rate, depth=4)
        assert model.keep_rates == built.keep_rates
        assert all(isinstance(rate, float) for rate in model.keep_rates)
        assert torch.equal(model(images), built(images))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_set_reduction_equals_building_with_it(method: str) -> None:
    images = draw_batch(2, 3, 32, 32)
    model = build_tiny(keep_rate=0.5, reduction="bat" if method != "bat" else "topk")
    model.set_reduction(method)
    built = build_tiny(keep_rate=0.5, reduction=method)
    assert model.reduction == method and model.stages() == built.stages()
    with torch.no_grad():
        assert torch.equal(model(images), built(images))
    with pytest.raises(ValueError, match="unknown reduction 'nonsense'"):
        model.set_reduction("nonsense")
    assert model.reduction == method


def test_identity_stage_gives_arange() -> None:
    model = build_tiny(keep_rate=(1.0, 0.5))
    with torch.no_grad():
        _, assignments = model.forward_with_assignments(draw_batch(2, 3, 32, 32))
    assert torch.equal(assignments[0], torch.arange(16).expand(2, 16))
    assert assignments[0].dtype == torch.int64
    assert assignments[1].max() == 7 and assignments[1].shape == (2, 16)


@pytest.mark.parametrize("reduction_loc", [(), (0,), (2,), (0, 1, 2), (2, 0), [1]])
def test_any_set_of_blocks_may_reduce(reduction_loc: tuple[int, ...]) -> None:
    model = build_tiny(reduction_loc=reduction_loc, keep_rate=0.5)
    kinds = [isinstance(block, BATBlock) for block in model.blocks]
    assert kinds == [index in reduction_loc for index in range(3)]
    with torch.no_grad():
        logits, assignments = model.forward_with_assignments(draw_batch(2, 3, 32, 32))
    lengths = [16 // 2**stage for stage in range(len(reduction_loc))]
    assert [assignment.shape[1] for assignment in assignments] == lengths
    assert logits.isfinite().all()


@pytest.mark.parametrize("keep_rate", [0, 0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_keep_rate_out_of_range(keep_rate: float) -> None:
    with pytest.raises(ValueError, match=rf"keep_rate.*\(0, 1\].*{keep_rate}"):
        build_tiny(keep_rate=keep_rate)
    model = build_tiny(keep_rate=0.6)
    for value in (keep_rate, [0.5, keep_rate]):
        with pytest.raises(ValueError, match=rf"keep_rate.*\(0, 1\].*{keep_rate}"):
            model.set_keep_rate(value)
    assert model.keep_rates == (0.6, 0.6), "a refused value changes nothing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_rate": (0.5, 0.5, 0.5)}, "keep_rate needs 1 value or 2 .*got 3"),
        ({"keep_rate": ()}, "keep_rate needs 1 value or 2 .*got 0"),
        ({"reduction": "nonsense"}, "unknown reduction 'nonsense'.*none.*topk.*evit.*bat"),
        ({"reduction_loc": (1, 3)}, r"reduction_loc .*0 \.\. 2.*got \[1, 3\]"),
        ({"reduction_loc": (-1,)}, r"reduction_loc .*0 \.\. 2.*got \[-1\]"),
        ({"reduction_loc": (1, 1)}, r"reduction_loc .*different.*got \[1, 1\]"),
        ({"cluster_ratio": 1.5}, r"cluster_ratio .*\[0, 1\].*1\.5"),
        ({"cluster_ratio": -0.1}, r"cluster_ratio .*\[0, 1\].*-0\.1"),
        ({"match_ratio": 2}, r"match_ratio .*\[0, 1\].*2"),
        ({"match_ratio": float("nan")}, r"match_ratio .*\[0, 1\].*nan"),
        ({"merge_weights": "median"}, "merge_weights .*importance.*mean.*'median'"),
        ({"class_token": False, "global_pool": "avg"}, "class_token must be True"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_say_name_value_and_range(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_tiny(**changes)


def test_what_timms_model_can_and_this_one_cannot_is_refused() -> None:
    model = build_tiny()
    images = draw_batch(1, 3, 32, 32)
    with pytest.raises(ValueError, match="attention mask"):
        model.forward_features(images, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="forward_with_assignments"):
        model.forward_intermediates(images)


# The stage's place in the block -----------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_timms_and_hands_out_the_class_tokens_row(qk_norm: bool) -> None:
    model = build_tiny(reg_tokens=2, qk_norm=qk_norm)
    attention = model.blocks[1].attn
    assert isinstance(attention, ImportanceAttention)
    x = draw_batch(2, 19, 32)
    with torch.no_grad():
        attended = attention.attend(x)
        torch.testing.assert_close(attended.tokens, attention(x), rtol=0, atol=1e-6)
        q, k, _ = attention.qkv(x).reshape(2, 19, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        matrix = (q @ k.transpose(-2, -1) / 16**0.5).softmax(dim=-1)  # (B, H, L, L)
    expected = matrix.mean(dim=1)[:, 0]
    torch.testing.assert_close(attended.importance, expected, rtol=0, atol=1e-6)
    assert expected.max() > 2 * expected.min(), "the row must not be flat"


@pytest.mark.parametrize("method", REDUCING)
def test_stage_leaves_prefix_and_lone_tokens_to_timms_block(method: str) -> None:
    model = build_tiny(reduction=method, keep_rate=0.5, reg_tokens=2, init_values=0.5)
    block = model.blocks[1]
    plain = Block(32, 2, qkv_bias=True, init_values=0.5, norm_layer=type(block.norm1)).eval()
    plain.load_state_dict(block.state_dict())
    x = draw_batch(3, 19, 32)
    with torch.no_grad():
        reduced, expected = block(x), plain(x)
    torch.testing.assert_close(reduced.tokens[:, :3], expected[:, :3], rtol=0, atol=1e-6)
    num_lone, groups = 0, reduced.assignment.tolist()
    for row, tokens, dense in zip(groups, reduced.tokens, expected[:, 3:], strict=True):
        for token, group in enumerate(row):
            # EViT's fused token is a weighted sum even of a single token.
            if group >= 0 and row.count(group) == 1 and not (method == "evit" and group == 8):
                torch.testing.assert_close(tokens[3 + group], dense[token], rtol=0, atol=1e-6)
                num_lone += 1
    assert num_lone > 0 or method == "dpcknn"


def run_by_hand(model, images: Tensor, assignments: list[Tensor]) -> Tensor:
    """Logits with given assignments: whole attention matrices and a loop over the groups."""
    x = model._pos_embed(model.patch_embed(images))
    prefix = model.num_prefix_tokens
    sizes = torch.ones(len(x), x.shape[1] - prefix)
    stage = 0
    for index, block in enumerate(model.blocks):
        heads = block.attn.num_heads
        batch, length, channels = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(batch, length, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (channels // heads) ** -0.5).softmax(dim=-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, length, channels)
        x = x + block.attn.proj(mixed)
        if index in model.reduction_loc:
            importance = attention.mean(dim=1)[:, 0, prefix:]
            images_out, sizes_out = [], []
            for b in range(batch):
                tokens, new_sizes = merge_by_hand(
                    model.reduction, x[b, prefix:], importance[b], sizes[b], assignments[stage][b]
                )
                images_out.append(torch.cat([x[b, :prefix], tokens]))
                sizes_out.append(new_sizes)
            x, sizes = torch.stack(images_out), torch.stack(sizes_out)
            stage += 1
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def merge_by_hand(method, tokens, importance, sizes, assignment) -> tuple[Tensor, Tensor]:
    weights = {"bat": importance, "tome": sizes}.get(method, torch.ones(len(tokens)))
    groups = [(assignment == group).nonzero()[:, 0] for group in range(int(assignment.max()) + 1)]
    merged = []
    for number, members in enumerate(groups):
        if method == "evit" and number == len(groups) - 1:
            merged.append(sum(importance[n] * tokens[n] for n in members))
        else:
            total = sum(weights[n] for n in members)
            merged.append(sum(weights[n] / total * tokens[n] for n in members))
    return torch.stack(merged), torch.stack([sizes[members].sum() for members in groups])


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_whole_model_equals_a_slow_one(method: str, reg_tokens: int) -> None:
    # The last stage is followed by a block: only through its attention do its groups matter.
    model = build_tiny(
        reduction=method, keep_rate=0.45, reg_tokens=reg_tokens, img_size=(40, 32), depth=4
    )
    images = draw_batch(3, 3, 40, 32)
    with torch.no_grad():
        logits, assignments = model.forward_with_assignments(images)
        expected = run_by_hand(model, images, assignments)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("method", ["bat", "evit", "topk"])
def test_the_most_attended_tokens_stay(method: str) -> None:
    model = build_tiny(reduction=method, keep_rate=0.5)
    block = model.blocks[1]
    x = draw_batch(4, 17, 32)
    with torch.no_grad():
        importance = block.attn.attend(block.norm1(x)).importance[:, 1:]
        assignment = block(x).assignment
    budget = model.stages()[0].budget
    num_attentive = budget.attentive if method == "bat" else budget.kept
    first_rest = budget.kept - (budget.clusters if method == "bat" else 0)
    for row, values in zip(assignment.tolist(), importance, strict=True):
        order = values.argsort(descending=True).tolist()
        attentive = {row[token] for token in order[:num_attentive]}
        rest = {row[token] for token in order[num_attentive:]}
        assert attentive == set(range(first_rest))
        assert all(group >= first_rest or group == -1 for group in rest)


def test_settings_reach_the_stage() -> None:
    images = draw_batch(2, 3, 32, 32)
    base = build_tiny(keep_rate=0.5)
    with torch.no_grad():
        logits, assignments = base.forward_with_assignments(images)
        mean, mean_assignments = build_tiny(
            keep_rate=0.5, merge_weights="mean"
        ).forward_with_assignments(images)
        _, dropping = build_tiny(keep_rate=0.5, cluster_ratio=0).forward_with_assignments(images)
        _, pairing = build_tiny(keep_rate=0.5, match_ratio=0.9).forward_with_assignments(images)
    assert torch.equal(assignments[0], mean_assignments[0])
    assert not torch.allclose(logits, mean, atol=1e-5)
    assert (assignments[0] >= 0).all() and (dropping[0] == -1).sum(dim=1).tolist() == [7, 7]
    assert not torch.equal(assignments[0], pairing[0])


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("merge_weights", ["importance", "mean"])
def test_every_parameter_gets_a_gradient(method: str, merge_weights: str) -> None:
    model = build_tiny(
        reduction=method, keep_rate=0.5, merge_weights=merge_weights, depth=4
    ).train()
    loss = F.cross_entropy(model(draw_batch(8, 3, 32, 32)), torch.arange(8) % 4)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        grad = parameter.grad
        if name.endswith("qkv.bias"):
            # One more constant in every attention logit changes no softmax: the derivative with
            # respect to the keys' bias is 0, and what is left of it is rounding.
            queries, keys, values = grad.chunk(3)
            assert keys.abs().max() < 1e-4 * values.abs().max(), name
            grad = torch.cat([queries, values])
        assert (grad != 0).all(), f"{name}: {(grad == 0).sum()} of {grad.numel()} are 0"


@pytest.mark.parametrize("method", REDUCING)
def test_gradients_reach_kept_and_merged_tokens_and_their_weights(method: str) -> None:
    x = draw_batch(2, 16, 8).requires_grad_()
    importance = draw_batch(2, 16, seed=1).softmax(dim=-1).requires_grad_()
    reduced = reduce_tokens(StageInputs(x, importance, torch.ones(2, 16), 0.5), method)
    (reduced.tokens * draw_batch(*reduced.tokens.shape, seed=2)).sum().backward()
    dropped = reduced.assignment < 0
    assert torch.equal((x.grad != 0).all(dim=-1), ~dropped)
    assert torch.equal((x.grad != 0).any(dim=-1), ~dropped)
    sizes = torch.stack(
        [(reduced.assignment == group).sum(dim=1) for group in range(reduced.tokens.shape[1])]
    )  # (K, B)
    merged = (sizes.T.gather(1, reduced.assignment.clamp(min=0)) > 1) & ~dropped
    if method in ("bat", "evit"):  # the two that weight by importance, in groups only
        assert torch.equal(importance.grad != 0, merged) and merged.any() and not merged.all()
    else:
        assert importance.grad is None or (importance.grad == 0).all()


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_grad_checkpointing_changes_nothing_but_memory(drop_path_rate: float) -> None:
    images = draw_batch(4, 3, 32, 32)
    results = []
    for enabled in (False, True):
        model = build_tiny(keep_rate=0.5, drop_path_rate=drop_path_rate).train()
        model.set_grad_checkpointing(enabled)
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        logits, assignments = model.forward_with_assignments(images)
        assert len(calls) == 3 and len(assignments) == 2
        logits.square().sum().backward()
        assert len(calls) == (6 if enabled else 3), "the blocks run once more in the backward pass"
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=0, atol=1e-6)


# The same groups whatever surrounds them --------------------------------------------------------


def draw_stage_inputs(kind: str) -> StageInputs:
    """Five images of 24 tokens; "equal" ones tie in tokens, importances and sizes."""
    x = draw_batch(5, 24, 16)
    importance = draw_batch(5, 24, seed=1).softmax(dim=-1)
    sizes = torch.randint(1, 5, (5, 24), generator=torch.Generator().manual_seed(2)).float()
    if kind == "equal":
        x[:, 8:20] = x[:, :1]
        importance[:, 5:] = importance[:, 5:6]
        x[1], importance[2] = 0, 0
    return StageInputs(x, importance, sizes, 0.4)


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_stage_is_the_same_in_float32_and_under_bf16_autocast(method: str, kind: str) -> None:
    inputs = draw_stage_inputs(kind)
    expected = reduce_tokens(inputs, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs.x @ inputs.x.mT).dtype == torch.bfloat16, "autocast is on outside the stage"
        reduced = reduce_tokens(inputs, method)
        assert (inputs.x @ inputs.x.mT).dtype == torch.bfloat16, "and on again after it"
    for before, after in zip(expected, reduced, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


def test_importance_is_float32_under_bf16_autocast() -> None:
    query, keys = draw_batch(2, 3, 1, 8), draw_batch(2, 3, 17, 8, seed=1)
    expected = class_token_importance(query, keys, 8**-0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        importance = class_token_importance(query, keys, 8**-0.5)
        low = class_token_importance(query.bfloat16(), keys.bfloat16(), 8**-0.5)
    assert importance.dtype == low.dtype == torch.float32
    assert torch.equal(importance, expected)
    torch.testing.assert_close(importance.sum(dim=-1), torch.ones(2))


@pytest.mark.parametrize("method", REDUCING)
def test_model_runs_under_bf16_autocast(method: str) -> None:
    model = build_tiny(reduction=method, keep_rate=0.5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, assignments = model.forward_with_assignments(draw_batch(2, 3, 32, 32))
    assert logits.isfinite().all()
    outputs = [stage.num_outputs for stage in model.stages()]
    assert [int(assignment.max()) + 1 for assignment in assignments] == outputs


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_stage_gives_an_image_the_same_groups_alone_and_in_a_batch(method: str, kind: str) -> None:
    inputs = draw_stage_inputs(kind)
    expected = reduce_tokens(inputs, method).assignment

    def assign(rows: list[int]) -> Tensor:
        chosen = inputs._replace(
            x=inputs.x[rows], importance=inputs.importance[rows], sizes=inputs.sizes[rows]
        )
        return reduce_tokens(chosen, method).assignment

    for rows in ([0], [1], [2], [3], [4], [4, 2], [3, 3, 3, 1, 0, 2, 4, 4]):
        assert torch.equal(assign(rows), expected[rows]), rows


@pytest.mark.parametrize("method", REDUCING)
def test_model_gives_an_image_the_same_result_alone_and_in_a_batch(method: str) -> None:
    model = build_tiny(reduction=method, keep_rate=0.5)
    images = draw_batch(6, 3, 32, 32)
    with torch.no_grad():
        logits, assignments = model.forward_with_assignments(images)
        for b in range(6):
            alone, alone_assignments = model.forward_with_assignments(images[b : b + 1])
            torch.testing.assert_close(alone[0], logits[b], rtol=0, atol=1e-5)
            for stage, assignment in enumerate(alone_assignments):
                assert torch.equal(assignment[0], assignments[stage][b])
    assert any(not torch.equal(assignments[0][0], row) for row in assignments[0][1:]) or (
        method == "random"
    )


# Copies -----------------------------------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = timm.create_model(NAMES[0], **TINY, reduction="evit", keep_rate=(0.5, 0.8)).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _pickled, _saved])
def test_copies_compute_the_same_and_are_independent(make_copy) -> None:
    model = build_tiny(reduction="evit", keep_rate=(0.5, 0.8))
    images = draw_batch(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        other = make_copy(model)
        assert other.keep_rates == model.keep_rates
        assert torch.equal(other(images), expected)
        other.set_keep_rate(0.2)
        assert not torch.allclose(other(images), expected, atol=1e-5)
        assert torch.equal(model(images), expected)
