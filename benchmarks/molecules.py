"""QM9's molecules as graphs, and the message-passing network of the papers' QM9 experiments.

The papers train on the data set as PyTorch Geometric prepares it, whose node and edge features come
from a table of bonds. The ``qm9pack`` wheel has elements and coordinates only: bonds, and what is
made of them, are read off the distances between atoms here (:func:`bonds`). Everything else is the
papers': eleven features per atom, five per edge of the complete graph (kind of bond, distance).

References:
    Gilmer et al., arXiv 1704.01212, the network. Navon et al., arXiv 2202.01017, the experiment.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qm9  # examples/qm9.py: run from a benchmark, whose path has the examples in front

RADII = np.array([0.31, 0.76, 0.71, 0.66, 0.57], np.float32)  # covalent, Angstrom: H, C, N, O, F
#: Length of a bond over the sum of the radii, below which it is triple, double, aromatic, single.
LENGTHS = (0.83, 0.895, 0.945, 1.25)
ATOM_FEATURES, EDGE_FEATURES = 11, 5


class Graphs(NamedTuple):
    """Molecules, padded to the same number of atoms A; element -1 where there is none."""

    elements: np.ndarray  # (N, A) int8
    positions: np.ndarray  # (N, A, 3) Angstrom
    targets: np.ndarray  # (N, 11)


def prepare(size: int) -> dict[str, np.ndarray]:
    """Returns elements, positions and targets of a random sample, the same in every run.

    Energies are in eV, U0 to G as atomisation energies; the rest is in the units of the examples.
    """
    chosen = np.random.default_rng(0).permutation(qm9.NUM_MOLECULES)[:size]
    elements = np.full((size, qm9.MAX_ATOMS), -1, np.int8)
    positions = np.zeros((size, qm9.MAX_ATOMS, 3), np.float32)
    targets = np.zeros((size, len(qm9.TARGETS)))
    for i, (atoms, coordinates, values) in enumerate(qm9.read_molecules(chosen)):
        elements[i, : len(atoms)] = atoms
        positions[i, : len(atoms)] = coordinates
        targets[i] = values
    counts = np.stack([(elements == e).sum(1) for e in range(len(qm9.ELEMENTS))], 1)
    for k, (name, *_) in enumerate(qm9.TARGETS):
        if name in qm9.FREE_ATOMS:
            targets[:, k] -= counts @ np.array(qm9.FREE_ATOMS[name])
    targets *= np.array([factor for _, _, factor, _, _ in qm9.TARGETS])
    order = np.random.default_rng(1).permutation(size)  # file order sorts molecules by size
    return {
        "elements": elements[order],
        "positions": positions[order],
        "targets": targets[order].astype(np.float32),
    }


def load(size: int) -> Graphs:
    """Returns molecules, kept in the user's cache folder."""
    qm9.data_folder()  # says what to install, should that be needed
    import platformdirs

    path = platformdirs.user_cache_path("bilb") / f"qm9-graphs-{size}-v1.bin"
    return Graphs(**qm9.cached(path, lambda: prepare(size)))


def bonds(elements: jax.Array, distances: jax.Array) -> jax.Array:
    """Returns the kind of bond between all atoms of a molecule, one-hot (A, A, 4).

    Single, double, triple, aromatic, by the distance (A, A) over the sum of covalent radii; bonds
    of hydrogen are single. Zeros where there is none.
    """
    present = elements >= 0
    radii = jnp.where(present, jnp.asarray(RADII)[elements], 0.0)
    both = present[:, None] & present & ~jnp.eye(len(elements), dtype=bool)
    ratio = jnp.where(both, distances / jnp.maximum(radii[:, None] + radii, 0.1), jnp.inf)
    heavy = elements > 0
    ratio = jnp.where(heavy[:, None] & heavy, ratio, jnp.where(ratio < LENGTHS[-1], 1.0, jnp.inf))
    triple, double, aromatic, single = (ratio < length for length in LENGTHS)
    kinds = [single & ~aromatic, double & ~triple, triple, aromatic & ~double]
    return jnp.stack(kinds, axis=-1).astype(distances.dtype)


