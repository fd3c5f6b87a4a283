"""Tasks of lm-evaluation-harness (the package lm_eval, extra `eval`) on a model of ours.

lm = HarnessModel(model, tokenizer)
scores, metrics = evaluate(lm, ["lambada_openai", "wikitext"], limit=100)
"""

import logging
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from gkachat.data.loader import IGNORE
from gkachat.eval.bpb import LOGITS_AT_A_TIME
from gkachat.eval.core import TOKENS, Group, batches, score
from gkachat.eval.report import Score
from gkachat.inference.engine import Engine, Request, Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

ACCURACY = ("acc", "exact_match", "acc_norm")  # the harness's names for it, the first that a task has
SEED = 1234  # of the few-shot examples: the harness's own


class HarnessModel(TemplateLM):
    """What the harness asks a model: how likely a continuation is, or a text on its own, and what comes next.

    Every text starts with BOS. What is longer than sequence_len loses its beginning, but not BOS: `truncated` counts.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16, seed: int = 42):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self._device = model.wte.weight.device
        self.limit = model.config.sequence_len
        self.truncated = 0
        self.ignored: set[str] = set()
        """Options of generation that tasks set and the engine does not have."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Each request is (its texts, context, continuation). A context is read once for all that may follow it."""
        asked: dict[tuple[int, ...], list[tuple[int, tuple[int, ...], int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            room = self.limit - len(continuation)
            if room < 0:
                n = len(continuation)
                raise ValueError(f"a continuation of {n} tokens, expected at most sequence_len {self.limit}")
            context = context[1:] if context[:1] == [self.tokenizer.bos] else context  # that is what is given for none
            *before, last = self.tokenizer.bos, *self._cut(context, room)
            if continuation:
                asked.setdefault(tuple(before), []).append((number, (last, *continuation), 1))
        groups = [Group(before, sorted(tails, key=lambda tail: -len(tail[1]))) for before, tails in asked.items()]
        found = [(0.0, True)] * len(requests)
        for batch in batches(groups, TOKENS.get(self._device.type, TOKENS["cpu"])):
            for (number, _), scored in score(self.model, batch).items():
                found[number] = (-scored.mean_loss * len(requests[number][2]), scored.hits)
        return found

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        self.truncated += len(tokens) > room
        return tokens[max(0, len(tokens) - room) :]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in the harness's windows: from the second on they see the text before, and no BOS."""
        windows = [
            (number, *window)
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tokenizer.encode(request.args[0]), self.tokenizer.bos, self.limit, 1
            )
        ]
        windows.sort(key=lambda window: -len(window[1]))
        found = torch.zeros(len(requests), dtype=torch.float64)
        while windows:
            longest = len(windows[0][1])
            n = max(1, min(self.batch_size, LOGITS_AT_A_TIME // (longest * self.model.config.vocab_size)))
            batch, windows = windows[:n], windows[n:]
            idx = torch.zeros(len(batch), longest, dtype=torch.long)  # what follows a row is not seen by it
            targets = torch.full_like(idx, IGNORE)
            for row, (_, given, predicted) in enumerate(batch):
                idx[row, : len(given)] = torch.tensor(given)
                targets[row, len(given) - len(predicted) : len(given)] = torch.tensor(predicted)
            logits = self.model(idx.to(self._device)).flatten(0, 1)
            nats = F.cross_entropy(
                logits, targets.to(self._device).flatten(), ignore_index=IGNORE, reduction="none"
            ).view(len(batch), -1)
            found.index_add_(0, torch.tensor([number for number, _, _ in batch]), -nats.double().sum(dim=1).cpu())
        return found.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Long prompts first, each with its own stops; half of sequence_len at least is left to a prompt."""
        asked = []
        for number, request in enumerate(requests):
            context, options = request.args
            options = dict(normalize_gen_kwargs(options))
            most, greedy = options.pop("max_gen_toks"), not options.pop("do_sample")
            stop = options.pop("until", None) or []
            known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"} & set(options)
            self.ignored |= set(options) - known
            chosen = {name: options[name] for name in known} | ({"temperature": 0.0} if greedy else {})
            stops = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
            settings = Sampling(max_tokens=most, stop=stops, seed=self.seed + number, **chosen)
            room = max(self.limit - 1 - most, (self.limit - 1) // 2)
            asked.append((number, Request(self._cut(self.tokenizer.encode(context), room), settings)))
        asked.sort(key=lambda pair: len(pair[1].tokens), reverse=True)
        said = [""] * len(requests)
        for piece in Engine(self.model, self.tokenizer).run([request for _, request in asked], rows=self.batch_size):
            said[asked[piece.request][0]] += piece.text
        return said


def evaluate(
    lm: HarnessModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
) -> tuple[dict[str, Score], dict[str, dict[str, float]]]:
    """Scores of those tasks that have an accuracy, and every figure that the harness makes of all of them.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        limit: so many examples of each task; by default all.
        num_fewshot: examples in a prompt, where the task does not say that it has none; by default the task's number.
        include_path: a directory with tasks of one's own.

    Raises ValueError for a task that is not known, or whose data cannot be had.
    """
    if not tasks or (limit is not None and limit < 1):
        raise ValueError(f"given tasks {', '.join(tasks) or 'none'} and limit {limit}, expected one or more of both")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no directory {include_path} with tasks")
    manager = TaskManager(include_path=include_path)
    scores, metrics = {}, {}
    for name in tasks:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a dozen unrelated types: no such task, no network, no such data
            told = str(error.args[0] if error.args else error) or type(error).__name__
            raise ValueError(f"task {name!r} cannot be loaded: {told.splitlines()[0]}") from error
        for task in loaded["tasks"].values():
            set_to = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=set_to or 0 if num_fewshot is None or set_to == 0 else num_fewshot)
            task.set_fewshot_seed(seed=SEED)
        start = time.perf_counter()
        result = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        seconds, counts = time.perf_counter() - start, result["n-samples"]
        total = sum(count["effective"] for count in counts.values())
        for task, found in result["results"].items():
            metrics[task] = {key.removesuffix(",none"): x for key, x in found.items() if isinstance(x, (int, float))}
            accuracy = [x for kind in ACCURACY for key, x in metrics[task].items() if key.split(",")[0] == kind]
            if accuracy and task in counts:
                a, n = accuracy[0], counts[task]["effective"]
                scores[task] = Score(a, sqrt(a * (1 - a) / max(n - 1, 1)), n, seconds * n / total)
    return scores, metrics
