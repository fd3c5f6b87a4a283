"""transformers' own common model tests hold for exported models of every attention, at tiny sizes.

tests/run.sh fetches them: they are in the source distribution on PyPI and in no wheel. They import two files that it
lacks, the mixins for generation and for export to other formats, of which empty ones take the place.
"""

import importlib
import random
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest

transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto")
pytest.importorskip("parameterized")
SOURCE = Path(__file__).parents[2] / ".venv" / f"transformers-tests-{transformers.__version__}"
if not SOURCE.is_dir():
    pytest.skip(f"no {SOURCE.name} in .venv; tests/run.sh fetches it where there is a network", allow_module_level=True)

from gkachat.hf.configuration_gkachat import GkachatConfig  # noqa: E402
from gkachat.hf.modeling_gkachat import GkachatForCausalLM, GkachatForSequenceClassification, GkachatModel  # noqa: E402


def common_tests():
    """Return transformers' ModelTesterMixin."""
    packages = {
        "transformers_tests": None,
        "transformers_tests.exporters": None,
        "transformers_tests.exporters.test_export": "ExportTesterMixin",
        "transformers_tests.generation": None,
        "transformers_tests.generation.test_utils": "GenerationTesterMixin",
    }
    for name, mixin in packages.items():
        sys.modules[name] = module = types.ModuleType(name)
        module.__path__ = [str(SOURCE)] if name == "transformers_tests" else []
        if mixin:
            setattr(module, mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


common = common_tests()
B, T, V, C, H = 2, 7, 49, 32, 4
SHAPES = {
    "Softmax": {"attention": "softmax", "value_embedding_layers": [1]},
    "SoftmaxConv": {"attention": "softmax", "short_conv": True},
    "GKA": {"attention": "gka", "gka_rope": True},
    "GKAConv": {"attention": "gka_conv", "attention_x0": True},
}


MODELS = {
    "": GkachatModel,
    "_FOR_CAUSAL_LM": GkachatForCausalLM,
    "_FOR_SEQUENCE_CLASSIFICATION": GkachatForSequenceClassification,
}
SKIPPED = {
    "test_bc_torch_dtype": "an old name of an argument of transformers; test_export.py loads in bfloat16",
    "test_bc_cache_name_forward": "both names of the cache are taken without a warning; 5.0 has only the old one",
    "test_generation_tester_mixin_inheritance": "the mixin for generation is not in the source distribution",
}

SKIPPED |= {  # half of the time
    name: "chooses among kernels of a GPU" if name.endswith("_sdpa_kernels") else "as in float16"
    for name in dir(common.ModelTesterMixin)
    if name.endswith("_sdpa_kernels") or (name.startswith("test_eager_matches_sdpa") and "_bf16_" in name)
}
NO_EMBEDS = dict.fromkeys(("test_inputs_embeds", "test_inputs_embeds_matches_input_ids"), "value embeddings need ids")


class Tester:
    """The tiny model and the batch that the common tests ask for."""

    batch_size, seq_length, hidden_size, num_attention_heads, num_hidden_layers = B, T, C, H, 2
    is_training = True
    __test__ = False

    def __init__(self, parent, **shape):
        self.parent, self.shape = parent, shape

    def get_config(self):
        return GkachatConfig(
            vocab_size=V, hidden_size=C, num_attention_heads=H, num_hidden_layers=2, max_position_embeddings=64,
            window=5, layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **self.shape,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids, mask = common.ids_tensor([B, T], V), common.random_attention_mask([B, T])
        return self.get_config(), {"input_ids": ids.clamp(min=3), "attention_mask": mask}


def model_tests(name):
    def set_up(self):
        random.seed(0)
        self.model_tester = Tester(self, **SHAPES[name])
        known = [(auto.CONFIG_MAPPING._extra_content, {"gkachat": GkachatConfig})]  # as if of transformers itself
        for kind, model in MODELS.items():
            known.append((getattr(auto, f"MODEL{kind}_MAPPING")._extra_content, {GkachatConfig: model}))
            known.append((getattr(common, f"MODEL{kind}_MAPPING_NAMES"), {"gkachat": model.__name__}))
        for table, entry in known:
            patch = mock.patch.dict(table, entry)
            patch.start()
            self.addCleanup(patch.stop)

    members = {"setUp": set_up, "all_model_classes": tuple(MODELS.values())}
    skipped = SKIPPED | (NO_EMBEDS if SHAPES[name].get("value_embedding_layers") else {})
    members |= {test: unittest.skip(reason)(lambda self: None) for test, reason in skipped.items()}
    members["test_can_init_all_missing_weights_before_2023"] = True  # it does not apply to us; runs the test
    return type(f"Test{name}", (common.ModelTesterMixin, unittest.TestCase), members)


TestSoftmax, TestSoftmaxConv, TestGKA, TestGKAConv = map(model_tests, SHAPES)
