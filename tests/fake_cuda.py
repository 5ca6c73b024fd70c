"""CUDA without a GPU: the project's code on FakeTensors, which know shape, dtype and device only.

    with fake_cuda() as probe:
        net = common.UNet(...).to("cuda")
        ...
    probe.peak, probe.copies

Tensors on the CPU stay real. Operands on different devices raise, as on a GPU. What a copy from
the device brings is zeros, what `.item()` reads is 0: both are recorded. A process that has called
`load_guard` is good for nothing else: torch takes it for one with a GPU.
"""
import contextlib
import ctypes
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten

# Autograd asks the device for streams and events, and torch's CPU build has none to offer.
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::Stream;
const Device cuda(c10::DeviceType::CUDA, 0);
const Stream stream(Stream::DEFAULT, cuda);

struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return cuda; }
  Device getDevice() const override { return cuda; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};

static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
// torch has made its own hooks by now, which have no members: these take their place.
static auto hooks = new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
"""


def why_not():
    """The reason why this machine cannot fake CUDA, or None."""
    if torch.backends.cuda.is_built():
        return "torch's CUDA build has a guard of its own"
    if shutil.which("g++") is None:
        return "no g++ to compile the device guard with"
    return None


def load_guard():
    """Make autograd take CUDA tensors. Before the first backward pass of the process."""
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{torch_dir / 'include'}"]
        command += ["-x", "c++", "-", "-o", library, f"-L{torch_dir / 'lib'}"]
        command += ["-lc10", "-ltorch_cpu"]
        subprocess.run(command, input=GUARD, text=True, check=True)
        ctypes.CDLL(library)
    # The CPU build would make several operations of it.
    torch.library.impl("aten::silu_backward", "CUDA", lambda *_: None)


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """What a GPU takes for F.scaled_dot_product_attention, without dropout."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
    if attn_mask is not None or q.dtype == torch.float32:
        needed = any(x.requires_grad for x in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, needed)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


attention = F.scaled_dot_product_attention


def apply_to_module(module, fn, recurse=True):
    """nn.Module._apply, which would swap fake parameters and cannot: they are put in place anew."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for tensors in (module._parameters, module._buffers):
        for name, x in tensors.items():
            if x is not None:
                with torch.no_grad():
                    new = fn(x)
                if new is not x and isinstance(x, nn.Parameter):
                    new = nn.Parameter(new, x.requires_grad)
                tensors[name] = new
    return module


def place_in_project():
    """The innermost line of the project that is running, "common.py:12 f", or "backward"."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


MOVES = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default,
         aten._index_put_impl_.default}


class Probe(TorchDispatchMode):
    """copies: (operation, line of the project) of all that moves between the devices. live, peak:
    bytes that are, and at most were, allocated on the GPU."""
    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies = []
        self.live = self.peak = 0
        self.known = set()  # storages

    def reset(self):
        self.copies.clear()
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in inputs)
        if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.copies.append(("item", place_in_project()))
            return 0.0 if inputs[0].is_floating_point() else 0
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            out = args[0]
        else:
            with self.fake:
                out = func(*args, **kwargs)
        if func in MOVES and len({x.device for x in (*inputs, out)}) > 1:
            self.copies.append((func.overloadpacket.__name__, place_in_project()))
        if func is aten._to_copy.default and out.device.type == "cpu":
            return torch.zeros(out.shape, dtype=out.dtype)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.allocated(x.untyped_storage())
        return out

    def allocated(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        size = -(-storage.nbytes() // 512) * 512  # as the caching allocator rounds
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, key, size)

    def freed(self, key, size):
        self.known.remove(key)
        self.live -= size


@contextlib.contextmanager
def fake_cuda():
    """Everything on the device "cuda" is fake in this block. Yields a Probe."""
    probe = Probe()
    nothing = lambda *args, **more: None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        values = dict(is_available=True, is_bf16_supported=True, device_count=1, current_device=0)
        for name, value in values.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *a, v=value, **k: v))
        for name in ("_lazy_init", "set_device", "synchronize", "get_rng_state", "set_rng_state"):
            stack.enter_context(mock.patch.object(torch.cuda, name, nothing))
        for name in ("max_memory_allocated", "max_memory_reserved"):
            peak = lambda *args: probe.peak
            stack.enter_context(mock.patch.object(torch.cuda, name, peak))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda x, *args: x))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", apply_to_module))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused_attention))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device="cuda") is a copy
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        yield stack.enter_context(probe)


# ---- scripts, run on it

def run(command):
    """Run ["ct.py", flag, ..] in this process."""
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"exit code {end.code}"


def without_weights(create_model, name, pretrained, **more):
    return create_model(name, **more)


def watch(command):
    """Run a command on fake CUDA tensors: its error, the copies within its micro-batches and how
    many there were elsewhere, and the peak of memory. Frozen networks have random weights."""
    import common
    inside = []
    all_steps = common.steps

    def counted(micro_batches):
        for pair in micro_batches:
            start = len(probe.copies)
            yield pair
            inside.extend(probe.copies[start:])

    def steps(*args):
        for step, micro_batches, trial in all_steps(*args):
            yield step, micro_batches if trial else counted(micro_batches), trial

    error = None
    with fake_cuda() as probe, contextlib.ExitStack() as stack:
        patches = [mock.patch.object(common, "steps", steps),
                   mock.patch.object(common, "LPIPS", partial(common.LPIPS, False)),
                   mock.patch.object(common, "save_checkpoint")]
        if "projected" in command:
            import timm
            random_weights = partial(without_weights, timm.create_model)
            patches.append(mock.patch.object(timm, "create_model", random_weights))
        for patch in patches:
            stack.enter_context(patch)
        try:
            run(command)
        except BaseException:
            error = traceback.format_exc()
    return dict(error=error, inside=inside, outside=len(probe.copies) - len(inside),
                peak=probe.peak)


def peaks(command, sizes):
    """The peaks of memory of a training command with micro-batches of these sizes."""
    found = []
    for size in map(str, sizes):
        seen = watch([*command, "--batch-size", size, "--micro-batch", size])
        if seen["error"]:
            raise RuntimeError(seen["error"])
        found.append(seen["peak"])
    return found
