"""The operators of the loop: checked, differentiable, each served by the best backend at hand.

`MIMA_BACKEND` (reference, triton or native) or the argument `backend=` overrides the choice;
`mima.ops.backends.choice.report` explains it.
"""

from mima.ops.adam_step import adam_step, adam_step_pullback
from mima.ops.attention import attention
from mima.ops.batched_lora import batched_lora
from mima.ops.combine import combine
from mima.ops.geglu import geglu
from mima.ops.group_norm import group_norm, layer_norm
from mima.ops.merge_lora import merge_lora
from mima.ops.projected_merge import projected_merge, projected_merge_pullback
from mima.ops.token_outputs import add_token_outputs_, token_outputs, token_sums
from mima.ops.weighted_merge import weighted_merge, weighted_merge_pullback

__all__ = [
    "adam_step",
    "adam_step_pullback",
    "add_token_outputs_",
    "attention",
    "batched_lora",
    "combine",
    "geglu",
    "group_norm",
    "layer_norm",
    "merge_lora",
    "projected_merge",
    "projected_merge_pullback",
    "token_outputs",
    "token_sums",
    "weighted_merge",
    "weighted_merge_pullback",
]
