"""A device of torch, "fakegpu", whose memory is the host's: to Python code it is a GPU.

Tensors of different devices do not mix, NumPy does not read them, and every operation that copies a
value to the host is recorded. The work of spmoe on "cuda" runs on it where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fakegpu"
aten = torch.ops.aten
_COPIES = {aten._to_copy, aten.copy_, aten.to}  # from one device to another
_READS = {  # which the host has to wait for
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal),
    *(aten.nonzero, aten.masked_select, aten._unique2),
}


class DeviceTensor(torch.Tensor):
    """A tensor of the device; ``host`` holds its values, in memory of the CPU."""

    host: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> DeviceTensor:
        # A view of a tensor that was made outside of inference mode is no inference tensor.
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=torch.device(NAME, 0),
            )
        tensor.host = host.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FakeDevice.current.run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Return the address. The memory lives until the device's queue has been waited for."""
        FakeDevice.current.lent.append(self.host)
        return self.host.data_ptr()

    def tolist(self) -> Any:
        """Return the values, which are copied to the host."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as a tensor of a GPU does."""
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu()")

    def __repr__(self) -> str:
        return f"DeviceTensor({self.host!r})"

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return DeviceTensor(self.host.clone())


class FakeDevice(TorchDispatchMode):
    """Runs the operations of the device while it is entered.

    Attributes:
        reads: Operations that copied values to the host, in order.
        lent: Memory whose address was asked for since the queue was last waited for.
    """

    current: FakeDevice

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        """``wait`` waits for the work of others that may be queued on the device."""
        super().__init__()
        self.wait = wait
        self.lent: list[torch.Tensor] = []
        self.reads: list[str] = []

    def __enter__(self) -> FakeDevice:
        FakeDevice.current = self
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the values, and wrap its results if they are the device's."""
        found = _Found()
        host_args, host_kwargs = found.unwrap(args), found.unwrap(kwargs)
        if not found.ours and not (found.target and found.target.type == NAME):
            return func(*args, **kwargs)
        kind = func.overloadpacket
        if kind is aten._has_compatible_shallow_copy_type:
            return False  # a module that moves gets new parameters
        if found.theirs and kind not in _COPIES:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and cpu, in {func}"
            )
        to_host = (found.target is not None and found.target.type != NAME) or (
            kind is aten.copy_ and not isinstance(args[0], DeviceTensor)
        )
        if to_host or kind in _READS or (kind is aten.index and _has_mask(host_args[1])):
            self.reads.append(str(func))
        if self.lent:
            self.wait()
            self.lent.clear()
        result = func(*host_args, **host_kwargs)
        if kind is aten.copy_:
            return args[0]
        crosses = to_host or not isinstance(args[0] if args else None, DeviceTensor)
        if crosses and host_args and result is host_args[0]:
            result = result.clone()  # the memory of the other side
        return result if to_host else _wrapped(result, found.ours)


class _Found:
    """Tensors and devices among the arguments of an operation."""

    def __init__(self) -> None:
        self.ours: dict[int, DeviceTensor] = {}  # by the identity of their values
        self.theirs = False  # of the host; numbers join in with those of any device
        self.target: torch.device | None = None

    def unwrap(self, value: Any) -> Any:
        """Return an argument as the host's operation takes it."""
        if isinstance(value, DeviceTensor):
            self.ours[id(value.host)] = value
            return value.host
        if isinstance(value, torch.Tensor):
            self.theirs = self.theirs or value.ndim > 0
        elif isinstance(value, torch.device):
            self.target = value
            return torch.device("cpu")
        elif type(value) in (list, tuple):
            return type(value)([self.unwrap(item) for item in value])
        elif type(value) is dict:
            return {name: self.unwrap(item) for name, item in value.items()}
        return value


def _has_mask(indices: Any) -> bool:
    """Whether the host must know how many values a mask picks."""
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def _wrapped(value: Any, ours: dict[int, DeviceTensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return ours[id(value)] if id(value) in ours else DeviceTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_wrapped(item, ours) for item in value])
    return value


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> DeviceTensor:
    return DeviceTensor(torch.empty_strided(size, stride, **(kwargs | {"device": "cpu"})))


def _empty(size: Any, **kwargs: Any) -> DeviceTensor:
    return DeviceTensor(torch.empty(size, **(kwargs | {"device": "cpu"})))


def _copy_from(source: torch.Tensor, target: torch.Tensor, *_: bool) -> torch.Tensor:
    return FakeDevice.current.run(aten.copy_.default, (target, source), {})


_registered: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to torch."""
    if _registered:
        return
    # Here, because an older torch has none; only `make test-fake-cuda` needs it.
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    _registered.append(library)
    # `torch.tensor` makes and fills its memory past every mode.
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
