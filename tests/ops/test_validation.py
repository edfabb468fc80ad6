"""A caller's mistake is named: operator, argument, expected, got; before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mima import ops

e = torch.ones


def _wm(**changes: Any) -> Any:
    arguments = {"base": [e(2, 3), e(4)], "thetas": [[e(2, 3), e(4)]] * 2, "weights": [0.5, 0.5]}
    return ops.weighted_merge(**{**arguments, **changes})


def _pm(**changes: Any) -> Any:
    arguments = {
        "W0": [e(2, 3), e(4, 3)],
        "W": [[e(2, 3), e(4, 3)]] * 2,
        "C": [e(5, 3), e(1, 3)],
        "M": [e(5, 3), e(1, 3)],
    }
    return ops.projected_merge(**{**arguments, **changes})


def _bl(**changes: Any) -> Any:
    arguments = {
        "x": e(2, 5, 3),
        "weight": e(4, 3),
        "A": [e(1, 3), e(2, 3)],
        "B": [e(4, 1), e(4, 2)],
        "scale": [1.0, 1.0],
        "index": torch.tensor([0, -1]),
    }
    return ops.batched_lora(**{**arguments, **changes})


def _ml(**changes: Any) -> Any:
    arguments = {
        "weight": e(4, 3),
        "A": [e(1, 3), e(2, 3)],
        "B": [e(4, 1), e(4, 2)],
        "scale": [1.0, 1.0],
        "weights": [0.5, 0.5],
    }
    return ops.merge_lora(**{**arguments, **changes})


def _gn(**changes: Any) -> Any:
    arguments = {"x": e(2, 4, 3), "weight": e(4), "bias": e(4), "groups": 2}
    return ops.group_norm(**{**arguments, **changes})


def _ln(**changes: Any) -> Any:
    return ops.layer_norm(**{"x": e(2, 4), "weight": e(4), "bias": e(4), **changes})


def _gg(**changes: Any) -> Any:
    return ops.geglu(**{"x": e(2, 4), **changes})


def _at(**changes: Any) -> Any:
    return ops.attention(**{"q": e(2, 3, 4), "k": e(2, 5, 4), "v": e(2, 5, 6), **changes})


def _as(**changes: Any) -> Any:
    lists = {name: [e(2, 3), e(4)] for name in "zgmv"}
    return ops.adam_step(**{**lists, "lr": 0.1, "step": 0, **changes})


def _ap(**changes: Any) -> Any:
    lists = {name: [e(2, 3), e(4)] for name in ("bar_z", "bar_m", "bar_v", "g", "m", "v")}
    return ops.adam_step_pullback(**{**lists, "lr": 0.1, "step": 0, **changes})


half, shared, long = torch.float16, e(2, 3), e(10)
nan, inf = float("nan"), float("inf")

MISTAKES: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (_wm, {"base": 3}, TypeError, r"weighted_merge: base must be a sequence of tensors, got int 3"),
    (_wm, {"base": [e(2, 3), 4.0]}, TypeError, r"base\[1\] must be a tensor, got float 4.0"),
    (_wm, {"base": [e(2, 3)]}, ValueError, r"thetas\[0\] must have length 1, .*, got 2"),
    (_wm, {"thetas": [e(2, 3), e(4)]}, TypeError, r"thetas\[0\] must be a sequence .*\[2, 3\]"),
    (_wm, {"thetas": [[e(2, 3)], [e(2, 3)]]}, ValueError, r"thetas\[0\] must have length 2"),
    (
        _wm,
        {"thetas": [[e(2, 3), e(4)], [e(2, 3), e(5)]]},
        ValueError,
        r"thetas\[1\]\[1\] must be \[4\] to match base\[1\] \[4\], got \[5\]",
    ),
    (
        _wm,
        {"thetas": [[e(2, 3), e(4)], [e(2, 3), e(4, dtype=half)]]},
        TypeError,
        r"thetas\[1\]\[1\] must be torch.float32 on cpu like base\[1\], got torch.float16",
    ),
    (_wm, {"base": [e(2, 3), e(4, dtype=half)]}, TypeError, r"base\[1\] must be torch.float32"),
    (_wm, {"base": [e(2, 3), e(4, device="meta")]}, TypeError, r"base\[1\] must be .* on cpu"),
    (
        _wm,
        {"base": [e(2, 3).int(), e(4).int()]},
        TypeError,
        r"base\[0\] must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    (_wm, {"weights": [1.0]}, ValueError, r"weights must be \[2\], one per concept, got \[1\]"),
    (_wm, {"weights": e(2, 1)}, ValueError, r"weights must be \[2\], .* got \[2, 1\]"),
    (_wm, {"weights": e(2).int()}, TypeError, r"weights must be floating point, got torch.int32"),
    (_wm, {"weights": 0.5}, TypeError, r"weights must be a sequence of numbers, got float 0.5"),
    (_wm, {"weights": [0.5, None]}, TypeError, r"weights\[1\] must be a number, got NoneType"),
    (_wm, {"weights": ["a", 0.5]}, TypeError, r"weights\[0\] must be a number, got str 'a'"),
    (_wm, {"weights": [0.5, e(1)]}, TypeError, r"weights\[1\] must be a number, got .* \[1\]"),
    (_wm, {"weights": [0.5, nan]}, ValueError, r"weighted_merge: weights must be finite"),
    (_wm, {"weights": e(2) * inf}, ValueError, r"weights must be finite, got \[inf, inf\]"),
    (_wm, {"backend": "cuda"}, ValueError, r"weighted_merge: unknown backend 'cuda'"),
    (_wm, {"backend": 3}, TypeError, r"backend must be a string or None, got 3"),
    (_gn, {"x": e(2)}, ValueError, r"group_norm: x must be \[B, C, ...\], got \[2\]"),
    (_gn, {"x": e(2, 4).int()}, TypeError, r"x must be float32, bfloat16, .*, got torch.int32"),
    (_gn, {"weight": e(3)}, ValueError, r"weight must be \[4\] to match x \[2, 4, 3\], got \[3\]"),
    (_gn, {"bias": e(4, dtype=half)}, TypeError, r"bias must be torch.float32 on cpu like x"),
    (_gn, {"groups": 3}, ValueError, r"groups must divide the 4 channels of x, got 3"),
    (_gn, {"groups": 0}, ValueError, r"groups must divide the 4 channels of x, got 0"),
    (_gn, {"eps": -1.0}, ValueError, r"group_norm: eps must be ≥ 0, got -1.0"),
    (_gn, {"x": e(2, 4, 0)}, ValueError, r"x must have elements to normalise, got \[2, 4, 0\]"),
    (_ln, {"x": e(())}, ValueError, r"layer_norm: x must be \[..., D\], got \[\]"),
    (_ln, {"bias": e(5)}, ValueError, r"layer_norm: bias must be \[4\] to match x"),
    (_gg, {"x": e(2, 3)}, ValueError, r"geglu: x must be \[..., 2 D\], got \[2, 3\]"),
    (_gg, {"x": 1.0}, TypeError, r"geglu: x must be a tensor, got float 1.0"),
    (_at, {"q": e(4)}, ValueError, r"q must be \[..., T, d\] with T, d ≥ 1, got \[4\]"),
    (_at, {"k": e(2, 5, 3)}, ValueError, r"k must be \[2, S, 4\] to match q \[2, 3, 4\]"),
    (_at, {"v": e(2, 4, 6)}, ValueError, r"v must be \[2, 5, e\] to match k \[2, 5, 4\]"),
    (_at, {"v": e(2, 5, 6).double()}, TypeError, r"v must be torch.float32 on cpu like k"),
    (_at, {"k": e(2, 0, 4), "v": e(2, 0, 6)}, ValueError, r"with S, e ≥ 1, got \[2, 0, 6\]"),
    (_as, {"z": e(2, 3)}, TypeError, r"adam_step: z must be a sequence of tensors"),
    (_as, {"z": [e(2, 3), 4.0]}, TypeError, r"z\[1\] must be a tensor, got float 4.0"),
    (_as, {"z": [e(2, 3), e(4, dtype=half)]}, TypeError, r"z\[1\] must be .* like z\[0\]"),
    (_as, {"g": [e(2, 3)]}, ValueError, r"g must have length 2, one per tensor of z, got 1"),
    (_as, {"v": [e(2, 3), e(5)]}, ValueError, r"v\[1\] must be \[4\] to match z\[1\] \[4\]"),
    (_as, {"m": [e(2, 3), e(4).double()]}, TypeError, r"m\[1\] must be torch.float32 on cpu"),
    (_as, {"g": [e(2, 3), 1.0]}, TypeError, r"g\[1\] must be a tensor, got float 1.0"),
    (_as, {"betas": (0.9, 1.0)}, ValueError, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    (_as, {"eps": 0.0}, ValueError, r"adam_step: eps must be > 0, got 0.0"),
    (_as, {"step": -1}, ValueError, r"adam_step: step must be ≥ 0, got -1"),
    (
        _as,
        {"g": [e(2, 3).requires_grad_(), e(4)], "overwrite": True},
        ValueError,
        r"overwrite must be False where a gradient is asked for",
    ),
    (
        _as,
        {"m": [shared, e(4)], "v": [shared, e(4)], "overwrite": True},
        ValueError,
        r"adam_step: m and v must not share memory where overwrite is True",
    ),
    (
        _as,
        {"m": [long[:6].view(2, 3), e(4)], "v": [long[4:].view(2, 3), e(4)], "overwrite": True},
        ValueError,
        r"adam_step: m and v must not share memory where overwrite is True",
    ),
    (
        _as,
        {**{name: [shared] * 2 for name in "zgm"}, "v": [e(2, 3), e(2, 3)], "overwrite": True},
        ValueError,
        r"m and v must not share",
    ),
    (_ap, {"g": [e(2, 3), e(5)]}, ValueError, r"g\[1\] must be \[4\] to match bar_z\[1\]"),
    (_ap, {"v": [e(2, 3)]}, ValueError, r"v must have length 2, one per tensor of bar_z, got 1"),
    (_pm, {"W0": e(2, 3)}, TypeError, r"projected_merge: W0 must be a sequence of tensors"),
    (_pm, {"W": [[e(2, 3)]] * 2}, ValueError, r"W\[0\] must have length 2, one per layer of W0"),
    (_pm, {"C": [e(5, 3)]}, ValueError, r"C must have length 2, one per concept of W, got 1"),
    (_pm, {"M": [e(5, 3)] * 3}, ValueError, r"M must have length 2, .*, got 3"),
    (_pm, {"W0": [e(2, 3), e(4, 2)]}, ValueError, r"W0\[1\] must be \[o, 3\] .* got \[4, 2\]"),
    (_pm, {"W0": [e(2), e(4)]}, ValueError, r"W0\[0\] must be \[o, d\], got \[2\]"),
    (_pm, {"C": [e(5, 3), e(1, 4)]}, ValueError, r"C\[1\] must be \[s, 3\] .* got \[1, 4\]"),
    (_pm, {"M": [e(4, 3), e(1, 3)]}, ValueError, r"M\[0\] must be \[5, 3\] to match C\[0\]"),
    (_pm, {"C": [e(5, 3, dtype=half), e(1, 3)]}, TypeError, r"C\[0\] must be torch.float32"),
    (
        _pm,
        {"W": [[e(2, 3), e(4, 3)], [e(2, 3), e(5, 3)]]},
        ValueError,
        r"W\[1\]\[1\] must be \[4, 3\] to match W0\[1\] \[4, 3\], got \[5, 3\]",
    ),
    (_bl, {"x": e(2, 3)}, ValueError, r"batched_lora: x must be \[b, t, d\], got \[2, 3\]"),
    (_bl, {"weight": e(4, 2)}, ValueError, r"weight must be \[o, 3\] to match x \[2, 5, 3\]"),
    (_bl, {"bias": e(3)}, ValueError, r"bias must be \[4\] to match weight \[4, 3\], got \[3\]"),
    (_bl, {"A": [e(1, 3), e(2, 4)]}, ValueError, r"A\[1\] must be \[r, 3\] .* got \[2, 4\]"),
    (_bl, {"B": [e(4, 1), e(4, 3)]}, ValueError, r"B\[1\] must be \[4, 2\] to match A\[1\]"),
    (_bl, {"B": [e(4, 1)]}, ValueError, r"B must have length 2, one per tensor of A, got 1"),
    (_bl, {"B": [e(4, 1), e(4, 2).double()]}, TypeError, r"B\[1\] must be torch.float32"),
    (_bl, {"scale": [1.0]}, ValueError, r"scale must be \[2\]"),
    (_bl, {"index": torch.tensor([0])}, ValueError, r"index must be \[2\], one per sample of x"),
    (_bl, {"index": torch.tensor([0, 1]).int()}, TypeError, r"index must be torch.int64 on cpu"),
    (_bl, {"index": [0, 1]}, TypeError, r"index must be torch.int64 .* got list \[0, 1\]"),
    (_bl, {"index": torch.tensor([0, 2])}, ValueError, r"index must be in \[-1, 2\).* 0 to 2"),
    (_bl, {"index": torch.tensor([-2, 0])}, ValueError, r"index must be in .* from -2 to 0"),
    (_bl, {"A": [], "B": [], "scale": []}, ValueError, r"index must be in \[-1, 0\)"),
    (_ml, {"weight": e(4)}, ValueError, r"merge_lora: weight must be \[o, d\], got \[4\]"),
    (_ml, {"A": e(2, 3)}, TypeError, r"merge_lora: A must be a sequence of tensors"),
    (_ml, {"A": [e(1, 3), e(1, 3)]}, ValueError, r"B\[1\] must be \[4, 1\] to match A\[1\]"),
    (_ml, {"scale": e(3)}, ValueError, r"scale must be \[2\], one per concept, got \[3\]"),
    (_ml, {"weights": [nan, 0.0]}, ValueError, r"merge_lora: weights must be finite"),
]


@pytest.mark.parametrize(
    ("call", "changes", "error", "message"),
    MISTAKES,
    ids=[
        f"{call.__name__[1:]}-{'-'.join(changes)}-{i}"
        for i, (call, changes, *_) in enumerate(MISTAKES)
    ],
)
def test_mistakes_are_named(
    call: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_unchanged_calls_are_right() -> None:
    for call in (_wm, _pm, _bl, _ml):
        call()


def test_a_tensor_gives_a_tensor_and_a_list_a_list() -> None:
    base = e(2, 3)
    alone = ops.weighted_merge(base, [base * 3], e(1))
    assert isinstance(alone, torch.Tensor)
    (listed,) = ops.weighted_merge([base], [[base * 3]], e(1))
    torch.testing.assert_close(alone, listed)
    torch.testing.assert_close(alone, base * 3)


def test_nothing_to_merge_gives_copies_and_empty_lists() -> None:
    base = e(2, 3)
    merged = ops.weighted_merge(base, [], [])
    assert torch.equal(merged, base)
    assert merged.data_ptr() != base.data_ptr()
    (projected,) = ops.projected_merge([base], [], [], [])
    assert torch.equal(projected, base)
    assert projected.data_ptr() != base.data_ptr()
    assert ops.weighted_merge([], [[], []], [0.5, 0.5]) == []
    assert ops.projected_merge([], [[], []], [base] * 2, [base] * 2) == []


def test_an_index_is_checked_again_after_it_changes() -> None:
    index = torch.tensor([0, 1])
    _bl(index=index)
    index[0] = 5
    with pytest.raises(ValueError, match="from 1 to 5"):
        _bl(index=index)
    index[0] = 0
    with pytest.raises(ValueError, match=r"index must be in \[-1, 1\)"):
        _bl(index=index, A=[e(1, 3)], B=[e(4, 1)], scale=[1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_any_floating_dtype_are_taken(dtype: torch.dtype) -> None:
    for base_dtype in (torch.float16, torch.float32, torch.float64):
        base = torch.zeros(3, dtype=base_dtype)
        merged = ops.weighted_merge(base, [base + 1], torch.tensor([0.5], dtype=dtype))
        assert torch.equal(merged, torch.full_like(base, 0.5))


def test_the_gradient_reaches_numbers_that_are_tensors() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    base = torch.zeros(3)
    ops.weighted_merge(base, [base + 1, base + 2], [weight, 1]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == 3


def test_an_index_out_of_range_is_found_under_vmap() -> None:
    index = torch.tensor([[0, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"index must be in \[-1, 2\).* from 0 to 2"):
        torch.vmap(lambda i: _bl(index=i))(index)
    torch.vmap(torch.vmap(lambda i: _bl(index=i)))(index[None] - 1)


def test_the_gradient_reaches_weights_of_another_dtype() -> None:
    weights = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    base = torch.zeros(3)
    ops.weighted_merge(base, [base + 1, base + 2], weights).sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([3.0, 6.0], dtype=torch.float64))
