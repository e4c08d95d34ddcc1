"""Every documented key exists, with its documented default, and a document that sets them all is read.

The list, ``tests/data/config-keys.txt``, is a transcription of the key tables of the documents, not made from the
models; `-` stands for a key without a default (null, required, or a section that is absent).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch

from deepspeed.runtime.config import parse_document
from deepspeed.runtime.config_schema import DeepSpeedConfigDocument
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, facts_of, field_names, nested_model, walk_fields

# Keys of this implementation, which the documents do not have.
OWN_KEYS = {
    "strict",
    "verify_gradients",
    "hang_timeout_s",
    "fp16.consecutive_skip_limit",
    "zero_optimization.offload_optimizer.buffer_size",
    "checkpoint.async_save",
    "checkpoint.keep_last",
    "checkpoint.verify_checksums",
}
LISTED = (Path(__file__).parents[1] / "data" / "config-keys.txt").read_text()
ENTRIES = [tuple(line.split(" ", 1)) for line in LISTED.splitlines()]


def find(place: str) -> tuple[type[DeepSpeedConfigModel], str]:
    """The model and field of a place, where aliases count."""
    model: type[DeepSpeedConfigModel] = DeepSpeedConfigDocument
    *path, last = place.split(".")
    for part in path:
        if part in ("<name>", "<i>"):
            continue
        nested = nested_model(model, field_names(model)[part])
        assert nested is not None, place
        model = nested[1]
    return model, last


@pytest.mark.parametrize(("place", "default"), ENTRIES, ids=[place for place, _ in ENTRIES])
def test_documented_key_has_its_documented_default(place, default):
    model, last = find(place)
    assert last in field_names(model), f"{place} is missing; known: {sorted(field_names(model))}"
    if place == "zero_optimization.overlap_comm":
        assert model().overlap_comm is False and model(stage=3).overlap_comm is True
        return
    value = model.model_fields[field_names(model)[last]].get_default(call_default_factory=True)
    if isinstance(value, torch.dtype):
        value = {torch.float32: "fp32", torch.float16: "fp16"}[value]
    if isinstance(value, Enum):
        value = value.value
    if default == "-":
        assert value is None or repr(value) == "PydanticUndefined"
    elif default == "...":
        assert len(value) == 3 and all("SparseMoeBlock" in name for name in value)
    else:
        assert value == json.loads(default) and type(value) is not type(None)


def test_no_key_is_undocumented():
    known = {place for place, _ in ENTRIES} | OWN_KEYS
    for place, model, name in walk_fields(DeepSpeedConfigDocument):
        if nested_model(model, name) is not None and any(k.startswith(place + ".") for k in known):
            continue
        # The generic group and mixture models have a few keys more than the documents give each method.
        extra = r"\.related_modules$|fp16_mixed_quantize\.quantize_change_ratio$"
        assert place in known or re.search(extra, place), place


def test_every_key_has_a_description_and_a_release():
    for place, model, name in walk_fields(DeepSpeedConfigDocument):
        assert model.model_fields[name].description, place
        assert facts_of(model, name).since, place


def test_a_document_with_every_key_is_read():
    """Each documented name, aliases too, one at a time, at its default: no error, nothing unknown."""
    for place, default in ENTRIES:
        if default in ("-", "..."):
            continue
        value = json.loads(default)
        for part in reversed(place.split(".")):
            value = [value] if part == "<i>" else {part: value}
        if "<name>" in place or place.startswith("compression_training."):
            continue  # these sections have required keys beside; see below
        _, report = parse_document(value)
        assert not report.unknown, (place, report.unknown)


def test_sections_with_required_keys_are_read():
    groups = {"g1": {"params": {"dense_ratio": 0.5}, "modules": ["a", "b"], "related_modules": [["c"]]}}
    pruning = {"shared_parameters": {"enabled": True, "schedule_offset": 5}, "different_groups": groups}
    document, report = parse_document(
        {
            "compression_training": {
                "layer_reduction": {"enabled": True, "keep_number_layer": 2, "teacher_layer": [1, 3]},
                "weight_quantization": {
                    "shared_parameters": {"enabled": True, "fp16_mixed_quantize": {"enabled": True}},
                    "different_groups": {"w": {"params": {"start_bits": 8, "target_bits": 4}}},
                },
                "activation_quantization": {
                    "shared_parameters": {"enabled": True},
                    "different_groups": {"a": {"params": {"bits": 8}, "modules": "attention"}},
                },
                "sparse_pruning": pruning,
                "row_pruning": pruning,
                "channel_pruning": pruning,
                "head_pruning": {
                    "shared_parameters": {"enabled": True, "num_heads": 12},
                    "different_groups": groups,
                },
            },
            "data_efficiency": {
                "data_sampling": {
                    "curriculum_learning": {
                        "enabled": True,
                        "curriculum_metrics": {
                            "seqlen": {
                                "difficulty_type": "value",
                                "schedule_type": "fixed_root",
                                "schedule_config": {"total_curriculum_step": 1e4, "root_degree": 2},
                            }
                        },
                    }
                }
            },
            "tensor_parallel": {"partition_config": {"layer_specs": [{"patterns": ["q_proj"], "shape": [2, -1]}]}},
        }
    )
    assert not report.unknown
    compression = document.compression_training
    assert compression.activation_quantization.different_groups["a"].modules == ["attention"]
    assert compression.weight_quantization.different_groups["w"].modules == ["*"]
    assert compression.row_pruning.different_groups["g1"].params.dense_ratio == 0.5
    metric = document.data_efficiency.data_sampling.curriculum_learning.curriculum_metrics["seqlen"]
    assert metric.schedule_config.total_curriculum_step == 10_000
    assert document.tensor_parallel.partition_config.layer_specs[0].patterns == ["q_proj"]


def test_typos_deep_inside_maps_and_lists_are_found():
    _, report = parse_document(
        {
            "data_efficiency": {
                "data_sampling": {"curriculum_learning": {"curriculum_metrics": {"m": {"min_dificulty": 1}}}}
            },
            "tensor_parallel": {"partition_config": {"layer_specs": [{}, {"paterns": []}]}},
        }
    )
    assert report.unknown == [
        (
            "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.m.min_dificulty",
            "; did you mean 'data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.m.min_difficulty'?",
        ),
        (
            "tensor_parallel.partition_config.layer_specs.1.paterns",
            "; did you mean 'tensor_parallel.partition_config.layer_specs.1.patterns'?",
        ),
    ]


def test_the_committed_reference_is_current():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "make_config_reference.py"), "--check"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
