"""Runs the published HRM and TRM code and keeps what it computed, for test_published.py to compare with.

`python tests/hrm/puzzle/make_golden.py HRM_FOLDER TRM_FOLDER`: checkouts of sapientinc/HRM and
SamsungSAILMontreal/TinyRecursiveModels. Small models, float32, exploration off; attention through PyTorch's SDPA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"batch_size": 4, "seq_len": 9, "num_puzzle_identifiers": 3, "vocab_size": 5, "hidden_size": 16, "num_heads": 2,
         "expansion": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.0, "forward_dtype": "float32",
         "puzzle_emb_ndim": 16}  # fmt: skip
CASES = {
    "hrm": SIZES | {"H_cycles": 2, "L_cycles": 2, "H_layers": 1, "L_layers": 2, "pos_encodings": "rope"},
    "hrm_learned": SIZES | {"H_cycles": 2, "L_cycles": 3, "H_layers": 1, "L_layers": 1, "pos_encodings": "learned",
                            "loss": "softmax_cross_entropy", "puzzle_emb_ndim": 0},
    "trm": SIZES | {"H_cycles": 2, "L_cycles": 3, "H_layers": 0, "L_layers": 2, "pos_encodings": "rope",
                    "puzzle_emb_len": 2},
    "trm_mlp": SIZES | {"H_cycles": 2, "L_cycles": 2, "H_layers": 0, "L_layers": 2, "pos_encodings": "none",
                        "mlp_t": True, "puzzle_emb_len": 2},
}  # fmt: skip
STEPS = 5
SEEDS = {"hrm": 3, "hrm_learned": 3, "trm": 6, "trm_mlp": 2}  # with which some rows halt early and others do not


def _stand_ins() -> None:
    """What the published code imports and a bare PyTorch lacks."""

    def attention(q, k, v, causal=False):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).contiguous()

    class Base:
        def __init__(self, **values):
            for kind in reversed(type(self).__mro__):
                for name in getattr(kind, "__annotations__", {}):
                    if name in values or hasattr(kind, name):
                        setattr(self, name, values.get(name, getattr(kind, name, None)))

    for module, name, value in (("flash_attn", "flash_attn_func", attention), ("pydantic", "BaseModel", Base)):
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, value)


def _run(case: str, code: str) -> None:
    _stand_ins()
    sys.path.insert(0, code)
    from models.losses import ACTLossHead

    if case.startswith("hrm"):
        from models.hrm.hrm_act_v1 import HierarchicalReasoningModel_ACTV1 as Model
    else:
        from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1 as Model
    sizes = dict(CASES[case])
    torch.manual_seed(SEEDS[case])
    head = ACTLossHead(Model({k: v for k, v in sizes.items() if k != "loss"}),
                       sizes.get("loss", "stablemax_cross_entropy"))  # fmt: skip
    with torch.no_grad():  # so that some rows halt early and others do not
        head.model.inner.q_head.weight.normal_(std=0.5)
        head.model.inner.q_head.bias.zero_()
        if sizes["puzzle_emb_ndim"]:
            head.model.inner.puzzle_emb.weights.normal_(std=0.5)
    tensors = {f"weights.{name}": value.clone() for name, value in head.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for mode in ("train", "eval"):
        head.train(mode == "train")
        rows = torch.zeros(4, 16, requires_grad=True)
        if sizes["puzzle_emb_ndim"]:
            head.model.inner.puzzle_emb.local_weights = rows
        carry = None
        for step in range(STEPS):
            batch = {
                "inputs": torch.randint(1, 5, (4, 9), generator=generator, dtype=torch.int32),
                "labels": torch.randint(1, 5, (4, 9), generator=generator, dtype=torch.int32),
                "puzzle_identifiers": torch.randint(0, 3, (4,), generator=generator, dtype=torch.int32),
            }
            batch["labels"][0, :3] = -100
            carry = carry or head.initial_carry(batch)
            keys = ("logits", "q_halt_logits", "q_continue_logits", "target_q_continue")
            carry, loss, _, outputs, _ = head(return_keys=keys, carry=carry, batch=batch)
            place = f"{mode}.{step}."
            tensors |= {place + name: value for name, value in batch.items()}
            tensors |= {place + name: value for name, value in outputs.items()}
            tensors |= {place + "loss": loss.detach(), place + "halted": carry.halted, place + "steps": carry.steps}
            tensors |= {place + name: getattr(carry.inner_carry, name) for name in ("z_H", "z_L")}
            tensors |= {f"{place}data.{name}": value for name, value in carry.current_data.items()}
            if mode == "train":
                head.zero_grad()
                rows.grad = None
                loss.backward()
                if step == STEPS - 1:
                    grads = {name: p.grad for name, p in head.named_parameters()}
                    tensors |= {f"grad.{name}": value.clone() for name, value in grads.items()}
                    if rows.grad is not None:
                        tensors["grad.puzzle_rows"] = rows.grad.clone()
    from safetensors.torch import save_file

    GOLDEN.mkdir(exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, GOLDEN / f"{case}.safetensors")
    (GOLDEN / f"{case}.json").write_text(json.dumps(sizes, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _run(sys.argv[3], sys.argv[1] if sys.argv[3].startswith("hrm") else sys.argv[2])
    else:
        for case in CASES:
            subprocess.run([sys.executable, __file__, *sys.argv[1:3], case], check=True)
