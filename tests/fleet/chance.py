"""Chance that repeats itself."""

from trio._core import _run


def seed_trio(seed: int) -> None:
    """Make the order in which trio runs the tasks of one tick a function of `seed`, as Hypothesis does it."""
    _run._r.seed(seed)
