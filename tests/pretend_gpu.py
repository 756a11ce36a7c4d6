"""Tensors that pretend to be on a GPU: `device` says cuda:0, the numbers lie on the CPU and are computed there.

    with pretend_gpu() as gpu:
        learn = flsl_learner(scene_dls(8, recipe, bs=4, device='cuda'), ...)
        with gpu.counted() as seen: learn.fit(1)
    seen.waits, seen.copies      # Counter: line of the library or of fastai that waited, or copied to the device
    seen.events                  # likewise, those that waited for an event only, and not for what was queued after it

Every operator passes `PretendGPU`: one that mixes devices raises, as on a GPU; one that waits for the device (`.item()`, `.cpu()`, `nonzero`, masks as
indices, a copy that does not say `non_blocking`) is counted under the function that called it. A copy to pinned memory that says `non_blocking` arrives when an
event behind it is waited for; what is read before that is wrong. A tensor made on one stream and used on another that has not waited for it raises, as does one whose
memory the other stream has not claimed (`record_stream`). What it cannot see: waits inside a kernel, kernels that are missing for a type, memory.
"""
import collections
import functools
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo   # now: it makes lists of torch's functions, which are replaced below
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device('cuda', 0)
aten = torch.ops.aten
PINNED = (torch.empty,)
FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray)
WAITS = {'_local_scalar_dense', 'equal', 'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount',
         '_linalg_check_errors', '_linalg_svd', '_linalg_eigh'}
COPIES = {'_to_copy', 'copy_', '_foreach_copy_'}


class OnGPU(torch.Tensor):
    "A tensor without numbers of its own; `inner` holds them, on the CPU"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        res = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                  dtype=inner.dtype, device='cpu')       # autograd would look for the driver
        res.inner = inner
        return res

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        "An operator that came past the mode, as those of autograd may"
        return PretendGPU.current.run(func, args, dict(kwargs or {}))

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self): return OnGPU(self.inner.detach())
    @data.setter
    def data(self, new): self.inner = new.inner
    def data_ptr(self): return self.inner.data_ptr()
    def untyped_storage(self): return self.inner.untyped_storage()
    def get_device(self): return GPU.index
    def __repr__(self): return f'OnGPU({self.inner})'

    def tolist(self):
        PretendGPU.current.count('waits')
        return self.inner.tolist()

    def numpy(self): raise TypeError("can't convert cuda:0 device type tensor to numpy")
    __array__ = numpy

    def as_subclass(self, kind): return self if kind is torch.Tensor else super().as_subclass(kind)

    def record_stream(self, stream): PretendGPU.current.made[self.untyped_storage().data_ptr()][2].add(stream)

    def __deepcopy__(self, memo):
        res = OnGPU(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter): res._is_param = True
        memo[id(self)] = res
        return res

    def __reduce_ex__(self, protocol):
        PretendGPU.current.count('waits')
        return self.inner.detach().__reduce_ex__(protocol)


def _is_gpu(device): return device is not None and torch.device(device).type=='cuda'


class _Functions(TorchFunctionMode):
    "What reaches for a driver before any operator is called: `to`, `cuda`, `cpu`, tensors made of lists"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        if func in PINNED and kwargs.pop('pin_memory', False):
            res = func(*args, **kwargs)
            res.pinned = True
            return res
        if func in FACTORIES and _is_gpu(kwargs.get('device')):
            return func(*args, **(kwargs | dict(device='cpu'))).to(GPU)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnGPU):
            return torch.tensor(*args[1:], **dict(dtype=args[0].dtype)|kwargs).to(GPU)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu): return self.to(args[0], name)
        if func is torch.Tensor.to: return self.to(*args, **kwargs)
        if func is torch.Tensor.pin_memory: return args[0]
        if name in ('tolist', 'numpy', 'data_ptr', 'untyped_storage', 'as_subclass', 'record_stream') and isinstance(args[0], OnGPU):
            return getattr(OnGPU, name)(*args, **kwargs)
        return func(*args, **kwargs)

    def to(self, x, *args, non_blocking=False, copy=False, memory_format=torch.preserve_format, device=None, dtype=None):
        "`Tensor.to` in all its forms, as one copy or none"
        for i,o in enumerate(args):
            if isinstance(o, torch.Tensor): device, dtype = o.device, o.dtype
            elif isinstance(o, torch.dtype): dtype = o
            elif isinstance(o, bool):
                if i==1+isinstance(args[1] if len(args)>1 else None, torch.dtype): non_blocking = o
                else: copy = o
            elif o is not None: device = o
        device, dtype = GPU if _is_gpu(device) else torch.device(device or x.device), dtype or x.dtype
        same = device==x.device and dtype==x.dtype and not copy
        if same and (memory_format==torch.preserve_format or x.is_contiguous(memory_format=memory_format)): return x
        gpu = PretendGPU.current
        gpu.target = device
        try: return aten._to_copy(x, dtype=dtype, non_blocking=non_blocking, memory_format=memory_format)
        finally: gpu.target = None


