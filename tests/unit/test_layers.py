"""Imports point downwards only, see docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepspeed"

# The longest matching prefix decides. A module may import its own layer and those below.
LAYERS = {
    "deepspeed": 6,
    "deepspeed.version": 0,
    "deepspeed.errors": 0,
    "deepspeed._core.checksum": 0,
    "deepspeed._core.lazy": 0,
    "deepspeed._core.compat": 0,
    "deepspeed._core.bars": 0,
    "deepspeed._core.pages": 0,
    "deepspeed._core.slurm": 0,
    "deepspeed.utils.logging": 0,
    "deepspeed.accelerator": 0,
    "deepspeed.comm": 0,
    "deepspeed._core.layout": 1,
    "deepspeed._core.precision": 1,
    "deepspeed._core": 2,
    "deepspeed.runtime": 3,
    "deepspeed.ops": 3,
    "deepspeed.checkpoint": 3,
    "deepspeed.utils": 3,
    "deepspeed.runtime.engine": 4,
    "deepspeed.runtime.engine_setup": 4,
    "deepspeed.runtime.engine_checkpoint": 4,
    "deepspeed.runtime.engine_choosing": 4,
    "deepspeed.runtime.engine_loading": 4,
    "deepspeed.runtime.engine_local": 4,
    "deepspeed.runtime.engine_saving": 4,
    "deepspeed.launcher": 5,
    "deepspeed.env_report": 5,
    "deepspeed.nvme": 5,
}
# Lazy packages name submodules as strings; their own imports are of layer 0.
CONFIG_LAYER = 1


def layer_of(module: str) -> int:
    of_config = "config" in module.rsplit(".", 1)[-1] or ".config_sections" in module
    if of_config and module.startswith("deepspeed.runtime") and not module.endswith("config_getters"):
        return CONFIG_LAYER
    if module in ("deepspeed.runtime.batch_triangle", "deepspeed.runtime.feature_gates"):
        return CONFIG_LAYER
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LAYERS:
            return LAYERS[prefix]
    raise AssertionError(module)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports_of(module: str, path: Path) -> list[tuple[int, str]]:
    """Modules of ours that a file imports, with line numbers; imports for type checkers do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("on_first_use", "later") and node.args:
            found.append((node.lineno, ast.literal_eval(node.args[0]).partition(":")[0]))
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append((node.lineno, whole if whole in MODULES else base))
    return [(line, name) for line, name in found if name.split(".")[0] == "deepspeed" and name != module]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    own = layer_of(module)
    wrong = [
        f"{MODULES[module]}:{line}: {module} (layer {own}) imports {name} (layer {layer_of(name)})"
        for line, name in imports_of(module, MODULES[module])
        if name != "deepspeed" and layer_of(name) > own
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    graph = {
        m: {name for _, name in imports_of(m, p) if name in MODULES and name != "deepspeed"} for m, p in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module in done:
            return
        for name in graph[module]:
            visit(name, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_package_raises_instead_of_asserting():
    found = [
        f"{path}:{node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_long_files_say_why():
    for path in MODULES.values():
        text = path.read_text()
        if text.count("\n") > 600:
            doc = ast.get_docstring(ast.parse(text)) or ""
            assert "one file" in doc or "lines" in doc, f"{path} is over 600 lines and its docstring gives no reason"
