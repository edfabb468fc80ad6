"""The native backend: passes tensors to the C++ and CUDA kernels of csrc/.

Raw operators: arguments are validated, outputs freshly allocated, nothing recorded by autograd. On
the CPU every operator is served in float32, float64, bfloat16 and float16, with as many threads as
`torch.get_num_threads()` says; results do not depend on how many. On CUDA `weighted_merge` and
`projected_merge` are served. The extension modules are optional: `unsupported_reasons` says why one
is not there.

Letters: N concepts, P tensors, L layers, [o, d] one weight, s_n tokens of concept n, r_n rank of
adapter n, b batch, t tokens. Flat lists are concept-major.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mima._version import __version__

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As in csrc/params.h."""

OPS = {
    "cpu": ("weighted_merge", "projected_merge", "batched_lora", "merge_lora"),
    "cuda": ("weighted_merge", "projected_merge"),
}
MODULES = {"cpu": "_native", "cuda": "_native_cuda"}


@cache
def build_info() -> dict[str, Any]:
    """What the installation wrote down: which modules were built, with what, or why they were not.

    Empty where mima runs from a tree that was never installed.
    """
    path = Path(__file__).parents[2] / "_build_info.json"
    if not path.exists():
        return {}
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info


@cache
def _load(device_type: str) -> tuple[Any, str]:
    """Return the extension module for a device type, or None and the reason."""
    name = MODULES[device_type]
    try:
        module = importlib.import_module(f"mima.{name}")
    except ImportError as error:
        recorded = build_info().get(name.lstrip("_"), {}).get("reason")
        return None, f"mima.{name} was not built: {recorded}" if recorded else str(error)
    if module.version != __version__:
        return None, (
            f"mima.{name} was built for mima {module.version}, this is {__version__}: "
            "install mima again"
        )
    return module, ""


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Say why the native backend cannot serve `op` for these tensors; empty if it can.

    Args:
        op: name of a public function of `mima.ops`.
        tensors: any of its tensors; their devices and dtypes count.
    """
    reasons = []
    for device_type in sorted({x.device.type for x in tensors}):
        if device_type not in OPS:
            reasons.append(f"no kernels for device {device_type}, only for {' and '.join(OPS)}")
            continue
        if op not in OPS[device_type]:
            reasons.append(
                f"no {device_type} kernel for it, only for {', '.join(OPS[device_type])}"
            )
        module, missing = _load(device_type)
        if module is None:
            reasons.append(missing)
        elif device_type == "cuda" and not torch.cuda.is_available():
            reasons.append("no CUDA device")
    for dtype in sorted({str(x.dtype) for x in tensors if x.dtype not in DTYPE_CODES}):
        served = ", ".join(str(d) for d in DTYPE_CODES)
        reasons.append(f"no kernels for {dtype}, only for {served}")
    return reasons


def cpu_level() -> str:
    """Return the instruction set that the CPU kernels use: generic, avx2 or avx512."""
    level: str = _module("cpu").cpu_level()
    return level


def _module(device_type: str) -> Any:
    module, missing = _load(device_type)
    if module is None:
        raise RuntimeError(missing)
    return module


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _with_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Matrices whose rows are contiguous: the tensors where they are, copies where not."""
    if _module("cpu").have_contiguous_rows(tensors):
        return list(tensors)
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in tensors]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    if not tensors or _module(tensors[0].device.type).are_contiguous(tensors):
        return list(tensors)
    return [x.contiguous() for x in tensors]


def _empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def weighted_merge_forward(
    base: Sequence[Tensor], thetas: Sequence[Tensor], weights: Tensor
) -> list[Tensor]:
    """Return base_p + Σ_n w_n (θ_np − base_p) for each p."""
    out = _empty_like(base)
    if not base:
        return out
    base, thetas = _contiguous(base), _contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    tensors = base, thetas, weights.tolist(), out
    if _on_cuda(base[0]):
        call = _module("cuda").WeightedMerge(code, *tensors, [], [], [])
        with _launching(call, base[0].device) as (table, stream):
            call.forward(table.data_ptr(), stream)
    else:
        _module("cpu").weighted_merge_forward(code, torch.get_num_threads(), *tensors)
    return out


