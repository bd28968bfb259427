from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.engine.packing import BITS, pack
from vtprune.errors import ConfigError, InputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from(DTYPES),
    st.integers(1, 70),
    st.sampled_from([8, 32]),
    st.floats(-100, 100),
)
def test_every_number_is_at_most_half_a_step_off(bits, dtype, width, group, offset):
    x = (numbers(2, 3, width) + offset).to(dtype)
    back = pack(x, bits, group).unpack()
    assert back.shape == x.shape
    assert back.dtype == dtype
    for here, there in zip(x.float().split(group, -1), back.float().split(group, -1), strict=True):
        span, largest = here.amax(-1) - here.amin(-1), here.abs().amax(-1)
        half = span / (2**bits - 1) / 2
        rounded = 2 * torch.finfo(dtype).eps * (largest + span)
        assert bool(((here - there).abs().amax(-1) <= half + rounded).all())


@pytest.mark.parametrize("bits", BITS)
def test_values_on_the_steps_come_back_exactly(bits):
    levels = torch.arange(64) % 2**bits
    levels[::32], levels[1::32] = 0, 2**bits - 1
    x = levels * 0.5 - 3
    assert torch.equal(pack(x, bits).unpack(), x)


def test_the_first_number_is_in_the_lowest_bits():
    x = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0])
    packed = pack(x, 2, 8)
    assert packed.codes.tolist() == [[0b10_01_00_11, 0b11_00_00_00]]
    assert (packed.step.tolist(), packed.low.tolist()) == ([1.0], [0.0])


@pytest.mark.parametrize(("bits", "share"), [(4, 5 / 16), (2, 3 / 16)])
def test_bytes_of_16_bit_keys(bits, share):
    """A group of 32 takes its codes and two numbers of 16 bits: 5 and 3 bits a number."""
    x = numbers(2, 8, 50, 128, dtype=torch.bfloat16)
    packed = pack(x, bits)
    assert packed.nbytes == share * x.numel() * x.element_size()
    assert packed.codes.numel() == x.numel() * bits // 8


def test_more_bits_and_smaller_groups_are_closer():
    x = numbers(4, 16, 128)

    def error(bits: int, group: int) -> float:
        return float((pack(x, bits, group).unpack() - x).square().mean())

    assert error(8, 32) < error(4, 32) / 50 < error(2, 32) / 500
    assert error(4, 8) < error(4, 32) < error(4, 128)


def test_groups_do_not_know_each_other():
    x = numbers(64)
    other = x.clone()
    other[32:] *= 100
    assert torch.equal(pack(x, 4).unpack()[:32], pack(other, 4).unpack()[:32])


def test_a_filled_up_group_has_the_range_of_its_own_numbers():
    x = numbers(3, 40) + 50
    assert torch.equal(pack(x, 4).unpack()[:, 32:], pack(x[:, 32:], 4, 8).unpack())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_numbers_and_no_tokens(dtype):
    x = torch.full((2, 32), 1.5, dtype=dtype)
    assert torch.equal(pack(x, 2).unpack(), x)
    none = pack(x[:0], 4)
    assert none.unpack().shape == (0, 32)
    assert none.nbytes == 0


def test_what_is_refused():
    with pytest.raises(ConfigError, match="bits=3 do not fill a byte"):
        pack(torch.ones(8), 3)
    with pytest.raises(ConfigError, match="group=12 fills no whole bytes"):
        pack(torch.ones(8), 4, 12)
    for wrong in (torch.ones(8, dtype=torch.int64), torch.ones(2, 0), torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"give floats \[\.\.\., d\]"):
            pack(wrong, 4)
