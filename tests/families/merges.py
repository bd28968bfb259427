"""What stages inside the language model make of several tokens, noted as one wrapped call runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from tests.families.reference import Chosen
from vtprune.engine.layers import Layers
from vtprune.types import Selection


@contextmanager
def merging() -> Iterator[Chosen]:
    """Notes the columns of the short prompt that each stage chose from, and what it chose."""
    noted: Chosen = {}
    decide = Layers._decide

    def seen(
        self: Layers,
        decoding: Any,
        step: Any,
        columns: Any,
        hidden: Tensor,
        spots: Mapping[int, Any],
    ) -> list[Selection]:
        chosen = decide(self, decoding, step, columns, hidden, dict(spots))
        noted[step.stage.layer] = {
            b: (columns.index[b, places], selection)
            for (b, places), selection in zip(spots.items(), chosen, strict=True)
        }
        return chosen

    with patch.object(Layers, "_decide", seen):
        yield noted
