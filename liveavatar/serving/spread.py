"""A keyed pattern that carries 32 bits: what the watermark adds to every picture and its detector looks for.

The pattern is a tile of 128 x 128 pixels that repeats over the picture, so that it is known at any size, and a crop or
a shift of the picture only turns it. A tile is 16 x 16 blocks; each has ten coefficients of the 8 x 8 DCT (PLACES)
set to +1 or -1, a "chip" each: those of SYNC_PLACES are the same for every payload and say where the tile
begins, the others carry the payload.

Code: each of the four bytes becomes a word of the first-order Reed-Muller code RM(1, 7): 128 chips, any two words 64 or
128 apart, decoded by the largest of 128 correlations; each chip is sent four times at places that the key scatters.
Needs no library, and no other code of this length that is decoded softly in one matrix product does better.

Every chip is multiplied by a sign drawn from the key. So for a picture that was made without the key, and any payload and
turn, the correlation is a sum of fixed numbers with independent random signs, and Hoeffding's inequality bounds it
without any assumption about pictures: P(correlation >= z * norm) <= exp(-z^2 / 2). See `watermark` for its use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from liveavatar.core import ConfigError

KEY_BYTES = 16  # at least
TILE, BLOCK = 128, 8  # pixels
BLOCKS = TILE // BLOCK  # of a tile, each way
SYNC_PLACES = ((2, 2), (1, 3))  # rows and columns of the 8 x 8 DCT
DATA_PLACES = ((1, 2), (2, 1), (3, 1), (2, 3), (3, 2), (0, 3), (3, 0), (3, 3))
PLACES = SYNC_PLACES + DATA_PLACES
PAYLOAD_BITS = 32
SYMBOLS, WORD = PAYLOAD_BITS // 8, 128  # bytes of a payload, chips of one
REPEATS = len(DATA_PLACES) * BLOCKS**2 // (SYMBOLS * WORD)


def dct_matrix(size: int = BLOCK) -> np.ndarray:
    """The orthonormal DCT-II, float32 [size, size], one row per frequency."""
    k, n = np.arange(size)[:, None], np.arange(size)
    rows = np.cos(np.pi * k * (2 * n + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


def hadamard(size: int = WORD) -> np.ndarray:
    """Sylvester's matrix, float32 [size, size] of +1 and -1 with orthogonal rows; size: a power of two."""
    rows = np.ones((1, 1), np.float32)
    while len(rows) < size:
        rows = np.block([[rows, rows], [rows, -rows]])
    return rows


def encode(payload: int) -> np.ndarray:
    """0 .. 2^32 - 1 -> chips float32 [512]: per byte a row of the Hadamard matrix (its low 7 bits), negated by its top bit."""
    symbols = np.frombuffer(int(payload).to_bytes(SYMBOLS, "big"), np.uint8)
    return (hadamard()[symbols & 127] * np.where(symbols & 128, -1, 1)[:, None]).astype(np.float32).ravel()


def decode(soft: np.ndarray) -> tuple[int, float]:
    """Soft chips [512] -> the most probable payload, and the probability that all its bytes are right.

    The probability takes the rest of the correlations as Gaussian noise whose size is seen in those of the other words.
    """
    scores = soft.reshape(SYMBOLS, WORD) @ hadamard()  # symmetric
    rows = np.abs(scores).argmax(1)
    best = scores[np.arange(SYMBOLS), rows]
    payload = int.from_bytes(bytes(int(row) | (128 if score < 0 else 0) for row, score in zip(rows, best)), "big")
    others = np.ones_like(scores, bool)
    others[np.arange(SYMBOLS), rows] = False
    noise, level = max(float(np.mean(scores[others] ** 2)), 1e-12), float(np.abs(best).mean())
    odds = np.concatenate([scores, -scores], 1) * level / noise  # log likelihood of each of the 256 words, but for a constant
    top = odds.max(1, keepdims=True)
    return payload, float(np.prod(1 / np.exp(odds - top).sum(1)))


@dataclass(frozen=True)
class Chips:
    """What a key says. sync: +-1 [2, 16, 16]. places: index of each sent chip among the flattened [8, 16, 16] data places.
    signs: +-1 of each sent chip; both [REPEATS, 512]."""

    sync: np.ndarray
    places: np.ndarray
    signs: np.ndarray

    @classmethod
    def of(cls, key: bytes) -> Chips:
        """key: at least 16 bytes, secret. Raises ConfigError."""
        if len(key) < KEY_BYTES:
            raise ConfigError(f"a watermark key of {len(key)} bytes: at least {KEY_BYTES} are needed")
        sent = REPEATS * SYMBOLS * WORD
        order = np.argsort(np.frombuffer(_stream(key, b"places", 8 * sent), "<u8"), kind="stable")
        return cls(
            sync=_signs(key, b"sync", len(SYNC_PLACES) * BLOCKS**2).reshape(-1, BLOCKS, BLOCKS),
            places=order.reshape(REPEATS, -1), signs=_signs(key, b"signs", sent).reshape(REPEATS, -1),
        )  # fmt: skip

    def all(self, payload: int) -> np.ndarray:
        """+-1 [10, 16, 16] of one payload, in the order of PLACES."""
        data = np.empty(self.places.size, np.float32)
        data[self.places] = self.signs * encode(payload)
        return np.concatenate([self.sync, data.reshape(-1, BLOCKS, BLOCKS)])

    def soft(self, data: np.ndarray) -> np.ndarray:
        """Data coefficients [8, 16, 16] -> soft chips [512]."""
        return (data.ravel()[self.places] * self.signs).sum(0)


def tile(chips: np.ndarray) -> np.ndarray:
    """Chips [10, 16, 16] -> the pattern, float32 [128, 128] with root mean square 1."""
    coefficients = np.zeros((BLOCKS, BLOCKS, BLOCK, BLOCK), np.float32)
    for (row, column), values in zip(PLACES, chips):
        coefficients[..., row, column] = values
    basis = dct_matrix()
    blocks = basis.T @ coefficients @ basis
    return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(TILE, TILE) * np.float32(BLOCK / np.sqrt(len(PLACES)))


def coefficients(field: np.ndarray) -> np.ndarray:
    """A tile [..., 128, 128] -> its coefficients at PLACES, float32 [..., 10, 16, 16]; of tile() what it was made of, times a constant."""
    basis = dct_matrix()
    blocks = field.reshape(*field.shape[:-2], BLOCKS, BLOCK, BLOCKS, BLOCK).swapaxes(-3, -2)
    spectrum = basis @ blocks @ basis.T
    return np.stack([spectrum[..., row, column] for row, column in PLACES], -3)


def _stream(key: bytes, label: bytes, size: int) -> bytes:
    return hashlib.shake_256(len(key).to_bytes(2, "big") + key + b"liveavatar watermark 1 " + label).digest(size)


def _signs(key: bytes, label: bytes, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(_stream(key, label, -(-count // 8)), np.uint8))[:count]
    return (1 - 2 * bits.astype(np.float32))
