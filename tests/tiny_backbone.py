"""A backbone and a tokenizer of bytes, small enough to train in a test."""

from pathlib import Path
from string import ascii_uppercase

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>")
TINY_CORE = ["hrm.d_l=32", "hrm.d_h=32", "hrm.head_size=16", "hrm.h_cycles=2", "hrm.l_steps=2", "hrm.attn_heads=2"]


def byte_tokenizer(letters: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, and <pad> (0) and <eos> (1); with `letters` one for a space and a capital letter too, as
    real tokenizers have."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("\u0120", letter) for letter in ascii_uppercase] if letters else []
    tokens += [space + letter for space, letter in merges]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1])


def save_tiny_backbone(folder: Path, letters: bool = False) -> Path:
    """A random two-layer Gemma 3 with its tokenizer, in `folder`."""
    tokenizer = byte_tokenizer(letters)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
