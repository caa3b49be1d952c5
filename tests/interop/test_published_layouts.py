"""Every tensor of a published checkpoint is a parameter, or rows of it are, and the other way round."""

import gzip
import json
from pathlib import Path

import jax
import pytest

from lm.experiment import UserError
from lm.interop.config import read_config, write_config
from lm.interop.hf import FREQUENCIES
from lm.interop.places import HEAD, parameter_places
from lm.model.families import FAMILIES
from lm.model.transformer import Transformer


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("--models")) / "layouts"
    skip = pytest.param(None, marks=pytest.mark.skip(reason=f"no layouts of published models at {root}"))
    found = sorted(root.glob("*.json.gz"))
    metafunc.parametrize("file", found or [skip], ids=lambda f: f.name.removesuffix(".json.gz") if f else "none")


def test_tensors_and_parameters_are_the_same(file):
    layout = json.loads(gzip.decompress(file.read_bytes()))
    config = layout["config"]
    family = FAMILIES.get(config["model_type"])
    if family is None:
        with pytest.raises(UserError, match=rf"{config['architectures'][0]}.*there are .*llama, .*qwen3"):
            read_config(config)
        return
    try:
        model, vocab_size = read_config(config)
    except UserError as error:  # what the model does not have, such as another rope
        assert any(name in str(error) for name in config)
        pytest.skip(f"refused: {error}")
    places = parameter_places(jax.eval_shape(lambda: Transformer(model, vocab_size, jax.random.key(0))), family)
    shapes = {name: list(place.their_shape) for place in places for name in place.names}
    assert shapes == {name: shape for name, (shape, _) in layout["tensors"].items()}
    for name, shape in shapes.items():
        rows = sorted((one.rows.start, one.rows.stop) for one in places if name in one.names)
        assert [start for start, _ in rows] + [shape[0]] == [0] + [stop for _, stop in rows]
    more = [name for name in layout.get("published_file_also_holds", ()) if not name.endswith(FREQUENCIES)]
    assert more in ([], [HEAD] if model.tied_head else [])
    written = write_config(model, vocab_size, config["model_type"])
    assert written["architectures"] == config["architectures"]
    assert read_config(written) == (model, vocab_size)
