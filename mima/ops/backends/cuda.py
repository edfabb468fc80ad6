"""The native backend on CUDA: passes tensors to the kernels of csrc/cuda.

Raw operators for float32, float64, bfloat16 and float16, as in `mima.ops.backends.cpu`.

Letters: N concepts, P tensors, L layers, [o, d] one weight. Flat lists are concept-major.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs, Tensors
from mima.ops.backends.extension import (
    DTYPE_CODES,
    adam_step_backward_lists,
    adam_step_lists,
    contiguous,
    empty_like,
    loaded,
)


@contextmanager
def _launching(call: Any, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Make the device current, copy a call's table to it, and name the current stream.

    A CUDA graph would copy the table again at each replay, from host memory that is not kept.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("mima's native kernels cannot be captured into a CUDA graph")
        table = torch.frombuffer(call.table(), dtype=torch.uint8).to(device, non_blocking=True)
        yield table, torch.cuda.current_stream(device).cuda_stream


def weighted_merge_forward(inputs: arguments.WeightedMerge) -> list[Tensor]:
    """Return base_p + Σ_n w_n (θ_np − base_p) for each p."""
    base, thetas, weights = inputs
    out = empty_like(base)
    if not base:
        return out
    base, thetas = contiguous(base), contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    tensors = base, thetas, weights.tolist(), out
    call = loaded("cuda").WeightedMerge(code, *tensors, [], [], [])
    with _launching(call, base[0].device) as (table, stream):
        call.forward(table.data_ptr(), stream)
    return out


def weighted_merge_backward(
    d_out: Tensors, inputs: arguments.WeightedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return (1 − Σ w) d_out, w_n d_out and ⟨d_out, θ_n − base⟩, each where needed."""
    base, thetas, weights = inputs
    need_base, need_thetas, need_weights = needs
    d_base = empty_like(base) if need_base else []
    d_thetas = empty_like(thetas) if need_thetas else []
    if not base:
        return d_base, d_thetas, torch.zeros_like(weights) if need_weights else None
    d_out, base, thetas = contiguous(d_out), contiguous(base), contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    given = base, thetas, weights.tolist()
    call = loaded("cuda").WeightedMerge(code, *given, [], d_out, d_base, d_thetas)
    with _launching(call, base[0].device) as (table, stream):
        # a sum per piece, added in a fixed order: the same result each time
        shape = (call.num_pieces if need_weights else 0, weights.shape[0])
        partial = weights.new_empty(shape, dtype=torch.float64)
        call.backward(table.data_ptr(), partial.data_ptr(), stream)
        d_weights = partial.sum(0).to(weights.dtype) if need_weights else None
    return d_base, d_thetas, d_weights


def combine_into(out: Tensors, x: Tensors, factors: Sequence[Sequence[float]]) -> None:
    """Write Σ_j f_ij x_j into `out`, contiguous, which may have tensors of `x`."""
    # named: copies must live until the launch
    x = contiguous(x)
    _launch(loaded("cuda").Combine(DTYPE_CODES[x[0].dtype], factors, x, out), x[0].device)


def adam_step_forward(inputs: arguments.AdamStep, *, overwrite: bool = False) -> list[Tensor]:
    """Return z, m and v after the step, one after the other; m and v in place on request."""
    given, out = adam_step_lists(inputs, overwrite)
    _launch(loaded("cuda").AdamStep(DTYPE_CODES[out[0].dtype], *given), out[0].device)
    return out


def adam_step_backward(
    d_out: Tensors, saved: arguments.AdamStepSaved, needs: Needs
) -> list[list[Tensor]]:
    """Return the gradients of z, g, m and v, an empty list where not needed."""
    given, grads = adam_step_backward_lists(d_out, saved, needs)
    _launch(loaded("cuda").AdamStep(DTYPE_CODES[d_out[0].dtype], *given), d_out[0].device)
    return grads


def _launch(call: Any, device: torch.device) -> None:
    with _launching(call, device) as (table, stream):
        call.launch(table.data_ptr(), stream)


