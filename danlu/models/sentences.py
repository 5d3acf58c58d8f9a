"""What sentence-transformers needs beside a model to make vectors of texts with it: which modules, in which order."""

from __future__ import annotations

from pathlib import Path

from danlu import files
from danlu.models.build import Config


def write(folder: Path, cfg: Config) -> None:
    """Write modules.json and what it names, where the model has a head `embed` and no other: its vectors are means of tokens."""
    if [task.kind for task in cfg.tasks] != ["embed"]:
        return
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    files.write_json(folder / "modules.json", [
        {"idx": int(number), "name": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, path, kind in modules])
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    files.write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": cfg.width, **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
        "include_prompt": True})
    (folder / "2_Normalize").mkdir()
    files.write_json(folder / "sentence_bert_config.json", {"max_seq_length": cfg.context, "do_lower_case": False})
    files.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
