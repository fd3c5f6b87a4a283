"""What a model that was tuned on made-up conversations can do: tasks it has never been asked.

for name, score in skills(model, tokenizer, val_fraction=0.05).items(): ...
"""

import random
from collections import Counter
from dataclasses import dataclass

from gkachat.config import GPTConfig
from gkachat.cost import account
from gkachat.data.conversations import is_val, prompt
from gkachat.data.tasks import answer_of, ask
from gkachat.engine import Engine, Request
from gkachat.gpt import GPT
from gkachat.sampling import Sampling
from gkachat.tokenizer import Tokenizer

ASKED = ("addition", "counting")


@dataclass(frozen=True)
class Skill:
    right: int
    asked: int
    chance: float
    """Share of the commonest answer: what always giving it would come to."""

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


def facts_of(config: GPTConfig) -> dict[str, str]:
    """What a model is told to say about itself."""
    attention = {"softmax": "softmax", "gka": "Gaussian kernel"}[config.attention]
    return {"attention": attention, "parameters": f"{account(config).params['total']:,}", "depth": str(config.depth)}


def skills(model: GPT, tokenizer: Tokenizer, val_fraction: float, n: int = 200, seed: int = 0) -> dict[str, Skill]:
    """Greedy answers to `n` questions of each task, all of them of the val part of what can be asked."""
    engine, found = Engine(model, tokenizer), {}
    end = tokenizer.special["<|assistant_end|>"]
    for task in ASKED:
        rng, asked = random.Random(seed), {}
        while len(asked) < n:
            key, question, answer = ask(task, rng, {})
            if is_val(key, val_fraction):
                asked[key] = question, answer_of(answer)
        questions, expected = zip(*asked.values(), strict=True)
        settings = Sampling(temperature=0, max_tokens=128, stop_tokens=(end,))
        requests = [Request(prompt(tokenizer, [{"role": "user", "content": q}])[1:], settings) for q in questions]
        said = [""] * n
        for piece in engine.run(requests, rows=50):
            said[piece.request] += piece.text
        right = sum(answer_of(text) == answer for text, answer in zip(said, expected, strict=True))
        found[task] = Skill(right, n, Counter(expected).most_common(1)[0][1] / n)
    return found


def report_skills(model: GPT, tokenizer: Tokenizer, val_fraction: float) -> None:
    for task, skill in skills(model, tokenizer, val_fraction).items():
        print(
            f"{task}: {100 * skill.accuracy:.1f} % of {skill.asked} questions it was not trained on "
            f"(always the commonest answer: {100 * skill.chance:.1f} %)"
        )
