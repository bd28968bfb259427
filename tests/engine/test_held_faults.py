"""Faults in caches that hold some tokens, or all in few bits: each must be noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_choosing import probed
from tests.engine.test_held import CACHES, assert_beams, assert_by_definition, double
from vtprune.engine import choosing, computing, held
from vtprune.engine.cuts import Cut
from vtprune.engine.held import Held
from vtprune.engine.packing import Packed, pack
from vtprune.strategies import zipvl


def goes_red(patch: Any, where: Any, name: str, fault: Any, cache: str = "packed again") -> None:
    patch.setattr(where, name, fault)
    with pytest.raises(AssertionError):
        assert_by_definition(*double("ragged"), probed(0.5, **CACHES[cache]))


def test_parts_in_another_order_than_their_columns(monkeypatch):
    right = Held.update

    def wrong(self, *args):
        parts, self.parts = self.parts, self.parts[::-1]
        made = right(self, *args)
        self.parts = parts
        return made

    goes_red(monkeypatch, Held, "update", wrong)


@pytest.mark.parametrize("cache", ["packed", "packed again"])
def test_bits_of_the_others(cache, monkeypatch):
    right = Held.__init__

    def wrong(self, layer, cut, bits):
        right(self, layer, cut, bits[::-1])

    goes_red(monkeypatch, Held, "__init__", wrong, cache)


def test_ranges_of_keys_by_token(monkeypatch):
    def wrong(x, bits):
        packed = pack(x.mT.contiguous(), bits) if x.shape[2] == 8 else pack(x, bits)
        return Turned(**vars(packed)) if x.shape[2] == 8 else packed

    class Turned(Packed):
        def unpack(self):
            return super().unpack().mT

        def rows(self, index):
            return Turned(**vars(super().rows(index)))

    goes_red(monkeypatch, held, "pack", wrong)


@pytest.mark.parametrize("cache", ["dropped again", "packed again"])
def test_never_again(cache, monkeypatch):
    goes_red(monkeypatch, computing, "settle_again", lambda *args: None, cache)


@pytest.mark.parametrize("cache", ["dropped again", "packed again"])
def test_another_share_of_what_was_decoded(cache, monkeypatch):
    right = zipvl.ZipVL.choose_again

    def wrong(self, q, k, scale, new):
        return right(replace(self, tau=0.9), q, k, scale, new)

    goes_red(monkeypatch, zipvl.ZipVL, "choose_again", wrong, cache)


def test_another_query(monkeypatch):
    right = choosing.settle_again

    def wrong(held, chooser, query, key, mask, scale):
        right(held, chooser, query.roll(1, 0), key, mask, scale)

    goes_red(monkeypatch, computing, "settle_again", wrong, "dropped again")


def test_columns_of_other_tokens(monkeypatch):
    right = Held.settle

    def wrong(self, columns, chosen, length):
        right(self, columns, chosen, length)
        self.cut = replace(self.cut, index=self.cut.index.roll(1, 1))

    goes_red(monkeypatch, Held, "settle", wrong, "dropped again")


@pytest.mark.parametrize("cache", ["dropped again", "packed again"])
def test_columns_that_do_not_follow_their_beam(cache, monkeypatch):
    monkeypatch.setattr(Cut, "rows", lambda self, index: self)
    with pytest.raises(AssertionError):
        assert_beams(cache)


def test_keys_that_do_not_follow_their_beam(monkeypatch):
    monkeypatch.setattr(Packed, "rows", lambda self, index: self)
    with pytest.raises(AssertionError):
        assert_beams("packed again")
