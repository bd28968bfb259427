"""What lmms-eval finds of this package: the model ``vtprune``, and a folder of tasks.

``python -m vtprune.eval.lmms_plugin`` prints that folder, for lmms-eval's ``--include_path``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "vtprune"
TASKS = Path(__file__).parent / "lmms_tasks"


def manifests() -> list[Any]:
    """Returns the entry of lmms-eval's model registry; it imports the class when it is asked for.

    It is the payload of the entry point ``lmms_eval.models``.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(NAME, chat_class_path="vtprune.eval.lmms_model.VtpruneChat")]


if __name__ == "__main__":
    print(TASKS)
