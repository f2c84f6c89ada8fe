"""What another rounding does to random layers of Gemma 3n E4B's width: `python benchmarks/e4b_rounding.py LAYERS`.

Logits with PyTorch's attention against those with transformers' plain one, both in bfloat16, 48 tokens.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

layers = int(sys.argv[1])
kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 7
torch.manual_seed(0)
config = Gemma3nTextConfig(
    vocab_size=2048, vocab_size_per_layer_input=2048, num_hidden_layers=layers, layer_types=kinds[:layers],
    num_kv_shared_layers=15 if layers == 35 else 5,
    activation_sparsity_pattern=[0.95] * min(10, layers) + [0.0] * max(0, layers - 10),
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
ids = torch.randint(2048, (1, 48))
found = []
with torch.no_grad():
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = model(ids).logits[0, :-1].float()
        found.append((logits, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")))
(a, loss_a), (b, loss_b) = found
print(f"{layers} layers: logits differ by {(a - b).norm() / a.norm():.2f} of their size, a token's loss by "
      f"{(loss_a - loss_b).std():.2f} (standard deviation)")  # fmt: skip
