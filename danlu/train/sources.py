"""What a recipe names as data: prepared folders, or files of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from danlu.config import Model
from danlu.data.inputs import Format


class Source(Model):
    """A prepared folder (what `danlu prepare` wrote) or files of rows, which part of it, and its share in a mixture."""

    path: str = Field(min_length=1, description="Folder that `danlu prepare` wrote; or a file, folder, pattern or hf://name of "
                      "rows, whose format is detected; `#500` takes 500 of them.")
    split: Literal["train", "val", "test"] = Field("train", description="Which part of a prepared folder.")
    subset: str | None = Field(None, description="Configuration of a hub data set.")
    hub_split: str = Field("train", min_length=1, description="Which part of a hub data set, as it is called there.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Share of the rows, relative to other sources.")
    columns: dict[str, str | int] = Field({}, description="Columns by role, where detection needs help: text, pair, label, "
                                          "score, tokens, tags, context, question, answers, prompt, completion, messages …")
    format: Format = Field("auto", description="Format of the files; auto goes by their names.")
    encoding: str = Field("utf-8", description="Encoding of the text, for example gb18030; it is never guessed.")
    header: bool | None = Field(
        None, description="Whether the first row of csv and tsv files names the columns; empty: it is seen.")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="Between csv columns; comma or tab.")
    task: str | None = Field(None, description="Which task of objective.parts the rows are for (objective.kind=tasks).")
    prepared: Path | None = Field(None, description="Where the rows stand as ids; filled in by the run.")

    @property
    def folder(self) -> Path:
        """The prepared folder."""
        return self.prepared or Path(self.path)

    @property
    def raw(self) -> bool:
        """Whether this names rows that are not prepared."""
        return not (Path(self.path) / "manifest.json").is_file()


def listed(value: Any) -> Any:
    """Return sources as a list, of which a path alone is one."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


Sources = Annotated[tuple[Source, ...], BeforeValidator(lambda value: tuple(listed(value)))]
