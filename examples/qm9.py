"""QM9 with eleven tasks: properties of molecules whose losses differ by orders of magnitude.

The molecules and their properties come from the ``qm9pack`` wheel, part of the extra ``bench``
(``pip install 'bilb[bench]'``), so nothing is downloaded when the script runs. Each molecule is
described by its atom counts, the eigenvalues of its Coulomb matrix and histograms of its
interatomic distances; a small network with a shared trunk predicts all properties at once. The
prepared descriptors are kept in the user's cache folder.

    python examples/qm9.py                                  # standardised targets, as in the papers
    python examples/qm9.py --targets raw                    # in their units, scales far apart
    python examples/qm9.py --method bilb4mtl --penalty 0.01 --seeds 3
    python examples/qm9.py --method mgda si+mgda --gram sketch --decay 0.99

The setting is a reduced one (4,000 or 8,000 training molecules, a two-layer network), made to
finish in minutes on a laptop. Its numbers rank methods; they are not comparable with published QM9
errors.

References:
    Ramakrishnan et al., "Quantum chemistry structures and properties of 134 kilo molecules",
    Scientific Data 1, 2014.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import experiment
import numpy as np

SIZES = {
    "standardised": dict(train_size=4_000, steps=2_000, hidden=(64, 64)),
    # Adam moves a weight by about the learning rate per step, so a head whose targets are in the
    # hundreds (R2) gets there late, unless the trunk is given up to it: smaller runs end before.
    "raw": dict(train_size=8_000, steps=3_000, hidden=(128, 128)),
}
NUM_MOLECULES = 130_831
SAMPLE = 24_000
TEST = 3_000
FORMAT = 1  # part of the cache's file name: raise it whenever `prepare` changes its output

HARTREE = 27.2114  # eV
BOHR = 0.529177  # Angstrom
ELEMENTS = {"H": 0, "C": 1, "N": 2, "O": 3, "F": 4}
CHARGES = np.array([1.0, 6.0, 7.0, 8.0, 9.0])
MAX_ATOMS = 29
BINS = np.linspace(0.8, 8.0, 21)  # Angstrom; the last bin also takes longer distances

# name, column of the CSV files, factor to the unit trained in, unit shown, factor to that one
TARGETS = (
    ("mu", "Dipole_debye", 1.0, "D", 1.0),
    ("alpha", "Polarizability_bohr3", 1.0, "a0^3", 1.0),
    ("HOMO", "HOMO_au", HARTREE, "meV", 1000.0),
    ("LUMO", "LUMO_au", HARTREE, "meV", 1000.0),
    ("R2", "R2_bohr2", 1.0, "a0^2", 1.0),
    ("ZPVE", "ZPVE_au", HARTREE, "meV", 1000.0),
    ("U0", "InternalEnergy_0K_au", HARTREE, "meV", 1000.0),
    ("U", "InternalEnergy_298K_au", HARTREE, "meV", 1000.0),
    ("H", "Enthalphy_298K_au", HARTREE, "meV", 1000.0),
    ("G", "GibbsFreeEnergy_298K_au", HARTREE, "meV", 1000.0),
    ("cv", "Heatcapacity_Cv_cal_mol_K", 1.0, "cal/mol/K", 1.0),
)
# Energies of the free atoms H, C, N, O, F in Hartree, from QM9's own reference file: subtracting
# them turns total energies into atomisation energies, which is what the papers train on.
FREE_ATOMS = {
    "U0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "U": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "H": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "G": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Eleven molecular properties at once: trains the methods and compares them."""

    seeds: int = 5
    """Number of seeds, trained side by side."""
    targets: Literal["standardised", "raw"] = "standardised"
    """Standardised, as in the papers, or only centred, in D, a0^3, eV, a0^2 and cal/mol/K."""
    output: Path = Path("outputs/qm9")
    """Folder for the table, its numbers and the figure."""


