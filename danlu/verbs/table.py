"""All verbs: what each is called, where it lives, how its arguments read.  Nothing heavy is imported for the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from danlu.verbs import arguments as of
from danlu.words import _


class Verb(NamedTuple):
    """What a verb is called, where it lives, and how its arguments read."""

    module: str                                          # its `main` takes the options as keywords
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    recipe: bool = False                                 # takes FILE and a.b=c beside options
    options: Callable[[argparse.ArgumentParser], None] | None = None             # those options, if `recipe`
    starts: bool = False                                 # is told its own command line, to start it in other processes


def verbs() -> dict[str, Verb]:
    """Return all verbs, by name."""
    return {
        "quickstart": Verb("danlu.quickstart", _("the whole way on text that Python brings, in minutes"), of.quickstart),
        "prepare": Verb("danlu.verbs.prepare", _("files to shards, tokenizer and report"), of.recipe, recipe=True),
        "train": Verb("danlu.verbs.train", _("a recipe to a trained, verified model"), of.recipe, recipe=True, starts=True),
        "tune": Verb("danlu.verbs.tune", _("the best values of some keys, by trying"), of.recipe, recipe=True,
                      options=of.tune_options),
        "audit": Verb("danlu.verbs.audit", _("what a run would really learn from"), of.recipe, recipe=True,
                       options=of.audit_options),
        "launch": Verb("danlu.verbs.launch", _("the job file of a recipe for SLURM or Kubernetes"), of.recipe, recipe=True,
                       options=of.launch_options),
        "verify": Verb("danlu.verbs.verify", _("that a layout changes nothing; that nothing has been changed"), of.recipe,
                       recipe=True, options=of.verify_options, starts=True),
        "rehearse": Verb("danlu.verbs.rehearse", _("every process of a layout, on one CPU: memory, messages"),
                         of.recipe, recipe=True, options=of.rehearse_options),
        "plan": Verb("danlu.verbs.plan", _("what a run will cost, and how it runs best on a machine"), of.recipe, recipe=True,
                     options=of.plan_options),
        "calibrate": Verb("danlu.verbs.calibrate", _("measures this machine once, for plans"), of.calibrate),
        "advise": Verb("danlu.verbs.advise", _("which model, method and settings for a task, with reasons and sources"),
                       of.advise),
        "eval": Verb("danlu.verbs.eval", _("figures of a task, answers, perplexity, bits per byte, with intervals"), of.eval),
        "predict": Verb("danlu.verbs.predict", _("what a model of a task says of new rows"), of.predict),
        "explain": Verb("danlu.verbs.explain", _("which tokens made a model of a task say what it says"), of.explain),
        "generate": Verb("danlu.verbs.generate", _("let a model write"), of.generate),
        "chat": Verb("danlu.verbs.chat", _("talk with a model"), of.chat),
        "serve": Verb("danlu.verbs.serve", _("a model over HTTP: OpenAI's protocol, tasks, a page"), of.serve),
        "merge": Verb("danlu.verbs.merge", _("an adapter and its base as one model, compared"), of.merge),
        "export": Verb("danlu.verbs.export", _("a model for other runtimes, opened there again and compared"), of.export),
        "parity": Verb("danlu.verbs.parity", _("whether two artefacts say the same"), of.parity),
        "lineage": Verb("danlu.verbs.lineage", _("what a model came from, back to the raw files, by hash"), of.lineage),
        "quantize": Verb("danlu.verbs.quantize", _("weights in 8 or 4 bits"), of.quantize),
        "prune": Verb("danlu.verbs.prune", _("fewer weights: zeros, or heads, hidden units, blocks taken out"), of.prune),
        "factorize": Verb("danlu.verbs.factorize", _("thinner matrices: each as a product of two"), of.factorize),
        "compress": Verb("danlu.verbs.compress", _("all of these, measured: the best that fits"), of.compress),
        "inspect": Verb("danlu.verbs.inspect", _("a prepared row as the model sees it"), of.inspect),
        "report": Verb("danlu.report", _("curves and results of a run as one HTML file"), of.report),
        "ckpt": Verb("danlu.verbs.ckpt", _("list, verify or hash checkpoints"), of.ckpt),
        "doctor": Verb("danlu.doctor", _("what this machine and installation can do"), of.doctor),
        "config": Verb("danlu.verbs.config", _("the schema of a recipe, or a check of one"), of.recipe, recipe=True,
                       options=of.config_options),
        "import-config": Verb("danlu.verbs.import_config", _("another tool's YAML file to a recipe, line by line"),
                              of.import_config),
        "version": Verb("danlu.verbs.version", _("the version"), lambda parser: None),
    }


ALIASES = {"preprocess": "prepare", "pretrain": "train", "pt": "train", "evaluate": "eval", "infer": "generate",
           "merge-lora": "merge", "api": "serve", "deploy": "serve", "env": "doctor", "checkpoint": "ckpt"}
