"""Decoding against a second view of the image, and what two questions make a model look at.

``ContrastiveDecoder`` is the logits processor (DAMRO, AGLA); ``relevance`` the two passes of CARVE,
``focus`` the image cut down by them, ``Given`` the strategy that prunes by them; ``masked`` the
image of AGLA.
"""

from vtprune.contrast.agla import AttentionSaliency, CLIPSaliency, Saliency, masked
from vtprune.contrast.carve import focus, relevance
from vtprune.contrast.decoder import ContrastiveDecoder
from vtprune.contrast.given import Given
from vtprune.engine.twin import twin

__all__ = [
    "AttentionSaliency",
    "CLIPSaliency",
    "ContrastiveDecoder",
    "Given",
    "Saliency",
    "focus",
    "masked",
    "relevance",
    "twin",
]