def data_folder() -> Path:
    """Returns the folder of qm9pack's CSV files, found without importing the package.

    Importing it would need ``pkg_resources``, which new environments no longer have.
    """
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "QM9 comes with the package qm9pack, which is not installed: pip install 'bilb[bench]'",
            name="qm9pack",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def read_molecules(chosen: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, list[float]]]:
    """Yields (elements, coordinates in Angstrom, raw targets) of the chosen rows, in file order."""
    wanted = set(chosen.tolist())
    row_number = 0
    for part in (1, 2, 3):
        with open(data_folder() / f"qm9_part{part}.csv", newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            columns = {name: index for index, name in enumerate(next(rows))}
            for row in rows:
                if row_number in wanted:
                    symbols = json.loads(row[columns["Elements"]].replace("'", '"'))
                    yield (
                        [ELEMENTS[symbol] for symbol in symbols],
                        np.array(json.loads(row[columns["XYZ_Ang"]])),
                        [float(row[columns[target[1]]]) for target in TARGETS],
                    )
                row_number += 1
    if row_number != NUM_MOLECULES:
        raise RuntimeError(f"qm9pack holds {row_number} molecules, {NUM_MOLECULES} expected")


def prepare(size: int = SAMPLE) -> Arrays:
    """Returns descriptors (size, D) and targets (size, 11) of a fixed random sample of QM9.

    The rows are in random order, the same in every run. Energies are in eV, U0 to G as atomisation
    energies; the rest is in the units of `TARGETS`.
    """
    chosen = np.random.default_rng(0).permutation(NUM_MOLECULES)[:size]
    elements = np.full((size, MAX_ATOMS), -1)
    positions = np.zeros((size, MAX_ATOMS, 3))
    raw = np.zeros((size, len(TARGETS)))
    for i, (atoms, coordinates, values) in enumerate(read_molecules(chosen)):
        elements[i, : len(atoms)] = atoms
        positions[i, : len(atoms)] = coordinates
        raw[i] = values
    counts = np.stack([(elements == e).sum(1) for e in range(len(ELEMENTS))], 1).astype(float)
    for k, (name, *_) in enumerate(TARGETS):
        if name in FREE_ATOMS:
            raw[:, k] -= counts @ np.array(FREE_ATOMS[name])
    raw *= np.array([factor for _, _, factor, _, _ in TARGETS])

    blocks = [slice(start, start + 1000) for start in range(0, size, 1000)]
    geometry = np.concatenate([descriptors(elements[block], positions[block]) for block in blocks])
    inputs = np.concatenate([counts, geometry], 1)
    inputs = inputs[:, inputs.std(0) > 0]
    # The rows were read in file order, which sorts molecules by size.
    order = np.random.default_rng(1).permutation(size)
    return {"inputs": inputs[order].astype(np.float32), "targets": raw[order].astype(np.float32)}


def descriptors(elements: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns Coulomb-matrix eigenvalues and distance histograms per pair of elements.

    Args:
        elements: (N, MAX_ATOMS) indices into `CHARGES`, -1 where a molecule has no further atom.
        positions: (N, MAX_ATOMS, 3) in Angstrom.
    """
    size, present = len(elements), elements >= 0
    charges = np.where(present, CHARGES[elements], 0.0)
    distances = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    diagonal = np.eye(MAX_ATOMS, dtype=bool)
    coulomb = (
        charges[:, :, None] * charges[:, None] / np.where(diagonal, 1.0, distances / BOHR + 1e-9)
    )
    coulomb = np.where(diagonal, 0.5 * charges[:, :, None] ** 2.4, coulomb)
    eigenvalues = np.linalg.eigvalsh(coulomb)
    by_magnitude = np.argsort(-np.abs(eigenvalues), axis=1)
    eigenvalues = np.take_along_axis(eigenvalues, by_magnitude, 1)

    num_elements, num_bins = len(ELEMENTS), len(BINS) - 1
    molecule, first, second = np.nonzero(
        present[:, :, None] & present[:, None] & np.triu(~diagonal, 1)
    )
    low, high = np.sort([elements[molecule, first], elements[molecule, second]], axis=0)
    distance_bin = np.digitize(distances[molecule, first, second], BINS[1:-1])
    cells = ((molecule * num_elements + low) * num_elements + high) * num_bins + distance_bin
    histograms = np.bincount(cells, minlength=size * num_elements**2 * num_bins)
    return np.concatenate([eigenvalues, histograms.reshape(size, -1)], 1)


def cached(path: Path, prepare: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays kept in a file, preparing and writing them if it is missing or damaged.

    The file begins with the SHA-256 of the rest. It is written under a temporary name and renamed
    when it is complete, so an interrupted run leaves no half-written cache behind.
    """
    arrays = _read_cache(path)
    if arrays is None:
        arrays = prepare()
        _write_cache(path, arrays)
    return arrays


def _read_cache(path: Path) -> Arrays | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        print(f"{path} is damaged and will be prepared anew", file=sys.stderr)
        return None
    with np.load(io.BytesIO(payload)) as stored:
        return dict(stored)


def _write_cache(path: Path, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # The same folder, because a rename is atomic within one file system only.
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name + ".", suffix=".tmp", delete=False
    ) as file:
        try:
            file.write(hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames closed files only
            os.replace(file.name, path)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise


def _remove_leftovers(path: Path, age: float = 3600.0) -> None:
    """Removes temporary files of killed runs; a younger one may belong to a run at work."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > age:
            leftover.unlink(missing_ok=True)


def load() -> Arrays:
    """Returns the prepared sample, from the user's cache folder if it is there."""
    data_folder()  # says what to install, should that be needed
    import platformdirs  # not above: the rest of this file works without it

    path = platformdirs.user_cache_path("bilb") / f"qm9-{SAMPLE}-v{FORMAT}.bin"
    return cached(path, prepare)


def make_problem(options: Options) -> experiment.Problem:
    """Returns the eleven regressions; inputs are standardised, targets as the options say."""
    arrays = load()
    pool, test = slice(TEST, None), slice(None, TEST)
    inputs = _standardised(arrays["inputs"], pool)
    centred = arrays["targets"] - arrays["targets"][pool].mean(0)
    spread = arrays["targets"][pool].std(0)
    if options.targets == "raw":
        spread = np.ones_like(spread)
    targets = centred / spread

    def data(rows: slice) -> experiment.Data:
        return experiment.Data(inputs[rows], tuple(targets[rows].T))

    return experiment.Problem(
        title=f"QM9, {options.targets} targets",
        tasks=tuple(
            experiment.Task(name, unit=unit, scale=float(spread[k] * factor))
            for k, (name, _, _, unit, factor) in enumerate(TARGETS)
        ),
        pool=data(pool),
        test=data(test),
        batch_size=128,
        learning_rate=1e-2,
        **SIZES[options.targets],
    )


def _standardised(values: np.ndarray, rows: slice) -> np.ndarray:
    spread = values[rows].std(0)
    return (values - values[rows].mean(0)) / np.where(spread > 0, spread, 1.0)


if __name__ == "__main__":
    experiment.main(Options, make_problem)
