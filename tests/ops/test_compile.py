"""torch.compile sees opaque operators: no graph break, right shapes, the same values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.operator_cases import BY_ID, SMALL, Case, values_and_gradients
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """One code object serves every case; Dynamo compiles it anew for eight of them at most."""
    torch.compiler.reset()


TINY = [case for case in SMALL if case.name == "small"]
r = torch.randn


def _raw_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each raw operator with arguments."""
    raw = torch.ops.mima
    base, thetas, weights = [r(3, 2), r(4)], [r(3, 2), r(4), r(3, 2), r(4)], r(2)
    W0, W, C, M = [r(3, 4)], [r(3, 4), r(3, 4)], [r(2, 4), r(1, 4)], [r(2, 4), r(1, 4)]
    x, weight, bias = r(3, 2, 4), r(5, 4), r(5)
    A, B, scale = [r(1, 4), r(2, 4)], [r(5, 1), r(5, 2)], r(2)
    index = torch.tensor([1, -1, 0])
    positive, adam = [x.square() for x in base], (0.1, 0.9, 0.99, 1e-3, 0.0, 2)
    yes, no = True, False
    image, channels = r(2, 4, 3), r(4)
    norm = image, channels, channels, 2, 1e-3, True
    q, k, v = r(2, 3, 2), r(2, 4, 2), r(2, 4, 5)
    heads = q, k, v, 0.5
    return {
        "group_norm": (raw.group_norm, (*norm, "")),
        "group_norm_backward": (raw.group_norm_backward, (image, *norm, [yes] * 3, "")),
        "group_norm_double_backward": (
            raw.group_norm_double_backward,
            (image, image, channels, None, *norm, [yes] * 4, ""),
        ),
        "group_norm_double_backward-partly": (
            raw.group_norm_double_backward,
            (image, image, None, None, *norm, [no, yes, no, yes], ""),
        ),
        "geglu": (raw.geglu, (weight, "")),
        "geglu_backward": (raw.geglu_backward, (r(5, 2), weight, [yes], "")),
        "geglu_double_backward": (
            raw.geglu_double_backward,
            (r(5, 2), weight, weight, [yes, no], ""),
        ),
        "attention": (raw.attention, (*heads, "")),
        "attention_backward": (raw.attention_backward, (r(2, 3, 5), *heads, [yes] * 3, "")),
        "attention_double_backward": (
            raw.attention_double_backward,
            (r(2, 3, 5), q, k, None, *heads, [yes, no, yes, yes], ""),
        ),
        "weighted_merge": (raw.weighted_merge, (base, thetas, weights, "")),
        "weighted_merge_backward": (
            raw.weighted_merge_backward,
            (base, base, thetas, weights, [yes] * 3, ""),
        ),
        "weighted_merge_backward-partly": (
            raw.weighted_merge_backward,
            (base, base, thetas, weights, [no, yes, no], ""),
        ),
        "adam_step": (raw.adam_step, (base, base, base, positive, *adam, "")),
        "adam_step_backward": (
            raw.adam_step_backward,
            (base * 3, base, base, positive, *adam, [yes] * 4, ""),
        ),
        "adam_step_backward-partly": (
            raw.adam_step_backward,
            (base * 3, base, base, positive, *adam, [no, yes, no, yes], ""),
        ),
        "combine": (raw.combine, (base * 2, [1.0, 0.5, 0.0, 2.0], 2, "")),
        "combine_": (raw.combine_, ([r(3, 2), r(4)], base * 2, [1.0, 0.5], 2, "")),
        "token_outputs": (raw.token_outputs, (W, C[0], "")),
        "add_token_outputs_": (raw.add_token_outputs_, ([r(3, 4), r(3, 4)], r(6, 2), C[0], "")),
        "token_sums": (raw.token_sums, (W, r(6, 2), "")),
        "projected_merge": (raw.projected_merge, (W0, W, C, M, "")),
        "projected_merge_backward": (
            raw.projected_merge_backward,
            (W0, W0, W, C, M, [yes] * 4, ""),
        ),
        "projected_merge_backward-partly": (
            raw.projected_merge_backward,
            (W0, W0, W, C, M, [no, yes, yes, no], ""),
        ),
        "batched_lora": (raw.batched_lora, (x, weight, A, B, scale, index, bias, "")),
        "batched_lora_backward": (
            raw.batched_lora_backward,
            (r(3, 2, 5), x, weight, A, B, scale, index, None, [yes] * 6, ""),
        ),
        "batched_lora_backward-partly": (
            raw.batched_lora_backward,
            (r(3, 2, 5), x, weight, A, B, scale, index, None, [no, no, yes, no, no, yes], ""),
        ),
        "merge_lora": (raw.merge_lora, (weight, A, B, scale, scale, "")),
        "merge_lora_backward": (
            raw.merge_lora_backward,
            (weight, weight, A, B, scale, scale, [yes] * 5, ""),
        ),
    }


