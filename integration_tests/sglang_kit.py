"""SGLang's attention test kit in this process: our plugin loaded, and what a process of SGLang has beside it."""

import unittest

from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel

load_plugins()
_parallel = get_parallel().override(attn_tp_size=1, attn_tp_rank=0, attn_dcp_rank=0, attn_dcp_size=1)
_parallel.__enter__()


class KitTest(unittest.TestCase):
    """The kit skips a test whose backend cannot be imported. Ours can: that would be a failure."""

    def skipTest(self, reason):
        self.fail(reason)
