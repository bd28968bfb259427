import pytest

from vtprune.errors import ConfigError
from vtprune.eval import tiny


def test_an_unknown_family_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"tiny model 'qwen3-vl'. Did you mean 'qwen3_vl'\?"):
        tiny.build("qwen3-vl")


def test_settings_of_a_family_reach_its_configuration():
    model, _ = tiny.build("gemma3", sliding_window=8)
    assert model.config.text_config.sliding_window == 8
