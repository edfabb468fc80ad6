"""Derivatives of every order, against finite differences in float64; and none that nobody needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.operator_cases import SMALL, Case, chosen_backend, skip_unless_available
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mima import ops, reference
from mima.ops.backends import reference as reference_backend

BACKENDS = ("reference", "native")
TINY = [case for case in SMALL if case.name == "small"]


def _leaves(case: Case, device: torch.device) -> list[Tensor]:
    return [x.requires_grad_() for x in case.tensors(torch.float64, device)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_first_and_second_derivatives(case: Case, backend: str, device: torch.device) -> None:
    skip_unless_available(backend, case.op, torch.float64, device)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(tensors, backend))

    leaves = _leaves(case, device)
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves, fast_mode=case.name != "small")


def test_sums_of_a_second_derivative_are_not_formed_in_16_bits() -> None:
    W = torch.zeros(64, 64, dtype=torch.float16)
    A, B = (torch.full(size, 4.0, dtype=torch.float16) for size in ((4, 64), (64, 4)))
    scale, weights = torch.ones(1), torch.ones(1)
    B.requires_grad_()
    scale.requires_grad_()
    merged = ops.merge_lora(W, [A], [B], scale, weights)
    (gradient,) = torch.autograd.grad(0.01 * merged.square().sum(), B, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), scale)
    # 2 · 0.01 · 2 scale Σ (B A) Aᵀ: more than float16's largest number
    expected = 4 * 0.01 * ((B @ A).float() @ A.float().T).sum()
    torch.testing.assert_close(second, expected.detach().view(1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_plain_pytorchs_results_have_no_gaps(case: Case, device: torch.device) -> None:
    leaves = [
        x.mT.contiguous().mT.requires_grad_() if x.ndim >= 2 else x.requires_grad_()
        for x in case.tensors(torch.float64, device)
    ]
    outputs = case.call(leaves, "reference")
    grads = torch.autograd.grad([y.sum() for y in outputs], leaves, allow_unused=True)
    assert all(x.is_contiguous() for x in (*outputs, *grads) if x is not None)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_third_derivatives(case: Case, device: torch.device) -> None:
    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = case.call(tensors, "reference")
        loss = sum((y**3).sum() for y in outputs)
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert gradgradcheck(gradients, _leaves(case, device), fast_mode=True)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_each_input_can_be_the_only_one_that_is_differentiated(
    case: Case, device: torch.device
) -> None:
    tensors = case.tensors(torch.float64, device)
    for i in range(len(tensors)):

        def f(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
            return tuple(case.call([*tensors[:i], x, *tensors[i + 1 :]], "reference"))

        leaf = tensors[i].clone().requires_grad_()
        assert gradcheck(f, [leaf], fast_mode=True)
        assert gradgradcheck(f, [leaf], fast_mode=True)


def _recorded_needs(monkeypatch: pytest.MonkeyPatch, op: str) -> list[tuple[bool, ...]]:
    """Record the last argument, the needs, of each call of an operator's backward."""
    name = f"{op}_backward"
    original = getattr(reference_backend, name)
    needs: list[tuple[bool, ...]] = []

    def spy(*args: Any) -> Any:
        needs.append(tuple(args[-1]))
        return original(*args)

    monkeypatch.setattr(reference_backend, name, spy)
    return needs


