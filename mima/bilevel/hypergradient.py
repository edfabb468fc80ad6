"""Differentiate through the K lower-level steps: one reverse sweep, three Hessian products.

The sweep walks the trajectory backwards, last step first. At each step the optimizer's rule is
differentiated by its own formula (it is elementwise), and the loss's curvature enters through one
Hessian-vector product. The gradient modes differ in that product alone:

- ``exact``: a backward pass through the backward pass;
- ``finite_difference``: central difference of two first-order gradients;
- ``first_order``: no product; dθ'[n]/dθ = I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from mima.bilevel import lower
from mima.bilevel.lower import LowerLevel, State, Tensors
from mima.bilevel.optimizers import Vector
from mima.merging import Params
from mima.ops.attention import TwiceDifferentiable

Product = Callable[[Params], tuple[Tensors, Tensors]]
"""``u ↦ (∂²L/∂z∂z · u, ∂²L/∂θ∂z · u)``, the second for those of the θ names that were asked for
on which L depends beside z."""
Cotangent = Callable[[Callable[[], Params]], Params]
"""The gradient at one state's change θ'_k − θ, for a function that returns z_k."""
Linearise = Callable[[LowerLevel, State, Params, tuple[str, ...], int], tuple[Tensors, Product]]
"""Gradient of step k's loss at a state, and its Hessian product there."""


@contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """Run attention on the math backend: the fused kernels have no double backward.

    Where a run has entered `FusedLayers`, attention without a mask runs on `mima.ops.attention`,
    whose second derivative keeps no matrix. ``exact`` enters this for the steps that it
    differentiates twice, and nothing else does, so that every other pass keeps the fused kernels.
    """
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 as it is on a GPU, where convolutions are in TF32 unless told otherwise.

    A difference of gradients is a few roundings of float32 large, TF32 rounds a thousand times as
    coarsely.
    """
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import
    operators = torch.backends.cuda.matmul, convolution
    lowered = [operator for operator in operators if operator.fp32_precision == "tf32"]
    for operator in lowered:
        operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operator in lowered:
            operator.fp32_precision = "tf32"


def exact(
    task: LowerLevel, state: State, theta: Params, wrt: tuple[str, ...], k: int
) -> tuple[Tensors, Product]:
    """Second derivatives by autograd."""
    z = {name: value.detach().requires_grad_() for name, value in state.z.items()}
    leaves = {name: theta[name].detach().requires_grad_() for name in wrt}
    with torch.enable_grad(), twice_differentiable_attention():
        loss = task.loss(z, {**theta, **leaves}, k)
        graph = torch.autograd.grad(
            loss, list(z.values()), create_graph=True, materialize_grads=True
        )

    def product(u: Params) -> tuple[Tensors, Tensors]:
        with twice_differentiable_attention():
            out = torch.autograd.grad(
                [g for g in graph if g.requires_grad],
                [*z.values(), *leaves.values()],
                [u[name] for name, g in zip(z, graph, strict=True) if g.requires_grad],
                allow_unused=True,
            )
        return _split(out, z, leaves)

    return {name: g.detach() for name, g in zip(z, graph, strict=True)}, product


def finite_difference(
    task: LowerLevel, state: State, theta: Params, wrt: tuple[str, ...], k: int
) -> tuple[Tensors, Product]:
    """Second derivatives by central differences of first-order gradients.

    The two points lie ``± h u`` from z; see ``difference_step``.
    """

    def gradients(u: Params, step: float) -> tuple[torch.Tensor | None, ...]:
        moved = {name: torch.add(z.detach(), u[name], alpha=step) for name, z in state.z.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
        shared = {name: theta[name].detach().requires_grad_() for name in wrt}
        inputs = [*leaves.values(), *shared.values()]
        with full_float32():
            with torch.enable_grad():
                loss = task.loss(leaves, {**theta, **shared}, k)
            return torch.autograd.grad(loss, inputs, allow_unused=True)

    def product(u: Params) -> tuple[Tensors, Tensors]:
        h = difference_step(state.z, u)
        if h == 0:
            return _split([None] * (len(state.z) + len(wrt)), state.z, wrt)
        pairs = zip(gradients(u, h), gradients(u, -h), strict=True)
        slopes = [None if a is None or b is None else (a - b).div_(2 * h) for a, b in pairs]
        return _split(slopes, state.z, wrt)

    if not task.optimizer.reads_gradient:
        return {}, product
    return state.gradient or lower.gradient(task, state, theta, k), product


def difference_step(z: Params, u: Params) -> float:
    """The h for differences between ``z ± h u``; 0 where u is 0.

    ``h = ∛(ε/2) / √Σ_j (‖u_j‖ / s_j)²``, ε/2 the rounding unit, balances the O(h²) truncation
    against the O(ε/h) rounding error. The scale s_j of tensor j, [O, D] once flattened, is the
    spectral norm ``rms(z) (√O + √D)`` of a random matrix: gradients have a low rank and lie where
    the weights are read, so that a step that is small beside ‖z_j‖ can be large beside what z_j
    does. The root mean square is over all of z, since some tensors, such as LoRA's B, start at 0.
    """
    sizes = [value.shape[0] if value.ndim else 1 for value in z.values()]
    reach = [o**0.5 + (v.numel() / o) ** 0.5 for o, v in zip(sizes, z.values(), strict=True)]
    lengths = torch.stack(torch._foreach_norm(list(u.values())))
    length = float((lengths / lengths.new_tensor(reach)).norm())
    values = list(z.values())
    rms = float(get_total_norm(values)) / sum(value.numel() for value in values) ** 0.5
    third: float = (torch.finfo(values[0].dtype).eps / 2) ** (1 / 3)
    return third * (rms or 1.0) / length if length else 0.0


LINEARISE: dict[str, Linearise] = {"exact": exact, "finite_difference": finite_difference}


def reads_gradients(mode: str, task: LowerLevel) -> bool:
    """Whether the sweep reads the gradients of the path's steps: ``exact`` computes its own."""
    return mode != "exact" and task.optimizer.reads_gradient


