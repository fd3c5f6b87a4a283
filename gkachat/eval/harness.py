"""Tasks of lm-evaluation-harness (the package lm_eval, extra `eval`) on a gkachat model: ARC, MMLU, GSM8K, LAMBADA ...

    lm = HarnessModel(model, tokenizer, chat=True)             # chat: for a model tuned on conversations
    scores, metrics = evaluate(lm, ["arc_easy", "gsm8k"], limit=100)

With `chat`, the harness renders each question with the chat template that the model was tuned on, few-shot examples as
earlier turns.
"""

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from gkachat.data.conversations import render, render_prompt
from gkachat.eval.results import task_score
from gkachat.eval.scoring import Continuation, Group, score_texts
from gkachat.inference.engine import Engine, Request
from gkachat.inference.sampling import Sampling
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

ACCURACY_METRICS = ("acc", "exact_match", "acc_norm", "pass@1")  # the first of these that a task has is its accuracy
FEWSHOT_SEED = 1234  # the harness's default
# Rendered prompts spell special tokens as text. A message that spells one itself is escaped, so that it stays text.
SPELLING, ESCAPED = "<|", "<\0|"


class HarnessModel(TemplateLM):
    """lm-evaluation-harness's interface to a model: likelihoods of continuations and of whole texts, and generation.

    Every text starts with BOS. Texts longer than sequence_len lose tokens after BOS; `truncated` counts them.

    Args:
        chat: read chat templates, and end generated answers at <|assistant_end|>.
        batch_size: texts that are generated at a time.
        seed: seed of sampling, for tasks that sample.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, chat: bool = False, batch_size: int = 16, seed: int = 42):
        super().__init__()
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.batch_size, self.seed = batch_size, seed
        self.sequence_len = model.config.sequence_len
        self.truncated = 0
        self.ignored_options: set[str] = set()  # generation options that tasks set and the engine does not have

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return f"gkachat-{self.tokenizer.sha256[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as one text, as gkachat.data.conversations renders them, without BOS.

        Without `add_generation_prompt` the last message is the beginning of an answer, and stays open.
        """
        messages = [{**m, "content": m["content"].replace(SPELLING, ESCAPED)} for m in chat_history]
        if add_generation_prompt:
            ids = render_prompt(self.tokenizer, messages)
        else:
            ids = render(self.tokenizer, messages)[0][:-1]  # without the last end token
        return self.tokenizer.decode(ids[1:])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return ids without BOS. With `chat`, special tokens that the chat template wrote become their ids."""
        if not self.chat:
            return self.tokenizer.encode(string)
        special, ids = self.tokenizer.special, []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", string):
            ids += [special[part]] if part in special else self.tokenizer.encode(part.replace(ESCAPED, SPELLING))
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation) requests; a context that several share is read once."""
        shared: dict[tuple[int, ...], list[Continuation]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            room = self.sequence_len - len(continuation)
            if room < 0:
                raise ValueError(
                    f"given a continuation of {len(continuation)} tokens, expected at most sequence_len "
                    f"{self.sequence_len}"
                )
            if context[:1] == [self.tokenizer.bos]:  # the harness's stand-in for an empty context
                context = context[1:]
            *before, last = self.tokenizer.bos, *self._truncate(context, room)
            if continuation:
                shared.setdefault(tuple(before), []).append(Continuation(number, (last, *continuation), 1))
        groups = [Group(prefix, continuations) for prefix, continuations in shared.items()]
        answers = [(0.0, True)] * len(requests)
        for (number, _), score in score_texts(self.model, groups):
            answers[number] = (-score.mean_loss * len(requests[number][2]), score.greedy)
        return answers

    def _truncate(self, ids: list[int], room: int) -> list[int]:
        self.truncated += len(ids) > room
        return ids[max(0, len(ids) - room) :]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return each whole text's log-likelihood, in the harness's windows.

        The first window starts with BOS. Later ones see as much of the text before them as fits, and no BOS.
        """
        windows = [
            (number, *window)
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tokenizer.encode(request.args[0]), self.tokenizer.bos, self.sequence_len, 1
            )
        ]
        groups = [
            Group.alone(i, (*given, predicted[-1]), len(given) + 1 - len(predicted))
            for i, (_, given, predicted) in enumerate(windows)
        ]
        totals = [0.0] * len(requests)
        for (i, _), score in score_texts(self.model, groups):
            number, _, predicted = windows[i]
            totals[number] -= score.mean_loss * len(predicted)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated for each (prompt, options) request. A prompt may take half of sequence_len."""
        stop_tokens = (self.tokenizer.special["<|assistant_end|>"],) if self.chat else ()
        queue = []
        for number, request in enumerate(requests):
            text, options = request.args
            options = dict(normalize_gen_kwargs(options))
            max_tokens, greedy = options.pop("max_gen_toks"), not options.pop("do_sample")
            stop = options.pop("until", None) or []
            known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"} & set(options)
            self.ignored_options |= set(options) - known
            sampling = Sampling(
                max_tokens=max_tokens,
                stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
                stop_tokens=stop_tokens,
                seed=self.seed + number,
                **({name: options[name] for name in known} | ({"temperature": 0.0} if greedy else {})),
            )
            room = max(self.sequence_len - 1 - max_tokens, (self.sequence_len - 1) // 2)
            queue.append((number, Request(self._truncate(self.tok_encode(text), room), sampling)))
        queue.sort(key=lambda item: len(item[1].tokens), reverse=True)
        answers = [""] * len(requests)
        for output in Engine(self.model, self.tokenizer).run([request for _, request in queue], rows=self.batch_size):
            answers[queue[output.request][0]] += output.text
        return answers


def keep_question_out_of_shots(task: Any) -> None:
    """Have the few-shot examples of a task exclude the question that is asked.

    Where examples come from the split that is asked, the harness (0.4.13) excludes the question only if the task names
    it as its test split and as the split of its examples. Otherwise a prompt may hold its own answer.
    """
    config, own = task.config, task.fewshot_cfg
    asked = config.test_split or config.validation_split
    pool = own.split or config.training_split or config.validation_split or config.test_split
    if pool != asked or own.split == config.test_split or own.samples is not None:
        return
    context, sample = task.fewshot_context, task.sampler.sample

    def fewshot_context(doc: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        task.sampler.sample = lambda n, eval_doc=None, **options: sample(n=n, eval_doc=doc, **options)
        return context(doc, *args, **kwargs)

    task.fewshot_context = fewshot_context


def evaluate(
    lm: HarnessModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    run_unsafe_code: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Run harness tasks; return the scores of those that have an accuracy, and every metric of every task and group.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        limit: number of examples of each task; None: all.
        num_fewshot: examples in a prompt, except for tasks that set it to 0; None: as many as the task says.
        include_path: directory with more tasks.
        run_unsafe_code: allow tasks that run the code a model writes, such as humaneval. The harness runs it without
            a sandbox.

    Raises ValueError for a task that is unknown, whose data cannot be loaded, or that is not allowed.
    """
    if not tasks or (limit is not None and limit < 1):
        raise ValueError(f"given tasks {', '.join(tasks) or 'none'} and limit {limit}, expected one or more of both")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no directory {include_path} with tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    scores: dict[str, dict[str, Any]] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name in tasks:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a dozen unrelated types: no such task, no network, no such data
            message = str(error.args[0] if error.args else error).strip() or type(error).__name__
            raise ValueError(f"task {name!r} cannot be loaded: {message.splitlines()[0]}") from error
        for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            keep_question_out_of_shots(task)
            if getattr(task, "UNSAFE_CODE", False) and not run_unsafe_code:
                raise ValueError(f"task {name!r} runs code that the model writes; --run-unsafe-code allows it")
        start = time.perf_counter()
        result = evaluator.evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=lm.chat,
            fewshot_as_multiturn=lm.chat,
            confirm_run_unsafe_code=run_unsafe_code,
        )
        seconds, counts = time.perf_counter() - start, result["n-samples"]
        n_examples = sum(count["effective"] for count in counts.values())
        for task, found in result["results"].items():
            metrics[task] = {
                key.removesuffix(",none"): float(x) for key, x in found.items() if isinstance(x, (int, float))
            }
            if task in counts:
                metrics[task]["examples"] = counts[task]["effective"]
            accuracy = [x for kind in ACCURACY_METRICS for key, x in metrics[task].items() if key.split(",")[0] == kind]
            if accuracy and task in counts:
                n = counts[task]["effective"]
                scores[task] = task_score(accuracy[0], n, seconds * n / n_examples)
    return scores, metrics
