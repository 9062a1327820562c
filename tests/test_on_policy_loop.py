"""docs/on_policy_loop.py runs, and is as short as it says."""

import importlib.util
from pathlib import Path

LOOP = Path(__file__).parents[1] / "docs" / "on_policy_loop.py"


def test_the_documented_loop_trains_on_what_it_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("on_policy_loop", LOOP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quick = ("trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.sample_steps=0",
             "trainer.warmup_steps=0", "adapter=lora", "quant=none", "task.max_new_tokens=4")  # fmt: skip
    after = module.main(24, 4, *quick)
    assert 0 <= after["preference_accuracy"] <= 1
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) < 60
