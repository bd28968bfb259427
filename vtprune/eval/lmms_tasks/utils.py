"""The scenes as a task of lmms-eval; their file is written when the task is first loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock
from PIL import Image

import vtprune
from vtprune.eval.export import write_parquet
from vtprune.eval.samples import answer_of

SCENES = 1000


def scenes_file() -> Path:
    """Returns the parquet file of the held-out scenes, in the cache of Hugging Face datasets."""
    folder = Path(HF_DATASETS_CACHE) / "vtprune"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scenes-{vtprune.__version__}-{SCENES}.parquet"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write_parquet(path, SCENES)
    return path


DATASET = {"data_files": {"test": str(scenes_file())}}


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Returns the one image."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """Returns the question, with what is to be put around it."""
    around = lmms_eval_specific_kwargs
    return f"{around['pre_prompt']}{doc['question']}{around['post_prompt']}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns 1 for the right word, as ``vtprune sweep --task scenes`` counts it, else 0."""
    return {"scenes_accuracy": float(answer_of(results[0]) == doc["answer"])}
