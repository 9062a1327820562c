"""docs/settings.md and its JSON schema are current and complete; local defaults are read."""

import json

import pytest
import yaml

from docs import settings
from smolvlm_exp.config.compose import search_path
from smolvlm_exp.config.schema import every_key
from smolvlm_exp.utils.paths import CONF


def test_settings_md_and_the_json_schema_are_current():
    for path, text in settings.files().items():
        assert path.read_text(encoding="utf-8") == text, "python docs/settings.py writes them"


def test_every_setting_is_in_both():
    page, schema = settings.markdown(), settings.json_schema()
    for key in every_key():
        assert f"| `{key}` |" in page
        node = schema
        for name in key.split("."):
            node = node["properties"][name]


def test_the_schema_has_every_key_of_our_files():
    def check(node, schema, where):
        for key, value in node.items():
            if where or key not in ("defaults", "hydra"):
                assert key in schema["properties"], (where, key)
                if isinstance(value, dict) and "properties" in schema["properties"][key]:
                    check(value, schema["properties"][key], f"{where}.{key}")

    for path in (CONF / "experiment").glob("*.yaml"):
        check(yaml.safe_load(path.read_text()), settings.json_schema(), "")
    assert json.loads((CONF.parent / "docs" / "settings.schema.json").read_text())["type"] == "object"


@pytest.mark.parametrize("override", [[], ["seed=9"]])
def test_local_defaults_apply_unless_the_command_overrides_them(tmp_path, override):
    import hydra

    (tmp_path / "local").mkdir()
    own = "# @package _global_\nseed: 5\ntracker:\n  entity: my_team\ntrainer:\n  cache: /tmp/cache\n"
    (tmp_path / "local" / "default.yaml").write_text(own)
    with search_path(config_dir=str(tmp_path)):
        composed = hydra.compose("config", overrides=override)
    assert (composed.tracker.entity, composed.trainer.cache) == ("my_team", "/tmp/cache")
    assert composed.seed == (9 if override else 5)
    ignored = (CONF.parent / ".gitignore").read_text().splitlines()
    assert "/conf/local/" in ignored


LISTED = sorted(path for path in CONF.glob("*/*.yaml") if "# Often changed" in path.read_text(encoding="utf-8"))


def test_every_group_lists_often_changed_settings():
    groups = {"adapter", "data", "model", "quant", "reward", "task", "tracker", "trainer"}
    assert {path.parent.name for path in LISTED} == groups


@pytest.mark.parametrize("path", LISTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_listed_defaults_equal_the_dataclass_s(path):
    group, option = path.parent.name, path.stem
    kinds = dict(settings.tables())
    option = yaml.safe_load(path.read_text(encoding="utf-8")).get("source", option)  # data=rlaif_v is data=hub
    cls = kinds.get(f"{group}={option}") or kinds[group]
    defaults = {key: yaml.safe_load(settings.default_text(field)) for key, field, *_ in settings.properties(cls)}
    lines = path.read_text(encoding="utf-8").partition("# Often changed, with their defaults:\n")[2]
    listed = [line for line in lines.partition("\n\n")[0].splitlines() if line.strip()]
    assert listed
    for line in listed:
        setting, _, meaning = line.partition("   # ")
        ((key, value),) = yaml.safe_load(setting).items()
        assert (value, bool(meaning)) == (defaults[key], True), line
