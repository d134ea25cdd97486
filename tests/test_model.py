"""The models: timm's own with every token kept, and shapes and settings otherwise."""

import copy

import pytest
import timm
import torch
from conftest import DESIGN, TINY, build_tiny, draw_batch, randomise

from arguments import get_args_parser, model_arguments
from checkpoints import build_model
from models import REDUCTIONS, count_parameters

METHODS = tuple(REDUCTIONS)
DROPPING = ("topk", "random", "evo")
NAMES = ("bat_deit_tiny_patch16_224", "bat_deit_small_patch16_224", "bat_deit_base_patch16_224")
SMALL_SHAPE = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


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
        keywords = {"num_classes": 5, "drop_path_rate": 0.1}
        model = build_model(model_arguments(typed) | keywords)
        assert (model.reduction, model.reduction_loc) == ("evit", (0, 2))
        assert model.keep_rates == (0.5, 0.9)
        own = model.blocks[2].settings
        assert (own.cluster_ratio, own.match_ratio, own.merge_weights) == (0.3, 0.2, "mean")
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
    model = timm.create_model(NAMES[1], embed_dim=24, num_heads=3, num_classes=0, **DESIGN)
    model.eval()
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
            found = set(row) - {-1} if method == "ppt" else set(row)  # which drops in some images
            assert found == {*range(stage.num_outputs), *([-1] if drops else [])}, expected
        num_tokens = 24 if method == "evo" else stage.num_outputs
    assert features.shape == (3, 2 + num_tokens, TINY["embed_dim"])
    assert [stage.block for stage in model.stages()] == [1, 2]


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
    stages = [block.stage for block in model.blocks]
    assert [stage is not None for stage in stages] == [n in reduction_loc for n in range(3)]
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
        ({"importance": "all"}, "importance .*class.*received.*'all'"),
        ({"reduction_seed": 0.5}, "reduction_seed must be an integer, at least 0, got 0.5"),
        ({"tome_r": 3}, "tome_r is for tome and ppt, not for 'bat'"),
        ({"tome_r": 0, "reduction": "tome"}, "tome_r must be an integer, at least 1, got 0"),
        ({"ppt_threshold": -1.0}, "ppt_threshold must be at least 0, got -1.0"),
        ({"evo_readout": "mean"}, "evo_readout 'mean' is for evo, not for 'bat'"),
        ({"proportional_attention": True}, "proportional_attention .*auto.*on.*off.*True"),
        ({"features": "values"}, "features .*tokens.*keys.*'values'"),
        ({"density_neighbors": -1}, "density_neighbors must be an integer, at least 0, got -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_say_name_value_and_range(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_tiny(**changes)


@pytest.mark.parametrize(
    "call", ["forward", "forward_features", "forward_intermediates", "get_intermediate_layers"]
)
def test_attention_masks_are_refused(call: str) -> None:
    with pytest.raises(ValueError, match="attention mask"):
        getattr(build_tiny(), call)(draw_batch(1, 3, 32, 32), attn_mask=torch.zeros(17, 17))
