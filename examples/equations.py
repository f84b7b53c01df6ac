"""Partial differential equations with known solutions, for physics-informed networks.

An :class:`Equation` says where to draw points, what should be zero there, and what the solution is.
The solutions owe nothing to networks: they are closed formulas (Poisson, Helmholtz, wave), a
quadrature (Burgers), a spectral solver (Allen-Cahn) and finite differences (the cavity). Where time
is a coordinate it is the first one.

References:
    Raissi et al., *Physics-informed neural networks*, Journal of Computational Physics 378, 2019.
    Wang et al., *When and why PINNs fail to train*, arXiv 2007.14527.
    Wang et al., *Understanding and mitigating gradient pathologies in physics-informed neural
    networks*, arXiv 2001.04536.
    Ghia et al., *High-Re solutions for incompressible flow using the Navier-Stokes equations and a
    multigrid method*, Journal of Computational Physics 48, 1982.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

Array = jax.Array | np.ndarray
Field = Callable[[Array], Array]  # points (N, D) -> values (N, outputs)

DIFFUSION, REACTION = 1e-4, 5.0  # of the Allen-Cahn equation
REYNOLDS = 100.0  # of the cavity


class Box(NamedTuple):
    """Points drawn uniformly between two corners; a side where a coordinate of both is the same."""

    number: int
    low: tuple[float, ...]
    high: tuple[float, ...]


class Reference(NamedTuple):
    """A solution on a grid: ``values[i, j]`` belongs to ``(first[i], second[j])``."""

    first: np.ndarray  # (N,)
    second: np.ndarray  # (M,)
    values: np.ndarray  # (N, M, outputs known)

    def points(self) -> np.ndarray:
        """Returns the points (N M, 2) of the grid."""
        return grid_points(self.first, self.second)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """A boundary value problem: its losses are mean squares of what should be zero."""

    title: str
    coordinates: tuple[str, str]
    losses: tuple[str, ...]  # names, those of the equation itself first
    regions: Mapping[str, tuple[Box, ...]]
    residuals: Callable[[Field, Mapping[str, Array]], tuple[Array, ...]]  # one array per loss
    reference: Callable[[], Reference]
    inside: int = 1  # how many of the losses are of the equation itself
    outputs: int = 1  # of the network; the reference may know fewer, the first ones

    @property
    def corners(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The lowest and the highest corner of the domain."""
        (box,) = self.regions["inside"]
        return box.low, box.high

    def draw(self, key: Array) -> dict[str, Array]:
        """Returns new points (N, 2) in each region."""
        boxes = [box for boxes in self.regions.values() for box in boxes]
        corners = lambda name: np.concatenate([[getattr(b, name)] * b.number for b in boxes])
        low, high = corners("low"), corners("high")
        points = low + (high - low) * jax.random.uniform(key, low.shape)
        ends = np.cumsum([sum(box.number for box in boxes) for boxes in self.regions.values()])
        return dict(zip(self.regions, jnp.split(points, ends[:-1])))

    def task_losses(self, field: Field, points: Mapping[str, Array]) -> Array:
        """Returns the losses (K,) of a field."""
        return jnp.stack([jnp.mean(r**2) for r in self.residuals(field, points)])


