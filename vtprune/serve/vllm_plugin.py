"""The entry point under ``vllm.general_plugins``: vLLM calls it in each of its processes."""

from __future__ import annotations

# Architecture, as --hf-overrides or config.json names it -> where its class is. As text, so that
# nothing is imported, and no device touched, before an engine wants that very class.
ARCHITECTURES = {
    "VtpruneLlava": "vtprune.serve.vllm_llava:VtpruneLlava",
    "VtpruneLlavaNext": "vtprune.serve.vllm_llava_next:VtpruneLlavaNext",
    "VtpruneQwen2_5_VL": "vtprune.serve.vllm_qwen2_5_vl:VtpruneQwen2_5_VL",
}


def register() -> None:
    """Makes the architectures known; a second call does nothing more."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]

    for name, where in ARCHITECTURES.items():
        ModelRegistry.register_model(name, where)
