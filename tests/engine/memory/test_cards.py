"""Cards by name, and the one in a machine."""

import pytest

from smolvlm_exp.engine.memory import cards
from smolvlm_exp.engine.memory.cards import find_card, found_card
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import GIB


def test_every_card_has_a_source_and_is_found_by_its_name():
    sources = cards.read_sheets()["sources"]
    for key, sheet in cards.cards().items():
        assert find_card(key) is find_card(key.upper()) is sheet
        assert sheet.source in sources
        assert 6 <= sheet.memory <= 141
        assert sheet.has_kernels == (sheet.capability >= 8)
    for typed in ("RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 4070 Ti Super", "4070tisuper"):
        assert find_card(typed).key == "rtx4070tisuper"
    assert [card.key for card in cards.cards().values() if card.reached] == ["h100", "h200"]
    memory = [card.memory for card in cards.shown_cards()]
    assert memory == sorted(memory)


def test_an_unknown_card_has_near_names():
    with pytest.raises(RequestError, match=r"task\.card=rtx4600: no such card\. Near: .*rtx4060.*cards\.yaml"):
        find_card("rtx4600")
    with pytest.raises(RequestError, match="Near: "):
        find_card("")


@pytest.mark.parametrize(
    ("said", "key", "memory"),
    [
        ("NVIDIA GeForce RTX 4060 Ti, 16380", "rtx4060ti_16gb", 15.996),
        ("NVIDIA GeForce RTX 4060 Ti, 8188", "rtx4060ti", 7.996),
        ("Tesla T4, 15360", "t4", 15.0),
        ("NVIDIA H100 80GB HBM3, 81559", "h100", 79.65),
        ("NVIDIA GeForce RTX 4060 Laptop GPU, 8188", "rtx4060_laptop", 7.996),
        ("NVIDIA RTX 9999 Max-Q, 8188", None, None),
    ],
)
def test_the_card_in_the_machine_is_found(said, key, memory, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    name, sheet = found_card()
    assert name == said.removeprefix("NVIDIA ").partition(",")[0]
    assert (sheet and sheet.key) == key
    if sheet:
        assert sheet.memory == pytest.approx(memory, abs=0.01)
        assert sheet.usable < sheet.memory * GIB
    program.unlink()
    assert found_card() is None


def test_bounds_are_narrow_where_a_card_was_measured():
    for key, width in (("h100", 1.11), ("h200", 1.11), ("rtx4060", 1.75)):
        best, worst = find_card(key).bounds()
        expected = find_card(key).expected()
        assert worst.matmul < expected.matmul < best.matmul < width * worst.matmul
        assert worst.bandwidth < expected.bandwidth < best.bandwidth
        assert best.launch < expected.launch < worst.launch


def test_old_cards_run_without_kernels():
    kernels = {key: find_card(key).expected().kernels for key in ("t4", "rtx2080ti", "a100", "rtx3060")}
    assert kernels == {"t4": False, "rtx2080ti": False, "a100": True, "rtx3060": True}
