"""Checkpoints: what is loaded was saved whole, by this run."""

from __future__ import annotations

import logging

import pytest
import torch

from experiments.errors import UserError
from experiments.training.checkpoint import CheckpointStore
from tests.experiments.run_configs import assert_same_bits


class Unsafe:
    """No plain value: loading it would run code of its class."""


def _store(tmp_path, *, keep=2, key="0123456789"):
    return CheckpointStore(tmp_path, key=key, keep=keep)


def _state(value):
    return {
        "model": {"weight": torch.full((3, 2), float(value))},
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
        "position": {"epoch": 1, "step": value, "start": 0.5},
        "nothing": None,
        "list": [1, (2, 3.5)],
    }


def test_newest_comes_back_as_saved(tmp_path):
    store = _store(tmp_path)
    store.save(_state(1), step=9)
    state = _state(2)
    store.save(state, step=10)
    assert_same_bits(store.load_newest(), state)


def test_order_is_by_step_not_by_name(tmp_path):
    store = _store(tmp_path)
    for step in (99_999_999, 100_000_000):
        store.save(_state(step % 7), step=step)
    assert store.load_newest()["position"]["step"] == 100_000_000 % 7


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    store = _store(tmp_path, keep=keep)
    for step in range(1, 6):
        store.save(_state(step), step=step)
        kept = [int(path.name[4:12]) for path in store.paths()]
        assert kept == list(range(max(1, step - keep + 1), step + 1))
    assert len(list(tmp_path.iterdir())) == keep


def test_saving_a_step_again_replaces_it(tmp_path):
    store = _store(tmp_path, keep=2)
    store.save(_state(1), step=1)
    store.save(_state(2), step=2)
    store.save(_state(3), step=2)
    assert len(store.paths()) == 2
    assert store.load_newest()["position"]["step"] == 3


def _truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path):
    path.write_bytes(b"")


def _flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip_one_bit])
def test_damaged_newest_is_named_and_the_one_before_it_is_used(tmp_path, caplog, damage):
    store = _store(tmp_path)
    store.save(_state(1), step=1)
    newest = store.save(_state(2), step=2)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        state = store.load_newest()
    assert state["position"]["step"] == 1
    assert str(newest) in caplog.text and "corrupt" in caplog.text
    assert not newest.exists()


def test_no_intact_checkpoint_is_none(tmp_path):
    store = _store(tmp_path)
    assert store.load_newest() is None
    _truncate(store.save(_state(1), step=1))
    assert store.load_newest() is None


def test_half_written_file_is_never_loaded(tmp_path):
    store = _store(tmp_path)
    path = store.save(_state(1), step=1)
    (tmp_path / "step00000002.tmp").write_bytes(path.read_bytes()[:100])
    assert store.load_newest()["position"]["step"] == 1


def test_checkpoint_of_another_run_is_refused(tmp_path):
    _store(tmp_path, key="aaaaaaaaaa").save(_state(1), step=1)
    with pytest.raises(UserError, match="belongs to run aaaaaaaaaa"):
        _store(tmp_path, key="bbbbbbbbbb").load_newest()


def test_loading_runs_no_code(tmp_path):
    store = _store(tmp_path)
    store.save({"object": Unsafe()}, step=1)
    with pytest.raises(Exception, match="weights_only"):
        store.load_newest()


def test_file_is_a_plain_torch_file(tmp_path):
    path = _store(tmp_path).save(_state(4), step=4)
    payload = torch.load(path, weights_only=True)
    assert payload["key"] == "0123456789" and payload["step"] == 4


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        _store(tmp_path, keep=0)
