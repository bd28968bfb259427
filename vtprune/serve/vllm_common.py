"""What the classes inside vLLM share: refusals at start-up, counts, and one call of the engine."""

# vLLM lives in an environment of its own, so a type checker has nothing to look at here.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor
from vllm.utils.tensor_schema import TensorShape

from vtprune.errors import UnsupportedError
from vtprune.serve.setting import read_setting
from vtprune.serve.static import Static
from vtprune.serve.towers import Tower

# Embeddings of images that keep different counts, in place of the one count that vLLM expects.
Ragged = Annotated[Tensor | list[Tensor], TensorShape("bn", "ifs", "hs", dynamic_dims={"ifs"})]


def static_of(tower: type[Tower], config: Any, served: Any = None) -> Static:
    """Returns what the configuration asks for, on this model, or to count with without one.

    Raises:
        ConfigError, UnsupportedError: it cannot be served, with the reason.
    """
    return Static(tower(config, served), read_setting(config))


class Pruner:
    """Prunes inside a model of the engine, whose tower it listens to.

    Args:
        model: what is served; its ``unpruned`` gives whole images.
        vllm_config: refused is what would go past the hooks.
    """

    def __init__(self, tower: type[Tower], model: Any, vllm_config: Any) -> None:
        self.static = static_of(tower, model.config, model)
        if self.static.step is not None:
            _check_engine(vllm_config)
        adapter: Any = self.static.adapter
        adapter.listen(self.static.layers)

    def __call__(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Returns what is left of each image, ``[K_i, D]``."""
        return self.static.prune(batch)[0]


def _check_engine(vllm_config: Any) -> None:
    """Raises UnsupportedError where the tower does not run whole, in Python, in this process."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        raise UnsupportedError(
            f"tensor_parallel_size={ranks} splits the heads of the vision tower, and every rank "
            "would choose by its own. Serve with data or pipeline parallelism, or send embeddings "
            "(vtprune.serve.to_vllm_inputs) to a stock engine."
        )
    if vllm_config.compilation_config.compile_mm_encoder:
        raise UnsupportedError(
            "compile_mm_encoder=true compiles the vision tower, whose attention then cannot be "
            "read. Leave it out of --compilation-config."
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise UnsupportedError(
            "enable_tower_connector_lora counts the tower's tokens by those that stay, and would "
            "adapt the wrong ones. Leave it out, or serve the stock architecture."
        )
    if not vllm_config.model_config.multimodal_config.get_limit_per_prompt("image"):
        raise UnsupportedError(
            "A limit of 0 images leaves the tower out, so there is nothing to prune. Give "
            '{"vtprune": {"strategy": null}} to take embeddings alone, or allow images.'
        )
