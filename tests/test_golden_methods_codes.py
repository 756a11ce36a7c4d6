"""Codes and slots: the numbers of SwAV's and SlotCon's public code, by the functions that training runs

The files in `golden/methods` were made by running independent implementations (SwAV) and CVMI-Lab/SlotCon itself.
"""
from functools import partial

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

import densessl.methods.clusters
from densessl.data.views import View
from densessl.methods.clusters import SlotCon, SlotConConfig, slotcon_terms
from densessl.theory.common import CommonBoxes
from densessl.theory.codes import sinkhorn, slot_contrast, slot_features, slot_scores, swapped_prediction
from golden_numbers import TOL, golden
from torch import nn

GRAD = dict(rtol=1e-9, atol=1e-10)
load = partial(golden, 'methods')


@pytest.mark.parametrize('name', ['sinkhorn_a', 'sinkhorn_more_prototypes'])
def test_sinkhorn(name):
    t, s = load(name)
    assert_close(sinkhorn(t['scores'], s['eps'], s['iterations']), t['codes'], **TOL)
    batch = torch.stack([t['scores'], t['scores'].flip(0)], 1)               # two places, each by itself
    assert_close(sinkhorn(batch, s['eps'], s['iterations'], dim=0), torch.stack([t['codes'], t['codes'].flip(0)], 1), **TOL)


@pytest.mark.parametrize('name', ['swav_2_3', 'swav_queue'])
def test_swapped_prediction(name):
    t, s = load(name)
    scores = torch.stack([t[f'scores.{v}'] for v in range(s['G']+s['L'])]).requires_grad_()
    queued = torch.stack([t[f'queue_scores.{g}'] for g in range(s['G'])]) if s['queue'] else None
    terms = swapped_prediction(scores, s['G'], queued, s['T'], s['eps'], s['iterations'])
    assert_close(terms.loss.detach(), t['loss'], **TOL)
    grad, = torch.autograd.grad(terms.loss, scores)
    for v,g in enumerate(grad): assert_close(g, t[f'grad.{v}'], **GRAD)


@pytest.mark.parametrize('name', ['slots_a', 'slots_3x5'])
def test_slots(name):
    t, s = load(name)
    x, prototypes = t['x'].requires_grad_(), t['prototypes'].requires_grad_()
    tokens = x.flatten(2).mT
    scores = slot_scores(tokens, prototypes)
    slots = slot_features(tokens, scores, s['temp'])
    assert_close(scores.mT.unflatten(-1, s['cells']).detach(), t['dots'], **TOL)
    assert_close(slots.detach(), t['slots'], **TOL)
    total = (t['g_slots']*slots).sum() + (t['g_dots'].flatten(2).mT*scores).sum()
    for got,want in zip(torch.autograd.grad(total, (x, prototypes)), (t['grad_x'], t['grad_prototypes'])):
        assert_close(got, want, **GRAD)


# ---- one whole step of SlotCon

class Encoder(nn.Module):
    "The encoder of the stored step: a convolution 8x8 of stride 8, batch norm, ReLU"
    arch = 'a convolution'
    def __init__(self, dim):
        super().__init__()
        self.net, self.embed_dim = nn.Sequential(nn.Conv2d(3, dim, 8, 8, bias=False), nn.BatchNorm2d(dim), nn.ReLU()), dim
    def grid(self, h, w, name=''): return h//8, w//8
    def tokens(self, x): return self.net(x).flatten(2).mT

PARTS = dict(encoder='encoder.net', projector='projector', grouping='prototypes', predictor_slot='predictor')

def slotcon_weights(t, kind, side):
    "Stored numbers of one side by our names; 1x1 convolutions are linear layers"
    found = {}
    for k,v in t.items():
        if not k.startswith(kind+'.'): continue
        part, _, rest = k[len(kind)+1:].partition('.')
        name, _, whose = part.rpartition('_')
        if part=='predictor_slot': name, whose = part, 'q'
        if whose==side: found[f'{PARTS[name]}.{rest.removeprefix("mlp.").removeprefix("slot_embed.")}'] = v.flatten(1) if v.shape[2:]==(1, 1) else v
    return found

