"""The rules of a tokenizer, changed for data: special tokens are not matched in it, and it may go on a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Raw


def for_data(content: Mapping[str, Any], special: set[int]) -> Raw:
    """Return the same rules, but with special tokens not matched in text.

    Where plain text can still become one (a Unigram or word vocabulary that lists `<mask>`), its entry keeps its id but
    is spelt with line breaks and spaces, as no pre-token is.
    """
    raw = Raw.from_str(json.dumps({**content, "post_processor": None}))
    raw.encode_special_tokens = True
    if not leaks(raw, raw, special) or content["model"]["type"] == "BPE":
        return raw
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[f"\n \n{t}" if i in special else t, s] for i, (t, s) in enumerate(model["vocab"])]
    else:
        unknown = model["unk_token"]
        model["vocab"] = {f"\n \n{t}" if i in special and t != unknown else t: i for t, i in model["vocab"].items()}
    plain = [t for t in content["added_tokens"] if t["id"] not in special]
    spelt = Raw.from_str(json.dumps({**content, "model": model, "post_processor": None, "added_tokens": plain}))
    return spelt if all(spelt.token_to_id(t["content"]) == t["id"] for t in plain) else raw


def inside(data: Raw) -> Raw:
    """Return rules for data that does not begin a text: a blank that only the first word gets is left out."""
    own: str = data.to_str()
    other = own.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    raw = data if other == own else Raw.from_str(other)
    raw.encode_special_tokens = True
    return raw


def going_on(data: Raw) -> Raw:
    """Return rules for data that goes on a text: what puts a blank before its first word is left out."""
    content = json.loads(data.to_str())
    content |= {part: unprefixed(content.get(part)) for part in ("normalizer", "pre_tokenizer")}
    raw = Raw.from_str(json.dumps(content))
    raw.encode_special_tokens = True
    return raw


def unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        inner = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {inner: [kept for one in part[inner] if (kept := unprefixed(one)) is not None]}
    changed = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {key: value for key, value in changed.items() if key in part}


def leaks(data: Raw, raw: Raw, special: set[int]) -> set[int]:
    """Return the special ids that plain text still produces."""
    found = set()
    for i in special:
        token = raw.id_to_token(i)
        for text in (token, f"a{token}", f"a {token} b"):
            found |= special & set(data.encode(text, add_special_tokens=False).ids)
    return found
