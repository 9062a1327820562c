"""Sample, score, pair, train, evaluate: one round of task=mine in its parts, for who wants to change one of them.

python docs/on_policy_loop.py
"""

import json
import tempfile
from pathlib import Path

from smolvlm_exp import compose, train
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.engine.generation.answers import packed_prompts, sample_answers
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.models.model import load_finetuned_model, load_processor
from smolvlm_exp.rewards.build import checked_rewards
from smolvlm_exp.rewards.pairs import ScoredAnswer, select_pairs


def main(rows: int = 256, answers: int = 8, *training: str) -> dict[str, float]:
    """`training`: further settings of the last step. Returns the held-out metrics of the tuned model."""
    folder = Path(tempfile.mkdtemp())
    config = compose([f"data.train_rows={rows}"])
    processor = load_processor(config.model)
    data = load_preferences(config.data, processor, folder, answers=False)
    rewards = checked_rewards(config.reward, data)
    model = load_finetuned_model(config.model, config.quant, config.adapter, config.seed)

    prompts = packed_prompts(model, PackedDataset(data.train, processor), pixels(processor), range(rows))
    sampling = Sampling(max_new_tokens=48, temperature=1.0)
    groups = sample_answers(model, processor, prompts, sampling, answers, logps=True)

    lines = []
    for row, group in zip(data.train, groups, strict=True):
        texts = processor.batch_decode([answer.ids for answer in group], skip_special_tokens=True)
        asked, truth, ids = [row["prompt"]] * answers, [row["truth"]] * answers, [answer.ids for answer in group]
        _, totals = rewards.score_answers(asked, texts, ids, truth)
        scored = [
            ScoredAnswer(text.strip(), total, answer.mean_logp, len(answer.ids), answer.ended, {})
            for text, total, answer in zip(texts, totals, group, strict=True)
        ]
        for best, worse in select_pairs(scored, pairs=2, margin=0.5, max_length_ratio=3.0, rejected="likeliest"):
            row["images"][0].save(folder / f"{len(lines)}.png")
            pair = {"chosen": scored[best].text, "rejected": scored[worse].text}
            lines.append({"image": f"{len(lines)}.png", "prompt": row["prompt"], **pair})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    run = train(["data=files", f"data.folder={folder}", "tracker=none", *training])
    return run.summary["after"]


if __name__ == "__main__":
    print(main())
