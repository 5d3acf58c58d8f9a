"""Text to learn from without any file: English that every Python has, and Chinese-like runs by Zipf's law."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np

# the opening of the Thousand Character Classic: all different
HAN = ("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
       "金生丽水玉出昆冈剑号巨阙珠称夜光果珍李柰菜重芥姜海咸河淡鳞潜羽翔")


def english(number: int = 40, length: int = 3000) -> list[str]:
    return [topics[name][:length] for name in sorted(topics)][:number]


def chinese(number: int = 100, length: int = 300, seed: int = 0) -> list[str]:
    """Return texts of long runs: a sign only now and then, as in real Chinese."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.zipf(1.3, (number, length)) - 1, len(HAN) - 1)
    marks = rng.random((number, length))
    return ["".join("。" if m < 0.01 else "，" if m < 0.03 else HAN[i] for i, m in zip(row, mark, strict=True))
            for row, mark in zip(drawn, marks, strict=True)]
