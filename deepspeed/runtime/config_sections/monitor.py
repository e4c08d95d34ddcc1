"""``tensorboard``, ``wandb``, ``csv_monitor`` and ``comet``: where training curves go."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepspeed.runtime.config_types import Bool, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["CSVConfig", "CometConfig", "TensorBoardConfig", "WandbConfig"]


class TensorBoardConfig(DeepSpeedConfigModel):
    """Event files for TensorBoard."""

    place: ClassVar[str] = "tensorboard"

    enabled: Bool = key(False, "Write TensorBoard events.")
    output_path: str = key("", "Folder; empty = under the folder the job was started from.")
    job_name: str = key("DeepSpeedJobName", "Sub-folder of output_path.")


class WandbConfig(DeepSpeedConfigModel):
    """Weights & Biases."""

    place: ClassVar[str] = "wandb"

    enabled: Bool = key(False, "Log to Weights & Biases.")
    group: str | None = key(None, "Group of runs.")
    team: str | None = key(None, "Team that owns the project.")
    project: str = key("deepspeed", "Project.")


class CSVConfig(DeepSpeedConfigModel):
    """Plain CSV files."""

    place: ClassVar[str] = "csv_monitor"

    enabled: Bool = key(False, "Write CSV files.")
    output_path: str = key("", "Folder; empty = under the folder the job was started from.")
    job_name: str = key("DeepSpeedJobName", "Sub-folder of output_path.")


class CometConfig(DeepSpeedConfigModel):
    """Comet. Unset values come from the COMET_* environment."""

    place: ClassVar[str] = "comet"

    enabled: Bool = key(False, "Log to Comet.", since="0.14.3")
    samples_log_interval: PosInt = key(100, "Samples between submissions.", since="0.14.3")
    project: str | None = key(None, "Project.", since="0.14.3")
    workspace: str | None = key(None, "Workspace.", since="0.14.3")
    api_key: str | None = key(None, "API key.", since="0.14.3")
    experiment_name: str | None = key(None, "Name of the experiment.", since="0.14.3")
    experiment_key: str | None = key(
        None, "Key of the experiment, 32 to 50 letters and digits.", since="0.14.3", pattern=r"^[A-Za-z0-9]{32,50}$"
    )
    online: Bool | None = key(None, "Online or offline; unset = online.", since="0.14.3")
    mode: Literal["get", "create", "get_or_create"] | None = key(
        None, "Continue an experiment or start one; unset = get_or_create.", since="0.14.3"
    )
