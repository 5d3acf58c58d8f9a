"""The tables of docs/*/config.md and models.md, made from the schema that the program itself reads.

    python docs/keys.py           rewrites the tables between `<!-- keys NAME -->` and `<!-- end -->`
    python docs/keys.py check     changes nothing; exits 1 if a table is not what the schema says

English meanings are the descriptions in the code; docs/zh/meanings.yaml holds their Chinese.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from danlu import config
from danlu.data.prepare import Prepare
from danlu.models import decoder, encoder
from danlu.train.recipe import Run
from danlu.verbs import table

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(?<=<!-- keys )(.+?)( -->\n)(.*?)(?=<!-- end -->)", re.S)
PAGES = ("config.md", "models.md")
ROOTS: dict[str, type[config.Model]] = {"Run": Run, "Prepare": Prepare}
UNIONS = {                                               # name of the table -> (whose schema, its definitions in order)
    "model": ("Run", ("Decoder", "Encoder")),
    "scaling": ("Run", ("danlu__nn__position__Linear", "Llama3", "Yarn")),
    "objective": ("Run", ("CausalLM", "MaskedLM", "NextSentence", "SentenceOrder", "Mixture", "Classify", "Regress", "Tag",
                          "Answer", "Choose", "Embed", "Tasks")),
    "adapt": ("Run", ("LoRA", "IA3", "Bottleneck", "Prompt", "Prefix", "PTuning", "BitFit", "Freeze", "QAT")),
    "sparsify": ("Run", ("KeepZeros", "Magnitude", "TwoFour")),
    "optim": ("Run", ("GD", "SGD", "Momentum", "Nesterov", "Adagrad", "RMSprop", "Adam", "AdamW", "Adafactor", "LAMB", "Lion",
                      "Muon")),
    "schedule": ("Run", ("Constant", "danlu__schedule__Linear", "Cosine", "InverseSqrt", "Polynomial", "WSD")),
    "tokenizer": ("Prepare", ("BPE", "WordPiece", "Unigram", "Chars", "Loaded")),
}
SINGLE = {                                               # other definitions -> the heading they stand under
    "Source": "data", "Chats": "chat", "Decoder": "decoder", "Encoder": "encoder", "Head": "heads", "Part": "parts",
    "Task": "tasks", "Continual": "continual", "Replay": "replay", "EWC": "ewc", "L2SP": "l2sp", "Distil": "distil-of-the-start",
    "Teach": "distil", "Average": "average", "Layout": "layout", "Local": "local", "Every": "every", "Stop": "stop",
    "Guard": "guard", "Audit": "audit", "Input": "inputs", "Clean": "clean", "Split": "split",
}
WORDS = {
    "en": {
        "key": "key", "value": "value", "default": "default", "meaning": "meaning", "kind": "kind", "of": "of", "all": "all",
        "keys": "keys and defaults", "needed": "needed", "integer": "integer", "number": "number", "string": "text",
        "path": "path", "list": "list of {}", "map": "map from name to {}", "or": " or ", "here": "here", "there": "elsewhere",
        "preset": "preset", "shape": "what it sets",
    },
    "zh": {
        "key": "键", "value": "取值", "default": "默认值", "meaning": "含义", "kind": "kind", "of": "属于", "all": "全部",
        "keys": "键与默认值", "needed": "必填", "integer": "整数", "number": "数", "string": "文本",
        "path": "路径", "list": "{} 的列表", "map": "名称到 {} 的映射", "or": " 或 ", "here": "本项目", "there": "其他工具",
        "preset": "preset", "shape": "所设的值",
    },
}
CHOSEN = ("bf16", "fp16", "full", "last", "all")         # values that a `true` elsewhere stands for
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def words_of(language: str) -> Mapping[str, str]:
    """Return the meaning of each English description in a language."""
    if language == "en":
        return {}
    found: dict[str, str] = yaml.safe_load((DOCS / language / "meanings.yaml").read_text(encoding="utf-8"))
    return found


class Tables:
    """The tables of one language."""

    def __init__(self, language: str) -> None:
        self.say, self.meanings, self.language = WORDS[language], words_of(language), language
        self.schemas = {name: config.schema(cls) for name, cls in ROOTS.items()}
        self.lacking: list[str] = []

    def of(self, name: str) -> str:
        """Return the table called `name` as it stands in the page."""
        match name.split():
            case ["aliases", "verbs"]:
                lines = self.rows((self.say["there"], self.say["here"]), ((f"`{a}`", f"`{b}`") for a, b in table.ALIASES.items()))
            case ["aliases", root]:
                lines = self.rows((self.say["there"], self.say["here"]), self.aliases(ROOTS[root]))
            case ["presets", kind]:
                presets = {"decoder": decoder.PRESETS, "encoder": encoder.PRESETS}[kind]
                lines = self.rows((self.say["preset"], self.say["shape"]), (
                    (f"`{preset}`", f"`{flow(shape)}`") for preset, shape in presets.items()))
            case [union] if union in UNIONS:
                lines = self.union(*UNIONS[union])
            case [one]:
                lines = self.single(one)
            case _:
                raise ValueError(f"no table is called {name!r}")
        return "\n".join(["", *lines, "", ""])

    def rows(self, head: tuple[str, ...], body: Any) -> list[str]:
        cells = [head, ("---",) * len(head), *body]
        return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]

    def single(self, name: str) -> list[str]:
        """Return the lines of one class: key, value, default, meaning."""
        root, schema = self.found(name)
        needed = schema.get("required", ())
        head = tuple(self.say[w] for w in ("key", "value", "default", "meaning"))
        return self.rows(head, (
            (f"`{key}`", self.shape(field, root), self.say["needed"] if key in needed else default(field, self.schemas[root]),
             self.meaning(field, root)) for key, field in schema["properties"].items()))

    def union(self, root: str, names: tuple[str, ...]) -> list[str]:
        """Return the kinds of a union with their keys, then what the keys mean."""
        kinds, keys = [], dict[tuple[str, str, str], list[str]]()
        for name in names:
            schema = self.schemas[root]["$defs"][name]
            kind = schema["properties"]["kind"]["default"]
            needed, told = schema.get("required", ()), []
            for key, field in schema["properties"].items():
                if key == "kind":
                    continue
                told.append(f"`{key}`" if key in needed else f"`{key}` = {default(field, self.schemas[root])}")
                keys.setdefault((key, self.shape(field, root), self.meaning(field, root)), []).append(f"`{kind}`")
            kinds.append((f"`{kind}`", self.meant(first(schema)), ", ".join(told)))
        lines = self.rows((self.say["kind"], self.say["meaning"], self.say["keys"]), kinds)
        if not keys:
            return lines
        head = tuple(self.say[w] for w in ("key", "value", "meaning", "of"))
        body = ((f"`{key}`", shape, meaning, self.say["all"] if len(of) == len(names) and len(of) > 2 else ", ".join(of))
                for (key, shape, meaning), of in keys.items())
        return [*lines, "", *self.rows(head, body)]

    def found(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """Return whose schema defines a class, and its definition."""
        for root, schema in self.schemas.items():
            if name == root:
                return root, schema
            if name in schema["$defs"]:
                return root, schema["$defs"][name]
        raise ValueError(f"no class is called {name!r}")

    def meaning(self, field: Mapping[str, Any], root: str) -> str:
        """Return what a key means: its own description, or that of the class it takes."""
        told = field.get("description")
        if told is None:
            ref = next(ref for ref in refs(field))
            told = first(self.schemas[root]["$defs"][ref])
        return self.meant(told)

    def meant(self, told: str) -> str:
        if self.language == "en":
            return told
        if told not in self.meanings:
            self.lacking.append(told)
        return self.meanings.get(told, told)

    def shape(self, field: Mapping[str, Any], root: str) -> str:
        """Return which values a key takes."""
        say = self.say
        several = list(refs(field))
        for union, (owner, names) in UNIONS.items():
            if owner == root and len(several) > 1 and set(several) <= set(names):
                none = [self.shape(one, root) for one in field.get("anyOf", ()) if one.get("type") == "null"]
                return say["or"].join((f"[`{union}`](#{union})", *none))
        if "$ref" in field:
            name = field["$ref"].rsplit("/", 1)[-1]
            return f"[`{SINGLE[name]}`](#{SINGLE[name]})"
        if "anyOf" in field or "oneOf" in field:
            return say["or"].join(dict.fromkeys(self.shape(one, root) for one in (field.get("anyOf") or field["oneOf"])))
        if "enum" in field or "const" in field:
            return say["or"].join(f"`{v}`" for v in field.get("enum", [field.get("const")]))
        if field["type"] == "array":
            if "prefixItems" in field:
                return say["list"].format(len(field["prefixItems"]))
            return say["list"].format(self.shape(field["items"], root))
        if field["type"] == "object":
            return say["map"].format(self.shape(field["additionalProperties"], root))
        if field["type"] in ("null", "boolean"):
            return "`null`" if field["type"] == "null" else say["or"].join(("`true`", "`false`"))
        bounds = ", ".join(f"{sign} {number(field[b])}" for b, sign in BOUNDS.items() if b in field)
        return " ".join(filter(None, (say["path"] if field.get("format") == "path" else say[field["type"]], bounds)))

    def aliases(self, cls: type[config.Model]) -> Iterator[tuple[str, str]]:
        """Yield (name elsewhere, name here); a name that is ours too is a short form, and left out."""
        for name, target in cls.ALIASES.items():
            if name in cls.model_fields:
                continue
            made = {target: None} if isinstance(target, str) else target(True)
            here = ", ".join(f"`{key}`" + (f" = `{json.dumps(value)}`" if value in CHOSEN else "") for key, value in made.items())
            yield f"`{name}`", here


def flow(shape: Mapping[str, Any]) -> str:
    """Return {key: value} as one writes it in a recipe."""
    return yaml.safe_dump(dict(shape), default_flow_style=True, sort_keys=False, width=1000).strip()


def first(schema: Mapping[str, Any]) -> str:
    """Return the first paragraph of a class's description on one line."""
    return " ".join(str(schema["description"]).split("\n\n")[0].split())