def test_no_gradient_is_computed_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2)
    leaf = torch.ones(2, 2, requires_grad=True)

    needs = _recorded_needs(monkeypatch, "weighted_merge")
    ops.weighted_merge(x, [leaf], [1.0], backend="reference").sum().backward()
    assert needs == [(False, True, False)]

    needs = _recorded_needs(monkeypatch, "projected_merge")
    ops.projected_merge([x], [[leaf]], [x], [x], backend="reference")[0].sum().backward()
    assert needs == [(False, True, False, False)]

    needs = _recorded_needs(monkeypatch, "batched_lora")
    index = torch.tensor([0, 0])
    y = ops.batched_lora(x[:, None], x, [leaf], [x], [1.0], index, backend="reference")
    y.sum().backward()
    assert needs == [(False, False, True, False, False, False)]

    needs = _recorded_needs(monkeypatch, "merge_lora")
    ops.merge_lora(x, [x], [leaf], [1.0], [1.0], backend="reference").sum().backward()
    assert needs == [(False, False, True, False, False)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merges_pullback_is_its_adjoint_and_gives_one_concepts_part(
    backend: str, device: torch.device
) -> None:
    skip_unless_available(backend, "projected_merge", torch.float64, device)
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device)

    W0, change, up = ([randn(o, 4) for o in (3, 2)] for _ in range(3))
    C, M, w = [randn(2, 4), randn(0, 4)], [randn(2, 4), randn(0, 4)], randn(2)
    zeros = [torch.zeros_like(x) for x in W0]
    for pullback, merge, text, swapped in (
        (ops.projected_merge_pullback, ops.projected_merge, (C, M), (M, C)),
        (ops.weighted_merge_pullback, ops.weighted_merge, (w,), (w,)),
    ):
        leaves = [[x.clone().requires_grad_() for x in W0] for _ in range(2)]
        merged = merge(W0, leaves, *text, backend=backend)
        flat = [x for row in leaves for x in row]
        expected = torch.autograd.grad(merged, flat, up)
        _assert_close([x for row in pullback(up, *text, backend=backend) for x in row], expected)
        parts = pullback(change, *swapped, backend=backend)
        for n, part in enumerate(parts):
            alone = [change if n == k else zeros for k in range(2)]
            _assert_close(part, merge(zeros, alone, *text, backend=backend))
        x = [randn(3, 4).requires_grad_()]
        assert gradgradcheck(
            lambda x, pullback=pullback, text=text: tuple(
                y for row in pullback([x], *text, backend=backend) for y in row
            ),
            x,
        )
        assert pullback([], *text) == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pullback_of_a_step_follows_each_argument_alone(
    backend: str, device: torch.device
) -> None:
    # v is a function of g, as in an unrolled run: derivatives of any order must not take the part
    # that goes through v for the one at g
    skip_unless_available(backend, "adam_step", torch.float64, device)
    draw = torch.Generator().manual_seed(0)
    z, g = (torch.randn(5, generator=draw, dtype=torch.float64).to(device) for _ in range(2))
    rule = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.02, "step": 3}
    found = []
    for step in (reference.adam_step, functools.partial(ops.adam_step, backend=backend)):
        leaf = g.clone().requires_grad_()
        out = step([z], [leaf], [2 * leaf], [leaf * leaf + 0.1], **rule)
        (first,) = torch.autograd.grad(
            sum(x.square().sum() for (x,) in out), leaf, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sin().sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad(second.sin().sum(), leaf)
        found.append([first, second, third])
    _assert_close(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_has_finite_slopes_where_no_gradient_was_seen(
    backend: str, device: torch.device
) -> None:
    skip_unless_available(backend, "adam_step", torch.float32, device)
    zero = torch.zeros(3, device=device)
    pulled = ops.adam_step_pullback(
        *([torch.ones_like(zero)] for _ in range(3)),
        *([zero], [zero], [zero]),
        lr=1.0,
        step=0,
        backend=backend,
    )
    assert pulled[0][0].tolist() == [1, 1, 1]
    for (x,) in pulled:
        assert torch.isfinite(x).all()
    torch.testing.assert_close(pulled[2][0], zero + 0.9 * (1 - 1 / (1 - 0.9) / 1e-8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_sees_that_its_moments_were_overwritten(backend: str, device: torch.device) -> None:
    skip_unless_available(backend, "adam_step", torch.float32, device)
    z, g, m, v = (torch.rand(5, device=device) for _ in range(4))
    recorded, _, _ = ops.adam_step([z], [g.requires_grad_()], [m], [v], lr=0.1, step=1)
    step = functools.partial(ops.adam_step, lr=0.1, step=1, overwrite=True, backend=backend)
    with torch.no_grad():
        _, (m_after,), _ = step([z], [g], [m], [v])
    if m_after is m:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            recorded[0].sum().backward()
    else:
        # plain PyTorch overwrites nothing
        recorded[0].sum().backward()
    with torch.inference_mode():
        step([z.clone()], [g.clone()], [m.clone()], [v.clone()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_a_merges_weights_pass_on_what_is_not_finite(
    backend: str, device: torch.device
) -> None:
    skip_unless_available(backend, "weighted_merge", torch.float64, device)
    found = []
    for merge in (reference.weighted_merge, functools.partial(ops.weighted_merge, backend=backend)):
        weights = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device, requires_grad=True)
        base, *thetas = (torch.full_like(weights, value) for value in (0, 1, 2))
        (merged,) = merge([base], [[theta] for theta in thetas], weights)
        upstream = torch.ones_like(merged, requires_grad=True)
        (gradient,) = torch.autograd.grad(merged, weights, upstream, create_graph=True)
        inf = torch.full_like(gradient, torch.inf)
        found.append(torch.autograd.grad(gradient, upstream, inf))
    _assert_close(*found)


def test_gradients_do_not_overwrite_what_a_second_backward_reads(device: torch.device) -> None:
    for case in TINY:
        leaves = _leaves(case, device)
        backend = chosen_backend(case.op, torch.float64, device)
        loss = sum((y**2).sum() for y in case.call(leaves, backend))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        for x, y in zip(first, again, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_torch_func_transforms(case: Case, device: torch.device) -> None:
    tensors = case.tensors(torch.float64, device)
    backend = chosen_backend(case.op, torch.float64, device)

    def loss(*tensors: Tensor) -> Tensor:
        return torch.stack([(y**2).sum() for y in case.call(tensors, backend)]).sum()

    every = tuple(range(len(tensors)))
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    _assert_close(torch.func.grad(loss, every)(*tensors), expected)

    outputs, pullback = torch.func.vjp(lambda *t: tuple(case.call(t, backend)), *tensors)
    _assert_close(pullback(tuple(2 * y for y in outputs)), expected)

    # The gradient of the gradient's norm, by nested transforms and by autograd.
    def norm(first: Tensor) -> Tensor:
        return (torch.func.grad(loss)(first, *tensors[1:]) ** 2).sum()

    leaf = tensors[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, *tensors[1:]), leaf, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), leaf)
    _assert_close([torch.func.grad(norm)(tensors[0])], [second])


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_vmap_agrees_with_a_loop(case: Case, which: str, device: torch.device) -> None:
    size = 3
    batches = [case.tensors(torch.float64, device, seed=seed) for seed in range(size)]
    stacked = [torch.stack(xs, dim=-1) for xs in zip(*batches, strict=True)]
    batched = {"all": range(len(stacked)), "first": [0], "last": [len(stacked) - 1]}[which]
    in_dims = tuple(-1 if i in batched else None for i in range(len(stacked)))
    tensors = [x if i in batched else x[..., 0] for i, x in enumerate(stacked)]
    backend = chosen_backend(case.op, torch.float64, device)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(tensors, backend))

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        loss = lambda *t: torch.stack([(y**2).sum() for y in f(*t)]).sum()  # noqa: E731
        return torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)

    for function in (f, gradients):
        together = torch.vmap(function, in_dims)(*tensors)
        for b in range(size):
            alone = function(*(x[..., b] if i in batched else x for i, x in enumerate(tensors)))
            _assert_close([y[b] for y in together], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_batched_gradients_agree_with_a_loop(
    case: Case, backend: str, device: torch.device
) -> None:
    skip_unless_available(backend, case.op, torch.float64, device)
    leaves = _leaves(case, device)
    outputs = case.call(leaves, backend)
    upstream = [torch.randn_like(y).requires_grad_() for y in outputs]
    grads = torch.autograd.grad(
        outputs, leaves, upstream, create_graph=True, materialize_grads=True
    )
    first = [x for x in grads if x.requires_grad]
    for ys, xs in ((outputs, leaves), (first, [*leaves, *upstream])):
        if not ys:
            continue

        def pull(
            *u: Tensor, ys: Sequence[Tensor] = ys, xs: Sequence[Tensor] = xs, batched: bool = False
        ) -> tuple[Tensor, ...]:
            options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
            return tuple(x for x in torch.autograd.grad(ys, xs, u, **options) if x is not None)

        directions = [torch.randn(2, *y.shape, dtype=y.dtype, device=device) for y in ys]
        each = [pull(*(u[i] for u in directions)) for i in range(2)]
        expected = [torch.stack(pair) for pair in zip(*each, strict=True)]
        _assert_close(torch.vmap(pull)(*directions), expected)
        _assert_close(pull(*directions, batched=True), expected)
        # views that negate, of which memory says nothing
        negated = [torch.complex(u[0], -u[0]).conj().imag for u in directions]
        assert all(u.is_neg() for u in negated)
        _assert_close(pull(*negated), each[0])


def _assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
