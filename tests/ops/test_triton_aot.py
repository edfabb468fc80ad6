"""Every kernel compiles for NVIDIA and AMD GPUs, spills nothing, fits, and reads wide words.

No GPU is needed: the launchers run on CPU tensors with their kernels replaced by recorders, and
what they would have launched is compiled ahead of time, with the same types and settings.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from mima.kernels import (
    adam_step,
    attention,
    batched_lora,
    combine,
    geglu,
    group_norm,
    merge_lora,
    projected_merge,
    token_products,
    weighted_merge,
)
from support.triton_aot import (
    GFX942,
    SM80,
    SM90,
    SM100,
    Launch,
    Resources,
    compile_launch,
    narrow_loads,
    recorded_launches,
    resources,
    widest_accesses,
)

from mima.ops.backends import arguments

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler"
)

TARGETS = {"sm_80": SM80, "sm_90": SM90, "sm_100": SM100, "gfx942": GFX942}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that a program may take."""
REGISTERS = {
    "_adam_step_fwd_kernel": 64,
    "_adam_step_bwd_kernel": 80,
    "_group_norm_fwd_kernel": 80,
    "_group_norm_bwd_kernel": 168,
    "_group_norm_double_bwd_kernel": 248,
    "_geglu_fwd_kernel": 80,
    "_geglu_bwd_kernel": 96,
    "_geglu_double_bwd_kernel": 136,
    "_attention_fwd_kernel": 255,
    "_attention_sums_kernel": 255,
    "_attention_queries_kernel": 255,
    "_attention_keys_kernel": 255,
    "_weighted_merge_fwd_kernel": 80,
    "_weighted_merge_bwd_kernel": 88,
    "_combine_kernel": 64,
    "_token_outputs_kernel": 144,
    "_add_token_outputs_kernel": 160,
    "_token_sums_kernel": 168,
    "_projected_merge_fwd_kernel": 255,
    "_projected_merge_bwd_kernel": 255,
    "_projected_merge_bwd_text_kernel": 208,
    "_batched_lora_fwd_kernel": 255,
    "_batched_lora_project_kernel": 160,
    "_batched_lora_outer_kernel": 152,
    "_batched_lora_sum_kernel": 112,
    "_merge_lora_fwd_kernel": 248,
    "_merge_lora_bwd_kernel": 152,
}
"""Of a thread on NVIDIA at most, for all dtypes and sizes: what triton 3.8 takes, rounded up."""
FRUGAL = Version(triton.__version__) >= Version("3.8")
"""Older compilers take other registers, and spill a few of the largest tiles."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FILE = 65_536
"""Registers of a multiprocessor of NVIDIA's: a program that takes more cannot be launched."""
STREAMS = ("weighted_merge", "adam_step", "combine")
YES = True


def _weighted_merge(dtype: torch.dtype) -> None:
    base = [torch.empty(320, 320, dtype=dtype), torch.empty(33, dtype=dtype)]
    weights = torch.ones(3)
    inputs = arguments.WeightedMerge(base, base * 3, weights)
    weighted_merge.weighted_merge_forward(inputs)
    weighted_merge.weighted_merge_backward(base, inputs, (YES, YES, YES))
    weighted_merge.weighted_merge_backward(base, inputs, (YES, YES, False))


def _adam_step(dtype: torch.dtype) -> None:
    z = [torch.empty(320, 320, dtype=dtype), torch.empty(33, dtype=dtype)]
    rule = 1e-4, 0.9, 0.999, 1e-8, 0.01, 3
    saved = arguments.AdamStepSaved(z, z, z, *rule)
    adam_step.adam_step_forward(arguments.AdamStep(z, *saved))
    adam_step.adam_step_backward(z * 3, saved, (YES, YES, YES, YES))
    adam_step.adam_step_backward(z * 3, saved, (False, YES, YES, YES))


def _combine(dtype: torch.dtype) -> None:
    x = [torch.empty(320, 320, dtype=dtype), torch.empty(33, dtype=dtype)]
    combine.combine_into(x, x * 2, [[1, 0.5]])
    combine.combine_into(x * 2, x * 3, [[1, -0.5, -0.25], [0, 1, 0.5]])


def _token_outputs(dtype: torch.dtype, tokens: int) -> None:
    X = [torch.empty(o, 768, dtype=dtype) for o in (320, 640)]
    C, A = torch.empty(tokens, 768, dtype=dtype), torch.empty(960, tokens, dtype=dtype)
    token_products.token_outputs(X, C)
    token_products.add_token_outputs(X, A, C)
    token_products.token_sums(X, A)


