"""The forms that a rank may be asked for in."""

from __future__ import annotations


Rank = int | float | str
"""64: a number of triplets; 0.25: this fraction of min(out_features, in_features); "energy=0.9": the smallest rank
that holds this share of the sum of squared singular values; "budget=0.5": ranks whose factors hold, in all modules
together, at most this share of the dense parameters."""


def parse_share(r: str) -> tuple[str, float]:
    """Returns ("energy", s) for "energy=s", and the same for "budget=s".

    Raises:
        ValueError: `r` is of neither form, an energy is not in (0, 1], or a budget is not in (0, 1).
    """
    name, _, share = r.partition("=")
    name = name.strip()
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if name not in ("energy", "budget") or not 0 < value <= 1 or (name == "budget" and value == 1):
        raise ValueError(
            "`r` as a string should be 'energy=s' with s in (0, 1] or 'budget=s' with s in (0, 1), such as "
            f"'energy=0.9', got {r!r}."
        )
    return name, value


def check_rank(r: Rank) -> None:
    """Raises ValueError unless `r` is a positive integer, a fraction in (0, 1], "energy=s" or "budget=s"."""
    if isinstance(r, str):
        parse_share(r)
    elif isinstance(r, float):
        if not 0 < r <= 1:
            raise ValueError(f"`r` as a fraction of min(out_features, in_features) should be in (0, 1], got {r}.")
    elif isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(
            f"`r` should be a positive integer, a fraction in (0, 1], 'energy=s' or 'budget=s', got {r!r}."
        )
