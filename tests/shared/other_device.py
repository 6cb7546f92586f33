"""A device that is neither a CPU nor CUDA and has no float64, like MPS: CPU tensors in disguise. An operation raises if
it mixes the device with CPU tensors of more than one number, or makes a float64 there.

Import it in a process of its own: torch keeps the device forever. None of its tensors may be made in inference mode."""

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

backend_registration._setup_privateuseone_for_python_backend("other")
OTHER = torch.device("other", 0)
COPIES = {"copy_", "_to_copy", "index_put_", "_index_put_impl_", "index", "set_"}


class _Other(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        if raw.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"this device has no {raw.dtype}")
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=OTHER
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"other({self.raw})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def __deepcopy__(self, memo):
        copy = memo[id(self)] = _Other(self.raw.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad)
        return copy

    def tolist(self):
        return self.raw.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _perform(func, args, kwargs or {})


def _perform(func, args, kwargs):
    name = func.overloadpacket.__name__
    flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(leaf, _Other) for leaf in flat)
    if name == "_has_compatible_shallow_copy_type":
        return type(args[0]) is type(args[1])
    if there and name not in COPIES:
        strangers = [leaf for leaf in flat if not isinstance(leaf, _Other) and leaf.dim()]
        assert not strangers, f"{name} of tensors on two devices: {[(type(leaf), leaf.shape) for leaf in flat]}"
    assert not (there and name == "_fused_adamw_"), "MPS's kernel ignores grad_scale"
    if there and name == "copy_" and not isinstance(args[0], _Other):
        late = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        assert not late, "a copy to the CPU that may be read before it is there"
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "other"
        kwargs = kwargs | {"device": torch.device("cpu")} if there else kwargs
    elif name == "copy_":
        there = isinstance(args[0], _Other)
    raw = pytree.tree_map(lambda leaf: leaf.raw if isinstance(leaf, _Other) else leaf, (args, kwargs))
    result = func(*raw[0], **raw[1])
    if name.endswith("_") and isinstance(result, torch.Tensor) and args and result is raw[0][0]:
        return args[0]
    return pytree.tree_map(lambda leaf: _Other(leaf) if there and isinstance(leaf, torch.Tensor) else leaf, result)


class OtherDevice(TorchDispatchMode):
    """A context in which tensors can be made on `OTHER`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _perform(func, args, kwargs or {})


def _empty(size, stride, **options):
    return _Other(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _copy(source, target, non_blocking=False):
    target.raw.copy_(source)
    return target


_library = torch.library.Library("aten", "IMPL")  # torch.tensor calls these without going through a mode
_library.impl("empty_strided", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy, "PrivateUse1")
