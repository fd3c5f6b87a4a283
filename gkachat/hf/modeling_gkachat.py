"""gkachat's GPT for transformers. It needs only transformers and the files beside it.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

The model is a pre-norm transformer with parameter-free RMSNorm, a relu^2 MLP, an untied head with soft-capped logits
and two learned scalars per layer. Each embedding gets a share of the previous one (smear), and a share of the residual
stream after the middle layer is subtracted at the end (backout). Attention is softmax attention or Gaussian Kernel
Attention (GKA, arXiv 2605.02144). GKA has no query, key or value projections: it compares and averages its input, the
normalised residual stream, itself (gka) or short convolutions of it (gka_conv). With `attention_x0` the embedding is
added to that input.
Shapes: B batch, T new tokens, S tokens in the cache and new, H heads, C channels.
MIT License, the gkachat developers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, is_peft_available

from .attention_gkachat import (
    ATTENTIONS,
    QK_SCALE,
    Attention,
    ForgetGate,
    GaussianKernelAttention,
    GKAConv,
    ShortConv,
    ValueEmbedding,
    linear,
    parameter,
    rms_norm,
)
from .configuration_gkachat import GkachatConfig
from .positions_gkachat import Positions, RecentInputs

SMEAR_CHANNELS = 24  # embedding channels that the smear's gate reads
# The output field that holds the cache was renamed between versions of transformers.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# What transformers passes on without a meaning for this model, or for its loss function.
KNOWN_ARGUMENTS = {
    "cache_position", "num_items_in_batch", "ignore_index", "shift_labels", "tokenizer", "assistant_tokenizer",
}  # fmt: skip

if is_peft_available():  # PEFT looks up a model type's matrices in tables, one for each kind of adapter
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and "_LNTUNING_" not in name and "_BEFT_" not in name:
            table.setdefault("gkachat", ["c_q", "c_k", "c_v", "c_proj", "c_fc"])  # it has no norms or biases to tune
        elif name.endswith("_FEEDFORWARD_MODULES_MAPPING"):
            table.setdefault("gkachat", ["c_fc"])


class MLP(nn.Module):
    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.c_fc = linear(config.hidden_size, 4 * config.hidden_size)
        self.c_proj = linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTC)).square())


class Block(GradientCheckpointingLayer):
    def __init__(self, config: GkachatConfig, index: int):
        super().__init__()
        self.attn = ATTENTIONS[config.attention](config, index)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        x0_BTC: Tensor,
        idx_BT: Tensor | None,
        positions: Positions,
        cache: DynamicCache | None = None,
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream and, if asked, the attention weights (B, H, T, S)."""
        y_BTC, weights = self.attn(rms_norm(x_BTC), x0_BTC, idx_BT, positions, cache, output_weights)
        x_BTC = x_BTC + y_BTC
        return x_BTC + self.mlp(rms_norm(x_BTC)), weights


class Smear(nn.Module):
    """Adds a share of the previous token's embedding to each token's, gated by sigmoid(W x[:24])."""

    def __init__(self, config: GkachatConfig):
        super().__init__()
        self.index = config.num_hidden_layers
        self.gate = linear(min(SMEAR_CHANNELS, config.hidden_size), 1)
        self.share = parameter(1)

    def forward(self, x_BTC: Tensor, positions: Positions, cache: DynamicCache | None) -> Tensor:
        (previous_BTC,) = positions.before(x_BTC, 1, None if cache is None else cache.layers[self.index])
        gate_BT1 = self.share.to(x_BTC.dtype) * torch.sigmoid(self.gate(x_BTC[..., : self.gate.in_features]))
        return x_BTC + gate_BT1 * previous_BTC


