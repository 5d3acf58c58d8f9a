"""The names of the figures that tell how good a model is, and whether more of one is better."""

from __future__ import annotations

import difflib

from danlu.errors import ConfigError
from danlu.words import _

HIGHER: dict[str, bool] = {                              # whether more is better
    "accuracy": True, "precision": True, "recall": True, "f1": True,
    "precision_macro": True, "recall_macro": True, "f1_macro": True,
    "precision_micro": True, "recall_micro": True, "f1_micro": True,
    "precision_weighted": True, "recall_weighted": True, "f1_weighted": True,
    "mcc": True, "auc": True, "subset_accuracy": True, "hamming_loss": False,
    "pearson": True, "spearman": True, "mse": False, "mae": False,
    "accuracy_at_1": True, "mrr": True,
    "exact_match": True, "has_answer_exact_match": True, "has_answer_f1": True, "no_answer_exact_match": True,
    "no_answer_f1": True, "bleu": True, "chrf": True, "rouge1": True, "rouge2": True, "rougeL": True,
    "loss": False, "perplexity": False, "bits_per_byte": False,
    "mlm_loss": False, "mlm_perplexity": False, "mlm_accuracy": True, "nsp_loss": False, "nsp_accuracy": True,
    "sop_loss": False, "sop_accuracy": True,
}


def direction(name: str) -> bool:
    """Return whether more of a metric is better.  `eval/NAME`, `TASK/NAME` and `eval_NAME` are read as NAME.

    Raises ConfigError for a name that no metric has.
    """
    bare = name.rsplit("/", 1)[-1].removeprefix("eval_")
    if bare.endswith("loss"):
        return False
    if bare not in HIGHER:
        near = difflib.get_close_matches(bare, HIGHER, 1, 0.5)
        known = _("one of {names}").format(names=", ".join(HIGHER))
        raise ConfigError(_("there is no metric {name!r}").format(name=name), where="metric",
                          fix=_("did you mean {name!r}?").format(name=near[0]) if near else known)
    return HIGHER[bare]
