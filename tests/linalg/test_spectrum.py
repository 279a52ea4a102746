"""Measures of a spectrum, against values known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_peft.linalg import effective_rank, energy_rank, noise_rank


few = settings(derandomize=True, deadline=None, max_examples=50)
spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=12).map(lambda S: sorted(S, reverse=True))


def test_effective_rank_of_known_spectra() -> None:
    S = torch.tensor([[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    torch.testing.assert_close(effective_rank(S), torch.tensor([4.0, 1.0, 0.0, 2.0]))
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert float(effective_rank(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-6)


def test_effective_rank_of_half_precision_is_float32() -> None:
    assert effective_rank(torch.ones(1000, dtype=torch.bfloat16)) == pytest.approx(1000, rel=1e-4)


@few
@given(S=spectra, scale=st.floats(1e-3, 1e3))
def test_effective_rank_is_bounded_and_scale_free(S: list[float], scale: float) -> None:
    values = torch.tensor(S, dtype=torch.float64)
    rank = float(effective_rank(values))
    assert 1 - 1e-12 <= rank <= len(S) + 1e-9
    assert float(effective_rank(scale * values)) == pytest.approx(rank)


@few
@given(S=spectra, share=st.floats(0.01, 1))
def test_energy_rank_is_the_smallest(S: list[float], share: float) -> None:
    rank = energy_rank(torch.tensor(S, dtype=torch.float64), share)
    energy = [value**2 for value in S]
    needed, rounding = share * sum(energy), 1e-12 * sum(energy)
    assert sum(energy[:rank]) >= needed - rounding
    assert sum(energy[: rank - 1]) < needed + rounding


def test_energy_rank_of_known_spectra() -> None:
    S = torch.tensor([2.0, 1.0, 1.0, 0.0])  # energies 4, 1, 1, 0
    assert [energy_rank(S, share) for share in (0.1, 4 / 6, 0.67, 5 / 6, 0.84, 1)] == [1, 1, 2, 2, 3, 3]


def test_energy_rank_of_half_precision_does_not_overflow() -> None:
    assert energy_rank(torch.full((10,), 1000.0, dtype=torch.float16), 0.55) == 6


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_energy_rank_refuses_shares(share: float) -> None:
    with pytest.raises(ValueError, match=f"at most 1, got {share}"):
        energy_rank(torch.ones(3), share)


@pytest.mark.parametrize("shape", [(400, 400), (300, 900), (900, 300)])
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_noise_rank_counts_the_signal_and_no_noise(shape: tuple[int, int], scale: float) -> None:
    """Spikes of one and a half times the edge stand out of noise; a few values at the edge itself may."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert noise_rank(torch.linalg.svdvals(scale * noise), shape) <= 2
    U, V = (torch.linalg.qr(noise[:side, :side].mT @ noise[:side, :side]).Q[:, :20] for side in (300, 300))
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    signal = torch.zeros(shape, dtype=torch.float64)
    signal[:300, :300] = 1.5 * edge * U @ V.mT
    assert 20 <= noise_rank(torch.linalg.svdvals(scale * (noise + signal)), shape) <= 22


def test_noise_rank_takes_its_scale_from_the_bulk() -> None:
    """Were the scale that of all entries, one huge value would hide the others."""
    noise = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    S = torch.linalg.svdvals(noise)
    S[:6] = torch.tensor([1e5, 100, 90, 80, 70, 60], dtype=torch.float64)
    assert noise_rank(S, (200, 200)) == 6
