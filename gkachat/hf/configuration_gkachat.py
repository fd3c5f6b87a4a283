"""Configuration of a gkachat model for transformers. MIT License, the gkachat developers."""

from transformers import PretrainedConfig

TAPS = 4  # tokens that gka_plus's short convolutions mix


class GkachatConfig(PretrainedConfig):
    """Shape of a model in modeling_gkachat.py.

    Args:
        attention: "softmax", "gka" (Gaussian Kernel Attention, arXiv 2605.02144) or "gka_plus" (the same kernel on
            short convolutions of the block input).
        window: tokens visible to layers of type "sliding_attention", the query's own included.
        layer_types: "full_attention" or "sliding_attention" for each layer.
        smear: add a share of the previous token's embedding to each token's.
        backout: subtract a share of the residual stream after the middle layer at the end.
        value_embedding_layers: softmax and gka_plus: layers that add a learned vector per token to the values.
        gka_rope: gka: rotate features by position before they are compared.
        gka_include_self: gka: let a token attend to itself.
        gka_normalize: gka: RMS-normalise each head's channels before they are compared and averaged.

    transformers sizes its caches by `sliding_window`, which is derived: for gka_plus it includes the tokens before the
    window that the convolutions read.
    """

    model_type = "gkachat"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

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
        smear: bool = True,
        backout: bool = True,
        value_embedding_layers: list[int] | None = None,
        gka_rope: bool = False,
        gka_include_self: bool = True,
        gka_normalize: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.attention, self.vocab_size, self.hidden_size = attention, vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings, self.window = max_position_embeddings, window
        kwargs["sliding_window"] = window and window + (TAPS - 1 if attention == "gka_plus" else 0)
        self.layer_types = list(layer_types or ["full_attention"] * num_hidden_layers)
        self.smear, self.backout = smear, backout
        self.value_embedding_layers = list(value_embedding_layers or [])
        self.gka_rope, self.gka_include_self, self.gka_normalize = gka_rope, gka_include_self, gka_normalize
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