def projected_merge_forward(inputs: arguments.ProjectedMerge) -> list[Tensor]:
    """Return W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n for each l."""
    W0 = inputs.W0
    if not W0:
        return []
    d = W0[0].shape[1]
    width = _vector_multiple(d, W0[0])
    out = _padded_like(W0, width)
    # named, since the call has addresses alone, and copies must live until the launch
    padded = [_pad_rows(x, width) for x in inputs]
    call = _projected_merge_call(padded, out=out)
    with _launching(call, W0[0].device) as (table, stream):
        call.forward(table.data_ptr(), 0, stream)
    return _cut(out, d)


def projected_merge_backward(
    d_out: Tensors, inputs: arguments.ProjectedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients of `projected_merge_forward`, an empty list where not needed."""
    W0, W, C, M = inputs
    need_W0, need_W, need_C, need_M = needs
    d = W0[0].shape[1]
    width = _vector_multiple(d, W0[0])
    d_W0 = _padded_like(W0, width) if need_W0 else []
    d_W = _padded_like(W, width) if need_W else []
    padded, upstream = [_pad_rows(x, width) for x in inputs], _pad_rows(d_out, width)
    call = _projected_merge_call(padded, d_out=upstream, d_W0=d_W0, d_W=d_W)
    acc = torch.float64 if W0[0].dtype == torch.float64 else torch.float32
    # [all rows, tokens]: d_out M^T for d_C, (W - W0) C^T for d_M
    coefficients = W0[0].new_empty((call.all_rows, call.num_tokens), dtype=acc)
    with _launching(call, W0[0].device) as (table, stream):

        def row_sums(like: Tensors, differences: bool) -> list[Tensor]:
            shape = (call.num_chunks, call.num_tokens, width)
            partial = coefficients.new_empty(shape)
            address = coefficients.data_ptr()
            call.sums(table.data_ptr(), address, differences, partial.data_ptr(), stream)
            total = partial.sum(0)[:, :d].to(W0[0].dtype)
            return [x.contiguous() for x in total.split([x.shape[0] for x in like])]

        kept = coefficients.data_ptr() if need_C else 0
        call.backward(table.data_ptr(), kept, stream)
        d_C = row_sums(C, True) if need_C else []
        d_M = []
        if need_M:
            call.forward(table.data_ptr(), coefficients.data_ptr(), stream)
            d_M = row_sums(M, False)
    return _cut(d_W0, d), _cut(d_W, d), d_C, d_M


def _pad_rows(tensors: Tensors, width: int) -> list[Tensor]:
    """Matrices of at least `width` columns whose rows start at multiples of 16 bytes.

    Views where they are so already, copies, padded with zeros, where not: the CUDA kernels access
    16 bytes at a time. For d a multiple of 8, as in every model there is, nothing is copied.
    """
    padded = []
    for x in tensors:
        fits = x.shape[1] == width and (x.stride(1) == 1 or width == 1)
        if not fits or (x.data_ptr() | x.stride(0) * x.element_size()) % 16:
            x = F.pad(x, (0, width - x.shape[1])).contiguous()
            x = x.clone() if x.data_ptr() % 16 else x
        padded.append(x)
    return padded


def _padded_like(tensors: Tensors, width: int) -> list[Tensor]:
    return [x.new_empty((x.shape[0], width)) for x in tensors]


def _cut(tensors: Tensors, d: int) -> list[Tensor]:
    """Undo the padding of outputs."""
    return [x if x.shape[1] == d else x[:, :d].contiguous() for x in tensors]


def _vector_multiple(d: int, like: Tensor) -> int:
    """Columns padded to whole 16-byte vectors."""
    lanes = 16 // like.element_size()
    return -(-d // lanes) * lanes


def _projected_merge_call(
    inputs: Sequence[Tensors],
    *,
    out: Tensors = (),
    d_out: Tensors = (),
    d_W0: Tensors = (),
    d_W: Tensors = (),
) -> Any:
    code = DTYPE_CODES[inputs[0][0].dtype]
    return loaded("cuda").ProjectedMerge(code, *inputs, out, d_out, d_W0, d_W)
