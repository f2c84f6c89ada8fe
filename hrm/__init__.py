"""Hierarchical reasoning on pretrained language models: train, save, load and generate with an HRM core.

`hrm_kernels` holds the fused kernels; `model.hrm.fused` says whether they run.
"""

from hrm.config import HRMConfig
from hrm.core import HRMCarry, HRMCore
from hrm.modeling import HRMCache, HRMGemma3N, HRMGemmaConfig, HRMGemmaForCausalLM, HRMOutput

__all__ = [
    "HRMCache",
    "HRMCarry",
    "HRMConfig",
    "HRMCore",
    "HRMGemma3N",
    "HRMGemmaConfig",
    "HRMGemmaForCausalLM",
    "HRMOutput",
]
