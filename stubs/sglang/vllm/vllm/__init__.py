"""Only `_custom_ops.rotary_embedding`, which SGLang imports on a CPU and never calls."""