def _projected_merge(dtype: torch.dtype, tokens: int) -> None:
    # The key and value projections of Stable Diffusion 1.x: 768 columns.
    W0 = [torch.empty(o, 768, dtype=dtype) for o in (320, 640)]
    C = [torch.empty(tokens, 768, dtype=dtype)] * 3
    inputs = arguments.ProjectedMerge(W0, W0 * 3, C, C)
    projected_merge.projected_merge_forward(inputs)
    projected_merge.projected_merge_backward(W0, inputs, (YES, YES, False, False))
    projected_merge.projected_merge_backward(W0, inputs, (YES, YES, YES, YES))


def _batched_lora(dtype: torch.dtype, rank: int) -> None:
    x, weight, bias = (torch.empty(s, dtype=dtype) for s in ((8, 77, 768), (320, 768), (320,)))
    A, B = [torch.empty(rank, 768, dtype=dtype)] * 8, [torch.empty(320, rank, dtype=dtype)] * 8
    scale, index = torch.ones(8), torch.arange(8)
    d_y = torch.empty(8, 77, 320, dtype=dtype)
    inputs = arguments.BatchedLora(x, weight, A, B, scale, index, bias)
    batched_lora.batched_lora_forward(inputs, [])
    saved = arguments.BatchedLoraSaved(*inputs[:-1], None)
    batched_lora.batched_lora_backward(d_y, saved, (YES, False, YES, YES, False, False))
    # for adapters alone, whose gradients need projections of their own
    batched_lora.batched_lora_backward(d_y, saved, (False, False, YES, YES, False, False))


def _merge_lora(dtype: torch.dtype, rank: int) -> None:
    weight = torch.empty(320, 768, dtype=dtype)
    A, B = [torch.empty(rank, 768, dtype=dtype)] * 3, [torch.empty(320, rank, dtype=dtype)] * 3
    scale = torch.ones(3)
    inputs = arguments.MergeLora(weight, A, B, scale, scale)
    merge_lora.merge_lora_forward(inputs)
    merge_lora.merge_lora_backward(weight, inputs, (YES,) * 5)


def _group_norm(dtype: torch.dtype, batch: int, channels: int, groups: int, side: int) -> None:
    x = torch.empty(batch, channels, side, side, dtype=dtype)
    weight = torch.empty(channels, dtype=dtype)
    inputs = arguments.GroupNorm(x, weight, weight, groups, 1e-5, side > 1)
    group_norm.group_norm_forward(inputs)
    for weights in (False, YES):
        group_norm.group_norm_backward(x, inputs, (YES, weights, weights))
        u = (x, weight, weight) if weights else (x, None, None)
        group_norm.group_norm_double_backward(x, u, inputs, (YES, YES, weights, weights))


def _geglu(dtype: torch.dtype) -> None:
    x, y = torch.empty(77, 2560, dtype=dtype), torch.empty(77, 1280, dtype=dtype)
    inputs = arguments.Geglu(x)
    geglu.geglu_forward(inputs)
    geglu.geglu_backward(y, inputs, (YES,))
    geglu.geglu_double_backward(y, (x,), inputs, (YES, YES))


def _attention(dtype: torch.dtype, width: int, keys: int) -> None:
    q, k = torch.empty(8, 1024, width, dtype=dtype), torch.empty(8, keys, width, dtype=dtype)
    inputs = arguments.Attention(q, k, k, 0.125)
    attention.attention_forward(inputs)
    attention.attention_backward(q, inputs, (YES,) * 3)
    attention.attention_double_backward(q, (q, k, k), inputs, (YES,) * 4)


Call = tuple[ModuleType, Callable[..., None], tuple[int, ...]]

USUAL: dict[str, Call] = {
    "weighted_merge": (weighted_merge, _weighted_merge, ()),
    "adam_step": (adam_step, _adam_step, ()),
    "combine": (combine, _combine, ()),
    "token_outputs": (token_products, _token_outputs, (9,)),
    "projected_merge": (projected_merge, _projected_merge, (9,)),
    "batched_lora": (batched_lora, _batched_lora, (16,)),
    "merge_lora": (merge_lora, _merge_lora, (16,)),
}
# The largest tiles of each heuristic, which have the most to keep in registers.
LARGEST: dict[str, Call] = {
    "token_outputs-77": (token_products, _token_outputs, (77,)),
    "projected_merge-77-tokens": (projected_merge, _projected_merge, (77,)),
    "batched_lora-rank-64": (batched_lora, _batched_lora, (64,)),
    "merge_lora-rank-64": (merge_lora, _merge_lora, (64,)),
}
# Of a network.
LAYERS: dict[str, Call] = {
    # few programs of many warps, whose steps are within a channel; and many
    "group_norm": (group_norm, _group_norm, (2, 320, 32, 64)),
    "group_norm-many": (group_norm, _group_norm, (16, 320, 32, 16)),
    "geglu": (geglu, _geglu, ()),
    "attention": (attention, _attention, (64, 1024)),
}
# float16 stands for itself on one target: its settings and register use are bfloat16's.
COMBINATIONS = [
    (name, call, dtype, target)
    for name, call in (USUAL | LARGEST).items()
    for dtype in DTYPES
    for target in TARGETS
    if dtype != "f16" or (name in USUAL and target == "sm_90")
]


