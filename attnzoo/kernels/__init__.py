"""The floor: one function per attention operation, on CPU and GPU, with one meaning whichever back end serves it.

    neighborhood_attention   1-D, 2-D, 3-D sliding windows (na1d, na2d, na3d: NATTEN's names); neighborhood_logits
    edited_attention         attention whose softmax is edited for some rows; grouped_attention, combine_groups,
                             group_masses, attention_probs, attention_column_sums, Visibility
    pooled_attention         softmax attention through a few agent tokens, in two stages
    linear_attention         phi(q) (phi(k)^T v), four normalisers, causal or not
    merge_attentions         partial results joined by their lse
    BACKENDS, use_backend, not_supported_reasons   which back end serves a call, and why another can't

torch is needed, triton only by the back end of that name.
"""

from attnzoo.kernels.dispatch import BACKENDS, not_supported_reasons, use_backend
from attnzoo.kernels.edited_attention import (
    Visibility,
    attention_column_sums,
    attention_probs,
    combine_groups,
    edited_attention,
    group_masses,
    grouped_attention,
)
from attnzoo.kernels.linear_attention import linear_attention
from attnzoo.kernels.merge import merge_attentions
from attnzoo.kernels.neighborhood_attention import na1d, na2d, na3d, neighborhood_attention, neighborhood_logits
from attnzoo.kernels.pooled_attention import pooled_attention

__all__ = [
    "BACKENDS",
    "Visibility",
    "attention_column_sums",
    "attention_probs",
    "combine_groups",
    "edited_attention",
    "group_masses",
    "grouped_attention",
    "linear_attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_logits",
    "not_supported_reasons",
    "pooled_attention",
    "use_backend",
]
