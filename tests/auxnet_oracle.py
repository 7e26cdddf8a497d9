"""What layer-parallel training with an AuxNet means: a slow, plain loop, from the paper's definition (arXiv 2112.05387).

Per micro-batch, K stages F_0..F_{K-1}, lambda_0 = x, and a chain of small steps that makes the inputs of the others::

    1  lambda_{k+1} = step_k(lambda_k)        (= G_{k+1}(x), one network)
    2  z_k = F_k(lambda_k)
    3  gradient of z_k is -c_fit (lambda_{k+1} - z_k) - kappa_{k+1}, the last stage's is d phi; p_k is what reaches lambda_k
    4  lambda^_k = lambda_k - eta_k (p_k + c_pull (lambda_k - z_{k-1}) + kappa_k)
    5  kappa_k += c_pull (lambda^_k - z_{k-1})
    6  the steps learn 1/2 |G_k(x) - lambda^_k|^2 / (N_k v_k)
    7  more sweeps repeat 3 to 5 for the same lambda_k, where z_k is drawn to lambda^_{k+1} (penalty) or kappa moves (kept)

c = beta / (N_k v_k), eta_k = eta / c_pull; N_k the elements of z_k, v_k its variance about each channel's mean (at least a
hundredth of its mean square): the first micro-batch's, and after every update a hundredth of the way to the mean of that
update's. Where p_k
came through a penalty it is multiplied by pull / fit. A stage sweeps until the loss has been heard there, so once for each
stage above it. Predicted kappas: s_k * head_k(z_k, y), where the head learns -p/s_k, s_k the root mean square of the first p;
they are kept out of step 4. With k micro-batches an update the whole objective is divided by k. ``whole``: autograd goes
through all steps at once, which is the same but for the order of sums.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class AuxNetOracle:
    """One setting on one list of stages, trained in one process by the definition; stages give one tensor."""

    def __init__(self, stages: list[nn.Sequential], steps: list[nn.Module], heads: list[nn.Module] | None = None, *,
                 fit: float = 10.0, pull: float = 0.03, eta: float = 1.0, sweeps: int = 1, kappa: str = "zero",
                 trust: float | None = None, growth: tuple[float, int] | None = None, k: int = 1, lr: float = 0.1,
                 momentum: float = 0.9, aux_lr: float = 3e-3, whole: bool = False) -> None:
        self.stages, self.steps, self.heads, self.k, self.whole = stages, steps, heads, k, whole
        self.fit, self.pull, self.eta, self.sweeps, self.kappa, self.trust, self.growth = \
            fit, pull, eta, sweeps, kappa, trust, growth
        self.optimizers = [torch.optim.SGD(s.parameters(), lr=lr, momentum=momentum) for s in stages]
        self.aux = [torch.optim.Adam([*step.parameters(), *(heads[s].parameters() if heads else ())], lr=aux_lr)
                    for s, step in enumerate(steps)]
        self.v: dict[int, Tensor] = {}
        self.seen: dict[int, list[Tensor]] = {s: [] for s in range(len(steps))}
        self.s: dict[int, Tensor] = {}
        self.grads: list[list[list[Tensor]]] = []  # by micro-batch and stage
        self.losses: list[float] = []

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        for m, (x, y) in enumerate(data):
            self._micro_batch(m, x, y)
            if (m + 1) % self.k == 0:
                for optimizer in (*self.optimizers, *self.aux):
                    optimizer.step()
                    optimizer.zero_grad()
                for s, seen in self.seen.items():
                    self.v[s] = torch.lerp(self.v[s], torch.stack(seen).mean(), 0.01)
                    seen.clear()

    def _micro_batch(self, m: int, x: Tensor, y: Tensor) -> None:
        K, scale = len(self.stages), 1 / self.k
        inputs, generated = [x], []
        entered: list[Tensor] = []
        for s, step in enumerate(self.steps):  # 1
            entered.append(inputs[-1].detach().requires_grad_(s > 0))
            generated.append(step(generated[-1] if self.whole and s > 0 else entered[-1]))
            inputs.append(generated[-1].detach().requires_grad_())
        z = [stage(lam) for stage, lam in zip(self.stages, inputs)]  # 2
        phi = cross_entropy(z[-1], y)
        self.losses.append(phi.item())
        grown = 1.0
        if self.growth is not None:
            grown = self.growth[0] ** min(1.0, (m // self.k) / self.growth[1])
        links = range(K - 1)
        outputs = [value.detach() for value in z]
        for s in links:
            channel = {4: 1, 3: 2, 2: 1}[outputs[s].dim()]
            others = [d for d in range(outputs[s].dim()) if d != channel]
            variance = (outputs[s] - outputs[s].mean(others, keepdim=True)).square().mean()
            self.seen[s].append(torch.maximum(variance, 0.01 * outputs[s].square().mean()))
            self.v.setdefault(s, self.seen[s][0])
        c_fit = [scale * grown * self.fit / outputs[s].numel() / self.v[s] for s in links]
        c_pull = [scale * grown * self.pull / outputs[s].numel() / self.v[s] for s in links]
        lam = [value.detach() for value in generated]
        kappa: list[Any] = [torch.zeros_like(t) if self.kappa == "kept" else None for t in lam]
        guesses = [None if self.heads is None else self.heads[s](outputs[s], y) for s in links]
        if self.heads is not None:
            kappa = [scale * self.s[s] * guesses[s].detach() if s in self.s else None for s in links]

        def hat(s: int, p: Tensor) -> Tensor:  # 4, of the pair (lambda_{s+1}, z_s)
            slope = p + c_pull[s] * (lam[s] - outputs[s])
            if self.kappa == "kept":
                slope = slope + kappa[s]
            move = slope * (self.eta / c_pull[s])
            if self.trust is not None:
                most = self.trust * torch.sqrt(self.v[s] * (move.numel() / len(move)))
                move = torch.stack([part * (most / part.norm()).clamp(max=1.0) for part in move])
            return lam[s] - move

        target = list(lam)
        p: dict[int, Tensor] = {}
        last_hat: dict[int, Tensor] = {}
        for sweep in range(self.sweeps):
            if sweep:  # 5 and 7
                for s in links:
                    if sweep <= K - 1 - s:
                        to_be = hat(s, p[s + 1])
                        if self.kappa == "kept":
                            kappa[s] = kappa[s] + c_pull[s] * (to_be - outputs[s])
                        else:
                            target[s] = to_be
                        last_hat[s] = to_be
            g: list[Any] = []  # 3
            for s in links:
                grad = (outputs[s] - target[s]) * c_fit[s]
                g.append(grad if kappa[s] is None else grad - kappa[s])
            p = {}
            for s in range(1, K):
                root, grad = (z[s], g[s]) if s < K - 1 else (phi * scale if scale != 1 else phi, None)
                p[s], = torch.autograd.grad(root, inputs[s], grad, retain_graph=True)
                if self.kappa == "zero" and s < K - 1:
                    p[s] = p[s] * (self.pull / self.fit)
        found = []
        for s, stage in enumerate(self.stages):
            root, grad = (z[s], g[s]) if s < K - 1 else (phi * scale if scale != 1 else phi, None)
            grads = torch.autograd.grad(root, list(stage.parameters()), grad, retain_graph=True)
            found.append(list(grads))
            for parameter, value in zip(stage.parameters(), grads):
                parameter.grad = value.clone() if parameter.grad is None else parameter.grad + value
        self.grads.append(found)
        learned: Any = 0.0
        for s in reversed(links):  # 6
            to_be = hat(s, p[s + 1]) if self.sweeps - 1 < K - 1 - s else last_hat[s]
            loss = (generated[s] - to_be).square().sum() * (scale * 0.5 / to_be.numel() / self.v[s])
            if self.heads is not None:
                self.s.setdefault(s, (p[s + 1] / scale).square().mean().sqrt())
                wanted = -p[s + 1] / (scale * self.s[s])
                loss = loss + (guesses[s] - wanted).square().mean() * (scale * 0.5)
            learned = learned + loss
            if not self.whole:
                # The chain rule, step by step from the last.
                above = [] if s == K - 2 else [(generated[s], entered[s + 1].grad)]
                torch.autograd.backward([loss, *(root for root, _ in above)], [None, *(grad for _, grad in above)])
        if self.whole:
            learned.backward()


def copies(modules: dict[int, nn.Module], count: int) -> list[nn.Module]:
    """Of the stages below the last."""
    return [copy.deepcopy(modules[s]) for s in range(count)]
