"""Operations of a transformer from the tokens that enter each layer, by the published formulas.

On n tokens a layer of width d and FFN width m takes 4 n d^2 + 2 n^2 d + 3 n d m operations (MACs,
multiply-accumulates, two FLOPs each), with 2 n d m for an FFN without a gate. So count TransPrune,
PyramidDrop and SparseVLM (gated), FastV and ToDRE (not gated). Every token attends to every other:
causality halves nothing, and windows save nothing. Norms, softmax, embeddings and the output head
are left out. Grouped keys and values count at their own width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from vtprune.errors import ConfigError, UnsupportedError

Tokens = int | float

# Model types whose FFN has a gate, and those whose FFN has none; a configuration does not say.
GATED = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"),
        *("pixtral", "qwen2_5_vl_vision"),
    }
)
PLAIN = frozenset(
    {
        *("clip_vision_model", "siglip_vision_model", "internvl_vision"),
        *("idefics3_vision", "smolvlm_vision"),
        *("qwen2_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision"),
    }
)


@dataclass(frozen=True)
class Shape:
    """What the operations of a transformer's layers depend on besides the tokens.

    Attributes:
        width: of the hidden states, d.
        ffn: width inside the FFN, m; of the experts that a token goes to, all together.
        layers: how many there are.
        gated: whether the FFN has three matrices instead of two.
        queries: heads times their size; None = ``width``.
        keys: the same of keys, and of values; None = ``queries``.
    """

    width: int
    ffn: int
    layers: int
    gated: bool = True
    queries: int | None = None
    keys: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and f.name != "gated" and not _is_count(value):
                raise ConfigError(f"{f.name}={value!r} of a Shape must be a whole number above 0.")

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Returns the shape of a language model or vision tower of transformers; a shape as it is.

        Raises:
            ConfigError: the configuration is of a whole model with several parts.
            UnsupportedError: it is not known how the layers of this type are built.
        """
        if isinstance(config, cls):
            return config
        if hasattr(config, "text_config") and hasattr(config, "vision_config"):
            raise ConfigError(
                f"{type(config).__name__} describes several transformers. Give its text_config or "
                "its vision_config."
            )
        kind = getattr(config, "model_type", None)
        if kind not in GATED | PLAIN:
            raise UnsupportedError(
                f"It is not known how the layers of {kind!r} are built; known are "
                f"{', '.join(sorted(GATED | PLAIN))}. Write the shape out: "
                "Shape(width=..., ffn=..., layers=..., gated=...)."
            )
        width = _first(config, "embed_dim", "hidden_size")
        heads = _first(config, "num_attention_heads", "num_heads")
        size = getattr(config, "head_dim", None) or width // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        layers = _first(config, "num_hidden_layers", "depth")
        ffn = _ffn(config, width)
        return cls(width, ffn, layers, kind in GATED, heads * size, shared * size)

    def layer(self, n: Tokens, keys: Tokens | None = None, ffn: Tokens | None = None) -> Tokens:
        """Returns the MACs of one layer in which ``n`` tokens attend.

        Args:
            keys: how many they attend to; None = themselves.
            ffn: how many go through the FFN; None = themselves.
        """
        queries = self.queries or self.width
        projected = 2 * n * self.width * (queries + (self.keys or queries))
        attended = self.attending(n, keys)
        matrices = 3 if self.gated else 2
        return projected + attended + matrices * (n if ffn is None else ffn) * self.width * self.ffn

    def attending(self, n: Tokens, keys: Tokens | None = None) -> Tokens:
        """Returns those of attention alone, of ``n`` queries; arguments as of ``layer``."""
        return 2 * n * (n if keys is None else keys) * (self.queries or self.width)

    def prefill(self, entering: Sequence[Tokens], ffn: Sequence[Tokens] | None = None) -> Tokens:
        """Returns the MACs of all layers on a prompt, ``entering`` by as many tokens each.

        ``ffn`` says how many go through the FFN where tokens leave between the two halves.

        Raises:
            ConfigError: not one number per layer.
        """
        through = self._checked(entering if ffn is None else ffn)
        pairs = zip(self._checked(entering), through, strict=True)
        return sum(self.layer(n, ffn=m) for n, m in pairs)

    def decode(self, entered: Sequence[Tokens], new: int) -> Tokens:
        """Returns the MACs of ``new`` tokens decoded after a prompt.

        ``entered`` has the tokens of the prompt that entered each layer, and wait in its cache.
        The t-th new token attends to these and to the t - 1 before it, as ToDRE counts.

        Raises:
            ConfigError: not one number per layer, or fewer than no new token.
        """
        if new < 0:
            raise ConfigError(f"{new} new tokens: give a number of 0 or more.")
        earlier = range(new)
        return sum(
            self.layer(1, keys=n + before) for n in self._checked(entered) for before in earlier
        )

    def _checked(self, tokens: Sequence[Tokens]) -> Sequence[Tokens]:
        if len(tokens) != self.layers or min(tokens) < 0:
            raise ConfigError(
                f"The tokens of {len(tokens)} layers were given ({list(tokens)}), but the shape "
                f"has {self.layers}. Give a number for each, 0 or more; schedule() writes them out."
            )
        return tokens


@dataclass(frozen=True)
class Cost:
    """MACs of a run, and those of the same run with every token."""

    macs: Tokens
    unpruned: Tokens

    @property
    def flops(self) -> Tokens:
        """FLOPs of the run: two per MAC."""
        return 2 * self.macs

    @property
    def share(self) -> float:
        """The run's part of what it would be with every token, 0 to 1."""
        return self.macs / self.unpruned if self.unpruned else 1.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.unpruned + other.unpruned)


def schedule(*runs: tuple[int, Tokens]) -> tuple[Tokens, ...]:
    """Returns the tokens of each layer from ``(layers, tokens)`` in order: ``(2, 576), (30, 288)``.

    Raises:
        ConfigError: a number of layers that is none.
    """
    for layers, _ in runs:
        if not _is_count(layers):
            raise ConfigError(f"{layers!r} layers: give pairs of layers (1 or more) and tokens.")
    return tuple(tokens for layers, tokens in runs for _ in range(layers))


def equivalent_tokens(
    entering: Sequence[Tokens], at: Literal["inputs", "outputs"] = "inputs"
) -> float:
    """Returns the mean number of tokens over the layers.

    ``inputs`` counts those that enter a layer. SparseVLM counts ``outputs``, those that a layer
    leaves to the next one, which is less: tokens that leave before a layer are charged to none.

    Raises:
        ConfigError: no layer, or another word.
    """
    if at not in ("inputs", "outputs") or not entering:
        raise ConfigError(
            f"at={at!r} of {len(entering)} layers: give 'inputs' or 'outputs', and 1 or more."
        )
    counted = entering if at == "inputs" else [*entering[1:], entering[-1]]
    return sum(counted) / len(counted)


def _ffn(config: Any, width: int) -> int:
    """Returns how wide the FFN of every layer is."""
    experts = getattr(config, "num_experts_per_tok", None)
    if experts is None:
        inside = getattr(config, "intermediate_size", None)
        return inside or int(width * config.mlp_ratio)
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UnsupportedError(
            f"{config.model_type} has layers with experts and layers without, which one Shape "
            "cannot tell apart. Add up the costs of two."
        )
    return experts * config.moe_intermediate_size


def _first(config: Any, *names: str) -> int:
    return next(value for name in names if (value := getattr(config, name, None)))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