def refs(field: Any) -> Iterator[str]:
    """Yield the definitions a field's schema refers to."""
    if isinstance(field, Mapping):
        if "$ref" in field:
            yield field["$ref"].rsplit("/", 1)[-1]
        for name, inner in field.items():
            if name != "discriminator":
                yield from refs(inner)
    elif isinstance(field, list):
        for inner in field:
            yield from refs(inner)


def number(value: float) -> str:
    """Return a bound or default as one would type it; 2^40 in place of 1099511627776."""
    power = int(value).bit_length() - 1
    if isinstance(value, int) and value >= 1 << 15 and value in (1 << power, (1 << power + 1) - 1):
        return f"2^{power}" if value == 1 << power else f"2^{power + 1} - 1"
    if value >= 1 << 62:
        return "2^63"
    return f"{value:g}" if isinstance(value, float) else str(value)


def default(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the default of a key."""
    value = field.get("default")
    if value == {}:
        return "`{}`"
    if isinstance(value, dict) or (value is None and "default" not in field):
        return "–"
    if isinstance(value, bool) or value is None or isinstance(value, str | list):
        return f"`{json.dumps(value)}`"
    return f"`{number(value)}`"


def page(text: str, tables: Tables) -> str:
    """Return the page with its tables as the schema has them."""
    return BLOCK.sub(lambda found: f"{found[1]}{found[2]}{tables.of(found[1])}", text)


def main(arguments: list[str]) -> int:
    """Rewrite, or check, the tables in both languages; return the exit code."""
    code = 0
    for language, name in ((language, name) for language in WORDS for name in PAGES):
        file, tables = DOCS / language / name, Tables(language)
        before = file.read_text(encoding="utf-8")
        after = page(before, tables)
        for told in tables.lacking:
            print(f"docs/{language}/meanings.yaml lacks: {told}")
        code |= bool(tables.lacking) or (arguments == ["check"] and after != before)
        if arguments == ["check"]:
            print(f"{file.relative_to(DOCS.parent)}: {'as the schema says' if after == before else 'stale: python docs/keys.py'}")
        else:
            file.write_text(after, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
