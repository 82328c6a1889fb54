"""RobustBench's entries as a table."""

import json

import numpy as np
import pytest

from robudget.errors import InputError
from robudget.tables.published import is_leaderboard, leaderboard_table


@pytest.fixture(scope="module")
def entries(shared):
    return leaderboard_table(shared / "data" / "robustbench" / "cifar10" / "Linf").set_index("run_id")


def test_all_99(entries):
    assert len(entries) == 99
    assert entries.aa_acc.between(0, 100).all()
    assert set(entries.norm) == {"linf"}
    assert entries.eps.to_numpy() == pytest.approx(np.full(99, 8 / 255))  # 0.031 counts as 8/255 …
    assert (entries.published_eps == "0.031").sum() == 6  # … and is kept


def test_a_folder_of_several_threats_names_them(shared):
    both = leaderboard_table(shared / "data" / "robustbench" / "cifar10")
    assert both.run_id.is_unique
    assert {"cifar10-linf-Ding2020MMA", "cifar10-l2-Ding2020MMA"} <= set(both.run_id)


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("Madry2018Towards", 44.04),
        ("Zhang2019Theoretically", 53.08),
        ("Rice2020Overfitting", 53.42),
        ("Gowal2020Uncovering_70_16", 57.14),  # `external`, not AutoAttack's 57.20
        ("Gowal2021Improving_70_16_ddpm_100m", 66.10),
        ("Wang2023Better_WRN-28-10", 67.31),
        ("Wang2023Better_WRN-70-16", 70.69),
        ("Peng2023Robust", 71.07),
        ("Bartoldson2024Adversarial_WRN-82-8", 71.59),
        ("Bartoldson2024Adversarial_WRN-94-16", 73.71),
    ],
)
def test_reference_points(entries, name, accuracy):
    assert entries.aa_acc[name] == accuracy


def test_sizes_and_data(entries):
    assert entries.parameters["Wang2023Better_WRN-70-16"] == 266_796_506
    assert entries.parameters["Wang2023Better_WRN-28-10"] == 36_479_194
    assert entries.parameters["Rade2021Helper_R18_ddpm"] == 11_171_146
    assert np.isnan(entries.parameters["Peng2023Robust"])  # RaWideResNet: the name does not say
    assert entries.synthetic_amount["Wang2023Better_WRN-70-16"] == 50e6
    assert entries.synthetic_amount["Bartoldson2024Adversarial_WRN-94-16"] == 300e6
    assert not entries.synthetic["Madry2018Towards"]
    assert entries.extra_data["Carmon2019Unlabeled"]
    assert entries.loss["Standard"] == "standard"
    assert not entries.collapsed.any()
    assert entries.year["Madry2018Towards"] == 2018


def test_other_threats_and_datasets(shared):
    root = shared / "data" / "robustbench"
    l2 = leaderboard_table(root / "cifar10" / "L2")
    assert set(l2.norm) == {"l2"}
    hundred = leaderboard_table(root / "cifar100" / "Linf")
    assert set(hundred.dataset) == {"cifar100"}  # an entry that says cifar10 lies in this folder
    assert is_leaderboard(root)
    assert len(leaderboard_table(root)) == 188
    imagenet = leaderboard_table(root / "imagenet" / "Linf")
    assert imagenet.eps.to_numpy() == pytest.approx(np.full(len(imagenet), 4 / 255))


def test_what_is_no_entry(tmp_path):
    assert not is_leaderboard(tmp_path)
    with pytest.raises(InputError, match="no RobustBench entry"):
        leaderboard_table(tmp_path)
    (tmp_path / "a.json").write_text("{")
    assert not is_leaderboard(tmp_path)
    entry = {"autoattack_acc": "50", "architecture": "x", "clean_acc": "high", "eps": "8/255", "dataset": "cifar10"}
    (tmp_path / "a.json").write_text(json.dumps(entry))
    assert is_leaderboard(tmp_path)
    with pytest.raises(InputError, match=r"a\.json' is no RobustBench entry"):
        leaderboard_table(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(entry | {"clean_acc": "90", "dataset": "cifar11"}))
    with pytest.raises(InputError, match=r"unknown dataset of a\.json 'cifar11'; did you mean 'cifar10'"):
        leaderboard_table(tmp_path)
