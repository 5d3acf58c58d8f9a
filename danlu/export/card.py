"""README.md of an exported folder: what it is, from what, how to open it.  Nothing is claimed that was not measured."""

from __future__ import annotations

from danlu import files
from danlu.adapt import folder as adapters
from danlu.evaluate.subject import Subject
from danlu.generate import writes

PIPELINES = {"classify": "text-classification", "tag": "token-classification", "answer": "question-answering",
             "choose": "multiple-choice", "embed": "sentence-similarity"}


def card(subject: Subject, *, library: str) -> str:
    """Return the card: front matter as the hub reads it, then the facts.  In English, as cards are."""
    tasks, adapted = subject.cfg.tasks, adapters.is_adapter(subject.folder)
    pipeline = PIPELINES[tasks[0].kind] if len(tasks) == 1 else "text-generation" if writes(subject.model) else None
    base = adapters.describe(subject.folder).base if adapted else None
    front = ["---", f"library_name: {library}", *([f"pipeline_tag: {pipeline}"] if pipeline else []),
             *([f"base_model: {base}"] if base is not None and library == "peft" else []), "tags:", "- danlu", "---"]
    facts = [f"- parameters: {sum(p.numel() for p in subject.model.parameters()):,}", f"- context: {subject.cfg.context} tokens",
             f"- tokenizer: sha256 {subject.tokenizer.sha256}"]
    for task in tasks:
        facts.append(f"- task `{task.name}` ({task.kind})" + (f": {', '.join(task.labels)}" if task.labels else ""))
    if subject.run is not None:
        facts.append(f"- trained with Danlu: objective {subject.run.objective.kind}" +
                     (f", adapter {subject.run.adapt.kind}" if subject.run.adapt is not None else ""))
    ema = subject.folder.parent if subject.folder.name == "ema" else subject.folder
    state = ema / "trainer_state.json"
    if state.is_file():
        told = files.read_json(state)
        facts.append(f"- step {told['global_step']}")
    if library == "peft" and writes(subject.model):
        facts.append("- stops at the ids of `generation_config.json`; PEFT does not read it, so pass it to `generate`")
    return "\n".join([*front, "", f"# {subject.folder.parent.name}", "", *facts, "",
                      "`parity.json` says how this folder was compared with the model it was made from, and the hash of each of "
                      "its files; `danlu verify` checks them, `danlu lineage` walks back to the data.", ""])
