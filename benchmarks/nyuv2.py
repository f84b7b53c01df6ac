"""NYU-v2 with three tasks: 13 classes, depth and surface normals of indoor scenes.

SegNet-MTAN by the protocol of Nash-MTL, FAMO and LDC-MTL: 795 images for training, 654 for tests,
batches of 2, Adam at 1e-4 (LDC-MTL: 8e-5), halved after 100 of 200 epochs, random crops and
mirrors; the result is the mean over the last ten epochs. Δm is against their single-task networks.

The data cannot come with a package. Download the preprocessed NYU-v2 of
https://github.com/lorenmt/mtan and unpack it to DATA/train and DATA/val, each with folders image,
label, depth and normal of 288 x 384 arrays 0.npy, 1.npy, ...:

    python benchmarks/nyuv2.py --data DATA
    python benchmarks/nyuv2.py --data DATA --methods bilb4mtl_nyuv2 --learning-rate 8e-5

This was tested on generated data in that layout only; no result of it is known.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dense
import tyro

NYUV2 = dense.DataSet(
    title="NYU-v2",
    folders={"image": "image", "semantic": "label", "depth": "depth", "normal": "normal"},
    channels={"semantic": 13, "depth": 1, "normal": 3},
    base=(0.3830, 0.6376, 0.6754, 0.2780, 25.01, 19.21, 0.3014, 0.5720, 0.6915),
    published={
        "ls": 5.59,
        "si": 4.39,
        "rlw": 7.78,
        "dwa": 3.57,
        "uw": 4.05,
        "famo": -4.10,
        "mgda": 1.38,
        "pcgrad": 3.97,
        "cagrad": 0.20,
        "imtl_g": -0.76,
        "nash_mtl": -4.04,
        "fairgrad": -4.66,
        "bilb4mtl_nyuv2": -4.40,
    },
    preset="bilb4mtl_nyuv2",
    download="Download the preprocessed NYU-v2 of https://github.com/lorenmt/mtan and unpack it so "
    "that there are train/ and val/, each with image/, label/, depth/ and normal/ of 0.npy, ...",
)


@dataclasses.dataclass(frozen=True)
class Options(dense.Options):
    """Trains on three tasks of NYU-v2 by the protocol of the papers."""

    output: Path = Path("outputs/nyuv2")
    """Folder for the runs, their checkpoints and the table."""


if __name__ == "__main__":
    dense.main(tyro.cli(Options), NYUV2)
