"""Attention that is turned around, against loops in float64."""

from __future__ import annotations

import torch

from vtprune.scoring.messages import Messenger, reversed_attention, silent

B, H, S, D, C = 2, 3, 7, 4, 12


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_each_token_receives_what_others_send_it() -> None:
    logits, v, sent = drawn(B, H, S, S), drawn(B, H, S, D), drawn(B, H, S).sigmoid()
    shares = logits.double().softmax(-1)  # of a sender among its receivers
    wanted = torch.zeros(B, H, S, D, dtype=torch.float64)
    for i in range(S):
        for j in range(S):
            passed = shares[:, :, i, j] * sent[:, :, i]
            wanted[:, :, j] += passed[..., None] * v[:, :, i]
    torch.testing.assert_close(reversed_attention(logits, v, sent).double(), wanted)


def test_what_is_sent_in_all_is_how_loud_a_token_is() -> None:
    messenger, x = Messenger(C, H), drawn(B, S, C)
    loud = messenger.control(x)
    assert ((loud > 0) & (loud < 1)).all()
    sent = messenger.select(x) * loud[:, None]
    received = reversed_attention(drawn(B, H, S, S), torch.ones(B, H, S, 1), sent)
    torch.testing.assert_close(received.sum((1, 2, 3)), loud.sum(1))


def test_the_selector_is_sharp_and_the_controller_an_mlp() -> None:
    torch.manual_seed(0)
    messenger, x = Messenger(C, H), drawn(B, S, C)
    state = {name: p.detach().double() for name, p in messenger.named_parameters()}
    heads = (x.double() @ state["heads.weight"].T / 0.1).softmax(-1)
    torch.testing.assert_close(messenger.select(x).double(), heads.mT, rtol=1e-5, atol=1e-6)
    units = torch.nn.functional.gelu(x.double() @ state["first.weight"].T + state["first.bias"])
    logit = units @ state["second.weight"][0] + state["second.bias"]
    torch.testing.assert_close(messenger.control(x).double(), logit.sigmoid())


def test_padding_is_silent() -> None:
    sent = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    assert silent(sent, torch.tensor([[True, True], [True, False]])).tolist() == [[1, 2], [3, 0]]
    assert silent(sent, None) is sent
