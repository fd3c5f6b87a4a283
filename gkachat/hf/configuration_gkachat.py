"""The shape of a gkachat model, as transformers reads it. MIT License, the gkachat developers."""

from transformers import PretrainedConfig

PLUS = {  # gka_plus: what is added to gka, and tokens that are mixed
    "conv_query": True,
    "conv_key": True,
    "conv_value": True,
    "taps": 4,
    "neighbour": False,
    "normalize": True,
    "token_bandwidth": False,
    "key_weight": False,
    "rope": True,
}


class GkachatConfig(PretrainedConfig):
    """A model of modeling_gkachat.py.

    Args:
        attention: "softmax", "gka" (Gaussian Kernel Attention, arXiv 2605.02144) or "gka_plus" (the same with what PLUS
            names).
        window: tokens that layers of type "sliding_attention" see, a token itself one of them; others see all.
        layer_types: of each layer "full_attention" or "sliding_attention".
        value_embedding_layers: softmax, gka_plus: layers that add a learned vector per token to the values.
        gka_rope: gka: rotate what is compared by its position.
        gka_include_self: gka: a token is among its own keys.
        gka_normalize: gka: each head's channels are RMS-normalised before they are compared and averaged.
        plus: gka_plus: those of PLUS that are different.

    `sliding_window`, by which transformers sizes caches, follows: gka_plus's convolutions reach behind a window.
    Raises ValueError for an attention there is not, or as many layer_types as there are not layers.
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
        value_embedding_layers: list[int] | None = None,
        gka_rope: bool = False,
        gka_include_self: bool = True,
        gka_normalize: bool = False,
        plus: dict | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        if attention not in ("softmax", "gka", "gka_plus"):
            raise ValueError(f"attention: given {attention!r}, expected 'softmax', 'gka' or 'gka_plus'")
        self.attention, self.vocab_size, self.hidden_size = attention, vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings, self.window = max_position_embeddings, window
        self.plus = PLUS | (plus or {})
        kwargs["sliding_window"] = window and window + (self.plus["taps"] - 1 if attention == "gka_plus" else 0)
        self.layer_types = list(layer_types or ["full_attention"] * num_hidden_layers)
        if len(self.layer_types) != num_hidden_layers:
            raise ValueError(f"layer_types: given {len(self.layer_types)}, expected {num_hidden_layers}")
        self.value_embedding_layers = list(value_embedding_layers or [])
        self.gka_rope, self.gka_include_self, self.gka_normalize = gka_rope, gka_include_self, gka_normalize
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
