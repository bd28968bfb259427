"""Lets a torchvision without operators be imported, in this process and in those it starts.

The wheel that fits beside the CPU build of torch lacks two operators that nothing here calls, but
whose schemas it asks for while it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
kept = []  # a library that is let go takes its schemas along


class Schemas(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is first asked for, and finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and not kept:
            import torch

            kept.append(torch.library.Library("torchvision", "FRAGMENT"))
            if torch.version.cuda is None:  # else the wheel brings them
                for operator in ("nms", "qnms"):
                    kept[0].define(operator + SCHEMA)
        return None


sys.meta_path.insert(0, Schemas())