def features(elements: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the features of the atoms (A, 11) and of the edges (A, A, 5) of a molecule.

    Atoms: element one-hot, atomic number, aromatic, sp, sp2, sp3, number of hydrogens bound to it.
    """
    present = elements >= 0
    squares = jnp.sum((positions[:, None] - positions) ** 2, axis=-1)
    distances = jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) * (squares > 0)
    kinds = bonds(elements, distances)
    number = jnp.asarray(np.asarray(qm9.CHARGES, np.float32))[elements]
    degree = kinds.sum(1)  # (A, 4) bonds of each kind
    heavy = elements > 0
    aromatic = heavy & (degree[:, 3] >= 2)
    sp = heavy & ((degree[:, 2] > 0) | (degree[:, 1] > 1))
    sp2 = heavy & ~sp & ((degree[:, 1] > 0) | (degree[:, 3] > 0))
    hydrogens = (kinds.sum(-1) * (elements == 0)).sum(1)
    atom = [
        jax.nn.one_hot(elements, len(qm9.ELEMENTS)),
        jnp.stack([number, aromatic, sp, sp2, heavy & ~sp & ~sp2, hydrogens], axis=-1),
    ]
    return jnp.concatenate(atom, axis=-1) * present[:, None], jnp.concatenate(
        [kinds, distances[..., None]], axis=-1
    )


def _dense(width: int, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """Returns a layer whose kernel starts uniform within one over the root of its inputs."""
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(width, use_bias=use_bias, kernel_init=kernel, name=name)


class EdgeConvolution(nn.Module):
    """Mean over the neighbours j of ``Θ(e_ij) x_j``, plus a linear map of the atom itself.

    Θ is a two-layer network of the edge's features whose output is a matrix (dim, dim). Its second
    layer is linear: ``Θ(e) = Σ_h a_h(e) W_h + B``. Summed over j first, ``Σ_j a_h(e_ij) x_j`` is
    small, and no matrix per edge is ever formed.
    """

    dim: int
    hidden: int = 128

    @nn.compact
    def __call__(self, atoms: jax.Array, edges: jax.Array, joined: jax.Array) -> jax.Array:
        """Returns (A, dim), of atoms (A, dim), edges (A, A, 5) and the mask of edges (A, A)."""
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        activations = nn.relu(_dense(self.hidden, "edge")(edges)) * joined[..., None]
        # Fan-in of the second layer is `hidden`; its output is the flattened matrix.
        kernel = self.param("kernel", uniform, (self.hidden, self.dim * self.dim))
        bias = self.param("bias", nn.initializers.zeros, (self.dim, self.dim))
        neighbours = jnp.maximum(joined.sum(1, keepdims=True), 1)
        summed = jnp.einsum("ijh,jd->ihd", activations, atoms)
        kernel = kernel.reshape(self.hidden, self.dim, self.dim)
        messages = jnp.einsum("ihd,hde->ie", summed, kernel) + (joined @ atoms) @ bias
        return messages / neighbours + _dense(self.dim, "root")(atoms)


class SetToSet(nn.Module):
    """Reads a set of atoms with an LSTM that attends to them in three steps."""

    steps: int = 3

    @nn.compact
    def __call__(self, atoms: jax.Array, present: jax.Array) -> jax.Array:
        """Returns (2 dim,), of atoms (A, dim) and which of them are present (A,)."""
        dim = atoms.shape[-1]
        cell = nn.OptimizedLSTMCell(dim, name="lstm")
        state = (jnp.zeros(dim), jnp.zeros(dim))
        read = jnp.zeros(2 * dim)
        for _ in range(self.steps):
            state, query = cell(state, read)
            scores = jnp.where(present, atoms @ query, -jnp.inf)
            read = jnp.concatenate([query, nn.softmax(scores) @ atoms])
        return read


class MessagePassing(nn.Module):
    """Three rounds of messages and a GRU, a reading of the set of atoms, a linear head per task."""

    num_tasks: int
    dim: int = 64

    @nn.compact
    def __call__(self, elements: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns the outputs (K,) for one molecule."""
        present = elements >= 0
        atoms, edges = features(elements, positions)
        joined = present[:, None] & present & ~jnp.eye(len(elements), dtype=bool)
        joined = joined.astype(atoms.dtype)
        hidden = atoms = nn.relu(_dense(self.dim, "trunk_atoms")(atoms))
        convolution = EdgeConvolution(self.dim, name="trunk_messages")
        gru = nn.GRUCell(self.dim, name="trunk_gru")
        for _ in range(3):
            messages = nn.relu(convolution(atoms, edges, joined))
            hidden, atoms = gru(hidden, messages)
        read = SetToSet(name="trunk_read")(atoms, present)
        read = nn.relu(_dense(self.dim, "trunk_out")(read))
        return _dense(self.num_tasks, "heads")(read)


def trunk(parameters: dict) -> dict:
    """Returns which parameters the tasks share."""
    names = parameters["params"]
    shared = {
        name: jax.tree.map(lambda _, name=name: name.startswith("trunk"), names[name])
        for name in names
    }
    return {"params": shared}
