"""What a forward pass can change in a module beside random states, kept to be put back: buffers and attributes."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from orchestrator.snapshot.attributes import Built, capture_attributes, restore_attributes
from orchestrator.snapshot.names import buffer_slots
from orchestrator.snapshot.tensors import overwrite, replica, replicas

__all__ = ["Kept"]


class Kept:
    """A copy of the buffers and plain attributes of a module as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._built = Built.of(module)
        self._attributes = replicas(capture_attributes(module))
        self._buffers = {
            slot.name: None if slot.tensor is None else replica(slot.tensor.detach())
            for slot in buffer_slots(module)
            if slot.tensor is None or not is_lazy(slot.tensor)
        }

    def put_back(self) -> None:
        """Make them what they were; what came since is removed."""
        for slot in buffer_slots(self._module):
            live = slot.tensor
            if live is not None and is_lazy(live):
                continue
            if slot.name not in self._buffers:
                del slot.owner._buffers[slot.key]
                continue
            saved = self._buffers[slot.name]
            if live is None or saved is None or not overwrite(live, saved):
                slot.owner._buffers[slot.key] = saved
        restore_attributes(self._module, self._attributes, self._built)
