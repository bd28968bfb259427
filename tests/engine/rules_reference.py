"""Row rules by their definition: the tiny LLaVA layer by layer, whole matrices, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests import tiny
from tests.engine.cache_reference import through_cache
from vtprune.scoring.probing import probes
from vtprune.types import RowRule

SIDE = tiny.SIDE // tiny.PATCH


def neighbours(visual: Tensor, radius: int) -> Tensor:
    """Which visual tokens ``[B, L]`` are near each other in an image of 6 x 6, ``[B, L, L]``."""
    length = visual.shape[1]
    close = torch.zeros(len(visual), length, length, dtype=torch.bool)
    for b, row in enumerate(visual):
        columns = row.nonzero()[:, 0].tolist()
        at = {c: (i // tiny.N, i % tiny.N // SIDE, i % SIDE) for i, c in enumerate(columns)}
        for one in columns:
            for other in columns:
                (image, r, c), (image2, r2, c2) = at[one], at[other]
                near = abs(r - r2) <= radius and abs(c - c2) <= radius
                close[b, one, other] = image == image2 and near
    return close


def chosen(
    rule: RowRule, seen: Tensor, visual: Tensor, scores: Tensor, valid: Tensor, prompt: int
) -> Tensor:
    """Which tokens probes of the prompt choose, ``[B, L]``; all that come behind it."""
    assert rule.chooser is not None
    stays = valid & ~visual
    whole = scores.masked_fill(~seen[:, None], -1e30).softmax(-1).mean(1)
    for b in range(len(valid)):
        spots = valid[b, :prompt].nonzero()[:, 0].tolist()
        rows = [spots[i] for i in probes(len(spots)).tolist()]
        mass = [float(whole[b, rows, j].double().sum()) for j in spots]
        held, count = 0.0, 0
        for share in sorted(mass, reverse=True):
            if held >= rule.chooser.share * len(rows):
                break
            held, count = held + share, count + 1
        each = [x / int(seen[b, rows, j].sum()) for x, j in zip(mass, spots, strict=True)]
        best = sorted(range(len(spots)), key=lambda i: -each[i])[:count]
        stays[b, [spots[i] for i in best] + spots[-1:]] = True
    return stays


def attended(rule: RowRule, seen: Tensor, visual: Tensor, scores: Tensor, v: Tensor) -> Tensor:
    """What attention gives ``[B, H, L, d]``, from ``scores`` and ``v`` of all heads."""
    n, heads = seen.shape[1], scores.shape[1]
    both = visual[:, :, None] & visual[:, None, :]
    if rule.attend == "window":
        seen = torch.where(both, neighbours(visual, rule.radius), seen)
    if rule.attend == "self":
        seen = torch.where(visual[:, :, None], torch.eye(n, dtype=torch.bool), seen)
    probabilities = scores.masked_fill(~seen[:, None], -1e30).softmax(-1)
    groups = heads // 2
    kept = range(heads // groups) if rule.heads is None else rule.heads
    dropped = torch.tensor([h // groups not in kept for h in range(heads)])
    unread = visual[:, None, None, :] & (dropped[None, :, None, None] | (not rule.read))
    out = probabilities.masked_fill(unread, 0.0) @ v
    silent = visual[:, None, :, None] & (dropped[None, :, None, None] | (rule.attend == "none"))
    return out.masked_fill(silent, 0.0)


def passed(rule: RowRule, mlp: Any, x: Tensor, visual: Tensor) -> Tensor:
    """What the MLP gives ``[B, L, D]``."""
    n = int(mlp.down_proj.in_features * rule.mlp)
    part = F.silu(x @ mlp.gate_proj.weight[:n].T) * (x @ mlp.up_proj.weight[:n].T)
    return torch.where(visual[:, :, None], part @ mlp.down_proj.weight[:, :n].T, mlp(x))


def layer_by(
    rule: RowRule,
    layer: Any,
    hidden: Tensor,
    rotary: Any,
    seen: Tensor,
    visual: Tensor,
    valid: Tensor,
    prompt: int,
) -> Tensor:
    """What comes out of a layer, ``[B, L, D]``; the first ``prompt`` columns were read at once."""
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        project(x).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    q = q * attention.scaling
    scores = q @ k.mT
    if rule.attend == "chosen":
        stays = chosen(rule, seen, visual, scores, valid, prompt)
        out = through_cache(rule, q, k, v, seen, stays, valid, prompt)
    else:
        out = attended(rule, seen, visual, scores, v)
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + passed(rule, layer.mlp, layer.post_attention_layernorm(hidden), visual)


def projected(maker: Any, features: Tensor) -> Tensor:
    """What a layer's own projector makes of features ``[M, C]``."""
    first, second = maker.source.layers[maker.layer].children()
    x = features @ first.weight.T + first.bias
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    return x @ second.weight.T + second.bias


@torch.no_grad()
def reference(
    model: Any,
    inputs: Mapping[str, Tensor],
    rules: Mapping[int, RowRule],
    steps: int = 10,
    gone: int = 99,
) -> tuple[Tensor, Tensor]:
    """Returns ids ``[B, steps]`` and their logits ``[B, steps, V]``.

    From layer ``gone`` on nobody sees visual tokens.
    """
    text, embed = model.model.language_model, model.get_input_embeddings()
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = states.hidden_states[-2][:, 1:].flatten(0, 1)
    embeds = embed(inputs["input_ids"]).clone()
    visual = inputs["input_ids"] == tiny.IMAGE
    embeds[visual] = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    valid = inputs["attention_mask"].bool()
    ids, logits = [], []
    for _ in range(steps):
        hidden, n = embeds, embeds.shape[1]
        seen = valid[:, None, :].expand(-1, n, -1).tril() | torch.eye(n, dtype=torch.bool)
        rotary = text.rotary_emb(hidden, (valid.long().cumsum(1) - 1).clamp(min=0))
        for number, layer in enumerate(text.layers):
            rule = rules.get(number, RowRule())
            if rule.maker is not None:
                hidden = hidden.clone()
                hidden[visual] = projected(rule.maker, features)
            sees = seen & ~visual[:, None] | torch.eye(n, dtype=torch.bool)
            seen_here = seen if number < gone else sees
            hidden = layer_by(
                rule, layer, hidden, rotary, seen_here, visual, valid, inputs["input_ids"].shape[1]
            )
        logits.append(model.lm_head(text.norm(hidden)[:, -1]))
        ids.append(logits[-1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30).argmax(-1))
        embeds = torch.cat([embeds, embed(ids[-1])[:, None]], dim=1)
        valid = F.pad(valid, (0, 1), value=True)
        visual = F.pad(visual, (0, 1), value=False)
    return torch.stack(ids, 1), torch.stack(logits, 1)
