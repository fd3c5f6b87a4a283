"""What people run on a model works on an export with the tools' defaults: Trainer, TRL, PEFT, pipelines, lm-eval."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from conftest import untrained_run

from gkachat.eval.harness import HarnessModel
from gkachat.hf.export import export
from gkachat.model.gpt import GPT
from gkachat.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. One two three four five six seven. "
TALKS = [
    [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
    for n in range(8)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory, transformers_modules):
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module", params=["softmax", "gka", "gka_conv"])
def exported(request, root):
    """The directory of an exported run that was tuned on conversations."""
    tokenizer = train_tokenizer([TEXT * 20], 320)
    shape = {"attention": request.param, "depth": 2, "sequence_len": 96, "window_pattern": "L"}
    start = GPT.init_weights

    def draw(self):
        start(self)
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                torch.nn.init.normal_(p, std=0.3)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # projections start at 0, which would hide what is before them
        patch.setattr(GPT, "init_weights", draw)
        run = untrained_run(root, request.param, tokenizer, tuned=True, **shape)
    export(run, root / request.param)
    return root / request.param


def load(path, auto=transformers.AutoModelForCausalLM):
    return auto.from_pretrained(path, trust_remote_code=True)


@pytest.fixture
def model(exported):
    return load(exported)


@pytest.fixture
def tokenizer(exported):
    return transformers.AutoTokenizer.from_pretrained(exported)


def arguments(path, **more):
    return {"output_dir": str(path), "max_steps": 2, "report_to": "none", "use_cpu": True, "logging_steps": 1, **more}


def trained(trainer):
    """Train two steps, and return the losses that were logged and the weights that moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])}
    return [step["loss"] for step in trainer.state.log_history if "loss" in step], moved


def test_the_trainer_trains_evaluates_and_predicts(exported, tokenizer, tmp_path):
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        exported, trust_remote_code=True, num_labels=2
    )
    rows = [{**tokenizer(TEXT[:n]), "labels": n % 2} for n in range(10, 18)]
    trainer = transformers.Trainer(
        classifier, transformers.TrainingArguments(**arguments(tmp_path)), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    assert "score.weight" in trained(trainer)[1]
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (8, 2)
    trainer.model.save_pretrained(tmp_path / "saved")
    kind = transformers.AutoModelForSequenceClassification
    loaded = load(tmp_path / "saved", kind)
    assert loaded.score.weight.equal(trainer.model.score.weight)
    assert load(exported, transformers.AutoModel)(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 32)


def test_trl_tunes_on_answers_alone_and_learns_the_end(model, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"messages": talk} for talk in TALKS])
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**arguments(tmp_path), assistant_only_loss=True), train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert learned[-1] == tokenizer.eos_token_id and tokenizer.decode(learned).startswith("It is")
    batch = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        expected = model.eval()(**batch).loss  # of capped logits
    losses, moved = trained(trainer)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3)
    assert {"lm_head.weight", "model.blocks.0.mlp.c_proj.weight"} <= moved


def test_trl_tunes_on_preferences_and_on_rewards(exported, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pairs = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": TALKS[0][1:]} for talk in TALKS]
    trainer = trl.DPOTrainer(
        load(exported), args=trl.DPOConfig(**arguments(tmp_path / "dpo"), trust_remote_code=True),
        processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(pairs),
    )  # fmt: skip
    losses, moved = trained(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and "lm_head.weight" in moved
    trainer = trl.GRPOTrainer(
        load(exported), reward_funcs=lambda completions, **_: [float(len(str(c))) for c in completions],
        args=trl.GRPOConfig(**arguments(tmp_path / "grpo"), max_completion_length=8), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": talk[:1]} for talk in TALKS]),
    )  # fmt: skip
    losses, moved = trained(trainer)
    assert len(losses) == 2 and "lm_head.weight" in moved


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix"])
def test_peft_tunes_without_being_told_names(model, tokenizer, tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    tuned = peft.get_peft_model(model, config)
    rows = [dict(tokenizer(TEXT[:n])) for n in range(10, 18)]
    trainer = transformers.Trainer(
        tuned, transformers.TrainingArguments(**arguments(tmp_path, learning_rate=0.01)), train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    refusals = {("prompt", "softmax"): "value embeddings need token ids", ("prefix", "gka"): "no prefix tuning"}
    refusals["prefix", "gka_conv"] = refusals["prefix", "gka"]
    if refusal := refusals.get((kind, model.config.attention)):
        with pytest.raises(ValueError, match=refusal):
            trainer.train()
        return
    assert trained(trainer)[1]
    tuned.eval()
    found = tuned.generate(**tokenizer("The quick", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    tuned.save_pretrained(tmp_path / "adapter")
    assert found.size(1) > 3 and (tmp_path / "adapter" / "adapter_config.json").exists()


def test_the_pipeline_continues_texts_and_answers(model, tokenizer):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert pipe("The quick", **options)[0]["generated_text"].startswith("The quick")
    assert pipe([TALKS[0][:1], TALKS[1]], batch_size=2, **options)[0][0]["generated_text"][1]["role"] == "assistant"
    assert pipe.preprocess("The quick")["input_ids"][0, 0] == tokenizer.bos_token_id


@pytest.mark.parametrize("exported", ["gka"], indirect=True)
def test_lm_eval_gives_what_our_harness_gives(exported, root):
    pytest.importorskip("lm_eval")
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from gkachat.checkpoint import load_model

    (root / "rows.jsonl").write_text("".join(json.dumps({"text": TEXT[: 9 * n]}) + "\n" for n in range(2, 9)))
    files = {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    kinds = {
        "last_word": {"output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}", "metric_list": [{"metric": "perplexity",
            "aggregation": "perplexity", "higher_is_better": False}]},
        "pages": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]},
    }  # fmt: skip
    (root / "tasks").mkdir(exist_ok=True)
    for name, kind in kinds.items():
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    manager = TaskManager(include_path=root / "tasks", include_defaults=False)
    model, own, _ = load_model(root / "runs" / exported.name)

    def figures(lm, task):
        result = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False)
        return {name: x for name, x in result["results"][task].items() if isinstance(x, float)}

    for task, options in (("last_word", {}), ("pages", {"add_bos_token": False})):
        hf = HFLM(str(exported), trust_remote_code=True, device="cpu", batch_size=4, **options)
        assert figures(hf, task) == pytest.approx(figures(HarnessModel(model, own), task), rel=1e-4)
