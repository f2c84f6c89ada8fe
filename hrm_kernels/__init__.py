"""Fused kernels for hierarchical recurrent reasoning: the L recurrence, the H update and the carry between segments
of the gated cell; the residual norm, the SwiGLU MLP and the attention of the paper's transformer block.

Needs torch and triton only, and knows nothing of models. Each operation is one module that holds, in this order, its
equation, the plain-PyTorch reference (the specification), the Triton kernels, the autograd registration and the public
function. `explain()` says which backend each function uses here and why.
"""

from hrm_kernels._backend import BackendError, Choice, explain
from hrm_kernels.carry_update import carry_update, carry_update_reference
from hrm_kernels.h_update import h_update, h_update_reference
from hrm_kernels.l_recurrence import l_recurrence, l_recurrence_reference
from hrm_kernels.residual_norm import residual_norm, residual_norm_reference
from hrm_kernels.rope_attention import rope_attention, rope_attention_reference
from hrm_kernels.swiglu_mlp import swiglu_block, swiglu_block_reference, swiglu_mlp, swiglu_mlp_reference
from hrm_kernels.token_mixer import token_mixer, token_mixer_reference

__all__ = [
    "BackendError",
    "Choice",
    "carry_update",
    "carry_update_reference",
    "explain",
    "h_update",
    "h_update_reference",
    "l_recurrence",
    "l_recurrence_reference",
    "residual_norm",
    "residual_norm_reference",
    "rope_attention",
    "rope_attention_reference",
    "swiglu_block",
    "swiglu_block_reference",
    "swiglu_mlp",
    "swiglu_mlp_reference",
    "token_mixer",
    "token_mixer_reference",
]
