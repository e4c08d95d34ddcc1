"""How a config gets in: dict, file, base64; and what is refused."""

from __future__ import annotations

import base64
import json
from collections import OrderedDict
from types import MappingProxyType

import pytest

from deepspeed.errors import ConfigError
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_reader import read_config

SMALL = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def test_dict_is_kept_as_it_is():
    assert read_config(SMALL) is SMALL
    assert DeepSpeedConfig(SMALL).raw is SMALL


@pytest.mark.parametrize("kind", [OrderedDict, MappingProxyType])
def test_other_mappings_are_taken(kind):
    assert read_config(kind(SMALL)) == SMALL


@pytest.mark.parametrize("as_text", [True, False])
def test_file_with_comments_and_trailing_commas(tmp_path, as_text):
    path = tmp_path / "ds.json"
    path.write_text(
        """{
        // a comment
        "train_batch_size": 8, # another
        /* and one
           more */
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8,},
    }"""
    )
    config = DeepSpeedConfig(str(path) if as_text else path)
    assert config.zero_optimization_stage == 2
    assert config.zero_config.reduce_bucket_size == 500_000_000


@pytest.mark.parametrize(
    "text", ['{"train_batch_size": 8, "train_batch_size": 9}', '{"zero_optimization": {"stage": 1, /**/ "stage": 2}}']
)
def test_duplicate_keys_are_refused_by_name(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    twice = "train_batch_size" if "train" in text else "stage"
    with pytest.raises(ConfigError, match=rf"ds\.json: duplicate keys '{twice}'"):
        DeepSpeedConfig(path)


def test_duplicate_keys_are_refused_in_base64():
    with pytest.raises(ConfigError, match="duplicate keys 'a'"):
        read_config(encoded('{"a": 1, "a": 2}'))


def test_base64():
    text = encoded(json.dumps({**SMALL, "wandb": {"project": "~~~???>>>"}}))
    assert "-" in text or "_" in text  # the url-safe alphabet is used
    assert read_config(text)["wandb"] == {"project": "~~~???>>>"}
    assert read_config(text.rstrip("=")) == read_config(text)
    assert DeepSpeedConfig(text).zero_optimization_stage == 2


def test_base64_longer_than_a_path_may_be():
    assert read_config(encoded(json.dumps({"wandb": {"project": "x" * 5000}})))["wandb"]["project"] == "x" * 5000


@pytest.mark.parametrize("bad", [None, 3, ["train_batch_size"], object()])
def test_other_input_is_refused(bad):
    with pytest.raises(ConfigError, match=f"expected a config as a dict.*got {type(bad).__name__}"):
        DeepSpeedConfig(bad)


@pytest.mark.parametrize("bad", ["no/such/file.json", "aGVsbG8=", "\0", ""])
def test_text_that_is_neither_file_nor_base64(bad):
    with pytest.raises(ConfigError, match="neither an existing file"):
        DeepSpeedConfig(bad)


def test_json_text_is_told_what_to_do():
    with pytest.raises(ConfigError, match=r"pass json\.loads"):
        DeepSpeedConfig('{"train_batch_size": 8}')


@pytest.mark.parametrize("text", ['{"a": ', "[1, 2]", '"text"', "{]"])
def test_broken_files_are_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.json"):
        DeepSpeedConfig(path)


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(ConfigError, match=r"weights\.bin cannot be read"):
        DeepSpeedConfig(path)
