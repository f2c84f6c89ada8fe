"""How much of what a core reads tells of the question: `python benchmarks/input_power.py BACKBONE --layers 6`.

On the texts of `depth.py`'s pointer_chase (9 objects, up to 4 arrows), at the ends of the questions: the shares of the
mean square of x = h / rms(h) that the letter to start from, and the number of arrows, explain (variance between their
classes), for x itself and whitened (`depth.Whitening`); and the share that is the same at all tokens. A CPU takes
minutes.
"""

from __future__ import annotations

import argparse
import json

import torch
from depth import Whitening, load, make_rows
from torch import Tensor

from hrm.data import collate
from hrm.loss import IGNORED
from hrm.train import load_tokenizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="folder or name of a causal language model")
    parser.add_argument("--layers", type=int, help="of the backbone, the first ones; default: all")
    parser.add_argument("--rows", type=int, default=1000, help="texts, each with 12 questions")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.backbone)
    task = {"task": "pointer_chase", "objects": 9, "max_depth": 4, "questions": 12, "judge_depths": [1], "judged": 1}
    rows, _, _ = make_rows(argparse.Namespace(**task, rows=options.rows), tokenizer)
    ids, mask, labels = collate(rows, tokenizer.pad_token_id)
    decoder = load(options, torch.float32).model.eval()
    h = torch.cat([decoder(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(32)])
    x = h / h.pow(2).mean(-1, keepdim=True).sqrt()
    row, place = (labels != IGNORED).nonzero(as_tuple=True)  # answers' labels stand behind "... from A?"
    asked = x[row, place - 1]
    start, arrows = ids[row, place - 2], ids[row, place - 4]
    whitening = Whitening(h[mask.bool()])
    for name, read in (("x", asked), ("whitened", whitening(asked))):
        power = read.pow(2).mean().item()
        shares = {"start": explained(read, start) / power, "arrows": explained(read, arrows) / power}
        print(json.dumps({"layers": options.layers, "of": name, "power": power, **shares}))
    print(json.dumps({"layers": options.layers, "the same at all tokens": x[mask.bool()].mean(0).pow(2).mean().item()}))


def explained(read: Tensor, classes: Tensor) -> float:
    """Mean square of the class means' distances from the whole mean, by the classes' sizes."""
    mean, total = read.mean(0), 0.0
    for one in classes.unique():
        own = read[classes == one]
        total += len(own) / len(read) * (own.mean(0) - mean).pow(2).mean().item()
    return total


if __name__ == "__main__":
    main()
