"""The lists of the migration page are those of the code: what is refused, does nothing, is renamed, missing or new."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from deepspeed.ops.registry import _MISSING
from deepspeed.runtime.config_schema import CLIENT_KEYS, DeepSpeedConfigDocument
from deepspeed.runtime.config_utils import facts_of, walk_fields
from deepspeed.runtime.feature_gates import _FILE_KEYS, _STAGE_3_KEYS, GATES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text()
FACTS = {place: facts_of(model, name) for place, model, name in walk_fields(DeepSpeedConfigDocument)}


def part(name: str) -> str:
    """What stands between a list's marks."""
    return PAGE.split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]


def rows(name: str) -> list[list[str]]:
    """The cells of a marked table, without its head."""
    return cells_of(part(name))


def cells_of(text: str) -> list[list[str]]:
    """The same, of the one table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def quoted(name: str) -> list[str]:
    return re.findall(r"`([^`]+)`", part(name))


def test_refused_keys():
    """Paste from here if it differs: every gate, in the order of the code."""
    expected = [[f"`{gate.key}`", gate.feature, gate.instead] for gate in GATES]
    assert rows("refused keys") == expected, "\n".join("| " + " | ".join(row) + " |" for row in expected)


def test_keys_without_effect():
    expected = [[f"`{place}`", facts.inert] for place, facts in FACTS.items() if facts.inert]
    assert rows("keys without effect") == expected, "\n".join("| " + " | ".join(row) + " |" for row in expected)


def test_renamed_keys():
    expected = []
    for place, facts in FACTS.items():
        if facts.forward is not None:
            section = place.rpartition(".")[0]
            new = f"`{section + '.' if section else ''}{facts.forward.to}`" if facts.forward.to else facts.forward.note
            expected.append([f"`{place}`", new])
    assert rows("renamed keys") == expected, "\n".join("| " + " | ".join(row) + " |" for row in expected)


def test_keys_of_one_stage_or_place():
    assert quoted("stage 3 keys") == list(_STAGE_3_KEYS)
    assert quoted("nvme keys") == list(_FILE_KEYS)
    assert sorted(quoted("client keys")) == sorted(CLIENT_KEYS)


def test_new_keys():
    assert [row[0] for row in rows("new keys")] == [f"`{p}`" for p, facts in FACTS.items() if facts.since == "1.0.0"]


def test_defaults_are_ours():
    models = {place: (model, name) for place, model, name in walk_fields(DeepSpeedConfigDocument)}
    for key, here, _ in rows("defaults"):
        model, name = models[key.strip("`")]
        default = model.model_fields[name].get_default(call_default_factory=True)
        assert here == json.dumps(default), key


def test_missing_optimizers():
    assert [name.lower() for name in quoted("missing optimizers")] == list(_MISSING)


def test_commands():
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].partition("\n[")[0]
    installed = [line.partition(" = ")[0].strip('"') for line in scripts.splitlines() if line]
    assert len(installed) > 5 and [row[0].strip("`") for row in rows("commands")] == installed


@pytest.mark.parametrize("line", quoted("missing calls"))
def test_missing_calls_are_missing(line):
    """What has arrived must leave the list."""
    with pytest.raises((ImportError, AttributeError)):
        exec(line if line.startswith("from") else f"import deepspeed; {line}", {})


# Where the package refuses, and where it says that something does nothing: how the page calls it.
REFUSALS = {
    "deepspeed:initialize": "mesh_param",
    "deepspeed._core.aio.engine:from_config": "aio.use_gds",
    "deepspeed.comm.setup:configure": "comms_logger.enabled",
    "deepspeed.comm.setup:log_summary": "deepspeed.comm.log_summary()",
    "deepspeed.launcher.arguments:check_runner": "--autotuning",
    "deepspeed.nvme.flags:refuse_gds": "--use_gds",
    "deepspeed.nvme.io:_check": "--engine torch_fastio",
    "deepspeed.ops.aio:load": "AsyncIOBuilder().load()",
    "deepspeed.ops.registry:_resolve": "optimizer.type",
    "deepspeed.runtime.activation_checkpointing.checkpointing:configure": "deepspeed.checkpointing.configure",
    "deepspeed.runtime.feature_gates:refuse_missing_features": "key",
    "deepspeed.runtime.zero.shard_homes:_check_nvme": "aio.use_gds",
}
IDLE = {
    "deepspeed.launcher.arguments:check_runner": "--launcher",
    "deepspeed.ops.registry:_resolve_adam": "optimizer.params.adam_w_mode",
    "deepspeed.ops.registry:take_max_grad_norm": "optimizer.params.max_grad_norm",
    "deepspeed.runtime.config_schema:prepare_document": "allgather_size",
    "deepspeed.runtime.config_utils:_forward": "key",
    "deepspeed.runtime.config_utils:_take": "key",
    "deepspeed.runtime.engine_saving:_in_background": "checkpoint.async_save",
    "deepspeed.runtime.feature_gates:inert_settings": "key",
}


def _places(test) -> set[str]:
    """``module:function`` of each node of the package that ``test`` accepts."""
    found = set()
    for path in (ROOT / "deepspeed").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found |= {f"{module}:{function.name}" for node in ast.walk(function) if test(node)}
    return found


def _refuses(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") == "MissingFeatureError"
    )


def _says_no_effect(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " has no effect" in node.value


@pytest.mark.parametrize(
    ("list_name", "known", "test"),
    [("refused calls", REFUSALS, _refuses), ("settings without effect", IDLE, _says_no_effect)],
)
def test_every_refusal_is_on_the_page(list_name, known, test):
    assert _places(test) == set(known), "the page must say it, and this test where it does"
    said = part(list_name)
    assert not [name for name in known.values() if name != "key" and name not in said]


@pytest.mark.parametrize(
    ("page", "begin", "end", "least"),
    [
        ("docs/migration.md", "<!-- figures: begin -->", "<!-- figures: end -->", 13),
        ("README.md", "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->", 30),
        ("docs/zero.md", "Measured here", "Estimates for a model", 9),
    ],
)
def test_figures_are_those_of_the_benchmarks(page, begin, end, least):
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    text = (ROOT / page).read_text().split(begin)[1].split(end)[0]
    cells = [cell for row in cells_of(text) for cell in row[1:]]
    figures = [number for cell in cells for number in re.findall(r"(?<![\w.])\d+\.?\d*", cell)]
    assert len(figures) >= least
    assert not [number for number in figures if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", measured)]
