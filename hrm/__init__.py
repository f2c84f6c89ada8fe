"""Hierarchical reasoning on pretrained language models: train, save, load and generate with an HRM core.

`hrm_kernels` holds the fused kernels; `model.hrm.fused` says whether they run. Once one of the names below has been
imported, transformers' Auto classes know the model.
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from hrm.config import HRMConfig
    from hrm.core import HRMCarry, HRMCore
    from hrm.modeling import HRMCache, HRMGemma3N, HRMGemmaConfig, HRMGemmaForCausalLM, HRMOutput
else:

    def __getattr__(name):
        """Imports PyTorch and all when the first of the names is asked for: before, the command line has to see to
        Ctrl-C, and its help needs none of it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from hrm import modeling

        return getattr(modeling, name)

    def __dir__():
        return sorted({*globals(), *__all__})
