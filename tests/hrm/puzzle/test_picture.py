"""Pictures of thoughts: a panel or frame for each segment, with what changed and what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrm.puzzle.picture import thought_picture
from hrm.settings import UsageError

SYMBOLS = {"sudoku": (2, 6), "maze": (1, 6), "arc": (0, 12)}


def draw(path: Path, task: str = "sudoku", segments: int = 3, seed: int = 0, wrong: bool = True) -> None:
    """A picture of 4 x 4 answers that change at random, or, without a seed, not at all."""
    rng = np.random.default_rng(seed)
    thoughts = rng.integers(*SYMBOLS[task], (segments, 16)).astype(np.uint8)
    if seed < 1:
        thoughts[:] = thoughts[0]
    mistakes = np.zeros((segments, 16), bool)
    mistakes[:, 5] = wrong
    thought_picture(path, task, (4, 4), np.full(16, 1, np.uint8), thoughts, mistakes)


@pytest.mark.parametrize(("segments", "seed"), [(1, 1), (5, 1), (16, 0)])
def test_a_gif_has_a_frame_for_each_segment(segments: int, seed: int, tmp_path: Path) -> None:
    draw(tmp_path / "thoughts.gif", segments=segments, seed=seed)
    with Image.open(tmp_path / "thoughts.gif") as image:
        assert getattr(image, "n_frames", 1) == segments


def test_a_png_grows_with_the_segments(tmp_path: Path) -> None:
    sizes = []
    for segments in (1, 4, 9):
        draw(tmp_path / "thoughts.png", segments=segments)
        with Image.open(tmp_path / "thoughts.png") as image:
            sizes.append(image.size)
    assert sizes == sorted(sizes) and sizes[2][0] > 1.4 * sizes[1][0] and sizes[2][1] > 1.4 * sizes[1][1]


@pytest.mark.parametrize("task", ["sudoku", "maze", "arc"])
@pytest.mark.parametrize("ending", ["png", "gif"])
def test_the_same_thoughts_give_the_same_bytes(task: str, ending: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw(tmp_path / f"{name}.{ending}", task, seed=seed)
    a, b, c = ((tmp_path / f"{name}.{ending}").read_bytes() for name in "abc")
    assert a == b and a != c


def test_changes_and_mistakes_are_marked(tmp_path: Path) -> None:
    changed, clash = (255, 224, 138), (251, 211, 211)
    for seed, wrong, marks in ((0, False, set()), (0, True, {clash}), (1, False, {changed})):
        draw(tmp_path / "thoughts.png", seed=seed, wrong=wrong)
        # the legend has both colours, on a few hundred pixels; a cell has thousands
        with Image.open(tmp_path / "thoughts.png") as image:
            counts = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20)}
        assert {colour for colour in (changed, clash) if counts.get(colour, 0) > 2000} == marks


@pytest.mark.parametrize(("task", "colour"), [("maze", (242, 163, 58)), ("arc", (255, 220, 0))])
def test_grids_have_their_colours(task: str, colour: tuple[int, int, int], tmp_path: Path) -> None:
    thoughts = np.full((1, 9), 5 if task == "maze" else 6, np.uint8)
    thought_picture(tmp_path / "a.png", task, (3, 3), thoughts[0], thoughts, np.zeros((1, 9), bool))
    with Image.open(tmp_path / "a.png") as image:
        counts = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20)}
    assert counts[colour] > 50_000


def test_padding_around_all_answers_is_left_out(tmp_path: Path) -> None:
    small, padded = np.full((3, 2), 4, np.uint8), np.zeros((5, 6), np.uint8)
    padded[:3, :2] = small
    for name, grid in (("small", small), ("padded", padded)):
        flat, mistakes = grid.ravel(), np.zeros((1, grid.size), bool)
        thought_picture(tmp_path / f"{name}.png", "arc", grid.shape, flat, flat[None], mistakes)
    assert (tmp_path / "small.png").read_bytes() == (tmp_path / "padded.png").read_bytes()


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"thoughts\.jpg'; it should end with \.png or \.gif"):
        draw(tmp_path / "thoughts.jpg")
