"""The oracle matrix: family x site x batch kind x attention x cache.

Keep all is bit-identical; dropping or merging equals the full-length model that hides the others.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import prompts
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all
from tests.families.test_flowcut import SIZES
from vtprune.errors import VTPruneError
from vtprune.eval import tiny

FAMILIES = tiny.names()
# Site -> (strategies, budgets).
SITES: dict[str, tuple[Any, Any]] = {
    "tower": ("visionzip", 0.4),
    "tower stages": ("flowcut", 0.4),
    "tower merging": ("tome", 0.4),
    "projector": ("fastervlm", 0.4),
    "decoder": ("fastv", 0.4),
    "decoder stages": ("pyramiddrop", 0.6),
    "both": (["divprune", "fastv"], [0.7, 0.5]),
}
NEWLINES = ("llava_next", "llava_next_video", "llava_onevision")
CASES = [(family, kind) for family in FAMILIES for kind in prompts.kinds(family)]


def check(family: str, kind: str, site: str, attention: str = "sdpa", **options: Any) -> None:
    """Holds a wrapped call against the reference."""
    strategy, keep = SITES[site]
    wrap = {key: options.pop(key) for key in ("positions", "newlines") if key in options}
    wrap |= {"strategy": strategy, "keep": keep}
    handle = gather_is_mask(family, inputs_of(family, kind), wrap, attention, **options)
    report = handle.report()
    assert all(image.kept <= image.tokens for image in report.images)
    assert report.stages or any(image.kept < image.tokens for image in report.images)


def refused(family: str, site: str, options: dict[str, Any]) -> str | None:
    """What the message says about a combination that cannot be right; None where it must work."""
    inside = site in ("decoder", "decoder stages", "both")
    inside |= site == "tower stages" and family in SIZES
    if options.get("use_cache") is False and inside:
        return "use_cache=False does not go"
    if options.get("cache_implementation") and inside and family == "gemma3":
        return "sliding window"
    if options.get("positions") == "renumber" and "qwen" in family:
        return "time, height and width"
    if options.get("newlines") and family not in NEWLINES:
        return "no tokens that end a row"
    return None


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_keep_all_is_bit_identical(family, kind, site):
    strategy, keep = SITES[site]
    keeps_all(family, kind, strategy, [1.0] * 2 if isinstance(keep, list) else 1.0)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gather_equals_mask(family, kind, site):
    check(family, kind, site)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "keep": {"positions": "keep"},
    "renumber": {"positions": "renumber"},
    "row": {"newlines": "row"},
}
# The combinations of the default suite; the rest of the matrix is slow.
QUICK = {(site, "sdpa") for site in ("projector", "decoder")}
WAYS = [
    pytest.param(
        *(site, option, attention),
        marks=[] if (site, attention) in QUICK else pytest.mark.slow,
    )
    for site in SITES
    for option in OPTIONS
    for attention in ("sdpa", "eager")
    if (option, attention) != ("as it comes", "sdpa")  # what the test above does
]


@pytest.mark.parametrize(("site", "option", "attention"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ways_of_calling(family, site, option, attention):
    options = OPTIONS[option]
    message = refused(family, site, options)
    if message is None:
        return check(family, "ragged", site, attention, **options)
    with pytest.raises(VTPruneError, match=message):
        check(family, "ragged", site, attention, **options)
