"""The distillation loss against sums written out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from losses import DistillationLoss

LOGITS = torch.tensor([[1.0, -0.5, 2.0, 0.0], [0.3, 0.2, -1.0, 4.0], [0.0, 0.0, 1.0, 1.5]])
DISTILLED = torch.tensor([[0.5, 0.5, -2.0, 1.0], [3.0, 0.1, 0.0, -1.0], [2.0, -1.0, 0.3, 0.0]])
TEACHER = torch.tensor([[0.1, 3.0, 0.2, 0.0], [1.0, 0.5, 2.5, 2.0], [-1.0, 0.0, 0.5, 0.2]])
TARGETS = torch.tensor([2, 3, 0])
IMAGES = torch.zeros(3, 3, 2, 2)


class Teacher(nn.Module):
    """Fixed logits times a parameter; random under dropout unless in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        assert images is IMAGES, "the teacher sees the student's images"
        return self.dropout(self.scale * TEACHER)


def cross_entropy(logits: Tensor, targets: list[int]) -> float:
    rows = logits.double().softmax(dim=1).tolist()
    return -sum(math.log(row[t]) for row, t in zip(rows, targets, strict=True)) / len(rows)


def soft_term(logits: Tensor, tau: float) -> float:
    """DeiT's: KL(teacher || student) at temperature tau, over all elements, times tau^2."""
    p, q = ((rows.double() / tau).softmax(dim=1) for rows in (TEACHER, logits))
    return ((p * (p / q).log()).sum() * tau * tau / logits.numel()).item()


def test_none_is_the_base_criterion():
    criterion = DistillationLoss(nn.CrossEntropyLoss())
    expected = cross_entropy(LOGITS, TARGETS.tolist())
    assert criterion(IMAGES, LOGITS, TARGETS).item() == pytest.approx(expected, rel=1e-6)
    with_teacher = DistillationLoss(nn.CrossEntropyLoss(), Teacher(), "none", alpha=0.9)
    assert with_teacher(IMAGES, LOGITS, TARGETS).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("outputs", [LOGITS, (LOGITS, DISTILLED)], ids=["one head", "two heads"])
@pytest.mark.parametrize(("kind", "tau"), [("soft", 1.0), ("soft", 3.0), ("hard", 7.0)])
def test_distillation(alpha, outputs, kind, tau):
    criterion = DistillationLoss(nn.CrossEntropyLoss(), Teacher(), kind, alpha, tau)
    distilled = outputs[1] if isinstance(outputs, tuple) else outputs
    decisions = [1, 2, 2]  # the teacher's largest logits
    term = soft_term(distilled, tau) if kind == "soft" else cross_entropy(distilled, decisions)
    expected = (1 - alpha) * cross_entropy(LOGITS, TARGETS.tolist()) + alpha * term
    assert criterion(IMAGES, outputs, TARGETS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_gradients_reach_the_student_only(kind):
    teacher = Teacher().train()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha=0.5)
    logits = LOGITS.clone().requires_grad_()
    criterion(IMAGES, logits, TARGETS).backward()
    assert (logits.grad != 0).all()
    assert not teacher.training and teacher.scale.grad is None
    assert not any(parameter.requires_grad for parameter in criterion.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distillation_type": "warm"}, "is 'warm', allowed: none, soft, hard"),
        ({"teacher_model": None}, "'soft' needs a teacher_model"),
        ({"alpha": 1.5}, "alpha is 1.5, allowed: 0 to 1"),
        ({"alpha": -0.1}, "alpha is -0.1, allowed: 0 to 1"),
        ({"tau": 0.0}, "tau is 0.0, allowed: above 0"),
    ],
)
def test_bad_settings(changes, words):
    settings = {"teacher_model": Teacher(), "distillation_type": "soft"} | changes
    with pytest.raises(ValueError, match=words):
        DistillationLoss(nn.CrossEntropyLoss(), **settings)
