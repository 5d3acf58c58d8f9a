"""What must not be asked or said: lists of words, and classifiers trained with Danlu.

A text is compared as people read it: full-width letters as plain ones, case and accents apart, characters that are not seen
(zero-width, soft hyphens) left out.  A filter of a stream gives out text only when nothing in it can be part of a match.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from danlu.errors import ConfigError, DataError
from danlu.words import _

LONGEST = 200                                            # characters of an entry
UNSEEN = frozenset("\u115f\u1160\u3164\uffa0\u2800")     # letters by category, blanks by look
SENTENCE = re.compile(r"[.!?。！？\n]\s*")
HELD = 240                                               # characters that a classifier is asked about at the latest
SEEN = 1200                                              # characters before them that it reads, too


class Hit(NamedTuple):
    """What stopped a text."""

    filter: str                                          # its name, as the log and the meters tell it; never the text


class Watch(Protocol):
    """A stream of text under a filter; `hit` once something was found, and nothing more is given out then."""

    hit: Hit | None

    def feed(self, text: str) -> str:
        """Take in what was said; return what may be given out now."""
        ...

    def end(self) -> str:
        """Return what may be given out of the rest: nothing more is said."""
        ...


class Filter(Protocol):
    """Finds what must not be said."""

    name: str

    def judge(self, text: str) -> Hit | None:
        """Return what is wrong with a whole text."""
        ...

    def watch(self) -> Watch:
        """Return the filter of one stream."""
        ...


def plain(character: str) -> str:
    """Return the characters that one is compared as; "" for one that is not seen.  Does not depend on its neighbours."""
    if character.isascii():
        return " " if character.isspace() else "" if character < " " else character.lower()
    if character in UNSEEN:
        return ""
    found = unicodedata.normalize("NFKD", character)
    kept = "".join(c for c in found if unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc", "Cs"))
    return "".join(" " if c.isspace() else c for c in kept.casefold())


def normal(text: str) -> str:
    """Return a text as it is compared, blanks as one."""
    return re.sub(" +", " ", "".join(map(plain, text))).strip()


def _letter(character: str) -> bool:
    """Return whether a character belongs to the word beside it: those that are written with blanks between words."""
    return (character.isalnum() and not "\u2e80" <= character <= "\U0003ffff") or character == "_"


class _Node:
    __slots__ = ("depth", "end", "fail", "next")

    def __init__(self, depth: int) -> None:
        self.next: dict[str, _Node] = {}
        self.fail: _Node | None = None
        self.depth = depth
        self.end: tuple[int, ...] = ()                   # lengths of the entries that end here


class Words:
    """A list of words and phrases.  One that begins or ends with a letter of an alphabet is found as a whole word only:
    "ass" is not found in "class"; Chinese words are found anywhere.
    """

    def __init__(self, words: Iterable[str], name: str) -> None:
        self.name, self.root, self.size = name, _Node(0), 0
        for word in words:
            self._add(normal(word))
        self._link()

    def _add(self, word: str) -> None:
        if not word or len(word) > LONGEST:
            raise DataError(_("an entry has 1 to {n} characters that are seen").format(n=LONGEST), where=self.name)
        node = self.root
        for c in word:
            node = node.next.setdefault(c, _Node(node.depth + 1))
        if not node.end:
            node.end, self.size = (len(word),), self.size + 1

    def _link(self) -> None:
        """Make the automaton of Aho and Corasick (1975): where to go on after a mismatch, what else ends here."""
        todo = deque([self.root])
        while todo:
            node = todo.popleft()
            for c, child in node.next.items():
                back = node.fail
                while back is not None and c not in back.next:
                    back = back.fail
                child.fail = self.root if back is None else back.next[c]
                child.end += child.fail.end
                todo.append(child)

    def step(self, node: _Node, c: str) -> _Node:
        """Return the state after one more character."""
        at: _Node | None = node
        while at is not None and c not in at.next:
            at = at.fail
        return self.root if at is None else at.next[c]

    def judge(self, text: str) -> Hit | None:
        watch = self.watch()
        watch.feed(text)
        watch.end()
        return watch.hit

    def watch(self) -> WordWatch:
        return WordWatch(self)


class WordWatch:
    """A stream under a list of words.  Holds back what may be the beginning of an entry."""

    def __init__(self, words: Words) -> None:
        self.words, self.node = words, words.root
        self.hit: Hit | None = None
        self.held: deque[tuple[str, int]] = deque()      # characters not given out, and how many compared ones each became
        self.waiting: list[int] = []                     # lengths of entries that are there if no letter follows, to now
        self.recent: deque[str] = deque(maxlen=LONGEST + 1)      # compared characters

    def feed(self, text: str) -> str:
        out: list[str] = []
        for c in text:
            if self.hit is not None:
                break
            compared = plain(c)
            count = 0
            for one in compared:
                if one == " " and (not self.recent or self.recent[-1] == " "):
                    continue
                count += 1
                self._step(one)
            if self.hit is None:
                self.held.append((c, count))
                self._release(out)
        return "".join(out)

    def _step(self, c: str) -> None:
        if self.waiting and not _letter(c):
            self._found()
            return
        self.waiting = []
        self.node = self.words.step(self.node, c)
        self.recent.append(c)
        for size in self.node.end:
            first = self.recent[-size]
            before = self.recent[-size - 1] if len(self.recent) > size else " "
            if _letter(first) and _letter(before):
                continue
            if not _letter(c):
                self._found()
                return
            self.waiting.append(size)

    def _found(self) -> None:
        self.hit = Hit(self.words.name)
        self.held.clear()

    def _release(self, out: list[str]) -> None:
        keep = max([self.node.depth, *self.waiting])
        there = sum(count for _c, count in self.held)
        while self.held and there - self.held[0][1] >= keep:
            c, count = self.held.popleft()
            there -= count
            out.append(c)

    def end(self) -> str:
        if self.waiting and self.hit is None:
            self._found()
        rest = "".join(c for c, _count in self.held)
        self.held.clear()
        return rest


class Classifier:
    """A model that says whether a text is one of some classes.  `ask` gives the name of the class found, or None."""

    def __init__(self, ask: Callable[[str], str | None], name: str) -> None:
        self.ask, self.name = ask, name

    def judge(self, text: str) -> Hit | None:
        parts = [text[first : first + SEEN] for first in range(0, len(text), SEEN - HELD)] if len(text) > SEEN else [text]
        return next((Hit(self.name) for part in parts if part.strip() and self.ask(part) is not None), None)

    def watch(self) -> ClassWatch:
        return ClassWatch(self)


class ClassWatch:
    """A stream under a classifier, asked at the end of each sentence; until then the sentence is held back."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.hit: Hit | None = None
        self.before, self.held = "", ""

    def feed(self, text: str) -> str:
        if self.hit is not None:
            return ""
        self.held += text
        ends = [found.end() for found in SENTENCE.finditer(self.held)]
        return self._asked(ends[-1] if ends else len(self.held) if len(self.held) >= HELD else 0)

    def _asked(self, size: int) -> str:
        ready = self.held[:size]
        if not ready:
            return ""
        self.hit = self.classifier.judge((self.before + ready)[-SEEN:])
        if self.hit is not None:
            self.held = ""
            return ""
        self.before, self.held = (self.before + ready)[-SEEN:], self.held[size:]
        return ready

    def end(self) -> str:
        return "" if self.hit is not None else self._asked(len(self.held))


class Chain:
    """Several filters one after the other, as one."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.watches = [one.watch() for one in filters]

    @property
    def hit(self) -> Hit | None:
        """What was found, by the first that found something."""
        return next((watch.hit for watch in self.watches if watch.hit is not None), None)

    def feed(self, text: str) -> str:
        """Take in what was said; return what may be given out now."""
        for watch in self.watches:
            text = watch.feed(text)
            if watch.hit is not None:
                return text if watch is self.watches[-1] else ""
        return text

    def end(self) -> str:
        """Return what may be given out of the rest."""
        rest = ""
        for watch in self.watches:
            rest = watch.feed(rest) + watch.end() if rest else watch.end()
        return rest


def judge(filters: Sequence[Filter], text: str) -> Hit | None:
    """Return what is wrong with a whole text."""
    return next((hit for one in filters if (hit := one.judge(text)) is not None), None)


def words_of(path: Path) -> Words:
    """Return the list in a file, UTF-8, one entry a line; # begins a comment line.  Raises ConfigError, DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_("the word list cannot be read: {why}").format(why=error), where=str(path)) from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise DataError(_("the word list is empty"), where=str(path))
    return Words(found, path.stem)
