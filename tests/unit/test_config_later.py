"""Sections whose model is imported when a document names them or somebody reads them look like any others."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from deepspeed.errors import ConfigError
from deepspeed.runtime import config_schema
from deepspeed.runtime.config import parse_document
from deepspeed.runtime.config_later import is_read
from deepspeed.runtime.config_sections.compression import CompressionConfig
from deepspeed.runtime.config_sections.monitor import CSVConfig
from deepspeed.runtime.config_sections.parallel import PipelineConfig
from deepspeed.runtime.config_utils import StandIn
from deepspeed.runtime.feature_gates import refuse_missing_features


def document(**keys):
    return parse_document(keys)[0]


def test_only_named_sections_are_imported():
    code = (
        "import json, sys; from deepspeed.runtime.config import DeepSpeedConfig;"
        "DeepSpeedConfig({'train_batch_size': 8, 'zero_optimization': {'stage': 2}, 'csv_monitor': {}}, world_size=1);"
        "print(json.dumps([m for m in sys.modules if 'config_sections.' in m or m.endswith('ing.config')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    sections = "deepspeed.runtime.config_sections."
    assert set(json.loads(done.stdout)) == {sections + "aio", sections + "monitor"}


def test_stand_ins_are_of_the_models_that_type_checkers_see():
    """The two branches of ``if TYPE_CHECKING`` name the same classes of the same modules."""
    tree = ast.parse(inspect.getsource(config_schema))
    branch = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    imported = {f"{node.module}:{a.name}" for node in branch.body for a in node.names}
    stand_ins = {node.targets[0].id: ast.literal_eval(node.value.args[0]) for node in branch.orelse}
    assert imported == set(stand_ins.values())
    for name in stand_ins:
        stand_in = getattr(config_schema, name)
        assert issubclass(stand_in, StandIn) and stand_in.model().__name__ == stand_in.__name__ == name


def test_reading_gives_defaults_and_is_not_setting():
    one = document()
    assert not is_read(one, "pipeline") and is_read(one, "fp16") and is_read(one, "sparse_attention")
    assert one.pipeline == PipelineConfig() and type(one.pipeline) is PipelineConfig
    assert is_read(one, "pipeline") and one.pipeline is one.pipeline
    assert one.model_fields_set == set()
    refuse_missing_features(one)
    with pytest.raises(AttributeError, match="no_such"):
        one.no_such  # noqa: B018


def test_named_sections_are_checked_at_once():
    one = document(csv_monitor={"enabled": True, "job_name": "j"}, sparse_attention=None)
    assert is_read(one, "csv_monitor") and type(one.csv_monitor) is CSVConfig and one.csv_monitor.job_name == "j"
    assert one.model_fields_set == {"csv_monitor"} and one.csv_monitor.model_fields_set == {"enabled", "job_name"}
    with pytest.raises(ConfigError) as caught:
        document(csv_monitor={"enabled": 7}, autotuning=3, elasticity={"min_gpus": -1})
    message = str(caught.value)
    assert "csv_monitor.enabled: expected true or false, got 7" in message
    assert "autotuning = 3: expected a section" in message
    assert "elasticity.min_gpus = -1" in message


def test_assignment_is_validated():
    one = document(train_batch_size=8)
    one.gradient_clipping = 2.0  # with the sections not read
    assert not is_read(one, "csv_monitor") and one.gradient_clipping == 2.0
    one.csv_monitor = {"job_name": "j"}
    assert type(one.csv_monitor) is CSVConfig and one.csv_monitor.job_name == "j"
    given = CompressionConfig()
    one.compression_training = given
    assert one.compression_training is given
    with pytest.raises(ValidationError, match="csv_monitor"):
        one.csv_monitor = 7
    assert one.csv_monitor.job_name == "j"


def test_whole_documents_have_all_sections():
    fields = list(config_schema.DeepSpeedConfigDocument.model_fields)
    dumped = document().model_dump()
    assert list(dumped) == fields and dumped["csv_monitor"] == CSVConfig().model_dump()
    assert set(document(train_batch_size=8).model_dump(exclude_defaults=True)) == {
        "train_batch_size",
        "zero_optimization",  # its overlap_comm follows the stage
    }
    assert document(csv_monitor={"job_name": "j"}).model_dump(exclude_unset=True) == {"csv_monitor": {"job_name": "j"}}
    assert [name for name, _ in document()] == fields
    assert "csv_monitor=CSVConfig(enabled=False" in repr(document())


def test_equality_and_copies_do_not_depend_on_what_was_read():
    read, unread = document(), document()
    assert read.pipeline is not None
    assert read == unread and document() != document(csv_monitor={"enabled": True}) and document() != 3
    for make in (copy.copy, copy.deepcopy, lambda one: one.model_copy(), lambda one: pickle.loads(pickle.dumps(one))):
        again = make(document(csv_monitor={"job_name": "j"}))
        assert not is_read(again, "pipeline") and again.pipeline == PipelineConfig()
        assert again.csv_monitor.job_name == "j"
