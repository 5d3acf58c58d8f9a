"""What every artefact must read alike, whoever trained it: texts that tokenizers get wrong, and conversations."""

from __future__ import annotations

TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "It's 3.14159 % of $1,000,000 — isn't it?", "ALL CAPS, CamelCase, snake_case",
    "今天天气很好，我们去公园散步吧。",
    "炼丹需要耐心：第1步，准备数据；第2步，训练。", "中英 mixed 文本 with numbers 2024年", "繁體字與「引號」",
    "😀", "👩‍👩‍👧‍👦 and 🇨🇳🏳️‍🌈", "café naïve e\u0301 ﬁ ﬀ",
    " leading", "trailing ", "  two  spaces  ", "\ttab\t", "\nline\n", "a\n\nb\r\nc\n", " ", "\n", "",
    "\u3000全角空格\u3000", "a\u00a0b\u200bc", "x" * 40, "1234567890" * 4,
    "def f(x):\n    return x + 1\n", "https://example.org/a?b=c&d=%20#e", "<b>html</b> &amp; [link](x)",
    "<|im_start|>user\nhi<|im_end|>", "<s>text</s>", "[CLS] a [SEP] b [MASK]", "<|endoftext|>", "<pad><unk> [PAD] [UNK]",
    "<|begin_of_text|><|eot_id|>", "[INST] hi [/INST]",
)

DIALOGUES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello!"},),
    ({"role": "system", "content": "You are terse."}, {"role": "user", "content": "  What is 2 + 2? \n"}),
    ({"role": "user", "content": "你好，请介绍一下自己。"}, {"role": "assistant", "content": "我是一个助手。😀"},
     {"role": "user", "content": "谢谢\n\n再见"}),
)