@pytest.mark.parametrize("name", list(_raw_calls()))
@pytest.mark.parametrize("backend", ["reference", ""])
def test_opcheck(name: str, backend: str) -> None:
    op, arguments = _raw_calls()[name]
    torch.library.opcheck(op.default, (*arguments[:-1], backend))


@pytest.mark.parametrize(
    "case",
    [*TINY, BY_ID["weighted_merge-no-concept"], BY_ID["batched_lora-unused"]],
    ids=lambda case: case.id,
)
def test_no_graph_break_forward_or_backward(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    compiled = torch.compile(
        lambda *t: tuple(case.call(t, None)), fullgraph=True, backend="aot_eager"
    )
    expected = values_and_gradients(case, tensors, None)
    actual = values_and_gradients(
        Case(case.op, case.name, case.shapes, lambda t, _: list(compiled(*t)), case.vectors),
        tensors,
        None,
    )
    for part in (0, 1):
        for x, y in zip(actual[part], expected[part], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
@pytest.mark.parametrize("how", ["no gradient", "no_grad", "inference_mode", "autocast"])
def test_no_graph_break_without_a_gradient(case: Case, how: str) -> None:
    torch._dynamo.reset()
    tensors = case.tensors(torch.float32)
    expected = case.call(tensors, None)
    compiled = torch.compile(
        lambda *t: tuple(case.call(t, None)), fullgraph=True, backend="aot_eager"
    )
    context: AbstractContextManager[object] = nullcontext()
    if how == "no_grad":
        tensors, context = [x.requires_grad_() for x in tensors], torch.no_grad()
    elif how == "inference_mode":
        context = torch.inference_mode()
    elif how == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    with context:
        actual = compiled(*tensors)
    for x, y in zip(actual, expected, strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_one_input_alone_has_its_gradient_compiled(case: Case) -> None:
    compiled = torch.compile(
        lambda *t: tuple(case.call(t, None)), fullgraph=True, backend="aot_eager"
    )
    for i in range(len(case.shapes)):
        torch._dynamo.reset()  # a compilation for each, more than the limit
        tensors = case.tensors(torch.float32)
        tensors[i].requires_grad_()
        if not any(y.requires_grad for y in case.call(tensors, None)):
            continue
        (expected, actual) = (
            torch.autograd.grad([y.square().sum() for y in f(*tensors)], tensors[i])[0]
            for f in (lambda *t: case.call(t, None), compiled)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compiled_with_inductor_among_other_operations() -> None:
    case = BY_ID["batched_lora-small"]
    tensors = case.tensors(torch.float32)

    def f(*t: torch.Tensor) -> torch.Tensor:
        return torch.relu(case.call([x * 2 for x in t], None)[0]).sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(f(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_bad_index_is_found_in_a_compiled_graph_too() -> None:
    case = BY_ID["batched_lora-small"]
    x, weight, scale, bias, *AB = case.tensors(torch.float32)
    raw = torch.ops.mima.batched_lora

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(index: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = raw(x, weight, AB[:2], AB[2:], scale, index, bias, "") + 1
        return y

    with pytest.raises(ValueError, match="index must be in"):
        f(torch.tensor([0, 2, 0]))


class _Log(TorchDispatchMode):
    """The operators that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_who_watches_sees_the_operator(case: Case) -> None:
    """Without a watcher it is called past the dispatcher."""
    tensors = case.tensors(torch.float32)
    expected = case.call(tensors, None)
    with _Log() as log:
        watched = case.call(tensors, None)
    assert f"mima.{case.op}.default" in log.names
    for x, y in zip(watched, expected, strict=True):
        assert torch.equal(x, y)
    with torch.profiler.profile() as profile:
        case.call(tensors, None)
    assert f"mima::{case.op}" in {event.name for event in profile.events()}
    with FakeTensorMode() as fake:
        faked = case.call([fake.from_tensor(x) for x in tensors], None)
    assert all(isinstance(x, FakeTensor) for x in faked)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"jvp|forward"),
    ):
        case.call([torch.autograd.forward_ad.make_dual(x, x) for x in tensors], None)
