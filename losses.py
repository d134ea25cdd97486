"""Losses around a base criterion, after DeiT (https://github.com/facebookresearch/deit).

Modifications of `losses.py: DistillationLoss`: the teacher is frozen here, bad settings are
ValueErrors, and a student without a distillation head is distilled through its class logits.
Co-training stands in DeiT's training loop; here it is a criterion like any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillationLoss(nn.Module):
    """A criterion plus a term that pulls the student to a teacher (DeiT, arXiv 2012.12877)."""

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None = None,
        distillation_type: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        """Builds the criterion.

        Args:
            base_criterion: (logits, targets) -> loss.
            teacher_model: images -> logits; needed unless the type is "none".
            distillation_type: "none"; "soft": KL divergence to the teacher's distribution; "hard":
                cross-entropy to the teacher's decision.
            alpha: weight of the distillation term, in [0, 1].
            tau: temperature of the soft distillation, > 0.
        """
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            allowed = "allowed: none, soft, hard"
            raise ValueError(f"distillation_type is {distillation_type!r}, {allowed}")
        if distillation_type != "none" and teacher_model is None:
            raise ValueError(f"distillation_type {distillation_type!r} needs a teacher_model")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, allowed: 0 to 1")
        if tau <= 0:
            raise ValueError(f"tau is {tau}, allowed: above 0")
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        if teacher_model is not None:
            teacher_model.eval().requires_grad_(False)
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(
        self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        """Scalar (1 - alpha) * base loss + alpha * distillation term.

        Args:
            inputs: (B, 3, height, width) the images, which the teacher sees too.
            outputs: (B, classes) logits, or a pair of them: class head, distillation head.
            targets: (B,) class indices or (B, classes) probabilities, as the base criterion takes.
        """
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        base_loss = self.base_criterion(logits, targets)
        if self.distillation_type == "none":
            return base_loss
        with torch.no_grad():
            teacher_logits = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            distillation = F.cross_entropy(distilled, teacher_logits.argmax(dim=1))
        else:
            # As in DeiT: the mean over all elements, times tau^2 so that gradients keep their size.
            student, teacher = (
                F.log_softmax(logits / self.tau, dim=1) for logits in (distilled, teacher_logits)
            )
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            distillation = divergence * self.tau**2 / distilled.numel()
        return base_loss * (1 - self.alpha) + distillation * self.alpha


class CosubLoss(nn.Module):
    """Co-training of two submodels (Touvron et al., arXiv 2212.04884).

    Stochastic depth draws two submodels for every image, which stands in the batch twice. Each
    learns from the target and from the other's prediction.
    """

    def __init__(self, base_criterion: nn.Module) -> None:
        """`base_criterion` takes (logits, targets); DeiT's is binary cross-entropy."""
        super().__init__()
        self.base_criterion = base_criterion

    def forward(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar mean of the four losses.

        Args:
            inputs: (2 B, 3, height, width) the images, not looked at.
            outputs: (2 B, classes) logits of one submodel, then of the other.
            targets: (B,) class indices or (B, classes) probabilities, as the base criterion takes.
        """
        first, second = outputs.chunk(2)
        losses = [self.base_criterion(logits, targets) for logits in (first, second)]
        for student, teacher in ((first, second), (second, first)):
            soft_targets = teacher.detach().sigmoid()
            losses.append(F.binary_cross_entropy_with_logits(student, soft_targets))
        return torch.stack(losses).mean()


class TwoHeadLoss(nn.Module):
    """The mean loss of two heads, each by the same criterion (Evo-ViT, AAAI 2022)."""

    def __init__(self, criterion: nn.Module) -> None:
        """`criterion` takes (inputs, logits, targets)."""
        super().__init__()
        self.criterion = criterion

    def forward(self, inputs: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Scalar mean; the pair of logits (B, classes) shares inputs and targets."""
        return torch.stack([self.criterion(inputs, logits, targets) for logits in outputs]).mean()
