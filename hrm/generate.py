"""Answers from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import OmegaConf
from transformers import set_seed

from hrm.data import Template, first_line
from hrm.evaluate import Depth, answer
from hrm.modeling import HRMGemmaForCausalLM
from hrm.settings import DataSection, UsageError, check_generation, check_length, typed_lines
from hrm.train import load_tokenizer


def answer_all(settings: Any, prompts: TextIO, answers: TextIO, notes: TextIO) -> None:
    """Writes the answer to `settings.prompt`, or to each line of `prompts`; how deep the core went goes to `notes`.

    Raises:
        UsageError: a setting that makes no sense, no run or checkpoint there, or a prompt that is empty or too long.
    """
    check_generation(settings)
    if settings.run is None:
        raise UsageError("run is missing; it should be a run folder or a checkpoint: run=runs/quickstart-...")
    checkpoint, template = find_checkpoint(Path(settings.run))
    tokenizer = load_tokenizer(str(checkpoint))
    model = load_trained(checkpoint)
    model.hrm.fused = settings.hrm.fused
    set_seed(settings.seed)
    generation: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "segments": settings.hrm.segments}
    if settings.temperature > 0:
        generation |= {"do_sample": True, "temperature": settings.temperature}
    for line in typed_lines(prompts) if settings.prompt is None else [settings.prompt]:
        if not line.strip():
            raise UsageError("the prompt is empty; it should be text")
        question = template.question(line.rstrip("\n"))
        tokens = len(tokenizer(question)["input_ids"]) + settings.max_new_tokens
        check_length("the prompt with its answer", tokens, model, "Shorten the prompt or max_new_tokens.")
        with Depth(model) as depth:
            (text,) = answer(model, tokenizer, [question], **generation)
        print(text, file=answers, flush=True)
        print(f"segments used: {depth.mean:.2f} a token", file=notes, flush=True)


def find_checkpoint(folder: Path) -> tuple[Path, Template]:
    """The checkpoint in a run folder with the run's template, or a checkpoint itself with the default one."""
    if (folder / "checkpoint" / "config.json").is_file():
        return folder / "checkpoint", Template(OmegaConf.load(folder / "config.yaml").data.template)
    if (folder / "config.json").is_file():
        return folder, Template(DataSection.template)
    if (folder / "model" / "config.json").is_file():
        raise UsageError(f"run is {str(folder)!r}, a run on puzzles; hrm solve and hrm evaluate take those")
    raise UsageError(f"run is {str(folder)!r}, which holds no checkpoint; it should be a run folder or a checkpoint")


def load_trained(checkpoint: Path) -> HRMGemmaForCausalLM:
    """The model of a checkpoint in evaluation mode, on the GPU where there is one; a UsageError where it is damaged."""
    try:
        model = HRMGemmaForCausalLM.from_pretrained(checkpoint)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{checkpoint} cannot be loaded: {first_line(error)}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
