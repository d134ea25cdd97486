"""The whole model is one graph for every batch size, and computes the same when compiled."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config
from conftest import INDUCTOR, build_tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from models import REDUCTIONS, clustering
from models.reduction import Reduction

BATCH_SIZES = (2, 5, 3)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw_images(batch_size: int) -> Tensor:
    """Images whose first dimension the compiler may not take for a constant."""
    generator = torch.Generator().manual_seed(batch_size)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator)
    torch._dynamo.mark_dynamic(images, 0)
    return images


def compile_counted(function: Callable, backend: str) -> tuple[Callable, CompileCounterWithBackend]:
    """The function compiled without graph breaks, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("method", REDUCTIONS)
def test_one_graph_for_all_batch_sizes(method: str) -> None:
    model = build_tiny(
        reduction=method, depth=3, reduction_loc=(1,), keep_rate=0.3, drop_path_rate=0.3,
        proportional_attention="auto",
    ).train()  # fmt: skip
    compiled, counter = compile_counted(model.forward_with_assignments, "eager")
    for batch_size in BATCH_SIZES:
        images = draw_images(batch_size)
        torch.manual_seed(batch_size)  # of the stochastic depth
        logits, assignments = compiled(images)
        torch.manual_seed(batch_size)
        expected, expected_assignments = model.forward_with_assignments(images)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(assignments[0], expected_assignments[0])
        assert counter.frame_count == 1, f"compiled again for a batch of {batch_size}"


@pytest.mark.parametrize("method", ["bat", "dpcknn"])
@pytest.mark.parametrize("importance", ["class", "received"])
def test_one_graph_of_several_blocks(method: str, importance: str, monkeypatch) -> None:
    """As with larger images; a stage of 64 tokens is cut to blocks here."""
    model = build_tiny(
        img_size=64, reduction=method, reduction_loc=(1,), keep_rate=0.7, importance=importance
    )
    images = draw_images(2)
    images = torch.nn.functional.interpolate(images, 64)
    expected, groups = model.forward_with_assignments(images)
    for name, value in (("BLOCK_ROWS", 17), ("BLOCK_ELEMENTS", 1), ("QUERY_ROWS", 30)):
        monkeypatch.setattr(clustering, name, value)
    compiled, counter = compile_counted(model.forward_with_assignments, "aot_eager")
    exported = torch.export.export(model, (images,)).module()
    for logits, assignments in (model.forward_with_assignments(images), compiled(images)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(assignments[0], groups[0])
    torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_one_graph_with_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are looked at in eager mode only, and there is no graph break for that."""
    own = Reduction(lambda stage, budget: REDUCTIONS["topk"].assign(stage, budget))
    monkeypatch.setitem(REDUCTIONS, "mine", own)
    model = build_tiny(reduction="mine", depth=1, reduction_loc=(0,), keep_rate=0.3)
    compiled, counter = compile_counted(model, "eager")
    for batch_size in BATCH_SIZES:
        images = draw_images(batch_size)
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images.clone(),), dynamic_shapes=dynamic).module()
    images = draw_images(5)
    torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-5)


def test_one_graph_for_all_batch_sizes_with_gradients_and_without() -> None:
    """A training step, forward and backward, and an evaluation: one graph each."""
    model = build_tiny(depth=2, reduction_loc=(0,), keep_rate=0.3).train()
    compiled, counter = compile_counted(model, "aot_eager")
    for batch_size in BATCH_SIZES:
        images = draw_images(batch_size)
        gradients = []
        for function in (model, compiled):
            model.zero_grad()
            function(images).square().sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1, f"compiled again for a batch of {batch_size}"
    model.eval()
    with torch.no_grad():
        for batch_size in BATCH_SIZES:
            images = draw_images(batch_size)
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)
            assert counter.frame_count == 2, f"compiled again for a batch of {batch_size}"


def test_a_changing_keep_rate_stays_a_constant() -> None:
    """A float attribute would become a symbol of the second graph, and that graph takes minutes."""
    model = build_tiny(keep_rate=0.7, depth=1, reduction_loc=(0,))
    compiled, counter = compile_counted(model.forward_with_assignments, "eager")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, keep_rate in enumerate((0.7, 0.5, 0.35), start=1):
            model.set_keep_rate(keep_rate)
            logits, assignments = compiled(images)
            expected, expected_assignments = model.forward_with_assignments(images)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            assert all(map(torch.equal, assignments, expected_assignments))
            assert counter.frame_count == number
    values = [node.meta.get("example_value") for g in counter.graphs for node in g.graph.nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert len(tensors) > 100 and all(type(n) is int for t in tensors for n in t.shape)


def test_generated_code_computes_the_same() -> None:
    model = build_tiny(depth=1, reduction_loc=(0,), keep_rate=0.5)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(model.forward_with_assignments, backend=INDUCTOR, fullgraph=True)
        logits, assignments = compiled(images)
        expected, expected_assignments = model.forward_with_assignments(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert len(assignments) == len(expected_assignments) == 1
    assert torch.equal(assignments[0], expected_assignments[0])
    assert len({tuple(row) for row in assignments[0].tolist()}) == 3
