"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at 0, near 1 elsewhere
NEWTON_SCHULZ_STEPS = 3  # as for small networks; torch.optim.Muon takes 5


class Muon(torch.optim.Optimizer):
    """Muon for convolution filters, SGD with Nesterov momentum for everything else.

    `torch.optim.Muon` takes matrices alone; here a filter bank (c_out, c_in, h, w) counts as the
    matrix (c_out, c_in·h·w). It is scaled to norm sqrt(c_out) before each step: a norm behind it
    makes its size meaningless, and so the learning rate is a relative step. Weight decay acts
    on what SGD moves.

    Args:
        groups: of parameters, each with `params`, `weight_decay` and `filters`: whether Muon moves
            them, which then have two or more dimensions and no decay; else it is added to the
            gradient.
        lr: learning rate of all.
        momentum: of all, 0..1.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024), and its
    use in KellerJordan/cifar10-airbench.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Makes one step from the gradients at hand; `closure` is not used."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad
                if not group["filters"] and group["weight_decay"]:
                    gradient = gradient.add(p, alpha=group["weight_decay"])
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
                update = gradient.add(buffer, alpha=momentum)
                if group["filters"]:
                    p.mul_(len(p) ** 0.5 / p.norm())
                    update = orthogonalize(update.flatten(1)).view(p.shape)
                p.add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Replaces a matrix by about the nearest with orthogonal rows (or columns, if it is tall).

    Args:
        matrix: float (R, C).
        steps: Newton-Schulz iterations. After three, singular values above about 0.013 of the
            Frobenius norm end between 0.5 and 1.3, smaller ones grow about forty times.

    Returns:
        float (R, C), of the matrix's dtype; computed in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    if tall := len(x) > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
