"""A small vocabulary and rows to learn from: ids 0..4 are [PAD] [UNK] [CLS] [SEP] [MASK], 5 ends a sentence."""

import numpy as np

from danlu import chance
from danlu.data.tokenizer import Special

PAD, UNK, CLS, SEP, MASK, STOP = range(6)
SIZE = 200


def vocab(size=SIZE, **change):
    numbers = np.arange(size)
    facts = {
        "size": size, "bos": None, "eos": None, "pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK,
        "reserved": numbers < STOP, "starts": numbers % 3 != 0, "ends": numbers == STOP,
    }
    return Special(**(facts | change))


def rng(seed=0):
    return lambda key, purpose: chance.generator(seed, purpose, key)


def row(*pieces, key=0, weights=None, other=None):
    """Return a row of the given pieces, each of them its own document."""
    ids = np.concatenate([np.asarray(p, np.int64) for p in pieces])
    made = {
        "ids": ids,
        "weights": np.ones(len(ids), np.float32) if weights is None else np.asarray(weights, np.float32),
        "segments": np.repeat(np.arange(1, len(pieces) + 1), [len(p) for p in pieces]).astype(np.int32),
        "key": np.array([0, 0, 0, key]),
        "documents": np.arange(len(pieces)),
    }
    return made if other is None else made | {"other": np.asarray(other, np.int64)}


def text(length, seed=0, stop=0.1):
    """Return plain ids, a share `stop` of which end a sentence."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random(length) < stop, STOP, draw.integers(STOP + 1, SIZE, length))
