"""Every form: gradient, printed formula, inverse, limits."""

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.laws.forms import FORMS, Shape, form_named

U = np.linspace(-3, 3, 13)
X_REF = 1e18
THETA = {
    "power": [4.0, 0.02],
    "saturating": [0.5, 1.2, -1.5],
    "shifted": [0.5, 1.2, -1.5, -0.5],
    "m4": [0.6, -2.0, -1.5, 0.3],
    "broken": [4.0, 0.05, 0.01, 0.2],
}
SHAPES = [Shape(True, True, -2, 2), Shape(False, True, -2, 2), Shape(True, False, -2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=["accuracy", "error", "unbounded"])
@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_is_the_derivative(name, shape):
    form, theta = form_named(name), np.array(THETA[name])
    value, gradient = form.value(theta, U, shape)
    assert gradient.shape == (len(U), form.n_params)
    for i in range(form.n_params):
        step = np.zeros(form.n_params)
        step[i] = 1e-6
        slope = (form.value(theta + step, U, shape)[0] - form.value(theta - step, U, shape)[0]) / 2e-6
        assert gradient[:, i] == pytest.approx(slope, rel=1e-5, abs=1e-6)
    batch, _ = form.value(np.stack([theta, theta]), U, shape)
    assert batch == pytest.approx(np.stack([value, value]))


def printed(name, p, x):
    """The formulas as the user reads them."""
    if name == "power":
        return p["C"] * x ** p["alpha"]
    if name == "saturating":
        return p["E"] - p["A"] * x ** -p["alpha"]
    if name == "shifted":
        return p["E"] - p["A"] * (x + p["x0"]) ** -p["alpha"]
    before = p["C"] * x ** p["alpha"]
    after = p["C"] * p["xb"] ** p["alpha"] * (x / p["xb"]) ** p["alpha2"]
    return np.where(x < p["xb"], before, after)


@pytest.mark.parametrize("name", ["power", "saturating", "shifted", "broken"])
def test_natural_parameters_are_those_of_the_printed_formula(name):
    form, theta, shape = form_named(name), np.array(THETA[name]), SHAPES[0]
    natural = {k: float(v) for k, v in form.natural(theta, X_REF, shape).items()}
    assert tuple(natural) == form.names
    u = np.array([-10.0, -5, 5, 10]) if name == "broken" else U  # far from the bend, which is rounded
    assert form.value(theta, u, shape)[0] == pytest.approx(printed(name, natural, X_REF * np.exp(u)), rel=1e-6)


def test_m4_satisfies_its_equation():
    theta, shape = np.array(THETA["m4"]), SHAPES[0]
    p = {k: float(v) for k, v in form_named("m4").natural(theta, X_REF, shape).items()}
    y = form_named("m4").value(theta, U, shape)[0]
    assert (p["E"] - y) / y ** p["gamma"] == pytest.approx(p["A"] * (X_REF * np.exp(U)) ** -p["alpha"], rel=1e-8)


def test_m4_without_its_last_parameter_is_saturating():
    shape = SHAPES[0]
    m4 = form_named("m4").value(np.array([0.6, -1.0, -1.5, -40.0]), np.linspace(0, 3, 7), shape)[0]
    ceiling = 100 / (1 + np.exp(-0.6))
    saturating = form_named("saturating").value(
        np.array([0.6, -1.0 + np.log(ceiling), -1.5]), np.linspace(0, 3, 7), shape
    )[0]
    assert m4 == pytest.approx(saturating, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["accuracy", "error"])
@pytest.mark.parametrize("name", FORMS)
def test_the_inverse_undoes_the_value(name, shape):
    form, theta = form_named(name), np.array(THETA[name])
    if not shape.rising and name in ("power", "broken"):
        theta[1:3] *= -1
    for u in (-1.5, 0.4, 2.0):
        y = float(form.value(theta, np.array([u]), shape)[0][0])
        assert form.inverse(theta[None], y, shape) == pytest.approx([u], abs=1e-6)


def test_no_inverse_beyond_the_ceiling_or_where_the_law_falls():
    rising = SHAPES[0]
    assert np.isnan(form_named("saturating").inverse(np.array([THETA["saturating"]]), 99.0, rising))
    assert np.isnan(form_named("m4").inverse(np.array([THETA["m4"]]), 99.0, rising))
    assert np.isnan(form_named("power").inverse(np.array([[4.0, -0.02]]), 60.0, rising))
    falls_after = np.array([[4.0, 0.05, -0.01, 0.2]])
    peak = form_named("broken").value(falls_after[0], np.linspace(-3, 3, 601), rising)[0].max()
    assert np.isnan(form_named("broken").inverse(falls_after, peak * 1.01, rising))
    assert np.isfinite(form_named("broken").inverse(falls_after, peak * 0.98, rising))


@pytest.mark.parametrize("name", FORMS)
def test_starts_are_finite_even_on_flat_data(name):
    starts = form_named(name).starts(U, np.full(len(U), 50.0), SHAPES[0])
    assert starts.ndim == 2
    assert np.isfinite(starts).all()


def test_an_unknown_form_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'saturating'"):
        form_named("saturated")
