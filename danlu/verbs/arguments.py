"""How the arguments of each verb read; nothing heavy is imported for them."""

from __future__ import annotations

import argparse
from pathlib import Path

import danlu
from danlu.words import _


def recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", help=_("the YAML file"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=_("changes to it; --a.b c means the same"))


def audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, help=_("write the audit to this file, too (default: audit.json of the run folder)"))


def launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--render", required=True, choices=["slurm", "k8s"], help=_("what the job file is for"))
    parser.add_argument("--nodes", type=int, help=_("machines (default: what the layout's processes fill)"))
    parser.add_argument("--gpus-per-node", "--gpus_per_node", type=int,
                        help=_("processes, and GPUs, of one machine (default: 8, or fewer if the layout needs fewer)"))
    parser.add_argument("--image", default=f"danlu:{danlu.__version__}", help=_("container image, for k8s"))


def verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help=_("layout = the recipe's layout against one process; or the path of a run, a checkpoint or "
                                       "an artefact, whose hashes are computed anew, back to the raw files"))
    parser.add_argument("--steps", type=int, default=4, help=_("steps to compare"))
    parser.add_argument("--precision", default="fp64", choices=["fp64", "fp32"], help=_("arithmetic of both"))
    parser.add_argument("--tolerance", type=float, help=_("largest relative difference allowed (default: 1e-6, in fp32 1e-3)"))
    parser.add_argument("--against", type=Path, help=argparse.SUPPRESS)


def rehearse_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, help=_("processes; those beyond tp·pp·cp are data parallel if layout.dp=1"))
    parser.add_argument("--vocab", type=int, help=_("ids of the tokenizer, where the recipe leaves them to it"))
    parser.add_argument("--memory", help=_("memory of one device, such as 80GB: does it fit?"))


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", help=_("search for the best way to run on this: 8xH100, 285xV100, or here"))
    parser.add_argument("--deadline", help=_("how long the run may take, such as 24h or 34d"))
    parser.add_argument("--budget", help=_("what the run may cost, in the currency of --price"))
    parser.add_argument("--price", help=_("what an hour of one device costs"))
    parser.add_argument("--vocab", type=int, help=_("ids of the tokenizer, where the recipe leaves them to it"))
    parser.add_argument("--model", help=_("in place of a recipe: a public model by name, such as gpt3-175b"))
    parser.add_argument("--tokens", help=_("of --model: what it learns from, such as 300B"))
    parser.add_argument("--memory", help=_("memory of one device, such as 80GB, in place of the hardware's"))
    parser.add_argument("--probe", action="store_true", help=_("without --hardware: make a few real steps, for the time of one"))
    parser.add_argument("--rehearse", type=int, default=0, help=_("so many of the best plans are rehearsed in full, too"))


def advise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help=_("what the model is for, such as classification"))
    parser.add_argument("--rows", help=_("labelled rows, or answers to learn from"))
    parser.add_argument("--tokens", help=_("tokens of plain text to learn from"))
    parser.add_argument("--language", help=_("of the texts: zh, en, …"))
    parser.add_argument("--hardware", default="here", help=_("what it is trained on: laptop, RTX4090, 8xH100, here"))
    parser.add_argument("--model-size", "--model_size", help=_("parameters, such as 7B (default: advised)"))
    parser.add_argument("--quality", choices=["best", "good", "draft"], default="good", help=_("what counts more than cost"))
    parser.add_argument("--latency", help=_("longest time of an answer, such as 20ms"))
    parser.add_argument("--price", help=_("what an hour of one device costs"))


def calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help=_("file for the measurements (default: machine.json in the user's cache)"))


def quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help=_("folder for everything it makes"))
    parser.add_argument("--steps", type=int, help=_("training steps (default: what fits into the time)"))
    parser.add_argument("--minutes", type=float, default=1.6, help=_("time to train for"))


def eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--data", help=_("files of rows or of text, or a prepared folder; default: what the run holds out"))
    split(parser)
    parser.add_argument("--sample-by", "--sample_by", default="line", choices=["line", "paragraph", "document"],
                        help=_("what one document is in a txt file"))
    parser.add_argument("--text", default="text", help=_("column of the text in jsonl, csv and parquet files"))
    parser.add_argument("--label", help=_("column of the label"))
    rows(parser)
    parser.add_argument("--task", choices=["text", "chat", "generate"],
                        help=_("of a decoder: loss of text, loss of answers, answers it writes (default: seen from the rows)"))
    parser.add_argument("--generate", dest="task", action="store_const", const="generate", help=_("the same as --task generate"))
    parser.add_argument("--answer-after", "--answer_after",
                        help=_("the final answer is what follows this pattern, for example '####'"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help=_("tokens of an answer (default: 256)"))
    parser.add_argument("--out", type=Path, help=_("write the result as JSON"))
    parser.add_argument("--samples", type=Path, help=_("write each row or document with what was found, as JSON lines"))


def split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="NAME",
                        help=_("part of a prepared folder (default: val), or of a hub data set (default: train)"))


def rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help=_("columns by role, as in a recipe"))
    parser.add_argument("--encoding", help=_("encoding of the file, for example gb18030 (default: the recipe's)"))
    parser.add_argument("--format", choices=["txt", "jsonl", "json", "csv", "tsv", "conll", "parquet"],
                        help=_("format of the file (default: by its name)"))
    parser.add_argument("--overlong", choices=["error", "cut", "drop", "split"],
                        help=_("what becomes of rows that are too long (default: as the recipe says)"))
    parser.add_argument("--length", type=int, help=_("tokens in a row (default: the run's)"))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help=_("arithmetic of the forward pass"))
    parser.add_argument("--batch", type=int, help=_("most rows computed at a time"))
    parser.add_argument("--head", help=_("which of several tasks (eval without --data: each)"))


def predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--data", help=_("files of rows without labels; - reads JSON lines from stdin"))
    parser.add_argument("--text", help=_("one text, in place of --data"))
    parser.add_argument("--pair", help=_("the text that belongs to it"))
    parser.add_argument("--out", type=Path,
                        help=_("file to write, jsonl, csv or tsv by its name (default: JSON lines to stdout)"))
    parser.add_argument("--top-k", "--top_k", type=int, default=0, help=_("also list so many of the likeliest classes"))
    rows(parser)


def explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--text", required=True, help=_("the text; of tags, words between white space"))
    parser.add_argument("--pair", help=_("the text that belongs to it; of a question, the text that holds the answer"))
    parser.add_argument("--target", help=_("class that is asked about (default: the one the model says)"))
    parser.add_argument("--word", type=int, help=_("whose tag is asked about, from 0 (default: the first that is not O)"))
    parser.add_argument("--out", type=Path, help=_("HTML file to write, with the attention of each layer"))
    parser.add_argument("--head", help=_("which of several tasks (eval without --data: each)"))
    parser.add_argument("--overlong", choices=["error", "cut"], help=_("what becomes of a text that is too long"))


def chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--system", help=_("what the model is told before anything else"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512, help=_("most tokens of an answer"))
    parser.add_argument("--temperature", type=float, default=0.7, help=_("0 = always the likeliest"))
    parser.add_argument("--top-k", "--top_k", type=int, help=_("choose among the k likeliest"))
    parser.add_argument("--top-p", "--top_p", type=float, help=_("choose among the likeliest that make up p"))
    parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0,
                        help=_("above 1: tokens already there become less likely"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same text"))


def generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--prompt", default="", help=_("how the text begins; - reads it from stdin"))
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int,
                        help=_("tokens to write (default: 128, or what the context has room for)"))
    parser.add_argument("--temperature", type=float, default=0.8, help=_("0 = always the likeliest"))
    parser.add_argument("--top-k", "--top_k", type=int, help=_("choose among the k likeliest"))
    parser.add_argument("--top-p", "--top_p", type=float, help=_("choose among the likeliest that make up p"))
    parser.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0,
                        help=_("above 1: tokens already there become less likely"))
    parser.add_argument("--stop", action="append", default=[], help=_("text that ends the answer; may be repeated"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same text"))
    parser.add_argument("--n", type=int, default=1, help=_("so many answers, the seeds one after the other"))
    parser.add_argument("--num-beams", "--num_beams", type=int, default=1,
                        help=_("the likeliest answer of a beam search so wide"))
    parser.add_argument("--length-penalty", "--length_penalty", type=float, default=1.0,
                        help=_("of a beam search: above 0 favours longer answers"))
    parser.add_argument("--draft", type=Path,
                        help=_("a small model with the same tokenizer that proposes tokens: faster, the same text"))
    parser.add_argument("--schema", type=Path, help=_("a JSON schema that the answer obeys"))
    parser.add_argument("--data", type=Path, help=_("JSON lines with a prompt each, answered many at a time"))
    parser.add_argument("--out", type=Path, help=_("file for the answers to --data"))
    parser.add_argument("--batch", type=int, default=16, help=_("answers written at a time"))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"],
                        help=_("arithmetic of the model; int8 on a CPU"))


def serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH",
                        help=_("also serve this adapter of the same base under NAME; may be repeated"))
    parser.add_argument("--name", help=_("what the model is called (default: the folder's name)"))
    parser.add_argument("--host", default="127.0.0.1", help=_("address to listen on; any but this machine's own needs keys"))
    parser.add_argument("--port", type=int, default=8000, help=_("port to listen on; 0: a free one"))
    parser.add_argument("--key-file", "--key_file", type=Path, help=_("file with one key a line, which only you can read"))
    parser.add_argument("--allow-host", "--allow_host", action="append", default=[], metavar="NAME",
                        help=_("a further name by which clients may call this server; may be repeated"))
    parser.add_argument("--filter", action="append", default=[], metavar="FILE|RUN:LABEL",
                        help=_("stop texts with words of a file, or that a classifier puts into a class; may be repeated"))
    parser.add_argument("--filter-where", "--filter_where", default="both", choices=["both", "prompts", "answers"],
                        help=_("what filters read"))
    parser.add_argument("--filter-test", "--filter_test", type=Path, metavar="FILE",
                        help=_("do not serve, but measure how often the filters stop texts of this file"))
    parser.add_argument("--audit", type=Path, metavar="FILE", help=_("keep a log of requests, without their texts, that shows "
                                                                     "whether it was changed"))
    parser.add_argument("--check-audit", "--check_audit", type=Path, metavar="FILE",
                        help=_("do not serve, but tell whether such a log was changed"))
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help=_("folder of runs that the page shows (default: the one that "
                                                                      "the run is in); without RUN there is only this page"))
    parser.add_argument("--no-page", "--no_page", action="store_true", help=_("without the page for a browser"))
    parser.add_argument("--length", type=int, help=_("tokens in a row (default: the run's)"))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help=_("arithmetic of the forward pass"))
    parser.add_argument("--slots", type=int, help=_("texts that are continued at a time (default: 8)"))
    parser.add_argument("--queue", type=int, help=_("texts that wait to be continued (default: 64)"))
    parser.add_argument("--patience", type=float, help=_("times of what an answer takes alone, by estimate, that it may take; "
                        "others are refused at once (default: 1.5)"))
    parser.add_argument("--spared", type=float, help=_("seconds of waiting that nobody is refused for (default: 0.25)"))
    parser.add_argument("--max-tokens", "--max_tokens", type=int, help=_("most new tokens of an answer (default: 1024)"))
    parser.add_argument("--inputs", type=int, help=_("most texts of a request (default: 256)"))
    parser.add_argument("--body", type=int, help=_("most bytes of a request (default: 1 MiB)"))
    parser.add_argument("--requests", type=int, help=_("most requests under way (default: 256)"))
    parser.add_argument("--connections", type=int, help=_("most open connections (default: 512)"))
    parser.add_argument("--rate", type=float, help=_("most requests of a key in a minute (default: no limit)"))
    parser.add_argument("--request-seconds", "--request_seconds", type=float, help=_("time for an answer (default: 120)"))
    parser.add_argument("--drain-seconds", "--drain_seconds", type=float,
                        help=_("time for answers under way, after the signal to stop (default: 30)"))


def merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint, or an adapter's folder as PEFT writes it"))
    parser.add_argument("--out", type=Path, help=_("folder for the merged model (default: `merged` in the first)"))
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=_("of the weights written (default: the base's)"))
    parser.add_argument("--tolerance", type=float,
                        help=_("largest difference allowed, as a share of the largest number said (default: by dtype)"))
    limits(parser)


def parity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help=_("run folder, checkpoint, or any exported folder; danlu:PATH, hf:PATH … say what opens it"))
    parser.add_argument("b", help=_("what is compared with it"))
    parser.add_argument("--data", type=Path, help=_("JSON lines with text, messages or ids (default: what the run held out)"))
    compared(parser)


def compared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help=_("most rows to compare on (default: 8)"))
    limits(parser)


def limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                        help=_("what may differ: difference, kl, top1, greedy, ids; may be repeated (default: by the kind)"))


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--to", required=True, choices=["hf", "peft", "onnx", "gguf", "torch-export"], help=_("what is written"))
    parser.add_argument("--out", type=Path, required=True, help=_("new folder to write"))
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=_("of the weights written (default: as they are)"))
    parser.add_argument("--quantize", choices=["int8", "q8_0"], help=_("weights in 8 bits: int8 of ONNX, q8_0 of GGUF"))
    compared(parser)


def lineage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help=_("run folder, checkpoint, exported folder or prepared data"))


def smaller(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--data", help=_("files of rows to calibrate by and to compare on (default: those of the run)"))
    parser.add_argument("--rows", type=int, default=160, help=_("rows that are read of them"))
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help=_("columns by role, as in a recipe"))
    parser.add_argument("--encoding", help=_("encoding of the file, for example gb18030 (default: the recipe's)"))
    parser.add_argument("--format", choices=["txt", "jsonl", "json", "csv", "tsv", "conll", "parquet"],
                        help=_("format of the file (default: by its name)"))
    parser.add_argument("--length", type=int, help=_("tokens in a row (default: the run's)"))
    parser.add_argument("--head", help=_("which of several tasks the rows are of"))


def _layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help=_("folder for the smaller model"))
    parser.add_argument("--keep", nargs="+", default=[], metavar="LAYER",
                        help=_("layers that stay as they are, by name or pattern"))
    parser.add_argument("--also", nargs="+", default=[], metavar="LAYER",
                        help=_("layers beside, such as heads of tasks, which else stay as they are"))
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=_("of what is not packed (default: as it is)"))


def quantize(parser: argparse.ArgumentParser) -> None:
    smaller(parser)
    parser.add_argument("--bits", type=int, choices=[8, 4], help=_("of a weight (default: those it has learned for, else 8)"))
    parser.add_argument("--method", default="rtn", choices=["rtn", "gptq", "awq", "dynamic", "nf4"],
                        help=_("rtn = to nearest; gptq, awq = by rows; dynamic = activations, too; nf4 = normal levels"))
    parser.add_argument("--group", type=int, help=_("weights of a row that share a scale, in 4 bits (default: 64)"))
    parser.add_argument("--embeddings", choices=["int8", "keep"],
                        help=_("the table of tokens and the head of the vocabulary (default: int8)"))
    _layers(parser)


def prune(parser: argparse.ArgumentParser) -> None:
    smaller(parser)
    parser.add_argument("--method", default="magnitude", choices=["magnitude", "wanda", "2:4", "heads", "ffn", "layers"],
                        help=_("single weights (magnitude, wanda, 2:4), or heads of attention, hidden units, blocks"))
    parser.add_argument("--sparsity", type=float, default=0.5, help=_("share that is taken out"))
    parser.add_argument("--packed", action="store_true",
                        help=_("store zeros in a bit each: smaller, but only Danlu opens it (default: as transformers does)"))
    _layers(parser)


