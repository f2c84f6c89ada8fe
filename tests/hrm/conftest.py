"""Fixtures of the models that the tests run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import BACKBONES, CORE, VOCABULARY, backbone_config, seem_trained
from transformers import AutoModelForCausalLM

from hrm import HRMGemmaForCausalLM


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings draw none: half the time of a short one. test_plot.py and test_quickstart.py look at them."""
    monkeypatch.setattr("hrm.report.plot_run", lambda *_: None)


@pytest.fixture(params=sorted(BACKBONES))
def kind(request: pytest.FixtureRequest) -> str:
    """Each of the three backbones in turn."""
    return request.param


@pytest.fixture
def make_model() -> Callable[..., HRMGemmaForCausalLM]:
    """make_model(kind, trained=True, lora=..., **hrm settings): a small model in evaluation mode."""

    def make(kind: str = "gemma3_text", *, trained: bool = True, lora: Any = True, **hrm: Any) -> HRMGemmaForCausalLM:
        backbone = AutoModelForCausalLM.from_config(backbone_config(kind))
        model = HRMGemmaForCausalLM.from_backbone(backbone, hrm={**CORE, **hrm}, lora=lora)
        if trained:
            seem_trained(model)
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 12) token ids, none of them the padding's."""
    return torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
