"""The optimizer of matrices: momentum, orthogonalized (Jordan et al. 2024)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration that brings singular values near 1
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon`'s update, of all matrices of one shape at once.

    Networks of many small layers have hundreds of matrices in a few dozen shapes. One after the other, their products
    are thousands of launches a step: a GPU would wait for most of it.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float = 0.01):
        """A rate that is a tensor on the matrices' device is read there, for CUDA graphs."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Matrices without a gradient stay as they are."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if matrices:
                self._update(matrices, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[nn.Parameter], rate: Any, decay: float) -> None:
        gradients: list[Any] = [p.grad for p in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        kept = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(kept, gradients, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(gradients, kept, _MOMENTUM)  # Nesterov's
        torch._foreach_mul_(matrices, 1 - rate * decay)
        shapes: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            shapes.setdefault(matrix.shape, []).append(index)
        for (rows, columns), members in shapes.items():
            updates = orthogonalize(torch.stack([ahead[i] for i in members])).float()
            updates *= -rate * max(1, rows / columns) ** 0.5
            torch._foreach_add_([matrices[i] for i in members], updates.unbind())


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with singular values brought near 1, in bfloat16: Newton and Schulz's iteration."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
