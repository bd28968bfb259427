"""The HTTP server, told on its command line; pictures come over the wire."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vtprune
from tests.serve import served
from vtprune.eval import shipped
from vtprune.eval.samples import Asker, load_scenes

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
SETTING = {"strategy": "fastervlm", "keep": 0.25}
OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
# What `vllm serve` calls; that command itself asks for a distribution named vllm.
SERVER = "vllm.entrypoints.openai.api_server"
PATIENCE = 300  # seconds


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    path = served.checkpoint(served.shipped_folder("mini-llava"), folder / "mini-llava")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = json.dumps({"architectures": ["VtpruneLlava"], "vtprune": SETTING})
    asked = ["--model", path, "--served-model-name", "mini", "--port", port, "--host", "127.0.0.1"]
    command = [sys.executable, "-m", SERVER, *asked, *OPTIONS, "--hf-overrides", told]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", folder / "log")
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    for _ in range(PATIENCE):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(health, timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])


def ask(url: str, picture: Any, text: str) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": text},
    ]
    body = {"model": "mini", "temperature": 0, "max_tokens": 5}
    body["messages"] = [{"role": "user", "content": content}]
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=PATIENCE))


def test_answers_are_those_of_transformers(url: str) -> None:
    model, processor = shipped.load("mini-llava")
    asker, answered = Asker(processor), set()
    for scene in load_scenes("scenes", "standard", None, 0, 5):
        given = ask(url, scene.image, scene.question)
        inputs = asker([scene.question], [scene.image])
        with vtprune.wrap(model, **SETTING, positions="renumber") as handle:
            (wanted,) = asker.answers(model, inputs, 5)
        text = given["choices"][0]["message"]["content"]
        assert "".join(text.split()) == wanted
        (chosen,) = handle.selections
        left = inputs["input_ids"].shape[1] - chosen.n + chosen.rows.shape[1]
        assert given["usage"]["prompt_tokens"] == left
        answered.add(wanted)
    assert len(answered) > 2
