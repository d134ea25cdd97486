"""A stage's place in its block, gradients through it, and the same groups whatever surrounds it."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, build_tiny, draw_batch
from stage_helpers import run_stage
from timm.models.vision_transformer import Block
from torch import Tensor

from models import REDUCTIONS
from models.clustering import class_token_importance, ieee_float32
from models.vit import attend

METHODS = tuple(REDUCTIONS)
# Evo-ViT's stages stand between blocks: see test_evo.py.
REDUCING = tuple(name for name in METHODS if name not in ("none", "evo"))


# The stage's place in the block -----------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_timms_and_hands_out_the_class_tokens_row(qk_norm: bool) -> None:
    model = build_tiny(reg_tokens=2, qk_norm=qk_norm)
    attention = model.blocks[1].attn
    x = draw_batch(2, 19, 32)
    with torch.no_grad():
        tokens, importance, *_ = attend(attention, x, rope=None, importance="class", bias=None)
        assert torch.equal(tokens, attention(x))
        q, k, _ = attention.qkv(x).reshape(2, 19, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        matrix = (q @ k.transpose(-2, -1) / 16**0.5).softmax(dim=-1)  # (B, H, L, L)
    expected = matrix.mean(dim=1)[:, 0]
    torch.testing.assert_close(importance, expected, rtol=0, atol=1e-6)
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
        logits = q @ k.transpose(-2, -1) * (channels // heads) ** -0.5
        if model.settings.is_proportional:  # log 1 = 0 before the first stage
            logits = logits + F.pad(sizes, (prefix, 0), value=1.0).log()[:, None, None]
        attention = logits.softmax(dim=-1)
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
    weights = {"bat": importance, "tome": sizes, "ppt": sizes}
    weights = weights.get(method, torch.ones(len(tokens)))
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
        importance = block(x).importance
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


def draw_stage_inputs(kind: str) -> dict[str, Tensor]:
    """Five images of 24 tokens; "equal" ones tie in tokens, importances and sizes."""
    x = draw_batch(5, 24, 16)
    importance = draw_batch(5, 24, seed=1).softmax(dim=-1)
    sizes = torch.randint(1, 5, (5, 24), generator=torch.Generator().manual_seed(2)).float()
    if kind == "equal":
        x[:, 8:20] = x[:, :1]
        importance[:, 5:] = importance[:, 5:6]
        x[1], importance[2] = 0, 0
    return {"x": x, "importance": importance, "sizes": sizes}


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_stage_is_the_same_in_float32_and_under_bf16_autocast(method: str, kind: str) -> None:
    inputs = draw_stage_inputs(kind)
    expected, x = run_stage(method, keep_rate=0.4, **inputs), inputs["x"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (inputs["x"] @ inputs["x"].mT).dtype == torch.bfloat16, (
            "autocast is on outside the stage"
        )
        reduced = run_stage(method, keep_rate=0.4, **inputs)
        assert (x @ x.mT).dtype == torch.bfloat16, "and on again after it"
    for before, after in zip(expected, reduced, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


@pytest.fixture
def precision_settings() -> Iterator[list]:
    """torch's float32 precision settings, from all of it down to GPU matrix products."""
    settings = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    yield settings
    for setting in settings:
        setting.fp32_precision = "none"


@pytest.mark.parametrize("number", [0, 1])
def test_stage_runs_on_a_cpu_whatever_the_precision_settings(precision_settings, number) -> None:
    inputs = draw_stage_inputs("random")
    expected = run_stage("bat", **inputs)
    precision_settings[number].fp32_precision = "tf32"
    before = [setting.fp32_precision for setting in precision_settings]
    with ieee_float32("cpu"):
        assert [setting.fp32_precision for setting in precision_settings] == before
    reduced = run_stage("bat", **inputs)
    assert torch.equal(reduced.assignment, expected.assignment)
    assert [setting.fp32_precision for setting in precision_settings] == before


@pytest.mark.parametrize("number", [0, 1])
def test_tf32_is_off_on_a_gpu_and_on_again_after_an_error(precision_settings, number) -> None:
    precision_settings[number].fp32_precision = "tf32"
    matmul = torch.backends.cuda.matmul
    with pytest.raises(KeyError), ieee_float32("cuda"):
        assert matmul.fp32_precision == "ieee"
        raise KeyError
    assert matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == ("tf32" if number == 0 else "none")


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
    other = timm.create_model(
        "bat_deit_tiny_patch16_224", **TINY, reduction="evit", keep_rate=(0.5, 0.8)
    ).eval()
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
