"""The README's table of methods, from their code and docstrings.

``python -m vtprune.eval.methods`` prints it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtprune.engine.plan import wrap
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import Facts, Joint, Need, Quantity, Site, Stage, Strategy

COLUMNS = ("name", "idea", "site", "signals", "tokens", "position ids", "paper", "defaults")
# Layers are those of the model that most authors state theirs for.
LLAVA = Facts(
    vision_layers=24,
    feature_block=22,
    has_cls=True,
    signals=Facts.signals_of(cls_row=True),
    n_tokens=576,
    decoder_layers=32,
    family="LLaVA-1.5",
)
# What else may hold of a model, and change what a strategy does there.
CASES = {
    "without [CLS]": replace(LLAVA, has_cls=False, signals=Facts.signals_of(cls_row=False)),
    "with `text_encoder`": replace(LLAVA, signals=LLAVA.signals | {Joint}),
    "where images differ in size": replace(LLAVA, n_tokens=None),
}
SITES = {Site.ENCODER: "tower", Site.PROJECTOR: "projector", Site.DECODER: "language model"}
BASELINE = "baseline"
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


def table() -> str:
    """Returns the table in Markdown: baselines first, then in the order of the model."""
    rows = [row(name) for name in sorted(strategy_names(), key=_rank)]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row(name: str) -> tuple[str, ...]:
    """Returns the cells of a strategy, in the order of ``COLUMNS``."""
    strategy, text = build(name), _text(name)
    return (
        f"`{name}`",
        text.partition("\n")[0],
        _cell(strategy, _sites),
        _cell(strategy, _needs),
        _tokens(name),
        strategy.positions,
        _paper(text),
        _defaults(name),
    )


def _paper(text: str) -> str:
    """Returns where a strategy was published."""
    if paper := _PAPER.search(text):
        return f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})"
    return BASELINE if BASELINE in text else "not found"


def _tokens(name: str) -> str:
    """Returns what becomes of tokens."""
    whole = {"compute": "all stay", "exit": "all or none pruned", "cache": "leave caches"}
    if strategy_class(name).kind in whole:
        return whole[strategy_class(name).kind]
    return "merged" if not strategy_class(name).trained and merges(name) else "pruned"


def _rank(name: str) -> tuple[bool, int, int, str]:
    first = build(name).plan(LLAVA)[0].site
    turn = {"compute": 1, "cache": 2}.get(strategy_class(name).kind, 0)
    return _paper(_text(name)) != BASELINE, list(SITES).index(first), turn, name


def _text(name: str) -> str:
    return inspect.getdoc(sys.modules[strategy_class(name).__module__]) or ""


def _defaults(name: str) -> str:
    """Returns where the defaults are from: the last sentence of the docstring.

    Raises:
        ConfigError: it does not say.
    """
    found = re.search(r"\sDefaults:\s((?:[^.]|\.\S)+)\.$", _text(name))
    if found is None:
        raise ConfigError(
            f"The docstring of {name}.py must end with where its defaults are from, such as "
            "'Defaults: official code.' or 'Defaults: the paper.'"
        )
    return " ".join(found[1].split())


def _cell(strategy: Strategy, words: Callable[[Sequence[Stage]], list[str]]) -> str:
    """Returns what ``words`` makes of the stages, and what there is more in each of ``CASES``."""
    first = words(strategy.plan(LLAVA))
    cell = ", ".join(first) or "none"
    for case, facts in CASES.items():
        more = [word for word in words(strategy.plan(facts)) if word not in first]
        cell += f"; {case}: {', '.join(more)}" if more else ""
    return cell


def _sites(stages: Sequence[Stage]) -> list[str]:
    layers: dict[Site, list[int]] = defaultdict(list)
    for stage in stages:
        layers[stage.site] += [] if stage.layer is None else [stage.layer]
    return [SITES[site] + _places(places) for site, places in layers.items()]


def _needs(stages: Sequence[Stage]) -> list[str]:
    layers: dict[type[Need], set[int]] = defaultdict(set)
    for need in (need for stage in stages for need in stage.needs):
        layers[type(need)] |= {need.layer} if isinstance(need, Quantity) else set()
    return [f"`{kind.__name__}`{_places(sorted(found))}" for kind, found in layers.items()]


def _places(layers: Sequence[int]) -> str:
    """Returns layers in words, the middle of many left out."""
    if len(layers) > 3:
        return f" {layers[0]}, {layers[1]} ... {layers[-1]}"
    return "".join(f"{',' if i else ''} {layer}" for i, layer in enumerate(layers))


@torch.no_grad()
def merges(name: str) -> bool:
    """Whether a token is made of several.

    Seen where the strategy runs on a tiny Qwen2-VL, on an image and a video: there nothing happens
    inside the tower, whose merging would leave no trace in the selections.
    """
    (model, processor), inputs = _tiny()
    try:
        handle = wrap(model, name, keep=0.3, processor=processor)
    except UnsupportedError:  # it acts in a ViT by itself alone
        return False
    with handle:
        model(**inputs)
        inside = any(stage.merged for stage in handle.report().stages)
        return inside or any(selection.mix is not None for selection in handle.selections)


@cache
def _tiny() -> Any:
    model, processor = tiny.build("qwen2_vl")
    image = Image.radial_gradient("L").resize((112, 112)).convert("RGB")
    video = np.stack([np.asarray(image.rotate(20 * turn)) for turn in range(8)])
    content = [
        {"type": "image", "image": image},
        {"type": "video", "video": video},
        {"type": "text", "text": "What is this?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return (model, processor), inputs


if __name__ == "__main__":
    print(table(), end="")
