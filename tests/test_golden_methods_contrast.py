"The numbers of the public codes of MoCo-v2, MoCo-v3, DenseCL and SetSim, by the code that training runs; and contrast over processes"
from functools import partial
from types import SimpleNamespace

import pytest, torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.ground.ranks import gather_rows
from densessl.methods.contrast import Contrasted, MoBY, MoBYConfig, contrast_terms, mocov3_method, moby_method
from densessl.methods.dense_contrast import (DenseCL, DenseCLConfig, SetSim, SetSimConfig, dense_contrast_terms)
from densessl.data.views import View
from densessl.methods.encoders import dense_encoder
from densessl.methods.heads import MLP
from densessl.theory.attention import unit_vectors
from densessl.theory.contrast import Queue, info_nce
from processes import in_ranks

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

# ---- MoCo-v3: in the batch, both ways (open-mmlab/mmselfsup, without the predictor)

def test_mocov3():
    t, s = load('mocov3_a')
    p = torch.stack([t['p1'], t['p2']]).requires_grad_()
    keys = unit_vectors(torch.stack([t['t2'], t['t1']]))
    loss_func = mocov3_method.loss(SimpleNamespace(temp=s['T']))
    loss = loss_func(Contrasted(unit_vectors(p), keys, p.new_empty(2, 0, s['C']), p[0], p[:1]))
    loss.backward()
    assert_close(loss, t['loss'], **TOL)
    assert_close(p.grad, torch.stack([t['grad_p1'], t['grad_p2']]), **GRAD)
    one = contrast_terms(Contrasted(unit_vectors(p[:1]), keys[:1], p.new_empty(1, 0, s['C']), p[0], p[:1]), s['T'], 2*s['T'])
    assert_close(one.loss, t['loss_12'], **TOL)

# ---- MoBY: a whole step (SwinTransformer/Transformer-SSL, the encoder one linear layer)

class OneToken(torch.nn.Linear):
    "An encoder of vectors, whose view is one token"
    def tokens(self, x): return self(x)[:,None]

def load_moby(module, t, when, key):
    "Pairs of our parameters and theirs; `key` is '_k' for the key branch"
    layers = {'.0': '.linear_hidden.1', '.1': '.linear_hidden.2', '.3': '.linear_out'}
    for k,p in module.named_parameters():
        part, _, rest = k.partition('.')
        layer, name = ('', rest) if part=='encoder' else (layers[f'.{rest[0]}'], rest[2:])
        yield p, t[f'{when}.{part}{key}{layer}.{name}']

def test_a_step_of_moby():
    t, s = load('moby_a')
    config = MoBYConfig(img_size=32, hidden_dim=s['hidden'], out_dim=s['C'], queue_size=s['K'], temp=s['T'], momentum=(s['m0'], 1.))
    model = MoBY(dense_encoder('test_resnet', img_size=32), config)
    for side in (model.student, model.teacher):
        side['encoder'], side['projector'] = OneToken(s['D'], s['E']), MLP(s['E'], s['hidden'], s['C'])
    model.double().train()
    model.teacher.requires_grad_(False)
    for side,key in ((model.student, ''), (model.teacher, '_k')):
        for p,value in load_moby(side, t, 'before', key): p.data.copy_(value)
    for queue,name in zip(model.queues, ('queue1', 'queue2')):
        queue.keys, queue.oldest = t[f'before.{name}'].mT.clone(), t['before.queue_ptr'][0].clone()
    model.update_teacher(s['m0'])          # the public code moves the teacher before its forward pass
    views = {f'global{i}': View(t[f'x{i}'][None], torch.zeros(1, s['B'], 4)) for i in (1, 2)}
    loss = moby_method.loss(config)(model(views))
    loss.backward()
    assert_close(loss, t['loss'], **TOL)
    for p,grad in load_moby(model.student, t, 'grad', ''): assert_close(p.grad, grad, **GRAD)
    for p,value in load_moby(model.teacher, t, 'after', '_k'): assert_close(p.data, value, **TOL)
    for queue,name in zip(model.queues, ('queue1', 'queue2')):
        assert_close(queue.keys.mT, t[f'after.{name}'], **TOL)
        assert queue.oldest==t['after.queue_ptr'][0]

# ---- DenseCL (open-mmlab/mmselfsup, features given) and SetSim (DerrickWang005/SetSim.pytorch)

def cells(x): return x.flatten(2).mT

@pytest.mark.parametrize('name', ['densecl_a', 'densecl_7x7'])
def test_densecl(name):
    t, s = load(name)
    model = DenseCL(dense_encoder('test_resnet', img_size=64), DenseCLConfig(img_size=64, queue_size=s['K'], out_dim=s['C'])).double()
    model.queue.keys, model.cell_queue.keys = t['queue'].mT.clone(), t['queue2'].mT.clone()
    q, grid = t['q'].requires_grad_(), t['q_grid'].requires_grad_()
    boxes = torch.tensor([0., 0., 1., 1.]).expand(2, s['B'], 4)
    out = model.contrasted((cells(t['b_q']), q, grid.mT), (cells(t['b_k']), t['k'], t['k_grid'].mT), boxes, s['cells'])
    assert torch.equal(out.positives, F.one_hot(t['match'], out.positives.shape[-1]).bool())
    terms = dense_contrast_terms(out, s['T'], s['lam'])
    terms.loss.backward()
    for k in ('single', 'dense'): assert_close(getattr(terms, k), t[f'loss_{k}'], **TOL)
    assert_close(terms.loss, t['loss'], **TOL)
    for k,x in dict(q=q, q_grid=grid).items(): assert_close(x.grad, t[f'grad_{k}'], **GRAD)
    assert_close(model.queue.keys.mT, t['queue_after'], **TOL)
    assert_close(model.cell_queue.keys.mT, t['queue2_after'], **TOL)

def test_setsim():
    t, s = load('setsim_a')
    config = SetSimConfig(img_size=64, queue_size=s['K'], out_dim=s['c'], attention=s['att_threshold'], similarity=s['neg'], threshold=s['geo_threshold'])
    model = SetSim(dense_encoder('test_resnet', img_size=64), config).double()
    model.cell_queue.keys = t['queue2'].mT.clone()
    q, whole = t['q'].requires_grad_(), torch.ones(s['B'], s['c']).double()
    boxes = torch.stack([t['coord1'], t['coord2']])
    out = model.contrasted((cells(t['f1']), whole, cells(q)), (cells(t['f2']), whole, cells(t['k'])), boxes, (7, 7))
    assert torch.equal(out.positives, t['match'])
    terms = dense_contrast_terms(out, s['T'], 1.)
    terms.loss.backward()
    close = dict(rtol=2e-8, atol=1e-9)     # the public code adds 1e-8 to its counts
    assert_close(terms.loss, t['loss'], **close)
    # the stored q are unit vectors, the model makes them so: of the gradient the part along them is gone
    u, g = cells(q.detach()), cells(t['grad_q'])
    assert_close(cells(q.grad), g-(g*u).sum(-1, keepdim=True)*u, **close)

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
    in_ranks(part, 2, tmp_path)
    q, k, queue = batch()
    loss = info_nce(q.requires_grad_(), k, .2) + info_nce(q, k, .2, queue(k))
    loss.backward()
    got = [torch.load(tmp_path/f'{i}.pt') for i in range(2)]
    assert_close(sum(o['loss'] for o in got)/2, loss.detach())
    assert_close(torch.cat([o['grad'] for o in got]), q.grad)
    for o in got:
        assert torch.equal(o['keys'], queue.keys) and torch.equal(o['oldest'], queue.oldest)
        assert torch.equal(o['rows'], k)
