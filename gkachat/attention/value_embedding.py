"""Value embeddings: a learned vector per token, added to the values (nanochat; modded-nanogpt)."""

import torch
from torch import Tensor, nn

from gkachat.attention.linear import Embedding, Linear, uniform_
from gkachat.config import GPTConfig

GATE_CHANNELS = 12  # channels of the layer's input that the gates read


class ValueEmbedding(nn.Module):
    """Adds a learned vector per token to the values, gated per head by 3 sigmoid(W x[:12]). Costs almost no FLOPs."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.table = Embedding(config.vocab_size, config.n_embd)
        self.gate = Linear(GATE_CHANNELS, config.n_head)

    @staticmethod
    def in_layer(config: GPTConfig, index: int) -> bool:
        """Return whether a layer has a value embedding: every other layer and the last, if the config asks for them."""
        return config.uses_value_embeddings and (config.depth - 1 - index) % 2 == 0

    def init_weights(self) -> None:
        """Fill the table uniformly, with standard deviation 1 / sqrt(C); gates start a little above their middle."""
        uniform_(self.table.weight, self.table.embedding_dim**-0.5)
        nn.init.uniform_(self.gate.weight, 0.0, 0.02)

    def forward(self, v_BTHD: Tensor, x_BTC: Tensor, idx_BT: Tensor) -> Tensor:
        """Return the values with the gated embeddings of the tokens added, (B, T, H, D)."""
        gate_BTH = 3 * torch.sigmoid(self.gate(x_BTC[..., :GATE_CHANNELS]))
        return v_BTHD + gate_BTH[..., None] * self.table(idx_BT).to(v_BTHD.dtype).view(v_BTHD.shape)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return table and gate, each in a group of its own."""
        return {"value_embeddings": [self.table.weight], "gates": [self.gate.weight]}