class PretendGPU(TorchDispatchMode):
    "Runs every operator on the CPU, checks its devices and counts its waits and copies"
    current = None

    def __init__(self):
        super().__init__()
        self.waits, self.copies, self.events, self.launches = collections.Counter(), collections.Counter(), collections.Counter(), 0
        self.sent, self.arrived = [], 0           # copies to pinned memory, and how many of them are there
        self.target = None       # where `Tensor.to` goes
        self.stream, self.made = Stream(), {}     # in use; of each storage the stream that wrote it, when, and the others that claimed it

    def count(self, kind):
        "One more, under the nearest function of the library or of fastai"
        f = sys._getframe(1)
        while f is not None and not {'densessl', 'fastai'} & {*Path(f.f_code.co_filename).parts[-3:-1]}: f = f.f_back
        name = f'{Path(f.f_code.co_filename).stem}.{f.f_code.co_name}' if f else 'elsewhere'
        getattr(self, kind)[name] += 1
        if kind=='waits': self.made.clear()       # all that was queued is done

    @contextmanager
    def counted(self):
        "Waits and copies inside the `with`"
        was, res = (self.waits.copy(), self.copies.copy(), self.launches, self.events.copy()), SimpleNamespace()
        yield res
        res.waits, res.copies, res.launches, res.events = self.waits-was[0], self.copies-was[1], self.launches-was[2], self.events-was[3]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return self.run(func, args, dict(kwargs or {}))

    def run(self, func, args, kwargs):
        flat, spec = tree_flatten((args, kwargs))
        there = [t for t in flat if isinstance(t, OnGPU)]
        here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU)]
        name = func.overloadpacket.__name__
        asked, (target, self.target) = kwargs.get('device'), (self.target if name=='_to_copy' else None, None)
        result_there = target.type=='cuda' if target else bool(there) or _is_gpu(asked)
        if name=='copy_' and there and getattr(args[0], 'pinned', False) and kwargs.get('non_blocking', args[2] if len(args)>2 else False):
            self.sent.append((args[0], args[1].inner.clone()))
            return args[0].fill_(True)            # until it arrives
        if there: self.look(func, name, args, kwargs, here, result_there)
        elif name in COPIES and result_there: self.copy_to_device(kwargs.get('non_blocking'))
        if name=='_fused_sdp_choice' and there: return 0           # the plain formula: the fused kernels need the card
        inner_args, inner_kwargs = tree_unflatten([t.inner if isinstance(t, OnGPU) else t for t in flat], spec)
        if _is_gpu(asked): inner_kwargs['device'] = torch.device('cpu')
        for t in there: self.stream.check(self.made.get(t.inner.untyped_storage().data_ptr()), func)
        out = func(*inner_args, **inner_kwargs)
        if not result_there: return out
        self.stream.write(out, self.made)
        self.launches += func.is_view is False if hasattr(func, 'is_view') else 1
        given = {id(t.inner): t for t in there}

        def outer(t):
            if not isinstance(t, torch.Tensor): return t
            return given[id(t)] if id(t) in given else OnGPU(t)
        return tree_map(outer, out)

    def look(self, func, name, args, kwargs, here, result_there):
        "Check the devices of an operator that is given a tensor of the GPU; does it wait?"
        if name in COPIES:
            source = args[0] if name=='_to_copy' else args[1]
            from_there = isinstance(source[0] if isinstance(source, (list, tuple)) else source, OnGPU)
            if from_there!=(result_there if name=='_to_copy' else isinstance(args[0], OnGPU) or not here):
                if from_there: self.count('waits')                # to the CPU: at once, whatever it says
                else: self.copy_to_device(kwargs.get('non_blocking', args[2] if len(args)>2 else False))
            return
        if name in ('index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'):
            indices = [i for i in args[1] if i is not None]
            one_number = name!='index' and len(args)>2 and args[2].numel()==1
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not one_number: self.count('waits')
            for i in indices:
                if not isinstance(i, OnGPU): self.copy_to_device(False)
            here = [t for t in here if not any(t is i for i in indices)]
        elif name in WAITS or (name=='repeat_interleave' and kwargs.get('output_size') is None): self.count('waits')
        if wrong := [tuple(t.shape) for t in here if t.dim()]:
            raise RuntimeError(f'Expected all tensors to be on the same device: {func} was given a tensor {wrong[0]} of the CPU and others of cuda:0')

    def copy_to_device(self, non_blocking):
        "A copy; it waits unless told not to"
        self.count('copies')
        if not non_blocking: self.count('waits')


