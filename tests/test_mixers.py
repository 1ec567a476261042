"""The registry of mixers."""
import dataclasses

from serpent_scale import config as configuration
from serpent_scale.config import ModelConfig
from serpent_scale.model import mixers
from serpent_scale.model.mixer import Mixer


def test_the_names_in_the_config_are_those_of_the_registry():
    assert set(configuration.MIXERS) == set(mixers.MIXERS)
    sections = {f.name for f in dataclasses.fields(ModelConfig) if dataclasses.is_dataclass(getattr(ModelConfig(), f.name))}
    assert sections == {*configuration.MIXERS, "serpent"}
    for mixer in mixers.MIXERS.values():  # the whole of the interface, each with its own
        assert issubclass(mixer, Mixer)
        assert not [name for name in ("forward", "parameter_count", "flops", "kept_bytes") if name not in vars(mixer)]
