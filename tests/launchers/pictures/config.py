from __future__ import annotations

from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict


class Data(Strict):
    path: FolderPath
    img_size: int
    train_size: int | None = None
    val_size: int | None = None


class Model(Strict):
    arch: str
    pretrained: bool
    load_model: FolderPath | None = None
    frozen: bool = False
    export_onnx: bool
    project_name: str
    task_name: str | None = None
    upload: bool = True
