"""Checkpoints as vLLM reads them, what it and transformers answer, and how the two compare."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import vtprune
from vtprune.eval import shipped

N_NEW = 8
CLOSE = 1e-4  # of log-probabilities, in float32; another token differs by far more


@dataclass(frozen=True)
class Answer:
    """New tokens with their log-probabilities; how long the prompt was, and how much was cached."""

    ids: list[int]
    log_probs: list[float]
    prompt: int = 0
    cached: int = 0


def agree(given: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    """Asserts equal greedy tokens and log-probabilities."""
    assert [answer.ids for answer in given] == [answer.ids for answer in wanted]
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=CLOSE, rtol=0
        )


def checkpoint(source: Path | Any, to: Path, **config: Any) -> str:
    """Copies a shipped model under the names that vLLM 0.32 reads, with more in its config.json.

    transformers 5 saves a CLIP tower as ``vision_tower.*``, and hub checkpoints have
    ``vision_tower.vision_model.*``. vLLM takes every ``.safetensors`` for weights of the model.
    """
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*_*.safetensors", "*.md"))
    weights = load_file(to / "model.safetensors")
    tower = "vision_tower."
    renamed = {
        f"{tower}vision_model.{name.partition(tower)[2]}" if name.startswith(tower) else name: x
        for name, x in weights.items()
    }
    save_file(renamed, to / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    return str(to)


def start(path: str, setting: dict[str, Any] | None, architecture: str, **options: Any) -> Any:
    """Returns an engine whose configuration says ``setting``; None = as the checkpoint says."""
    from vllm import LLM  # type: ignore[import-not-found]

    overrides = {"architectures": [architecture], "vtprune": setting}
    if setting is not None:
        options["hf_overrides"] = overrides
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 3},
        "block_size": 32,
    }
    return LLM(path, **{**settings, **options})


def answers(engine: Any, requests: Sequence[dict[str, Any]]) -> list[Answer]:
    """Returns greedy answers of the engine to all requests in one batch."""
    from vllm import SamplingParams  # type: ignore[import-not-found]

    greedy = SamplingParams(temperature=0, max_tokens=N_NEW, logprobs=1, ignore_eos=True)
    found = []
    for output in engine.generate(list(requests), greedy, use_tqdm=False):
        best = output.outputs[0]
        log_probs = [
            step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)
        ]
        prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        found.append(Answer(list(best.token_ids), log_probs, prompt, cached))
    return found


def request(processor: Any, prompt: str, images: Sequence[Any]) -> dict[str, Any]:
    """Returns a prompt with pictures as vLLM takes it."""
    ids = processor.tokenizer(prompt)["input_ids"]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": list(images)}}


def answer_here(model: Any, processor: Any, prompt: str, images: Sequence[Any]) -> Answer:
    """Returns the greedy answer of a transformers model, wrapped or not."""
    inputs = processor(text=[prompt], images=[list(images)], return_tensors="pt")
    return _generated(model, inputs, inputs["input_ids"].shape[1])


def _generated(model: Any, inputs: Any, length: int) -> Answer:
    out = model.generate(
        **inputs,
        max_new_tokens=N_NEW,
        do_sample=False,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences[0, length:].tolist()
    scores = [step[0].float().log_softmax(-1) for step in out.scores]
    return Answer(ids, [float(x[token]) for x, token in zip(scores, ids, strict=True)])


def asked(processor: Any, n: int, text: str) -> str:
    """Returns a prompt with ``n`` images and a question, by the chat template."""
    content = [*[{"type": "image"}] * n, {"type": "text", "text": text}]
    message = {"role": "user", "content": content}
    return processor.apply_chat_template([message], add_generation_prompt=True)


@torch.no_grad()
def answer_embedded(model: Any, request: dict[str, Any]) -> Answer:
    """Returns the greedy answer of a transformers LLaVA to embeddings in place of its images."""
    rows, images = [], iter(request["multi_modal_data"]["image"])
    for token in request["prompt_token_ids"]:
        if token == model.config.image_token_id:
            rows.append(next(images))
        else:
            rows.append(model.get_input_embeddings()(torch.tensor([token])))
    embeds = torch.cat(rows)[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return _generated(model, {"inputs_embeds": embeds, "attention_mask": mask}, 0)


def shipped_folder(name: str) -> Path:
    return shipped.MODELS / name


def rows_of(
    engine: Any, tower: Any, setting: dict[str, Any], see: Callable[[Any], Any]
) -> list[torch.Tensor]:
    """Returns what ``see`` is given by the engine's model when it prunes by another ``setting``.

    Only where the engine runs in this process.
    """
    from vtprune.serve.vllm_common import Pruner

    def run(model: Any) -> Any:
        for module in model.modules():
            if type(module).__name__ == "MMEncoderAttention":
                module._forward_pre_hooks.clear()
        model.config.vtprune = setting
        model._prune = Pruner(tower, model, engine.llm_engine.vllm_config)
        with torch.inference_mode():
            return [x.clone() for x in see(model)]

    (found,) = engine.apply_model(run)
    return found


@torch.no_grad()
def furthest(
    model: Any, name: str, options: dict[str, Any], inputs: Any, found: Sequence[torch.Tensor]
) -> tuple[float, list[Any]]:
    """Compares the rows of images with those that ``wrap`` leaves of them in transformers.

    An image counts where it leaves the same tokens of one with a little noise: another library
    rounds otherwise, and some decisions hang by a thread.

    Returns:
        The largest difference of those that count, as a share of the largest value, NaN where few
        do; and the selections, None for the others.
    """
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + 1e-5 * noise}
    with vtprune.wrap(model, name, **options) as handle:
        handle.encode(noisy)
        others = handle.selections
        outputs, chosen = handle.encode(inputs)
    wanted = outputs["image"].pooler_output
    assert [x.shape for x in found] == [x.shape for x in wanted]
    pairs = zip(chosen, others, strict=True)
    steady = [torch.equal(one.rows, other.rows) for one, other in pairs]
    if sum(steady) <= len(steady) / 2:
        return math.nan, [None] * len(steady)
    each = zip(found, wanted, steady, strict=True)
    far = max(float((x - y).abs().max() / y.abs().max()) for x, y, counts in each if counts)
    return far, [one if same else None for one, same in zip(chosen, steady, strict=True)]
