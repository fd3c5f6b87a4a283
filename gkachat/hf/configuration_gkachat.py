"""Configuration of a gkachat model for transformers. MIT License, the gkachat developers."""

from transformers import PretrainedConfig
from transformers.utils.versions import require_version

require_version("transformers>=5", "A gkachat export needs transformers 5 or newer: pip install -U 'transformers>=5'")
ATTENTIONS = ("softmax", "gka", "gka_conv")
TAPS = 4  # tokens that short convolutions mix


class GkachatConfig(PretrainedConfig):
    """Shape of a model in modeling_gkachat.py.

    Args:
        attention: "softmax", "gka" (Gaussian Kernel Attention, arXiv 2605.02144) or "gka_conv" (the same kernel on
            short convolutions of its input).
        window: tokens visible to layers of type "sliding_attention", the query's own included. transformers sizes its
            caches by `sliding_window`, which is the same number, and for gka_conv 3 more: those that the oldest key is
            a convolution of.
        layer_types: "full_attention" or "sliding_attention" for each layer.
        attention_x0: attention after the first layer reads a learned sum of the residual stream and the embedding.
        smear: add a share of the previous token's embedding to each token's.
        backout: subtract a share of the residual stream after the middle layer at the end.
        value_embedding_layers: softmax: layers that add a learned vector per token to the values.
        short_conv: softmax: queries, keys and values mix the last 4 tokens, and heads have output gates.
        gka_rope: gka: rotate features by position before they are compared.
        gka_include_self: gka: let a token attend to itself.
        gka_normalize: gka: RMS-normalise each head's channels before they are compared and averaged.
        final_logit_softcapping: logits are this number times tanh(z / this number).
        initializer_range: standard deviation of new weights. gkachat, which trains models, initialises them otherwise.

    Raises ValueError for values that fit no model.
    """

    model_type = "gkachat"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (Trainer adds it to another list)

    def __init__(
        self,
        attention: str = "softmax",
        vocab_size: int = 32_768,
        hidden_size: int = 1280,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 10,
        max_position_embeddings: int = 2048,
        window: int | None = None,
        layer_types: list[str] | None = None,
        attention_x0: bool = False,
        smear: bool = True,
        backout: bool = True,
        value_embedding_layers: list[int] | None = None,
        short_conv: bool = False,
        gka_rope: bool = False,
        gka_include_self: bool = True,
        gka_normalize: bool = False,
        final_logit_softcapping: float = 15.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: given {attention!r}, expected one of {', '.join(ATTENTIONS)}")
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 2:
            raise ValueError(f"hidden_size: given {hidden_size}, expected an even number for each of the heads")
        if not final_logit_softcapping or final_logit_softcapping <= 0:
            raise ValueError(f"final_logit_softcapping: given {final_logit_softcapping!r}, expected a number above 0")
        if value_embedding_layers and attention != "softmax":
            raise ValueError(f"value_embedding_layers: given {value_embedding_layers} with {attention}, expected none")
        self.attention, self.vocab_size, self.hidden_size = attention, vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings, self.window = max_position_embeddings, window
        kwargs["sliding_window"] = window + TAPS - 1 if window and attention == "gka_conv" else window
        self.layer_types = list(layer_types or ["full_attention"] * num_hidden_layers)
        self.attention_x0, self.smear, self.backout, self.short_conv = attention_x0, smear, backout, short_conv
        self.value_embedding_layers = list(value_embedding_layers or [])
        self.gka_rope, self.gka_include_self, self.gka_normalize = gka_rope, gka_include_self, gka_normalize
        self.final_logit_softcapping, self.initializer_range = final_logit_softcapping, initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
