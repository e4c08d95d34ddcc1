"""ds_io and ds_nvme_tune: what they print, write, leave behind and refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deepspeed.errors import ConfigError
from deepspeed.nvme import io, tune
from deepspeed.nvme.sizes import parse_nbytes
from deepspeed.runtime.config_sections.aio import AioConfig

SMALL = ["--io_size", "256K", "--loops", "2", "--block_size", "64K"]


def test_sizes():
    assert parse_nbytes("400M") == 400 << 20
    assert [parse_nbytes(text) for text in ("1", "7b", "2k", "2KB", "2KiB", " 3g ", "1T")] == [
        1,
        7,
        2048,
        2048,
        2048,
        3 << 30,
        1 << 40,
    ]
    for wrong in ("", "M", "0", "-1", "1.5M", "1X", "1MM", "²"):
        with pytest.raises(ValueError, match="whole number"):
            parse_nbytes(wrong)


def test_commands_are_installed():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'ds_io = "deepspeed.nvme.io:main"' in text
    assert 'ds_nvme_tune = "deepspeed.nvme.tune:main"' in text


@pytest.mark.parametrize("read", [[], ["--read"]], ids=["write", "read"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--engine", "aio_basic"],
        ["--engine", "torch_io", "--torch_legacy_save"],
        ["--sequential_requests", "--single_submit", "--io_parallel", "2"],
        ["--different_file_each_iteration", "--include_warmup_time", "--use_accelerator_pin_memory"],
    ],
    ids=lambda flags: " ".join(flags) or "plain",
)
def test_ds_io_prints_one_rate_and_leaves_nothing(tmp_path, capsys, flags, read):
    assert io.main(["--folder", str(tmp_path), *SMALL, "--validate", *read, *flags]) == 0
    out, err = capsys.readouterr()
    loops = 3 if "--include_warmup_time" in flags else 2
    assert f"262144 bytes a file, {loops} loop(s): " in out and out.endswith(" GB/sec\n")
    assert ("read" if read else "write") in out
    assert not err  # a progress bar is for terminals
    assert not list(tmp_path.iterdir())


def test_ds_io_uses_every_folder(tmp_path, capsys, monkeypatch):
    used = []
    for name in "ab":
        (tmp_path / name).mkdir()
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: (used.append(Path(path).parent.name), unlink(path)))
    io.main(["--folder_to_device_mapping", f"{tmp_path}/a:0", f"{tmp_path}/b:1", *SMALL])
    assert sorted(used) == ["a", "b"]
    assert "GB/sec" in capsys.readouterr().out


@pytest.mark.slow
def test_ds_io_in_two_processes(tmp_path, capfd):
    io.main(["--folder", str(tmp_path), *SMALL, "--multi_process", "2", "--read"])
    assert "2 process(es)" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_gds"], "--use_gds: GPUDirect Storage is not in this version"),
        (["--engine", "torch_fastio"], "torch_fastio is not in this version"),
        (["--fast_io_size", "1M"], "--fast_io_size has a meaning with --engine torch_fastio only"),
        (["--slow_bounce_buffer"], "--slow_bounce_buffer has a meaning with --gpu only"),
        (["--torch_legacy_save"], "--torch_legacy_save has a meaning with --engine torch_io only"),
        (["--engine", "aio_basic", "--io_parallel", "2"], "--io_parallel has a meaning with --engine aio_handle"),
        (["--multi_process", "0"], "--multi_process must be at least 1, but is 0"),
        (["--folder", "/missing"], "--folder: '/missing' is not a folder"),
        (["--folder_to_device_mapping", "x:0"], "either --folder or"),
    ],
)
def test_ds_io_refuses_with_the_flag_and_the_reason(tmp_path, flags, message):
    with pytest.raises(SystemExit) as caught:
        io.main(["--folder", str(tmp_path), *SMALL, *flags])
    assert str(caught.value).startswith("ds_io: error: ") and message in str(caught.value)


def test_gpus_are_asked_for_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command, flags in ((io, ["--folder", str(tmp_path), *SMALL]), (tune, ["--nvme_dir", str(tmp_path)])):
        with pytest.raises(SystemExit, match="--gpu: torch finds no CUDA device"):
            command.main([*flags, "--gpu"])


def run_tune(tmp_path, *flags):
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"block_size": ["64K", 131072], "queue_depth": [2], "io_parallel": 1}))
    disk = tmp_path / "disk"
    disk.mkdir()
    logs = tmp_path / "logs"
    args = ["--nvme_dir", str(disk), "--io_size", "512K", "--sweep_config", str(sweep), "--log_dir", str(logs)]
    assert tune.main([*args, *flags]) == 0
    assert not list(disk.iterdir())
    return logs


def test_ds_nvme_tune_prints_and_writes_the_best_section(tmp_path, capsys):
    logs = run_tune(tmp_path)
    out, err = capsys.readouterr()
    assert not err
    first, second, section = out.split("\n", 2)
    assert first == f"Running DeepNVMe performance tuning on ['{tmp_path}/disk']"
    assert second.startswith("Best performance (GB/sec): read = ") and ", write = " in second
    aio = json.loads(section)["aio"]
    assert list(aio) == ["single_submit", "overlap_events", "intra_op_parallelism", "queue_depth", "block_size"]
    assert (aio["single_submit"], aio["overlap_events"], aio["queue_depth"]) == ("false", "true", 2)
    assert AioConfig(**aio).block_size in (65536, 131072)
    assert json.loads((logs / tune.BEST_NAME).read_text()) == {"aio": aio}
    results = json.loads((logs / tune.RESULTS_NAME).read_text())
    assert [row["aio"]["block_size"] for row in results] == [65536, 131072]
    assert all(row["read"] > 0 and row["write"] > 0 for row in results)


def test_ds_nvme_tune_measures_what_is_wanted(tmp_path, capsys):
    logs = run_tune(tmp_path, "--no_read", "--loops", "2", "--verbose")
    out = capsys.readouterr().out
    assert "read =" not in out and "write =" in out
    assert out.count('"read": null') == 2
    assert all(row["read"] is None for row in json.loads((logs / tune.RESULTS_NAME).read_text()))


def test_best_is_the_least_time_for_both():
    rows = [
        {"aio": {"n": 1}, "read": 9.0, "write": 1.0},
        {"aio": {"n": 2}, "read": 3.0, "write": 3.0},
        {"aio": {"n": 3}, "read": 1.0, "write": 9.0},
    ]
    assert tune.best_setting(rows) == {"n": 2}
    assert tune.best_setting([{**row, "write": None} for row in rows]) == {"n": 1}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"depth": [1]}, "'depth' is unknown"),
        ({"queue_depth": [0]}, "queue_depth must be a whole number above 0, but is 0"),
        ({"block_size": ["1X"]}, "block_size"),
        ({"single_submit": ["maybe"]}, "single_submit must be true or false, but is 'maybe'"),
    ],
)
def test_a_sweep_is_checked(sweep, message):
    with pytest.raises(ConfigError, match=message):
        tune.settings_of(sweep)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gds"], "--gds: GPUDirect Storage is not in this version"),
        (["--no_read", "--no_write"], "leave nothing to measure"),
        (["--loops", "0"], "--loops must be at least 1"),
        (["--sweep_config", "/missing.json"], "/missing.json"),
    ],
)
def test_ds_nvme_tune_refuses_with_the_flag_and_the_reason(tmp_path, flags, message):
    with pytest.raises(SystemExit) as caught:
        tune.main(["--nvme_dir", str(tmp_path), "--log_dir", str(tmp_path / "logs"), *flags])
    assert str(caught.value).startswith("ds_nvme_tune: error: ") and message in str(caught.value)


def test_the_page_cache_is_flushed_by_root_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_DROP_CACHES", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="can be written by root only"):
        tune.main(["--nvme_dir", str(tmp_path), "--flush_page_cache"])
