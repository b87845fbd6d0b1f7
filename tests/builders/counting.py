"""Count what torch does inside a context: operators, bytes written, waits for the device."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


def _places(values):
    return {
        part.untyped_storage().data_ptr() for part in tree_leaves(values) if torch.is_tensor(part)
    }


class Counted(TorchDispatchMode):
    """Operators below autograd, but views; a result whose memory an argument has is not written.

    Attributes
    ----------
    operators : how often each was called.
    of_numbers : those among them that take or make floating-point numbers: not indices alone.
    written : bytes, of new tensors and of what is changed in place.
    waits : names of the operators that wait for the device.
    """

    def __init__(self):
        super().__init__()
        self.operators, self.of_numbers, self.written, self.waits = Counter(), Counter(), 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in WAITS:
            self.waits.append(name)
        wrote = 0
        if name.startswith("index_copy"):  # only the rows of its source
            wrote = args[3].nbytes
        elif function._schema.is_mutable:
            pairs = zip(function._schema.arguments, args, strict=False)
            changed = [a for spec, a in pairs if spec.alias_info and spec.alias_info.is_write]
            wrote = sum(part.nbytes for part in changed)
        else:
            old = _places((args, kwargs))
            fresh = [part for part in tree_leaves(result) if torch.is_tensor(part)]
            wrote = sum(p.nbytes for p in fresh if p.untyped_storage().data_ptr() not in old)
        if wrote or name in WAITS:
            self.operators[name] += 1
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, result)))
            self.of_numbers[name] += any(part.is_floating_point() for part in tensors)
        self.written += wrote
        return result

    @property
    def total(self):
        """All operators that are not views."""
        return sum(self.operators.values())


class Tape(TorchDispatchMode):
    """Records a call so that it can be replayed, as a CUDA graph is.

    Every tensor keeps its memory and every number of the host its value; an operator that waits is
    refused, a tensor of the host's numbers, and a replay that reads what others own no longer.
    """

    def __init__(self, device=None):
        super().__init__()
        self.calls = []
        self.made = set()  # storages, by their address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        if name == "lift_fresh":
            raise RuntimeError("a step copies what the host made")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        self.made |= _places(result) - _places((args, kwargs))
        return result

    def _check_owned(self):
        """The tape alone keeps what a graph would read from memory that was given back."""
        leaves = [part for part in tree_leaves(self.calls) if torch.is_tensor(part)]
        times = Counter(map(id, leaves))
        held = {id(tensor): tensor for tensor in leaves}
        ours = Counter(tensor.untyped_storage()._cdata for tensor in held.values())
        owned, shapes = set(), {}
        for key, tensor in held.items():
            storage = tensor.untyped_storage()
            shapes[storage._cdata] = storage.data_ptr(), tuple(tensor.shape)
            # those in the calls and in leaves, in held, in tensor, of the argument, and of torch
            others = sys.getrefcount(tensor) - 2 * times[key] - 4
            if others or torch._C._storage_Use_Count(storage._cdata) > ours[storage._cdata] + 1:
                owned.add(storage._cdata)
        for storage, (place, shape) in shapes.items():
            given_back = place not in self.made and storage not in owned
            assert not given_back, f"{shape} was given back; a graph would read it"

    def replay(self):
        """Run all operators again on the same memory."""
        self._check_owned()
        for function, args, kwargs, before in self.calls:
            old = _places((args, kwargs))
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                if torch.is_tensor(kept) and kept.untyped_storage().data_ptr() not in old:
                    kept.copy_(new)
