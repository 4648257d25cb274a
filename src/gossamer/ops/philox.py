"""Counter-based random numbers: the same bits on every device, in native code, in Triton and here.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A number is a
function of a key, a call and its position, so nothing has a state and no global generator is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "LANES", "ROUNDS", "rounding_noise", "words"]

LANES = 16
BLOCK = 8 * LANES
"""Elements that share one vector of counters: each counter gives eight numbers of 16 bits."""
ROUNDS = 7
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def words(counter: Tensor, call: int, key: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of every counter, as int64 tensors of its shape.

    Args:
        counter: Positions (int64, at least 0).
        call: Number of the call, in [0, 2^32).
        key: 64-bit key.
        rounds: Rounds; the paper recommends 10 and finds 7 to be the fewest that pass BigCrush.
    """
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.full_like(counter, call & _MASK), torch.zeros_like(counter)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps, which keeps all 64 bits of the product
        c0, c2 = ((b >> 32) & _MASK) ^ c1 ^ k0, ((a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = b & _MASK, a & _MASK
        k0, k1 = (k0 + _STEPS[0]) & _MASK, (k1 + _STEPS[1]) & _MASK
    return c0, c1, c2, c3


def rounding_noise(size: int, key: int, call: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ``size`` numbers of a uniform grid of 2^16 in (-0.5, 0.5), mean zero, float32.

    Element 16 s + l of block b takes word s % 4 of counter 16 b + l, its low half for s < 4.
    """
    blocks = -(-size // BLOCK)
    counter = torch.arange(blocks * LANES, device=device).view(blocks, 1, LANES)
    four = torch.cat(words(counter, call, key), dim=1)
    halves = torch.cat([four & 0xFFFF, four >> 16], dim=1).reshape(-1)[:size]
    return (halves.float() - 32767.5) * (1.0 / 65536.0)
