"""Conversations as contents: OpenAI messages, sharegpt, alpaca, queries and responses, prompts and completions, segments.

Each function gets the columns and returns the reader of a row, or None where the columns are not of its kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from danlu.data import forms
from danlu.data.columns import Columns, listed, number, text, value, written
from danlu.data.example import Chat, Content, Segments, Turn, Unusable

Row = Mapping[str, Any]
Reader = Callable[[Row], Content]
NAMED = {                                           # what data sets call the sides of a conversation
    "system": "system", "developer": "system", "user": "user", "human": "user", "question": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant", "function_call": "call", "tool_call": "call", "tool": "tool",
    "observation": "tool", "tool_response": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}
SWITCHES = ("loss", "train", "training")            # true or false; `loss` may be a number too
WEIGHTS = ("loss_weight", "loss_scale", "weight")
MADE = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool",
        "function_tag": "call"}


def chat(columns: Columns) -> Reader | None:
    """Whatever a conversation, or what can be learned like one, is written as; the most explicit form first."""
    for form in (messages, forms.tokens, segments, completion, alpaca, query, forms.plain):
        if found := form(columns):
            return found
    return None


def messages(columns: Columns) -> Reader | None:
    """A list of turns, {"role", "content"} or {"from", "value"}; or of {"human", "assistant"}, as swift has it."""
    column = columns.find("messages")
    if column is None or not all(isinstance(one, list | tuple) or str(one).lstrip()[:1] == "["
                                 for one in columns.values(column)):
        return None
    names = NAMED | {columns.given[tag]: role for tag, role in MADE.items() if tag in columns.given}

    def read(row: Row) -> Content:
        inner = _turns(value(row, column), columns, names)
        return _chat(columns, row, inner)

    return read


def _chat(columns: Columns, row: Row, turns: Sequence[Turn]) -> Chat:
    """Return a conversation with the system text and the tools of its row; Unusable if nothing in it can be learned."""
    system, tools = columns.find("system"), columns.find("tools")
    before = written(row, system) if system else ""
    if before and not (turns and turns[0].role == "system"):
        turns = [Turn("system", before), *turns]
    if not turns or (not columns.unlabelled and not any(turn.role == "assistant" for turn in turns)):
        raise Unusable("no_answer", "no turn is the assistant's")
    for place, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.content.strip() and not turn.calls:
            raise Unusable("empty_answer", f"turn {place + 1}, the assistant's, is empty")
    return Chat(tuple(turns), _tools(row.get(tools) if tools else None))


def _tools(found: Any) -> tuple[dict[str, Any], ...]:
    if found is None or found in ("", []):
        return ()
    return tuple(_object(one, "tools") for one in listed([found] if isinstance(found, Mapping) else found, "tools"))


def _object(found: Any, what: str) -> dict[str, Any]:
    """Return an object, also one that is written as JSON, without keys that hold nothing: Arrow fills every row with them."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise Unusable(what, f"{found[:40]!r} is not JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise Unusable(what, f"{type(found).__name__} where an object is wanted")
    return {str(key): _filled(inner) for key, inner in found.items() if inner is not None}


