"""The plain way to read: one record after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from danlu.data import formats
from danlu.data.blocks import Reject
from danlu.data.inputs import ROW_BYTES, Input, Record, resolve, split_take
from danlu.data.parse import parse
from danlu.errors import DataError
from danlu.words import _


def read(item: Input | str, *, row_bytes: int = ROW_BYTES, skip_broken: bool = False,
         on_reject: Callable[[str, Reject], None] | None = None) -> Iterator[Record]:
    """Yield every record of an input, in order, in bounded memory.

    A row at fault goes to `on_reject` with the name of its file; without one it raises DataError at the first.
    """
    chosen = split_take(Input(path=item) if isinstance(item, str) else item)
    files = resolve([chosen])
    for block in formats.stream(files, [chosen], row_bytes=row_bytes, skip_broken=skip_broken):
        file = files[block.file]
        found = parse(block, file.format, chosen, row_bytes=row_bytes)
        for reject in found.rejects:
            if on_reject is None:
                raise DataError(_("a row cannot be used ({reason}): {detail}").format(
                    reason=reject.reason, detail=reject.detail), where=f"{file.path}:{reject.line}",
                    fix=_("mend or remove the row"))
            on_reject(file.path, reject)
        for place, (line, text) in enumerate(zip(found.lines, found.texts, strict=True)):
            label = found.labels[place] if found.labels else None
            yield Record(text, file.path, line, label, chosen.split, len(text.encode()))
