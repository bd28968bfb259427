"""Ask a LLaVA about an image, with all visual tokens and with a quarter of them.

Runs offline on the model that is shipped with the package (extra: vtprune[eval]).
"""

from __future__ import annotations

from typing import Any

from PIL import Image

import vtprune
from vtprune.eval import scenes, shipped


def ask(model: Any, processor: Any, image: Image.Image, question: str) -> str:
    """Returns the model's answer; wrapped or not, the call is the same."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    batch = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    answer = ids[0, batch["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()


def main() -> None:
    """Prints the question, the two answers and what was kept."""
    # For a checkpoint from the hub: shipped.load("llava-hf/llava-1.5-7b-hf"), or as always
    # LlavaForConditionalGeneration.from_pretrained and AutoProcessor.from_pretrained.
    model, processor = shipped.load("mini-llava")
    scene = scenes.make_scene(seed=3, split="test")
    question = scenes.pick_question(scene, seed=0)

    print(f"question: {question.text} (right: {question.answer})")
    print(f"all tokens: {ask(model, processor, scene.image, question.text)}")
    with vtprune.wrap(model, "fastervlm", keep=0.25) as handle:
        print(f"a quarter: {ask(model, processor, scene.image, question.text)}")
        print(handle.report())


if __name__ == "__main__":
    main()
