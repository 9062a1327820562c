"""Sizes in settings: the same units for all of them."""

import pytest

from smolvlm_exp.tasks.chat import load_session
from smolvlm_exp.training.arguments import budget_of
from smolvlm_exp.training.engine_setup import check_request
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import bytes_of, size_of
from tests.conftest import compose


@pytest.mark.parametrize(
    ("text", "size"),
    [("1MB", 10**6), ("1MiB", 2**20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1TB", 10**12), ("0MiB", 0)],
)
def test_every_unit_is_parsed(text, size):
    assert size_of(text) == bytes_of("key", text) == size


@pytest.mark.parametrize("text", ["", "1", "GiB", "1 gib", "-1GiB", "1e3MB", "1KiB", "1GiB "[:-2]])
def test_an_invalid_size_is_refused_with_its_key(text):
    with pytest.raises(RequestError, match=rf"^the.key={text} is not a size; write it as 8GiB or 500MB"):
        bytes_of("the.key", text)


@pytest.mark.parametrize("unit", ["MB", "MiB", "GB", "GiB"])
def test_all_settings_accept_all_units(unit, small):
    config = compose(f"trainer.cache_ram=1{unit}", f"trainer.cache_disk=1{unit}")
    check_request(config.trainer, config.model, config.quant, config.adapter)
    assert budget_of(f"1{unit}") == size_of(f"1{unit}")
    config = compose("task=chat", f"model.id={small}", "quant=none", f"session.cache=1{unit}")
    assert load_session(config).cache.budget == size_of(f"1{unit}")
