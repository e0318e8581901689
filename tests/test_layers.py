"""The house rules that can be read off the source: import direction, no circles, one name per file."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "liveavatar"
LAYERS = ["core", "config", "telemetry", "ops", "models", "diffusion", "conditioning", "motion", "runtime",
          ("generate", "serving", "training", "evaluation", "display"), "__main__"]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in ([names] if isinstance(names, str) else names)}
MODULES = {
    ".".join(("liveavatar", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, also inside functions; `from a import b` is a.b where that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join((*package, *([node.module] if node.module else [])))
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names}
    return found


def part(module: str) -> str:
    """liveavatar.models.vae -> models"""
    return (module.split(".") + [""])[1]


GRAPH = {name: {m for m in imported(path) if m.startswith("liveavatar.")} for name, path in MODULES.items()}


@pytest.mark.parametrize("module", [m for m in MODULES if part(m)])
def test_imports_point_one_way(module):
    own = part(module)
    assert own in LEVEL, f"{own} has no place in architecture.md section 3"
    for other in GRAPH[module]:
        assert part(other) == own or LEVEL[part(other)] < LEVEL[own], f"{module} imports {other}"


def test_no_circles():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(GRAPH.get(module, ())):
                visit(other)
            done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_training_never_imports_runtime():
    seen, waiting = set(), [m for m in GRAPH if part(m) == "training"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += [m for m in GRAPH.get(module, ()) if m not in seen]
    assert not [m for m in seen if part(m) == "runtime"]


@pytest.mark.parametrize("module", MODULES)
def test_kernels_have_one_door(module):
    outside = {name.split(".")[0] for name in imported(MODULES[module])}
    assert module == "liveavatar.ops" or not outside & {"liveavatar_kernels", "flash_attn"}


def test_files_have_distinct_names():
    files = [p.name for folder in ("liveavatar", "kernels", "tests", "bench") for p in (ROOT / folder).rglob("*.py")]
    twice = [name for name, count in Counter(files).items() if count > 1 and name != "__init__.py"]
    assert not twice


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels package"
