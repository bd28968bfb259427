"""The plug-in in vLLM's own processes, told by a checkpoint's config.json alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import vtprune
from tests.serve import served
from tests.serve.served import agree, answer_here, answers, asked, request
from vtprune.eval import shipped
from vtprune.eval.samples import load_sizes

# Started anew, processes know of nothing that this one has registered.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
SETTING = {"strategy": "divprune", "keep": 40}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served") / "mini-qwen"
    told = {"architectures": ["VtpruneQwen2_5_VL"], "vtprune": SETTING}
    path = served.checkpoint(served.shipped_folder("mini-qwen"), folder, **told)
    engine = served.start(path, None, "")
    yield engine
    engine.llm_engine.engine_core.shutdown()


def test_images_of_many_shapes(engine: Any) -> None:
    model, processor = shipped.load("mini-qwen")
    samples = load_sizes("scenes", 5, 10)
    prompts = [(asked(processor, 1, s.question), [s.image]) for s in samples]
    prompts.append((asked(processor, 2, samples[0].question), [samples[2].image, samples[1].image]))
    with vtprune.wrap(model, **SETTING):
        wanted = [answer_here(model, processor, *one) for one in prompts]
    given = [request(processor, *one) for one in prompts]
    agree(answers(engine, given), wanted)
    again = answers(engine, given)
    agree(again, wanted)
    assert all(answer.cached >= 32 for answer in again)
    core = engine.llm_engine.engine_core.resources.engine_manager.processes
    assert core and os.getpid() not in {process.pid for process in core}
