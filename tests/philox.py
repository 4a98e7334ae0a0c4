"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the reference for random
numbers."""

import math

import numpy as np
import torch


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words for a 128-bit counter and a 64-bit key, both as 32-bit words, low first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def drawn_key(seed: int, offset: int) -> tuple[int, int]:
    """The key that a call of attention with dropout draws from a generator with this seed and offset."""
    return tuple(philox4x32((offset + i, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] for i in range(2))


def kept(key: tuple[int, int], p: float, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Which probabilities [B, H, Tq, Tk] attention's dropout keeps in a call with this key."""
    heads, rows, keys = (np.arange(n, dtype=np.uint64) for n in (shape[0] * shape[1], -(-shape[2] // 4), shape[3]))
    counter = np.broadcast_arrays(keys, rows[:, None], heads[:, None, None], np.uint64(0))
    words = np.stack(philox4x32(tuple(counter), key), 2).reshape(shape[0], shape[1], -1, shape[3])[:, :, : shape[2]]
    return torch.from_numpy(words >> 8 < math.ceil((1 - p) * 2**24))