class GkachatPreTrainedModel(PreTrainedModel):
    config_class = GkachatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "wte"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers wants lists)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "log_sigma", "forget_gate.bias", "residual_scale", "x0_mix", "input_mix", "backout", "smear.share",
    ]  # fmt: skip

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def post_init(self) -> None:
        super().post_init()
        names = [name for name, _ in self.named_parameters()]
        kept = self._keep_in_fp32_modules_strict or []
        self._keep_in_fp32_modules_strict = {part for part in kept if any(part in name for name in names)}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Attention) and module.input_mix is not None:
            init.constant_(module.input_mix, 0.5)
        if isinstance(module, ShortConv):
            identity = torch.zeros_like(module.weight)
            identity[0] = 1
            init.copy_(module.weight, identity)  # a part of it would not be recognised as loaded, and overwritten
        elif isinstance(module, GaussianKernelAttention):
            init.constant_(module.log_sigma, 0.5 * math.log(self.config.head_dim / 2))
        elif isinstance(module, GKAConv):
            init.constant_(module.log_sigma, 0.25 * math.log(self.config.head_dim) - math.log(QK_SCALE))
        elif isinstance(module, ForgetGate):  # heads forget at rates from 1/8 to 1/512
            rates = torch.logspace(3, 9, module.bias.numel(), base=2.0)
            init.copy_(module.bias, (rates - 1).log())
        elif isinstance(module, Smear):
            init.zeros_(module.share)
        elif isinstance(module, GkachatModel):
            init.ones_(module.residual_scale)
            init.zeros_(module.x0_mix)
            if module.backout is not None:
                init.zeros_(module.backout)

    def _resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the value embeddings too. Every row then belongs to a token, so that generation may use them all."""
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.modules():
            if isinstance(module, ValueEmbedding):
                old, n = module.table, embedding.num_embeddings
                module.table = self._get_resized_embeddings(old, n, mean_resizing=mean_resizing)
                module.table.requires_grad_(old.weight.requires_grad)
        if self.can_generate():
            self.generation_config.suppress_tokens = None
        return embedding


class GkachatModel(GkachatPreTrainedModel):
    """Transformer without a head. `last_hidden_state` is what the head reads."""

    def __init__(self, config: GkachatConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.residual_scale = parameter(config.num_hidden_layers)
        self.x0_mix = parameter(config.num_hidden_layers)
        self.smear = Smear(config) if config.smear else None
        self.backout = parameter(1) if config.backout else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden state (B, T, C).

        Args:
            attention_mask: (B, cached tokens + T), 0 for padding, which may be anywhere.
            position_ids: positions follow from the mask; these must agree with it.
            cache: a DynamicCache, also accepted as past_key_values.
            inputs_embeds: (B, T, C) instead of input_ids, for models without value embeddings.
            output_hidden_states: also return the input of each layer and the last hidden state.
            output_attentions: also return each layer's weights (B, H, T, S), which takes eager attention.

        Raises:
            ValueError: another kind of cache, a mask of another shape, positions that restart within a row, or an
                argument that this model does not have.
        """
        unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in KNOWN_ARGUMENTS)
        if unknown:
            raise ValueError(f"given {', '.join(unknown)}, which this model does not have")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is not None and self.config.value_embedding_layers:
            raise ValueError("inputs_embeds: this model's value embeddings need token ids; give input_ids")
        output_hidden_states = _or(output_hidden_states, self.config.output_hidden_states)
        output_attentions = _or(output_attentions, self.config.output_attentions)
        x_BTC = rms_norm(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
        if x_BTC.ndim != 3 or not x_BTC.size(1):
            raise ValueError(f"input_ids: given shape {tuple(x_BTC.shape[:-1])}, expected tokens of one or more texts")
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        n_past = 0 if cache is None else cache.get_seq_length()
        positions = Positions(x_BTC.shape[:2], n_past, attention_mask, position_ids, self.config, x_BTC.device)
        if self.smear is not None:
            x_BTC = self.smear(x_BTC, positions, cache)
        x0_BTC, states, attentions = x_BTC, [], []
        for index, block in enumerate(self.blocks):
            states.append(x_BTC)
            scale, mix = self.residual_scale[index].to(x_BTC), self.x0_mix[index].to(x_BTC)
            x0_BTC = x0_BTC.to(x_BTC.device)
            x_BTC = scale * x_BTC + mix * x0_BTC
            x_BTC, weights = block(
                x_BTC, x0_BTC, input_ids, positions, cache=cache, output_weights=bool(output_attentions)
            )
            attentions.append(weights)
            if index == len(self.blocks) // 2:
                middle_BTC = x_BTC
        if self.backout is not None:
            x_BTC = x_BTC - self.backout.to(x_BTC) * middle_BTC.to(x_BTC.device)
        x_BTC = rms_norm(x_BTC)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTC,
            hidden_states=(*states, x_BTC) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache},
        )

    def _cache(self, cache: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        """Return the cache to use, with the layers that smear and convolutions need. Raises ValueError."""
        L = self.config.num_hidden_layers
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"cache: given a {type(cache).__name__}, expected a DynamicCache")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None and cache.get_seq_length():
                raise ValueError("cache: gradient checkpointing recomputes layers, which would fill it a second time")
            return None
        if cache is None and not self.training and _or(use_cache, self.config.use_cache):
            cache = DynamicCache(config=self.config)
        if cache is None:
            return None
        while len(cache.layers) < L:
            cache.layers.append(DynamicLayer())
        while len(cache.layers) < 2 * L + 1:
            cache.layers.append(RecentInputs())
        attention, D, values = self.config.attention, self.config.head_dim, cache.layers[0].values
        if cache.get_seq_length() and (values.size(-1) == D) != (attention == "softmax"):
            raise ValueError(
                f"cache: given values of {values.size(-1)} channels for heads of {D}, which is not what {attention} "
                "caches; gka and gka_conv have no prefix tuning"
            )
        return cache


class GkachatForCausalLM(GkachatPreTrainedModel, GenerationMixin):
    """Language model for trained weights. To train from scratch, use gkachat, which initialises weights differently."""

    def __init__(self, config: GkachatConfig):
        super().__init__(config)
        self.model = GkachatModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V) in float32 and, with `labels` (B, T), the mean next-token loss in nats.

        The other arguments and errors are those of GkachatModel.

        Args:
            labels: shifted here; -100 is not scored.
            logits_to_keep: keep the logits of the last so many tokens, or of the tokens at these indices.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cap = self.config.final_logit_softcapping
        logits = self.lm_head(output.last_hidden_state[:, keep] / cap).float().tanh() * cap
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE: output.get(CACHE)},
        )


class GkachatForSequenceClassification(GenericForSequenceClassification, GkachatPreTrainedModel):
    """Classifier of whole texts by their last token."""

    def __init__(self, config: GkachatConfig):
        GkachatPreTrainedModel.__init__(self, config)  # the generic one asks AutoModel, which knows no remote code
        self.num_labels = config.num_labels
        self.model = GkachatModel(config)
        self.score = linear(config.hidden_size, self.num_labels)
        self.post_init()


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given
