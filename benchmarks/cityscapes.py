"""Cityscapes with two tasks: 7 classes and disparity of street scenes.

SegNet-MTAN by the protocol of FAMO and LDC-MTL: 2,975 images for training, 500 for tests, batches
of 8, Adam at 1e-4 (LDC-MTL: 3e-4), halved after 100 of 200 epochs, random crops and mirrors; the
result is the mean over the last ten epochs. Δm is against their single-task networks.

The data cannot come with a package. Download the preprocessed Cityscapes of
https://github.com/lorenmt/mtan and unpack it to DATA/train and DATA/val, each with folders image,
label_7 and depth of 128 x 256 arrays 0.npy, 1.npy, ...:

    python benchmarks/cityscapes.py --data DATA
    python benchmarks/cityscapes.py --data DATA --methods bilb4mtl_cityscapes --learning-rate 3e-4

This was tested on generated data in that layout only; no result of it is known.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dense
import tyro

CITYSCAPES = dense.DataSet(
    title="Cityscapes",
    folders={"image": "image", "semantic": "label_7", "depth": "depth"},
    channels={"semantic": 7, "depth": 1},
    base=(0.7401, 0.9316, 0.0125, 27.77),
    published={
        "ls": 22.60,
        "si": 14.11,
        "rlw": 24.38,
        "dwa": 21.45,
        "uw": 5.89,
        "famo": 8.13,
        "mgda": 44.14,
        "pcgrad": 18.29,
        "cagrad": 11.64,
        "imtl_g": 11.10,
        "nash_mtl": 6.82,
        "fairgrad": 5.18,
        "bilb4mtl_cityscapes": -0.57,
    },
    preset="bilb4mtl_cityscapes",
    download="Download the preprocessed Cityscapes of https://github.com/lorenmt/mtan and unpack "
    "it so that there are train/ and val/, each with image/, label_7/ and depth/ of 0.npy, ...",
)


@dataclasses.dataclass(frozen=True)
class Options(dense.Options):
    """Trains on two tasks of Cityscapes by the protocol of the papers."""

    batch_size: int = 8
    """Images per step."""
    output: Path = Path("outputs/cityscapes")
    """Folder for the runs, their checkpoints and the table."""


if __name__ == "__main__":
    dense.main(tyro.cli(Options), CITYSCAPES)
