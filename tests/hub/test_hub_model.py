"""Models and adapters from a Hub on loopback, from an empty cache: what is fetched, and what is said where it fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from smolvlm_exp.models.adapter import hub_adapter, saved_adapter
from smolvlm_exp.models.model import choose_resolution, load_finetuned_model, load_model, load_processor
from smolvlm_exp.models.provenance import provenance
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import KNOWN, is_offline
from smolvlm_exp.utils.paths import CONF
from tests.conftest import compose
from tests.hub.conftest import log_in

OURS = "some/tiny"


@pytest.fixture
def published(hub, small) -> Path:
    """The folder of models/some/tiny, with the weights in a file of their own name."""
    folder = hub.root / "models" / OURS
    shutil.copytree(small, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


def config(id: str = OURS, *more: str):
    return compose(f"model.id={id}", "quant=none", *more)


def test_a_model_is_fetched_once_and_then_there_without_the_hub(hub, published, small, caplog, monkeypatch):
    model, processor = load_model(config().model), load_processor(config().model)
    local = load_model(config(str(small)).model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
    found = provenance(config().model)
    assert (found.id, len(found.commit), found.license) == (OURS, 40, "apache-2.0")
    sent = hub.sent["model.safetensors"]
    hub.faults.append(("", "silent"))
    hub.requests.clear()
    monkeypatch.setattr("smolvlm_exp.utils.hub.PING_SECONDS", 0.3)
    is_offline.cache_clear()
    again = load_model(config().model)
    assert "using local files only" in caplog.text
    assert load_processor(config().model).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.num_parameters() == model.num_parameters()
    assert provenance(config().model) == found
    assert hub.sent["model.safetensors"] == sent
    with pytest.raises(RequestError, match=r"model\.id=some/other: it is not on this disk as a whole"):
        load_model(config("some/other").model)
    assert hub.requests == ["HEAD "], "one ping, and nothing else"


def test_what_is_wrong_with_an_id_is_said(hub, published, monkeypatch):
    wrong = {
        "HuggingFaceTB/SmolVLM-Instuct": "Did you mean HuggingFaceTB/SmolVLM-Instruct?",
        "some/tiny model.revision=v9": "it has no branch, tag or commit v9",
    }
    for id, said in wrong.items():
        for load in (load_processor, load_model):
            with pytest.raises(RequestError) as error:
                load(config(*id.split()).model)
            assert said in str(error.value)
    hub.gated.add(f"models/{OURS}")
    with pytest.raises(
        RequestError, match=r"it is gated\. Accept its conditions at https://huggingface.co/some/tiny, then"
    ):
        load_processor(config().model)
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(RequestError, match="the Hub refuses your token"):
        load_processor(config().model)
    log_in(monkeypatch, hub, accepted=True)
    load_processor(config().model)
    (published / "config.json").unlink()
    with pytest.raises(RequestError, match=r"model\.id=some/tiny: .*config\.json"):
        load_model(config().model)


@pytest.mark.parametrize(("fault", "said"), [("cut", "broke off"), ("drop", "broke off"), (503, "HTTP 503")])
def test_weights_that_never_arrive(hub, published, monkeypatch, fault, said):
    load_processor(config().model)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the clients' own tries
    hub.faults.append((r"GET .*model\.safetensors", fault))
    with pytest.raises(RequestError, match=rf"model\.id=some/tiny: the .*{said}"):
        load_model(config().model)
    hub.faults.clear()
    load_model(config().model)


def test_an_adapter_of_the_hubs_with_its_processor(hub, published, tmp_path, small):
    from peft import LoraConfig, get_peft_model

    base = load_model(config(str(small)).model)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    folder = hub.root / "models" / "me" / "dpo"
    tuned.save_pretrained(folder)
    processor = load_processor(config(str(small), "model.longest_edge=64").model)
    processor.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": OURS}))
    hub_adapter.cache_clear()

    given = (
        "model.adapter=me/dpo",
        "adapter=lora",
        "adapter.r=4",
        "adapter.lora_alpha=4",
        r"adapter.target=.*\.q_proj",
    )
    chosen = config(OURS, *given)
    loaded = load_finetuned_model(chosen.model, chosen.quant, chosen.adapter, 0)
    for name, tensor in tuned.state_dict().items():
        if "lora" in name:
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert Resolution.of(load_processor(chosen.model).image_processor.to_dict()).longest_edge == 64
    with pytest.raises(RequestError, match=r"was trained on some/tiny, and model\.id is embedded"):
        saved_adapter(chosen.adapter, "me/dpo", "embedded")
    hub_adapter.cache_clear()
    with pytest.raises(RequestError, match=r"model\.adapter=me/dqo: the Hub has no such model"):
        choose_resolution(config(OURS, "model.adapter=me/dqo").model, Resolution(64, 128))


def test_the_known_names_are_those_of_the_options():
    options = [(CONF / "model" / f"{path.stem}.yaml").read_text() for path in (CONF / "model").glob("smol*.yaml")]
    assert all(any(f"id: {name}\n" in option for option in options) for name in KNOWN["model"])
    assert len(options) == len(KNOWN["model"])


def test_nothing_is_told_to_the_hub():
    assert constants.HF_HUB_DISABLE_TELEMETRY
