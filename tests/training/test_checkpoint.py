"""Checkpoints: round trips, and every kind of damage."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.training import checkpoint


def state(step: int) -> checkpoint.State:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "model": {"w": torch.randn(50, 40, generator=generator), "n": torch.tensor(3)},
        "best": None,
        "records": [{"loss": 0.1, "done": True, "name": "é"}],
    }


def notices() -> tuple[list[str], object]:
    heard: list[str] = []
    return heard, heard.append


def same(a: checkpoint.State, b: checkpoint.State) -> bool:
    return checkpoint.digest(a) == checkpoint.digest(b)


def test_round_trip_and_the_one_before(tmp_path: Path) -> None:
    heard, notify = notices()
    assert checkpoint.load_last(tmp_path, notify) is None  # type: ignore[arg-type]
    checkpoint.save_last(tmp_path, state(1))
    checkpoint.save_last(tmp_path, state(2))
    found = checkpoint.load_last(tmp_path, notify)  # type: ignore[arg-type]
    assert found is not None
    assert same(found, state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert heard == []


def test_the_digest_sees_every_value() -> None:
    base = checkpoint.digest(state(1))
    for change in (
        {"step": 2},
        {"best": 0},
        {"records": [{"loss": 0.1, "done": 1, "name": "é"}]},
        {"model": {"w": state(1)["model"]["w"].double(), "n": torch.tensor(3)}},
        {"model": {"w": state(1)["model"]["w"].t().contiguous(), "n": torch.tensor(3)}},
    ):
        assert checkpoint.digest(state(1) | change) != base
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert checkpoint.digest({"w": channels_last}) == checkpoint.digest({"w": channels_last.contiguous()})


def flipped(content: bytes, at: int) -> bytes:
    out = bytearray(content)
    out[at] ^= 0x10
    return bytes(out)


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "text"])
def test_damage_is_found_and_the_previous_one_used(tmp_path: Path, damage: str) -> None:
    checkpoint.save_last(tmp_path, state(1))
    checkpoint.save_last(tmp_path, state(2))
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    at = whole.index(state(2)["model"]["w"].numpy().tobytes()[:64]) + 10
    last.write_bytes(
        {"bit": flipped(whole, at), "truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage]
    )
    heard, notify = notices()
    found = checkpoint.load_last(tmp_path, notify)  # type: ignore[arg-type]
    assert found is not None
    assert same(found, state(1))
    assert len(heard) == 1
    assert "damaged" in heard[0]
    assert "previous.pt (step 1)" in heard[0]
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(InputError, match=r"damaged.*no usable checkpoint") as caught:
        checkpoint.load_last(tmp_path, notify)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "hit"),)

    out = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "state": {"step": Bomb()}, "sha256": ""}, out)
    for content in (out.getvalue(), pickle.dumps(Bomb())):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"damaged"):
            checkpoint.load_last(tmp_path, lambda text: None)
    assert not (tmp_path / "hit").exists()


def test_a_crash_while_saving_keeps_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_last(tmp_path, state(1))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_last(tmp_path, state(2))
    found = checkpoint.load_last(tmp_path, lambda text: None)
    assert found is not None
    assert same(found, state(1))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_weights_carry_their_recipe(tmp_path: Path) -> None:
    recipe = Recipe().with_({"craft.steps": 7})
    shared = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.save_weights(tmp_path / "best.safetensors", {"a": shared, "tied": shared}, recipe, {"epoch": "3"})
    weights, about = checkpoint.load_weights(tmp_path / "best.safetensors")
    assert torch.equal(weights["a"], shared)
    assert torch.equal(weights["tied"], shared)
    assert Recipe.from_yaml(about["recipe"]) == recipe
    assert (about["recipe_id"], about["epoch"]) == (recipe.id, "3")
    with pytest.raises(InputError, match="no weights at"):
        checkpoint.load_weights(tmp_path / "other.safetensors")
    whole = (tmp_path / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(whole[:100])
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load_weights(tmp_path / "best.safetensors")


def test_only_plain_data_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="can't hold object"):
        checkpoint.save_last(tmp_path, {"step": object()})
