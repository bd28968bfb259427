"""Position ids of shortened prompts against those of transformers for whole ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.eval import tiny
from vtprune.serve.mrope import CHANNELS, laid_out, placed, visual, with_places

MARKER, WORD = 90, 7
D = 3


@dataclass
class Prompt:
    """Images (rows, columns) with words around them, and the tokens that stay of each image."""

    words: list[int]  # before each image, and after the last
    grids: list[tuple[int, int]]
    kept: list[Tensor]

    @property
    def ids(self) -> Tensor:
        pieces = [[WORD] * self.words[0]]
        for kept, words in zip(self.kept, self.words[1:], strict=True):
            pieces += [[MARKER] * len(kept), [WORD] * words]
        return torch.tensor([token for piece in pieces for token in piece])

    @property
    def images(self) -> list[tuple[int, int, int, int]]:
        firsts, at = [], 0
        for words, kept in zip(self.words, self.kept, strict=False):
            firsts.append(at + words)
            at += words + len(kept)
        each = zip(firsts, self.kept, self.grids, strict=True)
        return [(first, len(kept), *grid) for first, kept, grid in each]

    def embeddings(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [
            with_places(torch.rand(len(kept), D, dtype=dtype), kept, *grid)
            for kept, grid in zip(self.kept, self.grids, strict=True)
        ]


@pytest.fixture(scope="module")
def rope() -> Any:
    return tiny.build("qwen2_5_vl")[0].model.get_rope_index


def reference(rope: Any, prompt: Prompt) -> Tensor:
    """The kept columns of what transformers makes of the whole prompt."""
    types, stays = [], []
    for i, words in enumerate(prompt.words):
        types += [0] * words
        stays += [True] * words
        if i < len(prompt.grids):
            rows, columns = prompt.grids[i]
            types += [1] * (rows * columns)
            stays += torch.zeros(rows * columns).index_fill(0, prompt.kept[i], 1).bool().tolist()
    grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in prompt.grids])
    ids = torch.full((1, len(types)), WORD)
    whole, _ = rope(ids, torch.tensor([types]), image_grid_thw=grid)
    return whole[:, 0, torch.tensor(stays)]


def some(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:k].sort().values


PROMPTS = {
    "landscape": Prompt([3, 5], [(4, 6)], [some(24, 6, 0)]),
    "portrait": Prompt([3, 5], [(8, 4)], [some(32, 5, 1)]),
    "two": Prompt([2, 1, 4], [(7, 3), (2, 9)], [some(21, 4, 2), some(18, 7, 3)]),
    "all of one": Prompt([1, 2, 2], [(3, 5), (6, 2)], [some(15, 3, 4), some(12, 12, 5)]),
    "one token of many": Prompt([2, 1, 3], [(4, 6), (5, 3)], [some(24, 1, 6), some(15, 1, 7)]),
    "an image first and one last": Prompt(
        [0, 4, 0], [(3, 3), (4, 2)], [some(9, 2, 8), some(8, 1, 9)]
    ),
    "an image of one token": Prompt([2, 2, 3], [(1, 1), (3, 4)], [some(1, 1, 0), some(12, 5, 1)]),
    "wide": Prompt([1, 2], [(2, 700)], [some(1400, 40, 2)]),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tokens_have_the_ids_they_had(rope: Any, name: str, dtype: torch.dtype) -> None:
    prompt = PROMPTS[name]
    wanted, given = reference(rope, prompt), prompt.embeddings(dtype)
    positions, delta = laid_out(len(prompt.ids), prompt.images)
    text = prompt.ids == WORD
    assert torch.equal(positions[:, text], wanted[:, text])  # before any image is encoded
    if prompt.words[-1]:
        assert delta == int(wanted.max()) + 1 - len(prompt.ids)
    tokens, positions, delta = placed(prompt.ids, MARKER, positions, given, 0)
    assert torch.equal(positions, wanted)
    assert delta == int(wanted.max()) + 1 - len(prompt.ids)
    for one, other in zip(tokens, given, strict=True):
        assert torch.equal(one, other[:, :-CHANNELS])


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_prompt_that_comes_in_pieces(rope: Any, name: str, size: int) -> None:
    prompt = PROMPTS[name]
    given, length = prompt.embeddings(), len(prompt.ids)
    positions, _ = laid_out(length, prompt.images)
    delta = 0
    for begin in range(0, length, size):
        window = []
        for (first, kept, *_), image in zip(prompt.images, given, strict=True):
            piece = image[max(0, begin - first) : max(0, min(kept, begin + size - first))]
            window += [piece] if len(piece) else []
        _, positions, delta = placed(prompt.ids, MARKER, positions, window, begin)
    wanted = reference(rope, prompt)
    assert torch.equal(positions, wanted)
    assert delta == int(wanted.max()) + 1 - length


def test_without_embeddings_nothing_changes() -> None:
    prompt = PROMPTS["two"]
    positions, delta = laid_out(len(prompt.ids), prompt.images)
    assert placed(prompt.ids, MARKER, positions, [], 20) == ([], positions, delta)


@pytest.mark.parametrize("name", PROMPTS)
def test_written_placeholders_are_text(rope: Any, name: str) -> None:
    prompt = PROMPTS[name]
    positions, _ = laid_out(len(prompt.ids), prompt.images)
    written = prompt.ids.clone()
    before, middle = prompt.words[0], prompt.images[-1][0] + prompt.images[-1][1]
    written[: before // 2] = MARKER
    written[middle : middle + prompt.words[-1] // 2] = MARKER
    _, found, _ = placed(written, MARKER, positions, prompt.embeddings(), 0)
    assert torch.equal(found, reference(rope, prompt))
    if name == "two":
        assert len(visual(written, MARKER, positions[0])) == 11
