"""What each shared model is for, and how well it does that: one file for each kind of task.

A task feeds a model, in ONNX Runtime or as an artifact, with its data and keeps what the figure needs (`outcome`);
the figure is made of that, and where it says how far from the float model something is, of the float model's too.
"""

from tasks.base import Outcome, Run, Task
from tasks.classification import Classification
from tasks.detection import NanoDet, YoloX
from tasks.embedding import Embedding
from tasks.faces import FaceDetector
from tasks.file_types import FileTypes
from tasks.pictures_out import StyleTransfer, SuperResolution
from tasks.segmentation import Segmentation
from tasks.speech import FramesOfSpeech, SpectrumOfSpeech
from tasks.text import Stories

__all__ = ["TASKS", "Outcome", "Run", "Task"]

_ALL: tuple[Task, ...] = (
    Classification("squeezenet1_1"),
    Classification("mobilenetv2", products=True),
    Classification("mobilenetv1_075"),
    Classification("tiny_darknet"),
    Classification("resnet20_cifar10", products=True),
    Classification("resnet56_cifar10", products=True),
    Classification("mnist_cnn", products=True),
    Embedding("facenet", products=True),
    YoloX("yolox_nano"),
    NanoDet("nanodet_m"),
    FaceDetector("ultraface_rfb320"),
    Segmentation("deeplabv3_mnv2"),
    SuperResolution("super_resolution"),
    StyleTransfer("style_transfer"),
    SpectrumOfSpeech("nsnet2", products=True),
    FramesOfSpeech("gtcrn", products=True),
    Stories("stories260k", products=True),
    FileTypes("magika", products=True),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""By the name of the model."""