def slotcon_step():
    "Model, views and what is stored of the step"
    t, s = load('slotcon_step_a')
    config = SlotConConfig(img_size=56, hidden_dim=s['hidden'], out_dim=s['D'], n_prototypes=s['K'], student_temp=s['T_s'], teacher_temp=s['T_t'],
                           contrast_temp=s['tau'], group_weight=s['w'], momentum=(s['m0'], 1.))
    model = SlotCon(Encoder(s['channels']), config).double().train()
    for net,side in ((model.student, 'q'), (model.teacher, 'k')):
        lost = net.load_state_dict(slotcon_weights(t, 'before', side), strict=False)
        assert not lost.unexpected_keys and all('running' in k or 'batches' in k for k in lost.missing_keys)
    model.center.copy_(t['before.center'][0])
    box = torch.tensor([0.,0.,1.,1.]).double().expand(s['B'], 4)
    views = {f'global{v}': View(t[f'crop{v}'][None], torch.where(t[f'flag{v}'][:,None], box[:,[2,1,0,3]], box)[None]) for v in (1, 2)}
    return model, views, t, s

def test_slotcon_step(monkeypatch):
    model, views, t, s = slotcon_step()
    common = CommonBoxes(t['box1'], t['box2'], torch.ones(s['B'], dtype=torch.bool))
    monkeypatch.setattr(densessl.methods.clusters, 'common_boxes', lambda *boxes: common)
    model.update_teacher(s['m0'])                     # there before the forward pass, here after the step
    out = model(views)
    terms = slotcon_terms(out, s['T_s'], s['T_t'], s['tau'], s['w'])
    assert_close(terms.group, t['group_12']+t['group_21'], **TOL)
    assert_close(terms.contrast, t['contrast_12']+t['contrast_21'], **TOL)
    assert_close(terms.loss.detach(), t['loss'], **TOL)
    assert_close(model.center, t['center_after'][0], **TOL)
    terms.loss.backward()
    want = slotcon_weights(t, 'grad', 'q')
    assert want.keys()==dict(model.student.named_parameters()).keys()
    for k,p in model.student.named_parameters(): assert_close(p.grad, want[k], **GRAD, msg=lambda o: f'{k}: {o}')
    assert all(p.grad is None for p in model.teacher.parameters())


# ---- several processes share a batch

B, K, D, Q = 6, 5, 7, 6

def draw(*s, seed): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def inputs(): return draw(2, B, K, seed=0), draw(2, Q, K, seed=1), draw(B, K, D, seed=2), draw(B, K, D, seed=3), draw(2, B, K, seed=4)>0

def losses(scores, queued, pred, keys, there):
    "Values and gradients"
    scores, pred = scores.clone().requires_grad_(), pred.clone().requires_grad_()
    swapped = swapped_prediction(scores, queued=queued).loss
    contrast = slot_contrast(pred, keys, *there)
    return swapped, contrast, *torch.autograd.grad(swapped+contrast, (scores, pred))

def rank(i, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=init, rank=i, world_size=world)
    scores, queued, pred, keys, there = inputs()
    mine, n = slice(i*B//world, (i+1)*B//world), world
    got = losses(scores[:,mine], queued[:,i::n], pred[mine], keys[mine], there[:,mine])
    torch.save([o.detach() for o in got], f'{out}/{i}.pt')
    dist.destroy_process_group()

@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_balance_and_keys(world, tmp_path, one_thread):
    mp.start_processes(rank, (world, f'file://{tmp_path}/init', str(tmp_path)), nprocs=world, start_method='fork')
    parts = [torch.load(tmp_path/f'{i}.pt') for i in range(world)]
    swapped, contrast, grad, grad_pred = (o.detach() for o in losses(*inputs()))
    assert_close(torch.stack([p[0] for p in parts]).mean(), swapped)
    assert_close(torch.stack([p[1] for p in parts]).mean(), contrast)
    assert_close(torch.cat([p[2] for p in parts], 1)/world, grad)
    assert_close(torch.cat([p[3] for p in parts])/world, grad_pred)


def test_codes_of_large_scores_in_half_precision():
    scores = 400*draw(8, K, seed=0).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16): codes = sinkhorn(scores)
    assert codes.dtype==torch.float32 and codes.isfinite().all()
    assert_close(codes.sum(-1), torch.ones(8))