def pullback(
    mode: str,
    task: LowerLevel,
    theta: Params,
    wrt: tuple[str, ...],
    cotangents: Mapping[int, Cotangent],
    states: Sequence[State] | None = None,
) -> Tensors:
    """Vector-Jacobian product of ``θ ↦ (θ'_k[n](θ) − θ)``, k the states of the path asked for.

    Args:
        mode: ``exact``, ``finite_difference`` or ``first_order``.
        task: the lower-level problem.
        theta: θ, by name.
        wrt: the names of θ to differentiate by.
        cotangents: for states k in 1 … K after k steps, what gives the gradient at the change
            θ'_k[n] − θ, and at new words. Its argument returns z_k, for one that depends on z_k.
        states: the path, with its gradients where the mode ``reads_gradients``; None walks it.

    Returns:
        Gradient at θ, by name (names without any are absent). Memory: K states, one graph.
    """
    if mode == "first_order":
        return {}
    linearise, last = LINEARISE[mode], max(cotangents) - 1
    if states is None:
        keep = reads_gradients(mode, task)
        states = lower.descend(task, theta, last, keep_gradients=keep)
    z_bar: Tensors = {}
    total: Tensors = {}
    memory_bar: dict[str, Vector] | None = None
    for k in reversed(range(last + 1)):
        g, product = linearise(task, states[k], theta, wrt, k)
        if k + 1 in cotangents:
            after = partial(_after, task, states, theta, g, k)
            bar = cotangents[k + 1](after)
            here, at_theta = task.change_pullback(after, theta, wrt, bar)
            accumulate(z_bar, here)
            accumulate(total, at_theta)
        z_bar, g_bar, memory_bar = _rule_pullback(task, states[k], g, k, z_bar, memory_bar)
        hz, htheta = product(g_bar)
        z_bar = {name: value + hz[name] for name, value in z_bar.items()}
        accumulate(total, htheta)
    accumulate(total, {n: v for n, v in task.start_pullback(z_bar).items() if n in wrt})
    return total


def _after(task: LowerLevel, states: Sequence[State], theta: Params, g: Params, k: int) -> Params:
    """What is trained, after step k. The path's last step is taken here, when its end is asked."""
    if k + 1 < len(states):
        return states[k + 1].z
    known = g or lower.gradient(task, states[k], theta, k)
    return lower.advance(task, states[k], known, k).z


def _rule_pullback(
    task: LowerLevel,
    state: State,
    g: Params,
    k: int,
    z_bar: Params,
    memory_bar: dict[str, Vector] | None,
) -> tuple[Tensors, Tensors, dict[str, Vector]]:
    """Adjoint of the optimizer's rule at one step: gradients at z, at g and at its memory."""
    z_out: Tensors = {}
    g_out: Tensors = {}
    memory_out: dict[str, Vector] = {}
    for rule, names in lower.stepping_together(task, state.z):
        memory = [state.memory[name] for name in names]
        zeros = [tuple(map(torch.zeros_like, vector)) for vector in memory]
        z_bars, g_bars, memory_bars = rule.pullback(
            [z_bar[name] for name in names],
            [memory_bar[name] for name in names] if memory_bar else zeros,
            [g[name] for name in names] if g else [],
            memory,
            task.age + k,
        )
        z_out.update(zip(names, z_bars, strict=True))
        g_out.update(zip(names, g_bars, strict=True))
        memory_out.update(zip(names, memory_bars, strict=True))
    return z_out, g_out, memory_out


def accumulate(total: Tensors, more: Params) -> None:
    """Add ``more`` to the names of ``total``; the tensors themselves stay as they are."""
    both = [name for name in more if name in total]
    if both:
        sums = torch._foreach_add([total[name] for name in both], [more[name] for name in both])
        total.update(zip(both, sums, strict=True))
    total.update((name, value) for name, value in more.items() if name not in total)


def _split(
    values: Sequence[torch.Tensor | None], z: Params, wrt: Iterable[str]
) -> tuple[Tensors, Tensors]:
    """The two parts of a product, whose zeros are None: those at θ are left out."""
    count = len(z)
    at_z = zip(z.items(), values[:count], strict=True)
    at_theta = zip(wrt, values[count:], strict=True)
    return (
        {name: torch.zeros_like(like) if x is None else x for (name, like), x in at_z},
        {name: x for name, x in at_theta if x is not None},
    )