def factorize(parser: argparse.ArgumentParser) -> None:
    smaller(parser)
    parser.add_argument("--rank", default="auto", help=_("of every layer, or auto = each layer's by --error"))
    parser.add_argument("--error", type=float, default=0.1, help=_("most that a layer may lose, norm over norm"))
    _layers(parser)


def compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder, checkpoint or Hugging Face folder"))
    parser.add_argument("--target", nargs="+", default=[], metavar="WHAT=MOST",
                        help=_("what it must fit into: size=50MB, latency=5ms"))
    parser.add_argument("--data", required=True, help=_("rows that the quality is measured on"))
    parser.add_argument("--calibrate", help=_("rows to calibrate by (default: those of the run)"))
    parser.add_argument("--rows", type=int, default=160, help=_("rows that are read of them"))
    parser.add_argument("--only", nargs="+", default=[], metavar="WAY",
                        help=_("the ways to try, by name (default: all that make sense)"))
    parser.add_argument("--out", type=Path, help=_("folder for the model that is chosen (default: none is written)"))
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help=_("columns by role, as in a recipe"))
    parser.add_argument("--encoding", help=_("encoding of the file, for example gb18030 (default: the recipe's)"))
    parser.add_argument("--format", choices=["txt", "jsonl", "json", "csv", "tsv", "conll", "parquet"],
                        help=_("format of the file (default: by its name)"))
    split(parser)
    parser.add_argument("--overlong", choices=["error", "cut", "drop", "split"],
                        help=_("what becomes of rows that are too long (default: as the recipe says)"))
    parser.add_argument("--length", type=int, help=_("tokens in a row (default: the run's)"))
    parser.add_argument("--head", help=_("which of several tasks the rows are of"))


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help=_("prepared folder"))
    parser.add_argument("--row", type=int, default=0, help=_("number of the row"))
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help=_("part of a prepared folder"))
    parser.add_argument("--recipe", type=Path, help=_("show the row as this recipe cuts, packs and masks it"))


def report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help=_("run folder"))


def ckpt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["ls", "verify", "hash"], help=_("what to do"))
    parser.add_argument("path", type=Path, help=_("run folder or checkpoint"))


def doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--security", action="store_true", help=_("what is exposed"))


def tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=20, help=_("trials in all, those of earlier commands among them"))
    parser.add_argument("--search", action="append", default=[], metavar="KEY=WHAT",
                        help=_("a key and log(low,high), low..high, low..high:step or [a,b,c]; may be repeated"))
    parser.add_argument("--space", type=Path, help=_("YAML file with the same in a section `search`"))
    parser.add_argument("--metric", default="eval/loss", help=_("what decides; the best evaluation of a trial counts"))
    parser.add_argument("--direction", choices=["minimize", "maximize"], help=_("what is better (default: by the metric's name)"))
    parser.add_argument("--sampler", default="tpe", choices=["tpe", "random", "grid"], help=_("how values are chosen"))
    parser.add_argument("--pruner", choices=["median", "hyperband", "none"],
                        help=_("when a trial is stopped early (default: median, if the recipe evaluates on the way)"))
    parser.add_argument("--timeout", type=float, help=_("seconds after which no new trial begins"))
    parser.add_argument("--seed", type=int, default=0, help=_("same seed, same trials"))
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help=_("folder of the study and its trials"))


def import_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=_("the YAML file"))
    parser.add_argument("--from", dest="tool", required=True, choices=["llamafactory", "axolotl", "trl"],
                        help=_("the tool it is written for"))
    parser.add_argument("--out", type=Path, help=_("write the recipe here (default: print it)"))


def config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["schema", "check"], help=_("what to do"))
    parser.add_argument("--verb", dest="about", default="train", choices=["train", "prepare"], help=_("whose file it is"))
