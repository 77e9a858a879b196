"""Config nodes read into dataclasses: every kind of mistake is one line that names the key."""

from dataclasses import dataclass
from typing import Literal

import pytest
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.settings import node_name, read_settings


@dataclass(frozen=True, kw_only=True)
class Oven:
    name: str
    heat: float
    minutes: int = 10
    fan: bool = False
    mode: Literal["bake", "grill"] = "bake"
    trays: tuple[int, ...] = ()
    limit: int | None = None


def test_read_settings_converts_lists_and_whole_numbers():
    node = OmegaConf.create({"name": "o", "heat": 200, "trays": [1, 2], "limit": None})
    oven = read_settings(Oven, node, "oven")
    assert oven == Oven(name="o", heat=200.0, trays=(1, 2))
    assert isinstance(oven.heat, float)


def test_read_settings_takes_plain_mappings_as_well():
    assert read_settings(Oven, {"name": "o", "heat": 1.5}, "oven").heat == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minuts": 5}, r"unknown key oven\.minuts; did you mean 'minutes'\?"),
        ({"heat": "hot"}, r"oven\.heat = 'hot' must be a number"),
        ({"heat": True}, r"oven\.heat = True must be a number"),
        ({"heat": None}, r"oven\.heat = None must be a number"),
        ({"minutes": 2.5}, r"oven\.minutes = 2\.5 must be a whole number"),
        ({"minutes": True}, r"oven\.minutes = True must be a whole number"),
        ({"fan": 1}, r"oven\.fan = 1 must be true or false"),
        ({"mode": "bak"}, r"oven\.mode = 'bak'; did you mean 'bake'\?"),
        ({"trays": 3}, r"oven\.trays = 3 must be a list, each entry a whole number"),
        ({"trays": [1, "x"]}, r"oven\.trays\[1\] = 'x' must be a whole number"),
        ({"limit": "x"}, r"oven\.limit = 'x' must be a whole number or null"),
        ({"heat": "${oc.env:NO_SUCH_VARIABLE_HERE}"}, r"oven in the config cannot be resolved"),
        ({"heat": "???"}, r"oven in the config cannot be resolved"),
    ],
)
def test_read_settings_names_the_mistake(change, message):
    node = OmegaConf.create({"name": "o", "heat": 1.0} | change)
    with pytest.raises(UserError, match=message) as caught:
        read_settings(Oven, node, "oven")
    assert "\n" not in str(caught.value)


def test_read_settings_names_a_missing_key():
    with pytest.raises(UserError, match=r"oven\.heat is missing; it must be a number"):
        read_settings(Oven, {"name": "o"}, "oven")


def test_node_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown oven\.name = 'agga'; did you mean 'aga'\?"):
        node_name({"name": "agga"}, "oven", ["aga", "smeg"])
    with pytest.raises(UserError, match=r"oven\.name is missing; valid: aga, smeg"):
        node_name({}, "oven", ["aga", "smeg"])
