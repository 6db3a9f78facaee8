"""The shared ImageNet pictures, and which of them show what detectors know."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from shared_data import SHARED

COCO = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
]  # fmt: skip
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip

COCO_OF: dict[str, tuple[int, ...]] = {
    "bicycle": (444, 671),
    "car": (436, 468, 511, 609, 627, 656, 661, 751, 817),
    "motorcycle": (665, 670),
    "airplane": (404, 895),
    "bus": (654, 779, 874),
    "train": (466, 547, 820),
    "truck": (555, 569, 675, 717, 864, 867),
    "boat": (472, 484, 554, 576, 625, 814, 871, 914),
    "traffic light": (920,),
    "parking meter": (704,),
    "bench": (703,),
    "bird": (*range(7, 9), *range(10, 25), *range(80, 101), *range(127, 147)),
    "cat": tuple(range(281, 286)),
    "dog": tuple(range(151, 269)),
    "horse": (339,),
    "sheep": (348,),
    "cow": (345,),
    "elephant": (385, 386),
    "bear": (294, 295, 296),
    "zebra": (340,),
    "backpack": (414,),
    "umbrella": (879,),
    "tie": (906,),
    "sports ball": (429, 430, 574, 722, 768, 805, 852, 890),
    "tennis racket": (752,),
    "cup": (504, 968),
    "bowl": (659, 809),
    "banana": (954,),
    "apple": (948,),
    "orange": (950,),
    "broccoli": (937,),
    "hot dog": (934,),
    "pizza": (963,),
    "chair": (423, 559, 765),
    "couch": (831,),
    "potted plant": (738,),
    "dining table": (532,),
    "toilet": (861,),
    "tv": (664, 851),
    "laptop": (620, 681),
    "mouse": (673,),
    "remote": (761,),
    "keyboard": (508,),
    "cell phone": (487,),
    "microwave": (651,),
    "toaster": (859,),
    "refrigerator": (760,),
    "clock": (409, 892),
    "vase": (883,),
    "teddy bear": (850,),
    "hair drier": (589,),
}
"""The ImageNet classes whose name is one of COCO's or a kind of it (a beagle is a dog, a goldfinch a bird)."""
VOC_OF = {
    "aeroplane": "airplane", "bicycle": "bicycle", "bird": "bird", "boat": "boat", "bus": "bus", "car": "car",
    "cat": "cat", "chair": "chair", "cow": "cow", "diningtable": "dining table", "dog": "dog", "horse": "horse",
    "motorbike": "motorcycle", "pottedplant": "potted plant", "sheep": "sheep", "sofa": "couch", "train": "train",
    "tvmonitor": "tv",
}  # fmt: skip
BOTTLES = (440, 737, 898, 907)


def coco_pictures() -> list[tuple[Path, int]]:
    """Pictures of COCO-like classes with the class's number."""
    return _labelled({i: COCO.index(name) for name, classes in COCO_OF.items() for i in classes})


def voc_pictures() -> list[tuple[Path, int]]:
    """Pictures of VOC-like classes with the class's number; 0 is background."""
    known = {i: VOC.index(name) for name, coco in VOC_OF.items() for i in COCO_OF[coco]}
    return _labelled({**known, **dict.fromkeys(BOTTLES, VOC.index("bottle"))})


def all_pictures() -> list[Path]:
    """The shared pictures, in the order of labels.csv."""
    return [file for file, _ in _rows()]


def spread(files: Iterable[Path], count: int) -> list[Path]:
    """`count` of the files, evenly spaced."""
    files = list(files)
    return [files[i * len(files) // count] for i in range(count)]


def others(known: Iterable[tuple[Path, int]], count: int) -> list[Path]:
    """`count` pictures that are not among `known`."""
    taken = {file for file, _ in known}
    return spread((file for file in all_pictures() if file not in taken), count)


def stretched(file: Path, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3), RGB."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def padded(file: Path, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 (height, width, 3), RGB, its long side `side`; and that height and width."""
    with Image.open(file) as picture:
        ratio = side / max(picture.size)
        size = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
        resized = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return np.asarray(resized), (resized.height, resized.width)


def cropped(file: Path, side: int) -> np.ndarray:
    """uint8 (side, side, 3), RGB, the centre of a picture whose short side is at least that."""
    with Image.open(file) as picture:
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return np.asarray(picture.convert("RGB").crop((left, top, left + side, top + side)))


def _rows() -> list[tuple[Path, int]]:
    with (SHARED / "images" / "labels.csv").open(newline="") as handle:
        return [(SHARED / "images" / row["file"], int(row["class_index"])) for row in csv.DictReader(handle)]


def _labelled(wanted: dict[int, int]) -> list[tuple[Path, int]]:
    return [(file, wanted[index]) for file, index in _rows() if index in wanted]
