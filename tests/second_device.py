"""A device without hardware, to find tensors on the wrong device where there is no GPU: ``second``, of which there are two.

It is a plugin of pytest (``PYTHONPATH=tests python -m pytest -p second_device -m cuda``) and slzo's command line with this device
(``python tests/second_device.py fit --trainer.accelerator second --trainer.strategy second ...``). It is compiled when it is
first used, see ``second_device.cpp``, and stays registered in its process, so use a process of its own.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import distributed
from torch._C._distributed_c10d import AllgatherOptions, _create_work_from_future  # how torch makes a Work in Python
from torch.futures import Future
from torch.utils.cpp_extension import load

NAME = "second"


class SecondDevices(Accelerator):
    """Lightning's view of the two devices."""

    def setup_device(self, device):
        torch.second.set_device(device)

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, index) for index in devices]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


class SecondDDP(DDPStrategy):
    """DDP that makes no streams of CUDA."""

    def determine_ddp_device_ids(self):
        return None


class SecondGroup(distributed.ProcessGroup):
    """Exchanges tensors of the second device and refuses those of the CPU, as NCCL does."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):  # noqa: N802
        return NAME

    def _get_backend(self, device):
        return self._gloo

    @property
    def _device_types(self):
        return [torch.device(NAME, torch.second.current_device())]

    def allreduce(self, tensors, opts=distributed.AllreduceOptions()):  # noqa: B008
        return self._exchange(tensors, lambda copies: self._gloo.allreduce(copies, opts))

    def broadcast(self, tensors, opts=distributed.BroadcastOptions()):  # noqa: B008
        return self._exchange(tensors, lambda copies: self._gloo.broadcast(copies, opts))

    def allgather(self, received, sent, opts=AllgatherOptions()):  # noqa: B008
        copies = [_on_cpu(tensors) for tensors in received]
        self._gloo.allgather(copies, _on_cpu(sent), opts).wait()
        for tensors, own in zip(received, copies, strict=True):
            torch._foreach_copy_(tensors, own)
        return _finished(received)

    def _allgather_base(self, received, sent, opts=AllgatherOptions()):  # noqa: B008
        return self.allgather([list(received.chunk(self.size()))], [sent], opts)

    def barrier(self, opts=distributed.BarrierOptions()):  # noqa: B008
        self._gloo.barrier(opts).wait()
        return _finished(None)

    def _exchange(self, tensors, exchange: Callable):
        copies = _on_cpu(tensors)
        exchange(copies).wait()
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        return _finished(tensors)


def _on_cpu(tensors):
    for tensor in tensors:
        if tensor.device.type != NAME:
            raise RuntimeError(f"a tensor to exchange is on {tensor.device}")
    return [tensor.cpu() for tensor in tensors]


def _finished(result):
    future = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def register() -> None:
    """Compile the device, if that has not been done, and register it with torch and Lightning."""
    compiled = load("second_device", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    compiled.register_hooks()
    torch._register_device_module(NAME, _device_module(compiled))
    torch.utils.generate_methods_for_privateuse1_backend()
    # a module keeps its parameters when it moves to the CPU and back, as with CUDA
    torch.__future__.set_swap_module_params_on_conversion(True)
    distributed.Backend.register_backend(NAME, SecondGroup, devices=[NAME])
    AcceleratorRegistry.register(NAME, SecondDevices, description="a device for tests")
    StrategyRegistry.register(NAME, SingleDeviceStrategy, device=f"{NAME}:0")
    StrategyRegistry.register(f"{NAME}_ddp", SecondDDP, process_group_backend=NAME)


def _device_module(compiled) -> ModuleType:
    module = ModuleType(f"torch.{NAME}")

    @contextmanager
    def device(given):
        before = compiled.current_device()
        module.set_device(given)
        try:
            yield
        finally:
            module.set_device(before)

    module.device = device
    module.set_device = lambda given: compiled.set_device(
        torch.device(NAME, given).index if isinstance(given, int) else given.index or 0
    )
    module.device_count = compiled.device_count
    module.current_device = compiled.current_device
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Register the device before ``helpers`` looks for a card."""
    register()


if __name__ == "__main__":
    from slzo.__main__ import main

    register()
    sys.exit(main())
