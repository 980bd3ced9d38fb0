"""Shape of a network: what the forward pass needs to know beside the weights.

Read from a GGUF file's metadata (`architectures.py`), kept in the packed file's header, handed to the compute core.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Network:
    """Hyper-parameters of a decoder-only transformer. Names follow Hugging Face configs."""

    architecture: str
    """'llama', ... as GGUF's general.architecture says."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_dim: int = 0
    """Leading dimensions of a head that are rotated. 0: all of head_dim."""
    rope_scale: float = 1.0
    """Positions are divided by this (linear scaling)."""
    rope_factors: list[float] = field(default_factory=list)
    """Divisor of each rotation frequency, (rope_dim / 2,); empty for none (Llama 3's rope_freqs tensor)."""
    tied_head: bool = True
    """The output head is the embedding matrix."""
    qkv_bias: bool = False
    """Q, K and V have biases (qwen2)."""
    qk_norm: bool = False
    """Q and K heads pass an RMSNorm of (head_dim,) each before RoPE (qwen3, gemma3)."""
    qk_norm_joint: bool = False
    """That norm is over all heads at once, (num_heads * head_dim,) (olmoe)."""
    post_norms: bool = False
    """RMSNorm after attention and after the FFN, before the residual sum (gemma3)."""
    activation: str = "silu"
    """'silu' or 'gelu_tanh', of the gate."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied by this (gemma: sqrt(hidden_size))."""
    attention_scale: float = 0.0
    """Scores are multiplied by this. 0: 1 / sqrt(head_dim)."""
    sliding_window: int = 0
    """A row in a sliding layer sees this many latest keys, itself included. 0: all."""
    sliding_layers: list[bool] = field(default_factory=list)
    """Which layers slide, (num_layers,); empty for none."""
    sliding_rope_theta: float = 0.0
    """RoPE base of sliding layers. 0: as rope_theta."""
    logit_softcap: float = 0.0
    """logits = cap * tanh(logits / cap). 0: none."""
    attention_softcap: float = 0.0
    """The same for attention scores. 0: none."""
    num_experts: int = 0
    """Experts of each FFN. 0: a dense FFN."""
    num_active_experts: int = 0
    expert_ffn_size: int = 0
    normalise_experts: bool = False
    """Weights of the chosen experts are rescaled to sum to 1 (qwen3moe: yes, olmoe: no)."""

    def kv_bytes_per_token(self, kv_type: str = "f16") -> int:
        """Bytes of KV one token takes: a key and a value per layer and KV head. kv_type: 'f16' or 'q8'.

        SmolLM2-135M in float16: 2 * 30 layers * 3 heads * 64 * 2 B = 23,040 B. In 8 bits, each head padded to 16 and
        with a float16 scale: 2 * 30 * 3 * (64 + 2) B = 11,880 B.
        """
        head_bytes = 2 * self.head_dim if kv_type == "f16" else -(-self.head_dim // 16) * 16 + 2
        return 2 * self.num_layers * self.num_kv_heads * head_bytes
