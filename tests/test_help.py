"""What ``help`` shows: an index of the library, readable defaults, a formula for every method."""

import inspect
import re
import subprocess
import sys

import pytest

import bilb

MODULES = [
    bilb.presets,
    bilb.routers,
    bilb.discrepancies,
    bilb.lower_levels,
    bilb.grams,
    bilb.slopes,
    bilb.curvatures,
    bilb.metrics,
    bilb.names,
    bilb.plots,
]
#: Helpers that a module shares with the rest of the library.
INNER = {"of_linearization", "norms_of_linearization", "of_rows", "products", "norm"}
INNER |= {"known", "current", "in_order", "index", "names_of"}


def functions_of(module):
    """Returns the public functions by name."""
    for name, value in vars(module).items():
        if not inspect.isfunction(value) or name.startswith("_"):
            continue
        if module is bilb or (value.__module__ == module.__name__ and name not in INNER):
            yield name, value


PUBLIC = {name: value for module in (bilb, *MODULES) for name, value in functions_of(module)}
NO_METHODS = {
    *("chain", "loss_transformation", "value_and_grad", "representation_value_and_grad"),
    *("aggregate_by", "task_gradients", "linearize", "pmean_losses", "skip_nonfinite"),
}
METHODS = {name: f for name, f in functions_of(bilb) if name not in NO_METHODS}
METHODS |= dict(functions_of(bilb.lower_levels))


@pytest.mark.parametrize("name", PUBLIC)
def test_defaults_are_readable(name):
    signature = str(inspect.signature(PUBLIC[name]))
    assert not re.search(r"=<|0x[0-9a-f]|=GradientTransformation|=Router\(", signature), signature


@pytest.mark.parametrize("name", PUBLIC)
def test_defaults_that_are_none_are_said(name):
    """An optimiser of None is Adam at some rate, a router, function or way some named one."""
    documented = inspect.getdoc(PUBLIC[name])
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        if parameter.default is not None:
            continue
        entry = re.search(
            rf"^    {parameter.name}: (.*?)(?=^    \S|^\S|\Z)", documented, re.M | re.S
        )
        assert entry, f"{parameter.name} is not documented"
        if "optimizer" in parameter.name:
            assert re.search(r"Adam at [\d.e-]+", " ".join(entry[1].split())), entry[1]
        if parameter.name in ("router", "discrepancy", "slopes", "gram", "curvatures", "sample"):
            assert "if None" in " ".join(entry[1].split()) or "None)" in entry[1], entry[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_formula(name):
    text = inspect.getdoc(METHODS[name]).split("\nArgs:")[0].split("\nReturns:")[0]
    spans = [" ".join(span.split()) for span in re.findall(r"``(.+?)``", text, re.S)]
    symbols = re.compile(r"[Σ∇‖μλ·√Πρᵀ]|[=←∝/] ?[|\w]|\b(log|max|min|softmax)\(")
    calls = [
        span for span in spans if span.startswith(("bilb.", "optax.", "update", "static_args"))
    ]
    formulas = [span for span in spans if span not in calls and symbols.search(span)]
    assert formulas or ".. math::" in text


def test_help_of_the_package_is_an_index():
    words = set(re.findall(r"\w+", bilb.__doc__))
    public = {name for name in vars(bilb) if not name.startswith("_")}
    packages = {"bilevel", "gradient_balancing", "improvable_gap", "loss_balancing"}
    packages |= {
        "training_steps",
        "aggregation",
        "arguments",
        "asking",
        "base",
        "checks",
        "jacobian",
        "normalize",
        "representation",
        "training",
    }
    states = {name for name in public if name.endswith("State")}
    assert public - packages - states <= words
    # And nothing that is not there: every word of the lists, one a line or joined by commas.
    listed = re.findall(r"^    ((?:\w+(?:, |$|\b))+)", bilb.__doc__.split("Drivers\n")[1], re.M)
    named = {word for line in listed for word in re.findall(r"\w+_\w+", line)}
    assert named <= public


@pytest.mark.slow
def test_plots_are_there_and_do_not_import_matplotlib():
    script = (
        "import sys, bilb; bilb.plots.losses_over_time; "
        "assert not {'matplotlib', 'sklearn', 'orbax'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
