"The numbers of the public codes of MoCo-v2, MoCo-v3, DenseCL and SetSim, by the code that training runs; and contrast over processes"
from functools import partial

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.ground.ranks import gather_rows
from densessl.theory.contrast import Queue, info_nce

load = partial(golden, 'methods')
GRAD = dict(rtol=1e-9, atol=1e-10)

def queue_of(columns, oldest=0):
    "A queue with these keys, (D, K)"
    queue = Queue(columns.shape[1], len(columns)).double()
    queue.keys, queue.oldest = columns.mT.clone(), torch.tensor(oldest)
    return queue

def test_info_nce_with_a_queue():
    t, s = load('infonce_a')
    W = t['W_q'].requires_grad_()
    q, k = (F.normalize(x@w.mT, dim=-1) for x,w in ((t['x'], W), (t['y'], t['W_k'])))
    queue = queue_of(t['queue'], int(t['ptr']))
    loss = info_nce(q, k, s['T'], queue(k))
    loss.backward()
    assert_close(loss, t['loss'], **TOL)
    assert_close(W.grad, t['grad_W_q'], **GRAD)
    assert_close(queue.keys.mT, t['queue_after'], **TOL)
    assert torch.equal(queue.oldest, t['ptr_after'])

# ---- two processes

def part(rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=rank, world_size=world)
    q, k, queue = batch()
    x, y = (o.chunk(world)[rank] for o in (q, k))
    loss = info_nce(x.requires_grad_(), y, .2) + info_nce(x, y, .2, queue(y))
    grad, = torch.autograd.grad(loss, x)
    torch.save(dict(loss=loss.detach(), grad=grad/world, keys=queue.keys, oldest=queue.oldest, rows=gather_rows(y)), f'{out}/{rank}.pt')
    dist.barrier(); dist.destroy_process_group()

def batch():
    torch.manual_seed(3)
    q, k = (F.normalize(torch.randn(6, 5).double(), dim=-1) for _ in range(2))
    queue = Queue(10, 5).double()
    queue.oldest += 7      # the six keys wrap around
    return q, k, queue

@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
def test_processes_share_keys_and_queue(tmp_path):
    mp.spawn(part, args=(2, f'file://{tmp_path}/init', str(tmp_path)), nprocs=2)
    q, k, queue = batch()
    loss = info_nce(q.requires_grad_(), k, .2) + info_nce(q, k, .2, queue(k))
    loss.backward()
    got = [torch.load(tmp_path/f'{i}.pt') for i in range(2)]
    assert_close(sum(o['loss'] for o in got)/2, loss.detach())
    assert_close(torch.cat([o['grad'] for o in got]), q.grad)
    for o in got:
        assert torch.equal(o['keys'], queue.keys) and torch.equal(o['oldest'], queue.oldest)
        assert torch.equal(o['rows'], k)
