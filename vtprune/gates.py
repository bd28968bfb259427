"""Gates: small trained heads that say at each layer whether visual tokens may leave there.

A file of them is safetensors. Gate k, 0-based, reads the hidden states that leave layer k, so
tokens that it lets go do not enter layer k + 1. One per layer: ``gates.<k>.w1.weight`` ``[H, W]``
and ``gates.<k>.w2.weight`` ``[2, H]``. One shared: ``w1.weight``, ``w2.weight`` and
``embedding.weight`` ``[L, H]``. W is twice the width of the hidden states; class 1 is exit. Either
may have ``margins`` ``[S, L]``, those of S samples before each layer, which say how often it exits.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import full_precision
from vtprune.scoring.exits import threshold_for
from vtprune.trained import Trained, write

Form = Literal["shared", "per_layer"]
FILE = "dyvte_gates.safetensors"
TRAIN = "Train some with 'vtprune train dyvte --model ... --out FILE' and give gates=FILE."
KIND = Trained("gates", FILE, TRAIN)


class Gates(nn.Module):
    """The gates of a language model of ``depth`` layers; ``width`` is that of their input.

    Attributes:
        margins: ``[S, depth]`` float32, of each calibration sample before each layer; of none
            where S is 0. Layer 0, before which nothing may leave, has minus infinity.
    """

    margins: Tensor

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.depth, self.width = depth, width
        self.register_buffer("margins", torch.zeros(0, depth), persistent=False)

    def forward(self, state: Tensor, layer: int) -> Tensor:
        """Returns logits ``[B, 2]`` float32, stay and exit.

        Args:
            state: ``[B, W]``, of what enters ``layer`` (0-based, above 0).

        Raises:
            InputError: states of another width.
        """
        if state.shape[-1] != self.width:
            raise InputError(
                f"The gates read {self.width} values, twice the width of hidden states, but here "
                f"these are {state.shape[-1]}. They are of another model. {TRAIN}"
            )
        with full_precision(state):
            return self._logits(state.float(), layer - 1)

    def margin(self, state: Tensor, layer: int) -> Tensor:
        """Returns by how much exit is ahead, ``[B]`` float32; arguments as of ``forward``."""
        logits = self(state, layer)
        return logits[:, 1] - logits[:, 0]

    def _logits(self, state: Tensor, number: int) -> Tensor:
        raise NotImplementedError


class _Gate(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)


class PerLayer(Gates):
    """A gate for each layer, as the authors have them."""

    def __init__(self, depth: int, width: int, hidden: int = 2048) -> None:
        super().__init__(depth, width)
        self.gates = nn.ModuleList(_Gate(width, hidden) for _ in range(depth))

    def _logits(self, state: Tensor, number: int) -> Tensor:
        gate = cast(_Gate, self.gates[number])
        return F.linear(F.gelu(F.linear(state, gate.w1.weight.float())), gate.w2.weight.float())


class Shared(Gates):
    """One small gate for all layers, which are told apart by what is added to its hidden units.

    States grow from layer to layer, so each half of its input is divided by its root mean square.
    """

    def __init__(self, depth: int, width: int, hidden: int = 64) -> None:
        super().__init__(depth, width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.embedding = nn.Embedding(depth, hidden)
        self.w2 = nn.Linear(hidden, 2, bias=False)

    def _logits(self, state: Tensor, number: int) -> Tensor:
        half = self.width // 2
        normed = F.rms_norm(state.unflatten(-1, (2, half)), (half,), eps=1e-6).flatten(-2)
        units = F.linear(normed, self.w1.weight.float()) + self.embedding.weight[number].float()
        return F.linear(F.gelu(units), self.w2.weight.float())


def make(form: Form, depth: int, width: int, hidden: int | None = None) -> Gates:
    """Returns new gates of a form; ``hidden`` units each, by default the form's own number."""
    cls = {"shared": Shared, "per_layer": PerLayer}[form]
    return cls(depth, width) if hidden is None else cls(depth, width, hidden)


def load(name: str, device: torch.device | str = "cpu") -> Gates:
    """Returns the gates of a file, a folder or a shipped model, read once per device.

    Raises:
        ConfigError: no such file, or one that holds no gates.
    """
    return KIND.read(name, str(torch.device(device)), _load)


def _load(path: Path, device: str) -> Gates:
    try:
        tensors = load_file(path, device=device)
        margins = tensors.pop("margins", None)
        gates = _empty(tensors)
        gates.load_state_dict(tensors, assign=True)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path} holds no gates that fit together: {reason}. {TRAIN}") from error
    gates.margins = torch.zeros(0, gates.depth) if margins is None else margins.float().cpu()
    if gates.margins.ndim != 2 or gates.margins.shape[1] != gates.depth:
        raise ConfigError(
            f"{path} holds margins {list(gates.margins.shape)}; give [S, {gates.depth}]. {TRAIN}"
        )
    return gates.requires_grad_(False).eval()


def save(gates: Gates, path: Path) -> None:
    """Writes gates and their margins to a file, whole or not at all."""
    write({**gates.state_dict(), "margins": gates.margins.float()}, path)


@lru_cache(maxsize=256)
def threshold(gates: Gates, layers: tuple[int, ...], share: float) -> float:
    """Returns the threshold by which a mean ``share`` of tokens enters a layer, by the margins.

    Args:
        gates: as loaded, with margins.
        layers: 0-based, before which tokens may leave.
    """
    return threshold_for(gates.margins[:, list(layers)], layers, gates.depth, share)


def _empty(tensors: dict[str, Tensor]) -> Gates:
    """Returns gates without values, so that no random number is drawn, of what ``tensors`` hold."""
    shared = "embedding.weight" in tensors
    hidden, width = tensors["w1.weight" if shared else "gates.0.w1.weight"].shape
    with torch.device("meta"):
        if shared:
            return Shared(len(tensors["embedding.weight"]), width, hidden)
        return PerLayer(sum(key.endswith(".w1.weight") for key in tensors), width, hidden)