def _launches(call: Call, dtype: torch.dtype, target: str) -> list[Launch]:
    module, run, arguments = call
    hip = "6.4" if target.startswith("gfx") else None
    with (
        mock.patch.object(torch.version, "hip", hip),
        recorded_launches(module) as launches,
    ):
        run(dtype, *arguments)
    return launches


@pytest.mark.parametrize(
    ("name", "call", "dtype", "target"),
    COMBINATIONS,
    ids=[f"{name}-{dtype}-{target}" for name, _, dtype, target in COMBINATIONS],
)
def test_compiled_kernels_fit_spill_nothing_and_read_wide(
    name: str, call: Call, dtype: str, target: str
) -> None:
    launches = _launches(call, DTYPES[dtype], target)
    assert launches
    for launch in _distinct(launches):
        compiled = compile_launch(launch, TARGETS[target])
        kernel = launch.kernel.__name__
        used = resources(compiled)
        assert used.spilled == 0 or not FRUGAL, f"{kernel} spills on {target}"
        assert used.shared <= SHARED[target], f"{kernel}: {used.shared} bytes on {target}"
        loads, stores = widest_accesses(compiled)
        if target == "gfx942":
            # 64 lanes a warp: a thread's part of a tile may be narrower than a word
            assert used.registers <= 512
        else:
            most = REGISTERS[kernel] if FRUGAL else 255
            assert used.registers <= most, f"{kernel}: {used.registers} on {target}"
            assert _registers(launch, used) <= FILE, f"{kernel} cannot be launched on {target}"
            assert loads > 0, f"{kernel} has no 128-bit loads on {target}"
        if name.startswith((*STREAMS, "projected_merge")):
            assert loads > 0, f"{kernel} has no 128-bit loads on {target}"
            assert stores > 0, f"{kernel} has no 128-bit stores on {target}"
        if not name.startswith((*STREAMS, "token_outputs")):
            # the streams' last blocks, and only they, are masked element by element; and rows of A
            # are as long as there are tokens
            assert narrow_loads(compiled) == 0, f"{kernel} loads single elements on {target}"


@pytest.mark.parametrize(
    ("dtype", "target"),
    # float32 on one target of each vendor: for others it was looked at once, and takes minutes
    [("f32", "sm_90"), ("f32", "gfx942"), *(("bf16", target) for target in TARGETS)],
)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layers_fit_and_spill_nothing(name: str, dtype: str, target: str) -> None:
    if not FRUGAL and target != "sm_90":
        pytest.skip("what an older Triton makes of the others was not looked at")
    for launch in _distinct(_launches(LAYERS[name], DTYPES[dtype], target)):
        compiled = compile_launch(launch, TARGETS[target])
        kernel = launch.kernel.__name__
        used = resources(compiled)
        assert used.spilled == 0 or not FRUGAL, f"{kernel} spills on {target}"
        assert used.shared <= SHARED[target], f"{kernel}: {used.shared} bytes on {target}"
        if target == "gfx942":
            assert used.registers <= 512
            continue
        most = REGISTERS[kernel] if FRUGAL else 255
        assert used.registers <= most, f"{kernel}: {used.registers} on {target}"
        assert _registers(launch, used) <= FILE, f"{kernel} cannot be launched on {target}"
        assert widest_accesses(compiled)[0] > 0, f"{kernel} has no 128-bit loads on {target}"
        if name == "attention":
            assert narrow_loads(compiled) == 0, f"{kernel} loads single elements on {target}"


def test_rows_of_attention_that_are_no_power_of_two_are_read_in_wide_words() -> None:
    """Stable Diffusion's first heads have 40 columns: 80 bytes, five words."""
    for launch in _distinct(
        _launches((attention, _attention, (40, 1024)), torch.bfloat16, "sm_90")
    ):
        compiled = compile_launch(launch, SM90)
        kernel = launch.kernel.__name__
        assert narrow_loads(compiled) == 0, kernel
        assert widest_accesses(compiled)[0] > 0, kernel
        # a score of 16 rows and columns is two warps' work
        assert launch.arguments["num_warps"] == (2 if launch.arguments["BLOCK_T"] == 16 else 4)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [1, 160])
