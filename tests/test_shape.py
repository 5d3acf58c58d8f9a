"""The shape of the code: imports only go down the floors; the rest is printed (`pytest tests/test_shape.py -s`)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "danlu"
FLOORS: dict[str, int] = {                               # the longest matching prefix says where a module lives
    "danlu.words": 0, "danlu.errors": 0, "danlu.config": 0, "danlu.yamls": 0, "danlu.files": 0, "danlu.log": 0,
    "danlu.fault": 0, "danlu.figures": 0, "danlu.layout": 0, "danlu.chance": 0, "danlu.tensorfile": 1,
    "danlu.data": 1, "danlu.nn": 1,
    "danlu.models": 2, "danlu.adapt": 2, "danlu.objectives": 2, "danlu.optim": 2, "danlu.schedule": 2, "danlu.generate": 2,
    "danlu.compress": 2, "danlu.decode": 2, "danlu.parallel": 2, "danlu.evaluate": 3, "danlu.train": 3, "danlu.report": 3,
    "danlu.doctor": 3, "danlu.rehearse": 3, "danlu.planner": 3, "danlu.migrate": 3, "danlu.tune": 3, "danlu.serve": 3,
    "danlu.export": 3, "danlu.quickstart": 4, "danlu.verbs": 4, "danlu.cli": 4, "danlu.__main__": 4,
}
SIBLINGS = {                                             # arrows between rooms of one floor
    ("danlu.train", "danlu.evaluate"), ("danlu.generate", "danlu.models"), ("danlu.parallel", "danlu.models"),
    ("danlu.parallel", "danlu.objectives"), ("danlu.parallel", "danlu.adapt"), ("danlu.adapt", "danlu.models"),
    ("danlu.evaluate", "danlu.train"), ("danlu.train", "danlu.report"), ("danlu.__main__", "danlu.cli"),
    ("danlu.compress", "danlu.models"), ("danlu.compress", "danlu.adapt"),
    ("danlu.rehearse", "danlu.train"), ("danlu.planner", "danlu.rehearse"), ("danlu.planner", "danlu.train"),
    ("danlu.planner", "danlu.doctor"), ("danlu.migrate", "danlu.train"), ("danlu.tune", "danlu.train"),
    ("danlu.decode", "danlu.generate"), ("danlu.decode", "danlu.models"), ("danlu.decode", "danlu.adapt"),
    ("danlu.serve", "danlu.evaluate"), ("danlu.serve", "danlu.train"),
    ("danlu.cli", "danlu.verbs"), ("danlu.quickstart", "danlu.verbs"), ("danlu.export", "danlu.evaluate"),
    ("danlu.export", "danlu.train"), ("danlu.planner", "danlu.rehearse"), ("danlu.planner", "danlu.train"),
    ("danlu.planner", "danlu.doctor"),
}
PATH = ["__main__", "cli", "verbs/train", "train/run", "train/loop", "train/feed", "data/stream", "objectives/lm",
        "train/step", "models/decoder", "nn/attention", "nn/mlp", "nn/head"]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("danlu", *path.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


def room(name: str) -> str | None:
    return next((prefix for prefix in sorted(FLOORS, key=len, reverse=True)
                 if name == prefix or name.startswith(prefix + ".")), None)


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {name for name in found if name.split(".")[0] == "danlu" and name != "danlu"}


def test_every_module_has_a_floor() -> None:
    assert [name for name in modules() if name != "danlu" and room(name) is None] == []


def test_imports_only_go_down() -> None:
    known, wrong = modules(), []
    for name, path in known.items():
        here = room(name)
        if here is None:
            continue
        for target in imports(path, known):
            there = room(target)
            assert there is not None, target
            if there != here and FLOORS[there] >= FLOORS[here] and FLOORS[here] > 0 and (here, there) not in SIBLINGS:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def tops(path: Path) -> set[str]:
    """Packages imported at the top of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    plain = {alias.name.split(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.module or "").split(".")[0] for node in body if isinstance(node, ast.ImportFrom)}


def test_the_ground_floor_and_data_need_no_torch() -> None:
    assert [name for name, path in modules().items() if "torch" in tops(path)
            and (FLOORS.get(room(name) or "", 9) == 0 or name.startswith("danlu.data"))] == []


def test_print_the_shape() -> None:
    known = modules()
    for part in PATH:
        assert (ROOT / f"{part}.py").exists(), part
    reached, todo = set(), ["danlu.train.run"]
    while todo:
        name = todo.pop()
        if name not in reached and name in known:
            reached.add(name)
            todo += imports(known[name], known)
    lines = {name: known[name].read_text().count("\n") for name in known}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{name}.{node.name}") for name, path in known.items()
        for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    longest = max(lines, key=lambda n: lines[n])
    print(f"\nfrom the command line to backward: {len(PATH)} files: {' → '.join(PATH)}")
    print(f"reachable from train: {len(reached)} files, {sum(lines[n] for n in reached)} lines")
    print(f"in all: {len(known)} files, {sum(lines.values())} lines")
    print(f"longest file: {longest}, {lines[longest]} lines; longest function: {max(functions)[1]}, {max(functions)[0]} lines")
    assert lines[longest] <= 400
    assert max(functions)[0] <= 60
