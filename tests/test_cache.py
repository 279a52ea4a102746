"""The cache computes once, never mixes weights, and survives whatever lies in its directory."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_peft.cache import cached_factors
from spectral_peft.linalg import Factors, svd


class Counted:
    """Computes the SVD of a weight and counts how often."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self) -> Factors:
        self.calls += 1
        return svd(self.weight)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "not" / "yet"
    monkeypatch.setenv("SPECTRAL_PEFT_CACHE", str(path))
    return path


@pytest.mark.parametrize("value", [None, ""])
def test_off_by_default(value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECTRAL_PEFT_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("SPECTRAL_PEFT_CACHE", value)
    compute = Counted(gaussian(6, 4))
    for _ in range(2):
        cached_factors(compute.weight, ("a",), compute)
    assert compute.calls == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_second_call_reads_the_same_bits(directory: Path, dtype: torch.dtype) -> None:
    compute = Counted(gaussian(6, 4).to(dtype))
    first, second = (cached_factors(compute.weight, ("exact", "4"), compute) for _ in range(2))
    assert compute.calls == 1
    assert isinstance(second, Factors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert re.fullmatch(r"[0-9a-f]{64}\.safetensors", next(directory.iterdir()).name)
    assert len(list(directory.iterdir())) == 1


def test_strided_weight_has_the_key_of_its_contiguous_copy(directory: Path) -> None:
    compute = Counted(gaussian(6, 4).mT)
    cached_factors(compute.weight, (), compute)
    cached_factors(compute.weight.contiguous(), (), compute)
    assert compute.calls == 1


def test_everything_that_matters_is_in_the_key(directory: Path) -> None:
    weight = torch.zeros(6, 4)
    changed = weight.clone()
    changed[5, 3] = 1e-7
    cases = [
        (weight, ("a", "b")),
        (weight, ("ab",)),
        (weight, ("a", "c")),
        (changed, ("a", "b")),
        (weight.reshape(4, 6), ("a", "b")),
        (weight.to(torch.bfloat16).repeat(1, 2), ("a", "b")),
        (weight.view(torch.int32), ("a", "b")),
    ]
    compute = Counted(gaussian(6, 4))
    for case in cases:
        cached_factors(*case, compute)
    assert compute.calls == len(cases)
    assert len(list(directory.iterdir())) == len(cases)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "garbage", "other names"])
def test_unreadable_file_is_replaced_with_a_warning(directory: Path, content: bytes | None) -> None:
    from safetensors.torch import save

    compute = Counted(gaussian(6, 4))
    expected = cached_factors(compute.weight, (), compute)
    (path,) = directory.iterdir()
    path.write_bytes(save({"U": torch.ones(1)}) if content is None else content)
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        factors = cached_factors(compute.weight, (), compute)
    assert torch.equal(factors.U, expected.U)
    assert torch.equal(cached_factors(compute.weight, (), compute).U, expected.U)
    assert compute.calls == 2


def test_failed_write_leaves_nothing_behind(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("disk full")

    compute = Counted(gaussian(6, 4))
    monkeypatch.setattr("spectral_peft.cache.os.replace", refuse)
    with pytest.warns(UserWarning, match="disk full"):
        factors = cached_factors(compute.weight, (), compute)
    assert torch.equal(factors.U, svd(compute.weight).U)
    assert list(directory.iterdir()) == []


def test_several_at_once(directory: Path) -> None:
    weight = gaussian(30, 20)
    expected, results = svd(weight), []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        results.append(cached_factors(weight, (), lambda: svd(weight)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(factors.U, expected.U) for factors in results)
    assert len(list(directory.iterdir())) == 1


def test_meta_weight_is_not_hashed(directory: Path) -> None:
    compute = Counted(gaussian(6, 4))
    cached_factors(torch.empty(6, 4, device="meta"), (), compute)
    assert compute.calls == 1
    assert not directory.exists()


def test_a_directory_that_cannot_be_made_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRAL_PEFT_CACHE", str(tmp_path / "file" / "cache"))
    compute = Counted(gaussian(6, 4))
    with pytest.warns(UserWarning, match="could not be cached"):
        cached_factors(compute.weight, (), compute)
    assert compute.calls == 1