def _filled(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {str(key): _filled(inner) for key, inner in found.items() if inner is not None}
    return [_filled(one) for one in found] if isinstance(found, list | tuple) else found


def _turns(found: Any, columns: Columns, names: Mapping[str, str]) -> list[Turn]:
    turns = list[Turn]()
    for place, one in enumerate(listed(found, "messages"), 1):
        if not isinstance(one, Mapping):
            raise Unusable("messages", f"turn {place} is {type(one).__name__}, not an object")
        role = next((one[key] for key in (columns.given.get("role_tag", "role"), "role", "from") if one.get(key)), None)
        if role is None and {"human", "assistant"} & one.keys():
            turns += [Turn("user", written(one, "human")), _weighted(one, "assistant", written(one, "assistant"))]
            continue
        if names.get(str(role)) is None:
            raise Unusable("role", f"turn {place} is by {role!r}; known are {', '.join(names)}")
        turns.append(_turn(one, names[str(role)], columns.given.get("content_tag")))
    return turns


def _turn(one: Row, role: str, tag: str | None) -> Turn:
    said = _content(next((one[key] for key in (tag, "content", "value", "text") if key and one.get(key) is not None), ""))
    if role == "call":
        inner = said.strip()
        calls = listed(inner, "tool_call") if inner[:1] == "[" else [inner]
        return _weighted(one, "assistant", "")._replace(calls=tuple(_call(call) for call in calls))
    reasoning = one.get("reasoning_content")
    if role == "assistant" and isinstance(reasoning, str) and reasoning:
        said = f"<think>\n{reasoning}\n</think>\n\n{said}"
    calls = listed(one.get("tool_calls") or [], "tool_call")
    return _weighted(one, role, said)._replace(calls=tuple(_call(call) for call in calls))


def _content(found: Any) -> str:
    if isinstance(found, str):
        return found
    if not isinstance(found, list | tuple):
        raise Unusable("not_text", f"a turn holds {type(found).__name__}, not text")
    parts = list[str]()
    for part in found:
        inner = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(inner, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Unusable("not_text", f"a part of a turn is {kind}, not text")
        parts.append(inner)
    return "".join(parts)


def _call(found: Any) -> dict[str, Any]:
    """Return a tool call as OpenAI writes it, with its arguments as an object."""
    call = _object(found, "tool_call")
    inner = _object(call.get("function", call), "tool_call")
    if not isinstance(inner.get("name"), str):
        raise Unusable("tool_call", "a tool call has no name")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    function = {"name": inner["name"], "arguments": _object(arguments or {}, "tool_call")}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def _weighted(one: Row, role: str, said: str) -> Turn:
    """Return a turn with the weight that its row gives it, for all of it and for stretches of characters."""
    weight = None
    for key in (*SWITCHES, *WEIGHTS):
        if (found := one.get(key)) is not None:
            if isinstance(found, bool) and key in WEIGHTS:
                raise Unusable("weight", f"{key!r} is {found!r}, not a number")
            weight = float(found) if isinstance(found, bool) else number(found, "weight")
            if weight < 0:
                raise Unusable("weight", f"{key!r} is below 0")
            break
    spans = list[tuple[int, int, float]]()
    for part in listed(one.get("train_detail") or [], "weight"):
        if not isinstance(part, Mapping):
            raise Unusable("weight", "train_detail is not a list of objects")
        first, last = part.get("begin_offset"), part.get("end_offset")          # the last character is inside
        if not isinstance(first, int) or not isinstance(last, int) or not 0 <= first <= last < len(said):
            raise Unusable("weight", f"train_detail {first}..{last} is not within the turn's {len(said)} characters")
        spans.append((first, last + 1, number(part.get("weight", int(bool(part.get("train", True)))), "weight")))
    return Turn(role, said, weight, (), tuple(spans))


def segments(columns: Columns) -> Reader | None:
    """Stretches of text that are learned from or only read: {"segments": [{"text", "label"}]}."""
    column = columns.find("segments")
    if column is None:
        return None

    def read(row: Row) -> Content:
        pieces = list[tuple[str, float]]()
        for one in listed(value(row, column), "segments"):
            learned = one.get("label", True) if isinstance(one, Mapping) else None
            if not isinstance(one, Mapping) or not isinstance(one.get("text"), str) or not isinstance(learned, bool):
                raise Unusable("segments", 'a segment is not {"text": …, "label": true or false}')
            weight = _weighted(one, "assistant", one["text"]).weight
            pieces.append((one["text"], float(learned) if weight is None else weight))
        if not any(said and weight for said, weight in pieces) and not columns.unlabelled:
            raise Unusable("no_answer", "no segment is to be learned from")
        return Segments(tuple(pieces))

    return read


def completion(columns: Columns) -> Reader | None:
    """{"prompt", "completion"}: texts, tokenised as they are; or turns, of which only the completion's are learned."""
    asked, said = columns.find("prompt"), columns.find("completion")
    if asked is None or said is None:
        return None

    def read(row: Row) -> Content:
        before, after = value(row, asked), row.get(said)
        if isinstance(before, str) and not isinstance(after, list | tuple):
            answer = "" if columns.unlabelled and after is None else text(row, said)
            return Segments(((written(row, asked), 0.0), (answer, 1.0)), ends=True)
        read = [Turn("user", before)] if isinstance(before, str) else _turns(before, columns, NAMED)
        if isinstance(after, str):
            answers = [Turn("assistant", after)]
        else:
            answers = [] if columns.unlabelled and after is None else _turns(value(row, said), columns, NAMED)
        found = _chat(columns, row, [*(turn._replace(weight=0.0, spans=()) for turn in read), *answers])
        if not columns.unlabelled and not any(turn.role == "assistant" for turn in answers):
            raise Unusable("no_answer", "the completion holds no turn of the assistant")
        return found

    return read


def alpaca(columns: Columns) -> Reader | None:
    """{"instruction", "input", "output"} with "system" and "history" where the row has them."""
    asked, more, said = (columns.find(role) for role in ("instruction", "input", "output"))
    if asked is None or (said is None and not columns.unlabelled):
        return None

    def read(row: Row) -> Content:
        extra = written(row, more) if more else ""
        return _exchange(columns, row, text(row, asked) + (f"\n{extra}" if extra else ""), said)

    return read


def query(columns: Columns) -> Reader | None:
    """{"query", "response"} or a synonym of each, with "context", "system" and "history" where the row has them."""
    asked, said, about = columns.find("query"), columns.find("response"), columns.find("context")
    if asked is None or (said is None and not columns.unlabelled) or asked == said:
        return None

    def read(row: Row) -> Content:
        before = written(row, about) if about else ""
        return _exchange(columns, row, (f"{before}\n" if before else "") + text(row, asked), said)

    return read


def _exchange(columns: Columns, row: Row, asked: str, said: str | None) -> Chat:
    history, turns = columns.find("history"), list[Turn]()
    for pair in listed(row.get(history) or [], "history") if history else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise Unusable("history", "the history is not a list of [query, response]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    turns.append(Turn("user", asked))
    found = row.get(said) if said else None
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if said is not None and not (columns.unlabelled and found is None):
        answer = text({said: found}, said)
        turns.append(_weighted({key: row[key] for key in (*SWITCHES, *WEIGHTS) if key in row}, "assistant", answer))
    return _chat(columns, row, turns)
