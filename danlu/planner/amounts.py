"""Amounts as people write and read them: 300B tokens, 24h, 3.1e23 FLOPs."""

from __future__ import annotations

import math
import re

from danlu.errors import ConfigError
from danlu.words import _

LARGE = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "万": 1e4, "亿": 1e8}
TIMES = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 31557600.0, "秒": 1.0, "分钟": 60.0,
         "小时": 3600.0, "天": 86400.0, "周": 604800.0}
DAY = 86400.0
MOST = 1e21                                              # of tokens, rows, parameters


def number(text: str, *, where: str) -> float:
    """Return the number above 0 that '300B', '1.4T', '5e9', '5,000' or '3亿' means.  Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([KMBGTkmbgt万亿]?)", text.strip())
    value = float(re.sub("[_,]", "", found[1])) * LARGE[found[2].upper()] if found else 0.0
    if not 0 < value < MOST:
        raise ConfigError(_("{text!r} is no number above 0 and below {most:g}").format(text=text, most=MOST), where=where,
                          fix=_("write it as 5000, 300B or 1.4T"))
    return value


def seconds(text: str, *, where: str) -> float:
    """Return the seconds that '24h', '34d', '90m' or '1.5 h' means.  Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([a-z秒分钟小时天周]+)", text.strip().lower())
    value = float(found[1]) * TIMES.get(found[2], 0.0) if found else 0.0
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(_("{text!r} is no length of time").format(text=text), where=where,
                          fix=_("write it as 90m, 24h or 34d"))
    return value


def money(text: str, *, where: str) -> float:
    """Return an amount of money, not below 0.  Raises ConfigError for anything else."""
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(_("{text!r} is no amount of money").format(text=text), where=where, fix=_("write it as 500 or 0.8"))
    return value


def told(value: float) -> str:
    """Return a number as people read it: 7.47B, 1.4T, 5,000; above that as a power of ten."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size <= value < size * 1e4:
            return f"{value / size:.4g}{name}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def duration(value: float) -> str:
    """Return seconds as people read them."""
    for size, name in ((365.25 * DAY, _("years")), (DAY, _("days")), (3600.0, _("hours")), (60.0, _("minutes"))):
        if value >= 2 * size:
            return f"{value / size:,.1f} {name}"
    return _("{n:.3g} seconds").format(n=value)


def size(value: float) -> str:
    """Return bytes as people read them."""
    return f"{value / 1e12:.2f} TB" if value >= 1e12 else f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
