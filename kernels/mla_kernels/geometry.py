"""The numbers that make one MLA model different from another. Nothing else."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class MLAGeometry:
    """Head geometry of one MLA layer on one rank.

    Symbols as in the DeepSeek-V2 paper (arXiv 2405.04434, section 2.1) and vLLM's table:

    num_heads (N): query heads on this rank, after tensor parallelism.
    kv_lora_rank (L): width of the latent that serves as key and as value of every head.
    qk_nope_head_dim (P), qk_rope_head_dim (R), v_head_dim (V): per-head widths before absorption.
        R may be 0 (models without rotary embedding in attention).
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {'0 or more' if name == 'qk_rope_head_dim' else 'positive'}, got {value}"
            for name, value in asdict(self).items()
            if value < 0 or (value == 0 and name != "qk_rope_head_dim")
        ]
        if wrong:
            raise ValueError(f"impossible MLA geometry: {'; '.join(wrong)}")

    @property
    def latent_dim(self) -> int:
        """K: values in one cache row, the latent followed by the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Q: width of one unabsorbed query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the *unabsorbed* head, 1/sqrt(P + R), never 1/sqrt(L + R).

        Models with YaRN multiply it further; engines hand the product to the kernels.
        """
        return self.qk_head_dim**-0.5

    def __str__(self) -> str:
        return (
            f"{self.num_heads} heads, latent {self.kv_lora_rank} + rope {self.qk_rope_head_dim}, "
            f"nope {self.qk_nope_head_dim}, v {self.v_head_dim}"
        )