def weighted_merge_backward(
    d_out: Sequence[Tensor],
    base: Sequence[Tensor],
    thetas: Sequence[Tensor],
    weights: Tensor,
    need_base: bool,
    need_thetas: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return (1 − Σ w) d_out, w_n d_out and ⟨d_out, θ_n − base⟩, each where needed."""
    d_base = _empty_like(base) if need_base else []
    d_thetas = _empty_like(thetas) if need_thetas else []
    if not base:
        return d_base, d_thetas, torch.zeros_like(weights) if need_weights else None
    d_out, base, thetas = _contiguous(d_out), _contiguous(base), _contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    inputs = base, thetas, weights.tolist()
    d_weights = None
    if _on_cuda(base[0]):
        call = _module("cuda").WeightedMerge(code, *inputs, [], d_out, d_base, d_thetas)
        with _launching(call, base[0].device) as (table, stream):
            # a sum per piece, added in a fixed order: the same result each time
            shape = (call.num_pieces if need_weights else 0, weights.shape[0])
            partial = weights.new_empty(shape, dtype=torch.float64)
            call.backward(table.data_ptr(), partial.data_ptr(), stream)
            d_weights = partial.sum(0).to(weights.dtype) if need_weights else None
    else:
        sums = _module("cpu").weighted_merge_backward(
            code, torch.get_num_threads(), d_out, *inputs, d_base, d_thetas, need_weights
        )
        d_weights = weights.new_tensor(sums) if need_weights else None
    return d_base, d_thetas, d_weights


def projected_merge_forward(
    W0: Sequence[Tensor], W: Sequence[Tensor], C: Sequence[Tensor], M: Sequence[Tensor]
) -> list[Tensor]:
    """Return W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n for each l."""
    if not W0:
        return []
    if _on_cuda(W0[0]):
        return _projected_merge_forward_cuda(W0, W, C, M)
    out = _empty_like(W0)
    W0, W, C, M = _with_rows(W0), _with_rows(W), _with_rows(C), _with_rows(M)
    _module("cpu").projected_merge_forward(
        DTYPE_CODES[W0[0].dtype], torch.get_num_threads(), W0, W, C, M, out
    )
    return out


def projected_merge_backward(
    d_out: Sequence[Tensor],
    W0: Sequence[Tensor],
    W: Sequence[Tensor],
    C: Sequence[Tensor],
    M: Sequence[Tensor],
    need_W0: bool,
    need_W: bool,
    need_C: bool,
    need_M: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients of `projected_merge_forward`, an empty list where not needed."""
    if W0 and _on_cuda(W0[0]):
        return _projected_merge_backward_cuda(d_out, W0, W, C, M, need_W0, need_W, need_C, need_M)
    d_W0 = _empty_like(W0) if need_W0 else []
    d_W = _empty_like(W) if need_W else []
    d_C = _empty_like(C) if need_C else []
    d_M = _empty_like(M) if need_M else []
    if not W0:
        return d_W0, d_W, [x.zero_() for x in d_C], [x.zero_() for x in d_M]
    d_out, W0, W = _with_rows(d_out), _with_rows(W0), _with_rows(W)
    C, M = _with_rows(C), _with_rows(M)
    _module("cpu").projected_merge_backward(
        DTYPE_CODES[W0[0].dtype],
        torch.get_num_threads(),
        *(d_out, W0, W, C, M),
        *(d_W0, d_W, d_C, d_M),
    )
    return d_W0, d_W, d_C, d_M


@contextmanager
def _launching(call: Any, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Make the device current, copy a call's table to it, and name the current stream."""
    with torch.cuda.device(device):
        table = torch.frombuffer(call.table(), dtype=torch.uint8).to(device, non_blocking=True)
        yield table, torch.cuda.current_stream(device).cuda_stream


def _pad_rows(tensors: Sequence[Tensor], width: int) -> list[Tensor]:
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


def _padded_like(tensors: Sequence[Tensor], width: int) -> list[Tensor]:
    return [x.new_empty((x.shape[0], width)) for x in tensors]


def _cut(tensors: Sequence[Tensor], d: int) -> list[Tensor]:
    """Undo the padding of outputs."""
    return [x if x.shape[1] == d else x[:, :d].contiguous() for x in tensors]


def _projected_merge_forward_cuda(
    W0: Sequence[Tensor], W: Sequence[Tensor], C: Sequence[Tensor], M: Sequence[Tensor]
) -> list[Tensor]:
    d = W0[0].shape[1]
    width = _vector_multiple(d, W0[0])
    out = _padded_like(W0, width)
    inputs = [_pad_rows(x, width) for x in (W0, W, C, M)]
    call = _projected_merge_call(inputs, out=out)
    with _launching(call, W0[0].device) as (table, stream):
        call.forward(table.data_ptr(), 0, stream)
    return _cut(out, d)


def _projected_merge_backward_cuda(
    d_out: Sequence[Tensor],
    W0: Sequence[Tensor],
    W: Sequence[Tensor],
    C: Sequence[Tensor],
    M: Sequence[Tensor],
    need_W0: bool,
    need_W: bool,
    need_C: bool,
    need_M: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    d = W0[0].shape[1]
    width = _vector_multiple(d, W0[0])
    d_W0 = _padded_like(W0, width) if need_W0 else []
    d_W = _padded_like(W, width) if need_W else []
    inputs = [_pad_rows(x, width) for x in (W0, W, C, M)]
    upstream = _pad_rows(d_out, width)
    call = _projected_merge_call(inputs, d_out=upstream, d_W0=d_W0, d_W=d_W)
    acc = torch.float64 if W0[0].dtype == torch.float64 else torch.float32
    # [all rows, tokens]: d_out M^T for d_C, (W - W0) C^T for d_M
    coefficients = W0[0].new_empty((call.all_rows, call.num_tokens), dtype=acc)
    with _launching(call, W0[0].device) as (table, stream):

        def row_sums(like: Sequence[Tensor], differences: bool) -> list[Tensor]:
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


def _vector_multiple(d: int, like: Tensor) -> int:
    """Columns padded to whole 16-byte vectors."""
    lanes = 16 // like.element_size()
    return -(-d // lanes) * lanes


def _projected_merge_call(
    inputs: Sequence[Sequence[Tensor]],
    *,
    out: Sequence[Tensor] = (),
    d_out: Sequence[Tensor] = (),
    d_W0: Sequence[Tensor] = (),
    d_W: Sequence[Tensor] = (),
) -> Any:
    code = DTYPE_CODES[inputs[0][0].dtype]
    return _module("cuda").ProjectedMerge(code, *inputs, out, d_out, d_W0, d_W)


def batched_lora_forward(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
    bias: Tensor | None,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """Return x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ with i = index[b], [b, t, o].

    Puts x_b A_iᵀ into `kept`, for the backward with the same inputs: [b, t, largest rank or more],
    in the accumulator type. Where adapters are merged it is not formed, and `kept` stays empty.
    """
    x = x.contiguous()
    computes_base = bool(A) and _computes_base(x, weight)
    if computes_base:
        (weight,) = _with_rows([weight])
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        if bias is not None:
            y.copy_(bias.expand_as(y))
    else:
        y = F.linear(x, weight, bias).contiguous()
    if y.numel() == 0 or not A:
        return y
    A, B = _with_rows(A), _contiguous(B)
    merges = computes_base and _module("cpu").merges_adapters(*x.shape[1:], weight.shape[0])
    if kept is not None and not merges:
        # whole vectors, of whatever instruction set
        width = -(-max(A_n.shape[0] for A_n in A) // 16) * 16
        kept.append(x.new_empty(*x.shape[:2], width, dtype=scale.dtype))
    _module("cpu").batched_lora_forward(
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        *(x, weight, computes_base, A, B),
        scale.tolist(),
        index.tolist(),
        *(y, not computes_base or bias is not None, kept[0] if kept else None),
    )
    return y


def _computes_base(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes the base product, and its part of d_x, or PyTorch does.

    In float32 the sums of the base product continue into the low-rank part without leaving the
    registers. 16-bit types have instructions of their own, which PyTorch's library uses; without
    AVX2 that library is the faster one, too. An empty weight has no address to pass.
    """
    return x.dtype == torch.float32 and weight.numel() > 0 and cpu_level() != "generic"


def batched_lora_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
    projection: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, A, B, scale and bias; None or empty where not needed."""
    (b, t, d), o = x.shape, weight.shape[0]
    x, d_y = x.contiguous(), d_y.contiguous()
    d_x = None
    computes_base = need_x and bool(A) and _computes_base(x, weight)
    if computes_base:
        (weight,) = _with_rows([weight])
        d_x = torch.empty_like(x)
    elif need_x:
        d_x = torch.matmul(d_y, weight).contiguous()
    d_weight = d_y.view(b * t, o).mT @ x.view(b * t, d) if need_weight else None
    d_bias = d_y.sum((0, 1)) if need_bias else None
    d_A = _empty_like(A) if need_A else []
    d_B = _empty_like(B) if need_B else []
    d_scale = None
    if A and (need_x or need_A or need_B or need_scale):
        A, B = _with_rows(A), _contiguous(B)
        sums = _module("cpu").batched_lora_backward(
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
            *(d_y, x, weight, computes_base, A, B),
            scale.tolist(),
            index.tolist(),
            *(projection, d_x, d_A, d_B, need_scale),
        )
        d_scale = scale.new_tensor(sums) if need_scale else None
    elif need_scale:
        d_scale = torch.zeros_like(scale)
    return d_x, d_weight, d_A, d_B, d_scale, d_bias


def merge_lora_forward(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, weights: Tensor
) -> Tensor:
    """Return W + Σ_n w_n s_n B_n A_n, [o, d]."""
    (out,) = _empty_like([weight])
    (weight,) = _with_rows([weight])
    A, B = _with_rows(A), _contiguous(B)
    _module("cpu").merge_lora_forward(
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
        *(weight, A, B),
        scale.tolist(),
        weights.tolist(),
        out,
    )
    return out


def merge_lora_backward(
    d_out: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    weights: Tensor,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_scale: bool,
    need_weights: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of weight, A, B, scale and weights; None or empty where not needed."""
    # a copy: an operator's output may not be its input
    d_weight = d_out.clone(memory_format=torch.contiguous_format) if need_weight else None
    d_A = _empty_like(A) if need_A else []
    d_B = _empty_like(B) if need_B else []
    need_products = need_scale or need_weights
    products = scale.new_zeros(scale.shape)
    if A and (need_A or need_B or need_products):
        (d_out,) = _with_rows([d_out])
        A, B = _with_rows(A), _contiguous(B)
        # ⟨d_out, B_n A_n⟩, of which both gradients are multiples
        sums = _module("cpu").merge_lora_backward(
            DTYPE_CODES[d_out.dtype],
            torch.get_num_threads(),
            *(d_out, A, B),
            scale.tolist(),
            weights.tolist(),
            *(d_A, d_B, need_products),
        )
        products = scale.new_tensor(sums) if need_products else products
    d_scale = weights * products if need_scale else None
    d_weights = scale * products if need_weights else None
    return d_weight, d_A, d_B, d_scale, d_weights
