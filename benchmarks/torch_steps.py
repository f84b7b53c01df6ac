"""Training steps in PyTorch for side_by_side.py: from the methods' formulas, and with TorchJD.

PyTorch is imported when the first step is made, so that the processes that measure bilb's memory do
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: TorchJD's classes of the methods that aggregate a Jacobian.
TORCHJD = {
    "mgda": lambda t: t.MGDA(),
    "cagrad": lambda t: t.CAGrad(c=0.4),
    "pcgrad": lambda t: t.PCGrad(),
    "imtl_g": lambda t: t.IMTLG(),
    "aligned_mtl": lambda t: t.AlignedMTL(),
    "upgrad": lambda t: t.UPGrad(),
}


def load() -> Any:
    """Imports PyTorch and TorchJD."""
    import torch
    import torchjd.aggregation
    import torchjd.autogram
    import torchjd.autojac

    return torch, torchjd


def versions() -> str:
    """Returns the versions of both libraries."""
    import importlib.metadata as installed

    return ", ".join(f"{name} {installed.version(name)}" for name in ("torch", "torchjd"))


def task_losses(layers: list[Callable[[Any], Any]], inputs: Any, targets: Any) -> Any:
    """Returns the mean squared errors (K,)."""
    *hidden, heads = layers
    for layer in hidden:
        inputs = layer(inputs).relu()
    return ((heads(inputs) - targets) ** 2).mean(0)


class TorchStep:
    """A step that trains and gives the losses before it."""

    def __init__(self, step: Callable[[], np.ndarray], held: Callable[[], list[Any]]):
        """Keeps the step, and a function for the tensors that stay from one to the next."""
        self.step, self.held = step, held

    def __call__(self) -> np.ndarray:
        """Takes a step."""
        return self.step()

    def peak_bytes(self) -> float:
        """Returns the bytes that stay, and the most that a step has allocated beside them."""
        torch, _ = load()
        self.step()
        held = sum(tensor.nbytes for tensor in self.held())
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self.step()
        events = profile.profiler.kineto_results.events()
        memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        return held + max(np.cumsum([event.nbytes() for event in memory]), default=0)


def make(
    kind: str, method: str, problem: Any, *, learning_rate: float, penalty: float
) -> TorchStep | None:
    """Returns a step of PyTorch, None if there is none.

    Args:
        kind: ``torch``, ``compiled``, ``torchjd`` or ``autogram``.
        method: the method's name.
        problem: its ``kernels``, ``inputs`` and ``targets`` are NumPy arrays.
        learning_rate: of Adam, for the model and what a method learns (FAMO has its own).
        penalty: of BiLB4MTL.
    """
    torch, torchjd = load()
    layers = [linear(kernel) for kernel in problem.kernels]
    params = [layer.weight for layer in layers]
    batch = torch.tensor(problem.inputs), torch.tensor(problem.targets)

    def held(*optimizers):
        states = [of for optimizer in optimizers for of in optimizer.state.values()]
        tensors = [value for of in states for value in of.values() if torch.is_tensor(value)]
        return [*params, *batch, *tensors]

    adam = lambda params, rate=learning_rate, **more: torch.optim.Adam(params, lr=rate, **more)
    if kind in ("torchjd", "autogram"):
        if method not in TORCHJD:
            return None
        optimizer = adam(params, fused=True)
        aggregator = TORCHJD[method](torchjd.aggregation)
        if kind == "autogram" and not hasattr(aggregator, "gramian_weighting"):
            return None
        make_step = {"torchjd": _aggregating_step, "autogram": _weighting_step}[kind]
        return TorchStep(make_step(layers, batch, aggregator, optimizer), lambda: held(optimizer))
    num_tasks = problem.targets.shape[1]
    own = {
        "ls": None,
        "bilb4mtl": torch.ones(num_tasks),  # the router's logits W
        "uw": torch.zeros(num_tasks),  # the log variances s
        "famo": torch.zeros(num_tasks),  # the logits xi
    }
    if method not in own:
        return None
    learnt = own[method]

    def objective():
        losses = task_losses(layers, *batch)
        return scalarised(method, losses, learnt, penalty), losses

    forward = torch.compile(objective) if kind == "compiled" else objective
    losses_of = lambda: task_losses(layers, *batch)
    losses_of = torch.compile(losses_of) if kind == "compiled" else losses_of
    groups = [*params]
    if method in ("bilb4mtl", "uw"):
        learnt.requires_grad_(True)
        groups.append(learnt)
    optimizer = adam(groups, fused=True)
    of_logits = adam([learnt], 0.025, weight_decay=1e-3) if method == "famo" else None

    def step():
        value, losses = forward()
        value.backward()
        optimizer.step()
        if of_logits is not None:
            with torch.no_grad():
                change = (losses + 1e-8).log() - (losses_of() + 1e-8).log()
                z = learnt.softmax(0)
                learnt.grad = z * (change - z @ change)
                of_logits.step()
        optimizer.zero_grad()
        return losses.detach().numpy()

    return TorchStep(step, lambda: held(optimizer))


def scalarised(method: str, losses: Any, learnt: Any, penalty: float) -> Any:
    """Returns a method's objective, from the losses (K,) and what it learns (K,)."""
    if method == "ls":
        return losses.sum()
    if method == "bilb4mtl":
        weights = learnt.sigmoid()
        u = weights * losses
        gaps = (u[1:] - u[:-1]).abs().sum()
        return u.sum() / weights.sum().detach() + penalty * gaps
    if method == "uw":
        return 0.5 * ((-learnt).exp() * losses + learnt).sum()
    z = learnt.softmax(0)
    d = losses + 1e-8
    return (z * d.log()).sum() / (z / d).sum().detach()


def linear(kernel: np.ndarray) -> Any:
    """Returns a linear layer without bias of a kernel (inputs, outputs)."""
    torch, _ = load()
    layer = torch.nn.Linear(*kernel.shape, bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(kernel.T.copy()))
    return layer


def _weighting_step(layers, batch, aggregator, optimizer):
    """Returns a step of TorchJD by weights, which it computes from the Gram matrix."""
    _, torchjd = load()
    engine = torchjd.autogram.Engine(*layers, batch_dim=None)

    def step():
        losses = task_losses(layers, *batch)
        losses.backward(aggregator.gramian_weighting(engine.compute_gramian(losses)))
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach().numpy()

    return step


def _aggregating_step(layers, batch, aggregator, optimizer):
    """Returns a step of TorchJD by the Jacobian."""
    _, torchjd = load()
    params = [layer.weight for layer in layers]

    def step():
        losses = task_losses(layers, *batch)
        torchjd.autojac.backward(losses)
        torchjd.autojac.jac_to_grad(params, aggregator)
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach().numpy()

    return step
