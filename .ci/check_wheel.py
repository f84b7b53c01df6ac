"""Checks an installed wheel: typed, without extras, and no slower to import than promised.

CPU seconds of whole processes are compared, the least of several, so that other load counts little.
"""

import importlib.util
import pathlib
import resource
import subprocess
import sys

LIMIT = 1.5  # times the import of jax and optax


def seconds(imports: str) -> float:
    """Returns the CPU seconds of a fresh interpreter that imports these."""
    usage = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = usage()
    subprocess.run([sys.executable, "-c", f"import {imports}"], check=True)
    return usage() - before


def main() -> None:
    """Prints the ratio; exits with an error where something is wrong."""
    spec = importlib.util.find_spec("bilb")
    assert spec is not None
    assert spec.origin is not None
    package = pathlib.Path(spec.origin).parent
    assert package.parent.name == "site-packages", f"not the wheel: {package}"
    assert (package / "py.typed").exists(), "py.typed is not in the wheel"
    assert importlib.util.find_spec("matplotlib") is None, "the environment has extras"
    times = {name: [seconds(name) for _ in range(5)] for name in ("jax, optax", "jax, optax, bilb")}
    base, ours = map(min, times.values())
    print(f"import jax, optax: {base:.2f} s; with bilb: {ours:.2f} s; ratio {ours / base:.2f}")
    if ours > LIMIT * base:
        sys.exit(f"import bilb takes more than {LIMIT} times as long")


if __name__ == "__main__":
    main()
