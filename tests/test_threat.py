import pytest

from robudget.errors import InputError
from robudget.threat import Threat, format_eps, parse_eps


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), (0.5, 0.5), ("1e-2", 0.01), ("0.031", 0.031), (1, 1.0)]
)
def test_eps_is_read_from_fractions_and_numbers(text: object, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize("bad", ["x", "8/0", "1/2/3", None, True, float("nan"), float("inf"), "-1/255", [1]])
def test_eps_that_is_no_radius_is_refused(bad: object) -> None:
    with pytest.raises(InputError, match=r"eps|number"):
        parse_eps(bad)


@pytest.mark.parametrize("eps", [8 / 255, 1 / 255, 0.5, 0.031, 1e-3, 1.0, 12.0, 0.1])
def test_a_written_eps_reads_back_as_the_same_float(eps: float) -> None:
    assert parse_eps(format_eps(eps)) == eps


def test_eps_of_whole_255ths_is_written_as_such() -> None:
    assert format_eps(8 / 255) == "8/255"
    assert format_eps(0.1) == "0.1"


def test_a_threat_accepts_the_fields_spellings_of_a_norm_and_text() -> None:
    assert Threat("Linf", "8/255") == Threat("linf", 8 / 255)  # type: ignore[arg-type]
    assert str(Threat("l2", 0.5)) == "l2 0.5"


def test_zero_eps_is_the_unattacked_image_and_a_ball_of_all_images_is_refused() -> None:
    assert Threat("linf", 0).eps == 0
    assert Threat("l1", 12).eps == 12
    with pytest.raises(InputError, match="8/255"):
        Threat("linf", 8)


def test_an_unknown_norm_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'linf'"):
        Threat("l_inf", 0.1)  # type: ignore[arg-type]
