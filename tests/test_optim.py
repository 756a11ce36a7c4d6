"A step of LARS, of clipping and of the teacher's average takes as many operators for many weights as for few"
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from densessl.methods.student_teacher import ema_update
from densessl.training.optim import clip_per_parameter_, lars, split_decay

class Operators(TorchDispatchMode):
    "Counts what would be launched on a GPU; one for all tensors of a `_foreach_`"
    def __init__(self):
        super().__init__()
        self.seen = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})

def network(n):
    "`n` blocks with statistics of a batch"
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(n)))

def operators(what, n):
    "Of the second step of a network of `n` blocks"
    net = network(n)
    if what=='ema': work = lambda: ema_update(teacher, net, .9)
    elif what=='clip': work = lambda: clip_per_parameter_(net.parameters(), .1)
    else: work = lars(split_decay(net)).step
    teacher = copy.deepcopy(net)
    for p in net.parameters(): p.grad = torch.ones_like(p)
    work()
    with Operators() as ops: work()
    return ops.seen

@pytest.mark.parametrize('what,most', [('lars', 25), ('clip', 6), ('ema', 2)])
def test_operators_of_a_step(what, most):
    few, many = operators(what, 2), operators(what, 40)
    assert many==few, f'more weights, more operators: {many-few}'
    assert sum(many.values())<=most, many