class Stream:
    "As `torch.cuda.Stream`: `clock` counts what was queued, `known` how much of each other stream is done before what comes next"
    def __init__(self, *args): self.clock, self.known = 0, {}
    def wait_stream(self, other): self.known[other] = other.clock

    def check(self, made, func):
        "An error if this stream may not use what was `made`"
        stream, when, claimed = made or (self, 0, ())
        if stream is self: return
        if self.known.get(stream, 0)<when: raise RuntimeError(f'race: {func} reads what another stream may not have written yet')
        if self not in claimed: raise RuntimeError(f'{func} reads memory that the stream which made it may give away: record_stream')

    def write(self, out, made):
        "Note who wrote these tensors, and when"
        self.clock += 1
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and (at := t.untyped_storage().data_ptr()):
                stream, _, claimed = made.get(at, (None, 0, set()))
                made[at] = self, self.clock, claimed if stream is self else set()


@contextmanager
def _on_stream(stream):
    gpu = PretendGPU.current
    was, gpu.stream = gpu.stream, stream
    try: yield
    finally: gpu.stream = was


class Event:
    "As `torch.cuda.Event`: once it is waited for, what was sent before it was recorded is there"
    def record(self, stream=None): self.n = len(PretendGPU.current.sent)
    def synchronize(self):
        gpu = PretendGPU.current
        gpu.count('events')
        for to,value in gpu.sent[gpu.arrived:self.n]: to.copy_(value)
        gpu.arrived = max(gpu.arrived, self.n)


def _on_cpu(f):
    "Autocast where the numbers are"
    @functools.wraps(f)
    def _f(*args, **kwargs): return f(*('cpu' if o=='cuda' else o for o in args), **{k: 'cpu' if v=='cuda' else v for k,v in kwargs.items()})
    return _f


@contextmanager
def pretend_gpu():
    "Inside the `with` there is a GPU, as far as torch, fastai and the library can tell; gives the `PretendGPU` that counts"
    def nothing(*args, **kwargs): return None
    there = dict(_lazy_init=nothing, is_available=lambda: True, is_initialized=lambda: False, is_bf16_supported=lambda *a, **k: True,
                 device_count=lambda: 1, current_device=lambda: 0, manual_seed_all=nothing, manual_seed=nothing, empty_cache=nothing,
                 Event=Event, Stream=Stream, stream=_on_stream, current_stream=lambda *a: gpu.stream, get_rng_state_all=lambda: [], synchronize=lambda *a: gpu.count('waits'))
    gpu = PretendGPU()
    with ExitStack() as stack:
        for k,v in there.items(): stack.enter_context(mock.patch.object(torch.cuda, k, v))
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, torch.__future__.get_swap_module_params_on_conversion())
        torch.__future__.set_swap_module_params_on_conversion(True)       # `model.to('cuda')` keeps the parameters that an optimizer has
        for k in ('_accelerator_graph_capture_health_check', '_cuda_graph_capture_health_check'):
            if hasattr(torch.optim.Optimizer, k): stack.enter_context(mock.patch.object(torch.optim.Optimizer, k, lambda self: None))
        for owner,k in ((torch.autocast, '__init__'), (torch, 'is_autocast_enabled'), (torch, 'get_autocast_dtype')):
            stack.enter_context(mock.patch.object(owner, k, _on_cpu(getattr(owner, k))))
        stack.enter_context(mock.patch.object(PretendGPU, 'current', gpu))
        stack.enter_context(_Functions())
        stack.enter_context(gpu)
        yield gpu
