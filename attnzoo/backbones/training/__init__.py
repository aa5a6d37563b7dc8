"""Training and measuring classifiers: timm's parts on accelerate, behind `attnzoo train classify` and `eval classify`.

    from attnzoo.backbones import training
    data = training.folder_data("imagenette")
    training.train(training.TrainConfig("dinat_mini", epochs=20, mixup=0.2), data, "outputs/dinat")

Needs the extra `train` (accelerate, torchmetrics, matplotlib); importing attnzoo does not.
"""

from attnzoo.backbones.training.config import NEUTRAL, SCHEDULES, TrainConfig
from attnzoo.backbones.training.data import ClassificationData, Pictures, folder_data, hub_data
from attnzoo.backbones.training.evaluation import evaluate
from attnzoo.backbones.training.losses import AUXILIARY, AuxiliaryLoss
from attnzoo.backbones.training.trainer import build, train

__all__ = [
    "AUXILIARY",
    "NEUTRAL",
    "SCHEDULES",
    "AuxiliaryLoss",
    "ClassificationData",
    "Pictures",
    "TrainConfig",
    "build",
    "evaluate",
    "folder_data",
    "hub_data",
    "train",
]