def grid_points(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the points (N M, 2) of a grid."""
    return np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)


def derivatives(field: Field, points: Array, coordinate: int) -> tuple[Array, Array, Array]:
    """Returns u, its first and its second derivative by a coordinate, (N, outputs) each."""
    direction = jnp.zeros_like(points).at[:, coordinate].set(1.0)
    along = lambda points: jax.jvp(field, (points,), (direction,))
    (value, first), (_, second) = jax.jvp(along, (points,), (direction,))
    return value, first, second


def boundary(
    number: int, domain: tuple[tuple[float, float], tuple[float, float]], *sides: str
) -> tuple[Box, ...]:
    """Returns sides of a rectangle, of ``number`` points each; all four by default."""
    (a, b), (c, d) = domain
    known = {
        "left": Box(number, (a, b), (a, d)),
        "right": Box(number, (c, b), (c, d)),
        "bottom": Box(number, (a, b), (c, b)),
        "top": Box(number, (a, d), (c, d)),
    }
    return tuple(known[side] for side in sides or known)


def of_formula(
    solution: Field, low: tuple[float, float], high: tuple[float, float], shape: tuple[int, int]
) -> Reference:
    """Returns the values of a formula in float64."""
    first, second = (np.linspace(*ends) for ends in zip(low, high, shape))
    with jax.enable_x64(True):
        values = jax.jit(solution)(grid_points(first, second))
    return Reference(first, second, np.asarray(values).reshape(*shape, -1))


# Poisson and Helmholtz: u = sin(πx) sin(nπy) on [-1, 1]², zero on the boundary.

SQUARE = (-1.0, -1.0), (1.0, 1.0)


def product_of_sines(points: Array, waves: int) -> Array:
    """Returns ``sin(πx) sin(waves πy)`` (N, 1)."""
    x, y = points[:, :1], points[:, 1:]
    return jnp.sin(np.pi * x) * jnp.sin(waves * np.pi * y)


def poisson_solution(points: Array) -> Array:
    """Returns ``sin(πx) sin(πy)`` (N, 1)."""
    return product_of_sines(points, 1)


def helmholtz_solution(points: Array) -> Array:
    """Returns ``sin(πx) sin(2πy)`` (N, 1)."""
    return product_of_sines(points, 2)


def poisson_residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
    """``Δu = f``; u = 0 on the boundary, all sides together."""
    x = points["inside"]
    *_, u_xx = derivatives(field, x, 0)
    *_, u_yy = derivatives(field, x, 1)
    source = -2 * np.pi**2 * poisson_solution(x)
    return u_xx + u_yy - source, field(points["boundary"])


def helmholtz_residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
    """``Δu + u = f``; u = 0 on each side."""
    x = points["inside"]
    *_, u_xx = derivatives(field, x, 0)
    u, _, u_yy = derivatives(field, x, 1)
    source = (1 - 5 * np.pi**2) * helmholtz_solution(x)
    on_sides = (field(points[side]) for side in ("left", "right", "bottom", "top"))
    return u_xx + u_yy + u - source, *on_sides


# Burgers: time in [0, 1], x in [-1, 1].

STRIP = (0.0, -1.0), (1.0, 1.0)


def burgers_solution(points: Array, viscosity: float = 0.01 / np.pi) -> Array:
    """Returns the solution (N, 1) by the Cole-Hopf transformation.

    It is the mean of ``-sin(πy)`` under a density of y, the product of ``exp(-cos(πy) / (2πν))``
    and a Gaussian about x of variance 2νt; the trapezoidal rule gives it to rounding.
    """
    t, x = points[:, :1], points[:, 1:]
    z = np.linspace(-12.0, 12.0, 1201)
    y = x - jnp.sqrt(4 * viscosity * t) * z
    density = jax.nn.softmax(-jnp.cos(np.pi * y) / (2 * np.pi * viscosity) - z**2, axis=1)
    return -jnp.sum(density * jnp.sin(np.pi * y), axis=1, keepdims=True)


def burgers(viscosity: float = 0.01 / np.pi) -> Equation:
    """Returns ``u_t + u u_x = ν u_xx``, u = 0 at both ends, ``u = -sin(πx)`` at first."""

    def residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
        x = points["inside"]
        _, u_t, _ = derivatives(field, x, 0)
        u, u_x, u_xx = derivatives(field, x, 1)
        at_first = points["initial"]
        initial = field(at_first) + jnp.sin(np.pi * at_first[:, 1:])
        return u_t + u * u_x - viscosity * u_xx, field(points["boundary"]), initial

    solution = functools.partial(burgers_solution, viscosity=viscosity)
    return Equation(
        title=f"Burgers equation, viscosity {viscosity:.3g}",
        coordinates=("t", "x"),
        losses=("residual", "boundary", "initial"),
        regions={
            "inside": (Box(128, *STRIP),),
            "boundary": boundary(32, STRIP, "bottom", "top"),
            "initial": boundary(64, STRIP, "left"),
        },
        residuals=residuals,
        reference=functools.cache(lambda: of_formula(solution, *STRIP, (51, 201))),
    )


# Allen-Cahn: time in [0, 1], x in [-1, 1], periodic.


def allen_cahn_initial(x: Array) -> Array:
    """Returns ``x² cos(πx)``."""
    return x**2 * jnp.cos(np.pi * x)


def allen_cahn_residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
    """``u_t = 1e-4 u_xx + 5 (u - u³)``; u and u_x are periodic; ``u = x² cos(πx)`` at first."""
    x = points["inside"]
    _, u_t, _ = derivatives(field, x, 0)
    u, _, u_xx = derivatives(field, x, 1)
    left = points["boundary"]
    at_left, slope_left, _ = derivatives(field, left, 1)
    at_right, slope_right, _ = derivatives(field, left.at[:, 1].set(1.0), 1)
    jumps = jnp.concatenate([at_right - at_left, slope_right - slope_left])
    at_first = points["initial"]
    initial = field(at_first) - allen_cahn_initial(at_first[:, 1:])
    return u_t - DIFFUSION * u_xx - REACTION * (u - u**3), jumps, initial


@functools.cache
def allen_cahn_reference(size: int = 4096, steps_per_time: int = 10) -> Reference:
    """Solves the equation by splitting: diffusion exact in Fourier space, reaction in closed form.

    The initial slope has a jump where the period closes, so that the error falls with about the
    square of the grid's spacing. It is 2e-5 here; that of the splitting is 1e-9.

    Args:
        size: points of the spatial grid that it computes on, of which 128 are returned.
        steps_per_time: steps between two of the 101 times that are returned.
    """
    times = 101
    step = 1 / ((times - 1) * steps_per_time)
    x = np.linspace(-1.0, 1.0, size, endpoint=False)
    wave_numbers = np.pi * np.arange(size // 2 + 1)
    half_diffusion = np.exp(-DIFFUSION * wave_numbers**2 * step / 2)
    growth = np.exp(2 * REACTION * step)

    def diffuse(u):
        return np.fft.irfft(half_diffusion * np.fft.rfft(u), size)

    def react(u):
        return u * np.sqrt(growth / (1 + u**2 * (growth - 1)))

    u = np.asarray(x**2 * np.cos(np.pi * x))
    values = [u]
    for _ in range(times - 1):
        for _ in range(steps_per_time):
            u = diffuse(react(diffuse(u)))
        values.append(u)
    thin = slice(None, None, size // 128)
    return Reference(np.linspace(0.0, 1.0, times), x[thin], np.stack(values)[:, thin, None])


# Waves: time and x in [0, 1].

UNIT_SQUARE = (0.0, 0.0), (1.0, 1.0)


def wave_solution(points: Array, speed: float = 2.0, overtone: int = 4) -> Array:
    """Returns ``sin(πx) cos(πct) + ½ sin(nπx) cos(nπct)`` (N, 1)."""
    t, x = points[:, :1], points[:, 1:]
    mode = lambda n: jnp.sin(n * np.pi * x) * jnp.cos(speed * n * np.pi * t)
    return mode(1) + 0.5 * mode(overtone)


def wave(speed: float = 2.0, overtone: int = 4) -> Equation:
    """Returns ``u_tt = c² u_xx``, u = 0 at both ends, u and u_t = 0 given at first.

    The default is that of arXiv 2007.14527.
    """
    solution = functools.partial(wave_solution, speed=speed, overtone=overtone)

    def residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
        x = points["inside"]
        *_, u_tt = derivatives(field, x, 0)
        *_, u_xx = derivatives(field, x, 1)
        at_first = points["initial"]
        u, u_t, _ = derivatives(field, at_first, 0)
        return u_tt - speed**2 * u_xx, field(points["boundary"]), u - solution(at_first), u_t

    return Equation(
        title=f"Wave equation, speed {speed:g}, overtone {overtone}",
        coordinates=("t", "x"),
        losses=("residual", "boundary", "displacement", "velocity"),
        regions={
            "inside": (Box(128, *UNIT_SQUARE),),
            "boundary": boundary(32, UNIT_SQUARE, "bottom", "top"),
            "initial": boundary(64, UNIT_SQUARE, "left"),
        },
        residuals=residuals,
        reference=lambda: of_formula(solution, *UNIT_SQUARE, (101, 101)),
    )


# The lid-driven cavity: the unit square, whose upper side moves to the right with speed 1.


def cavity_residuals(field: Field, points: Mapping[str, Array]) -> tuple[Array, ...]:
    """The steady Navier-Stokes equations of velocity u, v and pressure p; no slip at the walls."""
    x = points["inside"]
    values, by_x, by_xx = derivatives(field, x, 0)
    _, by_y, by_yy = derivatives(field, x, 1)
    u, v, _ = jnp.split(values, 3, axis=1)
    u_x, v_x, p_x = jnp.split(by_x, 3, axis=1)
    u_y, v_y, p_y = jnp.split(by_y, 3, axis=1)
    u_friction, v_friction, _ = jnp.split((by_xx + by_yy) / REYNOLDS, 3, axis=1)
    along_x = u * u_x + v * u_y + p_x - u_friction
    along_y = u * v_x + v * v_y + p_y - v_friction
    walls = field(points["walls"])[:, :2]
    lid = field(points["lid"])[:, :2] - jnp.array([1.0, 0.0])
    return along_x, along_y, u_x + v_y, walls, lid


@functools.cache
def cavity_reference(cells: int = 128) -> Reference:
    """Solves for the stream function by central differences and Newton's method.

    With ``u = ψ_y`` and ``v = -ψ_x``, the vorticity ``ω = -Δψ`` obeys ``u ω_x + v ω_y = Δω / Re``;
    at a wall it follows from the no-slip condition to first order (Thom's formula).
    """
    h, inner = 1 / cells, cells - 1
    # From values at all nodes of a line, walls included, to derivatives at the inner ones.
    band = lambda *values: scipy.sparse.diags(values, [0, 1, 2], shape=(inner, cells + 1))
    first, second = band(-1.0, 0.0, 1.0) / (2 * h), band(1.0, -2.0, 1.0) / h**2
    keep = band(0.0, 1.0, 0.0)
    kron = functools.partial(scipy.sparse.kron, format="csr")
    by_x, by_y = kron(first, keep), kron(keep, first)
    laplacian = kron(second, keep) + kron(keep, second)
    embed = kron(keep.T, keep.T)  # ψ is zero at the walls

    # ω at all nodes: ω = vorticity ψ + of_lid.
    number = np.arange((cells + 1) ** 2).reshape(cells + 1, cells + 1)
    near = number.copy()
    near[0], near[-1] = number[1], number[-2]
    near[:, 0], near[:, -1] = number[:, 1], number[:, -2]
    at_wall = np.ones(number.shape, bool)
    at_wall[1:-1, 1:-1] = False
    places = number[at_wall], near[at_wall]
    thom = scipy.sparse.csr_matrix(
        (np.full(len(places[0]), -2 / h**2), places), shape=(number.size, number.size)
    )
    vorticity = thom @ embed - embed @ laplacian @ embed
    of_lid = np.zeros(number.shape)
    of_lid[1:-1, -1] = -2 / h
    of_lid = of_lid.ravel()

    of_u, of_v = by_y @ embed, -by_x @ embed
    diagonal = scipy.sparse.diags
    psi = np.zeros(inner**2)
    for _ in range(20):
        omega, u, v = vorticity @ psi + of_lid, of_u @ psi, of_v @ psi
        omega_x, omega_y = by_x @ omega, by_y @ omega
        rest = u * omega_x + v * omega_y - laplacian @ omega / REYNOLDS
        transport = diagonal(u) @ by_x + diagonal(v) @ by_y - laplacian / REYNOLDS
        slope = transport @ vorticity + diagonal(omega_x) @ of_u + diagonal(omega_y) @ of_v
        change = scipy.sparse.linalg.spsolve(slope.tocsc(), rest)
        psi -= change
        if np.abs(change).max() < 1e-10:
            break
    else:
        raise RuntimeError(f"Newton's method did not converge with {cells} cells")

    values = np.zeros((cells + 1, cells + 1, 2))
    values[:, -1, 0] = 1.0
    values[1:-1, 1:-1, 0] = (of_u @ psi).reshape(inner, inner)
    values[1:-1, 1:-1, 1] = (of_v @ psi).reshape(inner, inner)
    line = np.linspace(0.0, 1.0, cells + 1)
    return Reference(line, line, values)


EQUATIONS = {
    "poisson": Equation(
        title="Poisson equation",
        coordinates=("x", "y"),
        losses=("residual", "boundary"),
        regions={
            "inside": (Box(128, *SQUARE),),
            "boundary": boundary(16, SQUARE),
        },
        residuals=poisson_residuals,
        reference=lambda: of_formula(poisson_solution, *SQUARE, (101, 101)),
    ),
    "helmholtz": Equation(
        title="Helmholtz equation",
        coordinates=("x", "y"),
        losses=("residual", "left", "right", "bottom", "top"),
        regions={
            "inside": (Box(128, *SQUARE),),
            **{side: boundary(32, SQUARE, side) for side in ("left", "right", "bottom", "top")},
        },
        residuals=helmholtz_residuals,
        reference=lambda: of_formula(helmholtz_solution, *SQUARE, (101, 101)),
    ),
    "burgers": burgers(),
    "burgers_viscous": burgers(0.1 / np.pi),
    "allen_cahn": Equation(
        title="Allen-Cahn equation",
        coordinates=("t", "x"),
        losses=("residual", "periodic", "initial"),
        regions={
            "inside": (Box(128, *STRIP),),
            "boundary": boundary(32, STRIP, "bottom"),
            "initial": boundary(64, STRIP, "left"),
        },
        residuals=allen_cahn_residuals,
        reference=allen_cahn_reference,
    ),
    "wave": wave(),
    "wave_slow": wave(speed=0.5, overtone=2),
    "navier_stokes_cavity": Equation(
        title="Navier-Stokes equations in a lid-driven cavity, Re = 100",
        coordinates=("x", "y"),
        losses=("momentum x", "momentum y", "continuity", "walls", "lid"),
        regions={
            "inside": (Box(128, *UNIT_SQUARE),),
            "walls": boundary(32, UNIT_SQUARE, "left", "right", "bottom"),
            "lid": boundary(32, UNIT_SQUARE, "top"),
        },
        residuals=cavity_residuals,
        reference=cavity_reference,
        inside=3,
        outputs=3,
    ),
}
