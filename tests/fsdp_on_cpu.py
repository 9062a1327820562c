"""accelerate shards weights on GPUs alone; with `patch()` it does so on CPUs too. As a program it runs smolvlm_exp."""

import inspect

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def patch() -> None:
    plain = AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        plugin = inspect.signature(plain).bind(self, *args, **kwargs).arguments.get("fsdp_plugin")
        if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = patched


if __name__ == "__main__":
    from smolvlm_exp.main import main

    patch()
    main()
