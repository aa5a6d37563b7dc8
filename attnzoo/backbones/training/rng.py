"""Random numbers of a run as functions of (seed, purpose, place): nothing to save, nothing lost when a run is killed.

What a step draws does not depend on how the run got there: a resumed run, another number of workers and the same
global batch over several processes see the same data, augmentations, mixes and drops.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

#: Purposes, so that their streams never meet.
ORDER, IMAGE, MIX, STEP, WEIGHTS, SPLIT = range(6)


def derive(*entropy: int) -> int:
    """A seed of 63 bits from non-negative ints; other ints give an independent one."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def reseed(*entropy: int) -> None:
    """Seed Python's, numpy's and torch's global generators (GPUs' too)."""
    seed = derive(*entropy)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated(*entropy: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators seeded inside, as before after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive(*entropy)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: workers must not touch a GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def restored() -> Iterator[None]:
    """All global generators as they were, after the block."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
