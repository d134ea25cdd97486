"""GMACs against hand counts and the released figures; describing a model; rates for a budget."""

import re

import pytest
import torch
from conftest import build_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import REDUCTIONS, count_gmacs, count_parameters, describe, find_keep_rate

# Reported by the original authors for DeiT-S at 224 x 224 (ImageNet-1k).
REPORTED_GMACS = {0.7: 3.005, 0.6: 2.583, 0.5: 2.344, 0.4: 2.083, 0.3: 1.823, 0.2: 1.645}
DEIT_SMALL_GMACS = {
    1.0: 4.5989, 0.7: 3.0238, 0.6: 2.6305, 0.5: 2.3011, 0.4: 2.0396, 0.3: 1.8163, 0.2: 1.6377
}  # fmt: skip
D, HEADS, MLP, CLASSES, PATCH_PIXELS = 32, 2, 128, 4, 3 * 8 * 8  # of the TINY model


def dense_block(length: int, mlp_length: int | None = None) -> int:
    """Multiply-accumulates of one block: projections, two products per head, MLP."""
    projections = length * D * 3 * D + length * D * D
    attention = 2 * HEADS * length * length * (D // HEADS)
    return projections + attention + 2 * (mlp_length or length) * D * MLP


def assert_counted(gmacs: float, macs: int, row: int) -> None:
    """Equal to the hand count; the class token's attention row counts if it is a matrix product."""
    assert round(gmacs * 1e9) in (macs, macs + row)


def embedding_and_head(num_patches: int) -> int:
    return num_patches * PATCH_PIXELS * D + D * CLASSES


@pytest.mark.parametrize(("keep_rate", "gmacs"), DEIT_SMALL_GMACS.items())
def test_deit_small(small_model, keep_rate: float, gmacs: float) -> None:
    small_model.set_keep_rate(keep_rate)
    assert count_gmacs(small_model) == pytest.approx(gmacs, abs=0.5e-4)
    if keep_rate < 1:
        assert gmacs == pytest.approx(REPORTED_GMACS[keep_rate], rel=0.03)
    assert count_parameters(small_model) == 22_050_664


@pytest.mark.parametrize("img_size", [(32, 32), (40, 56)])
def test_count_by_hand_with_every_token(img_size: tuple[int, int]) -> None:
    num_patches = img_size[0] * img_size[1] // 64
    length = 1 + num_patches
    macs = 3 * dense_block(length) + embedding_and_head(num_patches)
    model = build_tiny(img_size=img_size, keep_rate=1.0)
    assert_counted(count_gmacs(model), macs, row=2 * length * D)
    plain = build_tiny(img_size=img_size, reduction_loc=())
    assert count_gmacs(plain) == pytest.approx(macs / 1e9, rel=1e-9)


def test_count_by_hand_of_a_stage() -> None:
    """Every matrix product of the stage counts; its sides are large enough to be one."""
    model = build_tiny(
        img_size=64, keep_rate=0.75, match_ratio=0.5, reduction_loc=(1,), num_classes=4
    )
    kept, _, pairs, attentive, inattentive = model.stages()[0].budget
    assert (kept, pairs, attentive, inattentive) == (48, 15, 44, 20)
    macs = embedding_and_head(64) + dense_block(65) + dense_block(65, 1 + kept)
    macs += dense_block(1 + kept)
    macs += (attentive // 2) ** 2 * D  # cosines
    macs += inattentive**2 * D  # distances
    macs += kept * 64 * D  # merging
    assert_counted(count_gmacs(model), macs, row=65 * D)


@pytest.mark.parametrize("method", REDUCTIONS)
def test_count_equals_counting_a_real_forward_pass(method: str) -> None:
    model = build_tiny(reduction=method, keep_rate=0.4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = count_gmacs(model)
    assert model.training and next(model.parameters()).device.type == "cpu"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert counted == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-9)


def test_other_image_size_is_counted_where_the_model_takes_it() -> None:
    model = build_tiny(dynamic_img_size=True, keep_rate=0.5)
    assert count_gmacs(build_tiny(img_size=(64, 48), keep_rate=0.5)) > 2 * count_gmacs(model)


# describe ---------------------------------------------------------------------------------------


def read_table(text: str) -> tuple[list[list[str]], float, float, float, float]:
    """Rows of the blocks, then GMACs outside of them, in all, share of dense in %, and dense."""
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d+\s", line)]
    rest = float(re.search(r"embedding and head: ([\d.]+) GMACs", text)[1])
    total = re.search(r"total: ([\d.]+) GMACs, ([\d.]+)% of the dense ([\d.]+)", text)
    return rows, rest, *(float(number) for number in total.groups())


@pytest.mark.parametrize("keep_rate", [0.7, 0.2, 1.0, (1.0, 0.5, 0.3)])
def test_described_numbers_add_up(small_model, keep_rate: object) -> None:
    small_model.set_keep_rate(keep_rate)
    text = describe(small_model)
    rows, rest, total, share, dense = read_table(text)
    rates = " ".join(f"{rate:g}" for rate in small_model.keep_rates)
    assert text.splitlines()[0] == (
        f"reduction bat, keep rates {rates}, blocks 3 6 9, cluster ratio 0.4, match ratio 0.1, "
        "merge weights importance, proportional attention off"
    )
    assert "parameters: 22,050,664;" in text
    assert [int(row[0]) for row in rows] == list(range(12))
    gmacs = [float(row[-1]) for row in rows]
    assert sum(gmacs) + rest == pytest.approx(total, abs=13 * 0.5e-4 + 1e-9)
    assert total == pytest.approx(count_gmacs(small_model), abs=0.5e-4 + 1e-9)
    assert share == pytest.approx(100 * total / dense, abs=0.06)
    assert dense == pytest.approx(4.6, abs=0.05)
    num_tokens = 196
    stages = {stage.block: stage for stage in small_model.stages()}
    for row in rows:
        block, entering, leaving = (int(word) for word in row[:3])
        assert entering == num_tokens
        if block in stages:
            rate, spent = float(row[3]), [int(word) for word in row[4:8]]
            attentive, pairs, clusters, inattentive = spent
            assert rate == stages[block].keep_rate
            assert attentive - pairs + clusters == leaving
            assert attentive + inattentive == entering
            assert leaving == max(1, -int(-rate * entering // 1))  # ceil
        else:
            assert entering == leaving and len(row) == 4
        num_tokens = leaving
    assert small_model.stages()[-1].num_outputs == num_tokens
    assert small_model.keep_rates == (
        keep_rate if isinstance(keep_rate, tuple) else (keep_rate,) * 3
    ), "describing changes nothing"


def test_describe_counts_evits_fused_token() -> None:
    rows, *_ = read_table(describe(build_tiny(reduction="evit", keep_rate=0.5)))
    assert [row[1:3] for row in rows] == [["16", "16"], ["16", "9"], ["9", "6"]]


# Keep rate for a budget -------------------------------------------------------------------------


def test_keep_rate_of_deit_small(small_model) -> None:
    small_model.set_keep_rate(0.9)
    assert find_keep_rate(small_model, 4.6) == 1.0, "no stage is cheaper than almost no reduction"
    assert small_model.keep_rates == (0.9,) * 3


@pytest.mark.parametrize(("method", "target"), [("bat", 3.0), ("tome", 2.0)])
def test_found_keep_rate_is_the_largest_within_the_budget(
    small_model, method: str, target: float
) -> None:
    small_model.set_reduction(method)
    found = find_keep_rate(small_model, target)
    small_model.set_keep_rate(found)
    assert count_gmacs(small_model) <= target
    small_model.set_keep_rate(found + 0.001)
    assert count_gmacs(small_model) > target


def test_budgets_at_the_ends() -> None:
    model = build_tiny(keep_rate=1.0)
    dense = count_gmacs(model)
    assert find_keep_rate(model, dense) == find_keep_rate(model, 100.0) == 1.0
    assert find_keep_rate(model, dense * 0.999) < 1.0
    with pytest.raises(ValueError, match=r"target_gmacs 1e-05 .*smallest keep rate"):
        find_keep_rate(model, 1e-5)
    for still in (build_tiny(reduction="none"), build_tiny(reduction_loc=())):
        with pytest.raises(ValueError, match="reduces tokens"):
            find_keep_rate(still, 1.0)
