"""The predictor of DynamicViT, against a definition in float64."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm

from vtprune.scoring.keeping import Keeper, masked_attention

B, N, C = 2, 9, 8


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_patch_is_judged_by_itself_and_by_the_mean_of_those_alive() -> None:
    torch.manual_seed(0)
    keeper, x = Keeper(C), drawn(B, N, C)
    alive = (drawn(B, N) > 0).float()
    w = {name: p.detach().double() for name, p in keeper.named_parameters()}
    normed = layer_norm(x.double(), (C,), w["norm.weight"], w["norm.bias"])
    units = gelu(normed @ w["enter.weight"].T + w["enter.bias"])
    for b in range(B):
        common = units[b, alive[b] > 0, C // 2 :].mean(0)
        for i in range(N):
            made = torch.cat([units[b, i, : C // 2], common])
            for name in ("first", "second"):
                made = gelu(w[f"{name}.weight"] @ made + w[f"{name}.bias"])
            wanted = (w["last.weight"] @ made + w["last.bias"]).log_softmax(0)
            torch.testing.assert_close(keeper(x, alive)[b, i].double(), wanted)


def test_hiding_is_taking_away() -> None:
    torch.manual_seed(0)
    keeper, x = Keeper(C), drawn(1, N, C)
    left = [0, 3, 4, 8]
    alive = torch.zeros(1, N).index_fill(1, torch.tensor(left), 1)
    torch.testing.assert_close(keeper(x, alive)[:, left], keeper(x[:, left]))
    logits = drawn(1, 2, N, N)
    masked = masked_attention(logits, alive, eps=0.0)
    alone = logits[:, :, left][..., left].softmax(-1)
    torch.testing.assert_close(masked[:, :, left][..., left], alone)
    hidden = [i for i in range(N) if i not in left]
    assert not masked[:, :, left][..., hidden].any()
    torch.testing.assert_close(masked_attention(logits, torch.ones(1, N)), logits.softmax(-1))


def test_a_decision_has_a_gradient() -> None:
    alive = torch.ones(1, N, requires_grad=True)
    masked_attention(drawn(1, 2, N, N), alive).square().sum().backward()
    assert alive.grad is not None
    assert alive.grad.abs().sum() > 0
