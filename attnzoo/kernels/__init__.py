"""The floor: one function per attention operation, on CPU and GPU, with one meaning whichever back end serves it.

    neighborhood_attention   1-D, 2-D, 3-D sliding windows (na1d, na2d, na3d: NATTEN's names); neighborhood_logits
    block_sparse_attention   attention over listed blocks of keys; BlockSparsity, axis_order, tile_order
    edited_attention         attention whose softmax is edited for some rows; grouped_attention, combine_groups,
                             group_masses, group_value_mean, attention_probs, attention_column_sums, Visibility
    pooled_attention         softmax attention through a few agent tokens, in two stages
    linear_attention         phi(q) (phi(k)^T v), four normalisers, causal or not
    sampled_window_attention windows whose keys are read at real-valued positions; positions_from_normalized
    merge_attentions         partial results joined by their lse
    plan_neighborhood_attention   useful and executed FLOPs and the speed-up bound, before anything runs
    BACKENDS, use_backend, not_supported_reasons   which back end serves a call, and why another can't

torch is needed, triton only by the back end of that name.
"""

from attnzoo.kernels.block_sparse_attention import BlockSparsity, axis_order, block_sparse_attention, tile_order
from attnzoo.kernels.dispatch import BACKENDS, not_supported_reasons, use_backend
from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    combine_groups,
    edited_attention,
    group_masses,
    group_value_mean,
    grouped_attention,
)
from attnzoo.kernels.linear_attention import linear_attention
from attnzoo.kernels.merge import merge_attentions
from attnzoo.kernels.neighborhood_attention import na1d, na2d, na3d, neighborhood_attention, neighborhood_logits
from attnzoo.kernels.planning import Plan, plan_neighborhood_attention
from attnzoo.kernels.pooled_attention import pooled_attention
from attnzoo.kernels.sampled_window_attention import positions_from_normalized, sampled_window_attention

__all__ = [
    "BACKENDS",
    "Plan",
    "BlockSparsity",
    "Visibility",
    "attention_column_sums",
    "attention_probs",
    "axis_order",
    "block_sparse_attention",
    "combine_groups",
    "edited_attention",
    "group_masses",
    "group_value_mean",
    "grouped_attention",
    "linear_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_logits",
    "not_supported_reasons",
    "plan_neighborhood_attention",
    "pooled_attention",
    "positions_from_normalized",
    "sampled_window_attention",
    "tile_order",
    "use_backend",
]