def test_attention_of_any_width_compiles_and_wide_heads_fit(width: int, dtype: str) -> None:
    """Stable Diffusion's deepest heads have 160 columns; of one, Triton makes a constant."""
    for launch in _launches((attention, _attention, (width, 1024)), DTYPES[dtype], "sm_80"):
        used = resources(compile_launch(launch, TARGETS["sm_80"]))
        assert attention.widest(used.shared, DTYPES[dtype]) <= 256
        assert used.shared <= SHARED["sm_80"], launch.kernel.__name__
    assert attention.widest(SHARED["sm_80"], DTYPES[dtype]) == 256
    assert attention.widest(SHARED["sm_90"], torch.float32) == 256
    # smaller cards of the same generations
    assert attention.widest(101_376, torch.float32) == 128
    assert attention.widest(101_376, torch.bfloat16) == 256


def _registers(launch: Launch, used: Resources) -> int:
    """Registers of a program, of which a thread is given eight at a time."""
    return -(-used.registers // 8) * 8 * 32 * launch.arguments["num_warps"]


def _distinct(launches: list[Launch]) -> list[Launch]:
    """Leave out launches that differ in addresses and sizes alone: one kernel serves them."""
    constants = {
        (launch.kernel.__name__, *(str(v) for k, v in launch.arguments.items() if k.isupper())):
        launch for launch in launches
    }  # fmt: skip
    return list(constants.values())


@pytest.mark.parametrize("rank", [12, 24, 20])
def test_ranks_that_are_no_power_of_two_are_read_in_the_widest_words_they_allow(rank: int) -> None:
    forward, *_ = _launches((batched_lora, _batched_lora, (rank,)), torch.bfloat16, "sm_90")
    assert forward.arguments["BLOCK_R"] == (16 if rank < 16 else 32)
    # rows of 12, 24 and 20 elements start at multiples of 8, 16 and 8 bytes
    assert forward.arguments["RANK_MULTIPLE"] == (8 if rank == 24 else 4)
    compiled = compile_launch(forward, SM90)
    assert resources(compiled).spilled == 0
    assert narrow_loads(compiled) == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_full_block_of_the_stream_is_wide(target: str) -> None:
    # base, three θ and out of 1024 float32 elements on 128 threads: two words a thread each on
    # NVIDIA; on AMD, with 256 threads, one.
    launch = _launches(USUAL["weighted_merge"], torch.float32, target)[0]
    loads, stores = widest_accesses(compile_launch(launch, TARGETS[target]))
    words = 1024 // (launch.arguments["num_warps"] * TARGETS[target].warp_size * 4)
    assert loads >= 4 * words
    assert stores >= words


def test_unaligned_tensors_get_kernels_that_promise_nothing() -> None:
    base = [torch.empty(4097)[1:]]
    with recorded_launches(weighted_merge) as launches:
        weighted_merge.weighted_merge_forward(arguments.WeightedMerge(base, base, torch.ones(1)))
    (launch,) = launches
    assert launch.arguments["ALIGNED"] is False
    loads, _ = widest_accesses(compile_launch(launch, SM90))
    assert loads == 0


def test_one_launch_serves_a_whole_list() -> None:
    base = [torch.empty(size) for size in (3, 70_000, 5, 1)]
    with recorded_launches(weighted_merge) as launches:
        weighted_merge.weighted_merge_forward(
            arguments.WeightedMerge(base, base * 2, torch.ones(2))
        )
    assert len(launches) == 1
    saved = arguments.AdamStepSaved(base, base, base, 1e-4, 0.9, 0.999, 1e-8, 0.0, 3)
    with recorded_launches(adam_step) as launches:
        adam_step.adam_step_forward(arguments.AdamStep(base, *saved))
        adam_step.adam_step_backward(base * 3, saved, (YES,) * 4)
    assert len(launches) == 2
    with recorded_launches(combine) as launches:
        combine.combine_into(base, base * 2, [[1, 0.5]])
    assert len(launches) == 1
    W0 = [torch.empty(o, 8) for o in (3, 640, 0)]
    C = [torch.empty(2, 8)] * 2
    with recorded_launches(projected_merge, token_products) as launches:
        projected_merge.projected_merge_forward(arguments.ProjectedMerge(W0, W0 * 2, C, C))
        token_products.token_outputs(W0, C[0])
        token_products.add_token_outputs(W0, torch.empty(643, 2), C[0])
        token_products.token_sums(W0, torch.empty(643, 2))
    assert len(launches) == 4
