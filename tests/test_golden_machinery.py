"""The machinery of FLSL's public code, reproduced: head, positions, schedules, clipping, LARS.

The numbers in `golden` were made by running ISL-CV/FLSL (and sthalles/CLoVE for its LARS) unchanged.
"""
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.theory.positions import resample_positions, sincos_positions
from densessl.methods.heads import PrototypeHead
from densessl.training.optim import Lars, clip_per_parameter_
from densessl.training.schedules import cosine, linear_ramp, warmup_cosine

load = partial(golden, 'flsl')


# ---- head

def ours(key):
    "Our name of a parameter of the public head"
    names = {'last_layer.weight_v': 'prototypes', 'last_layer.weight_g': 'prototype_norm', 'mlp.weight': 'mlp.0.weight', 'mlp.bias': 'mlp.0.bias'}
    return names.get(key, key)


@pytest.mark.parametrize('name', ['default', 'free_g', 'one_layer'])
def test_head(name):
    t, s = load(f'head_{name}')
    head = PrototypeHead(t['x'].shape[-1], s['K'], s['hidden'], s['bottleneck'], s['nlayers'], s['norm_last_layer']).double()
    state = {ours(k[2:]): v for k,v in t.items() if k.startswith('w.')}
    if s['norm_last_layer']: assert (state.pop('prototype_norm')==1).all()
    head.load_state_dict(state)
    x = t['x'].requires_grad_()
    out = head(x)
    assert_close(out, t['out'], **TOL)
    (t['g_out']*out).sum().backward()
    grads = {ours(k[5:]): v for k,v in t.items() if k.startswith('grad.')}
    assert grads.keys() == dict(head.named_parameters()).keys()
    for k,p in head.named_parameters(): assert_close(p.grad, grads[k], rtol=1e-9, atol=1e-10)
    assert_close(x.grad, t['grad_x'], rtol=1e-9, atol=1e-10)


# ---- positions

@pytest.mark.parametrize('name', ['14_384', '4_24_cls'])
def test_sincos(name):
    t, s = load(f'sincos_{name}')
    table = sincos_positions(s['d'], (s['grid'], s['grid']))
    if s['cls_token']: table = torch.cat([torch.zeros(1, s['d'], dtype=table.dtype), table])
    assert len(table)==s['total_rows']
    assert_close(table[t['rows']], t['values'], **TOL)


@pytest.mark.parametrize('name', ['14_to_6', '14_to_14', '4_to_2', '14_to_6x10'])
def test_resampled_positions(name):
    t, s = load(f'posinterp_{name}')
    new = [n//s['patch'] for n in s['image_hw']]
    got = resample_positions(t['table'], (s['table'], s['table']), new, offset=.1, antialias=False)
    assert_close(got, t['resized'], **TOL)


# ---- schedules

@pytest.mark.parametrize('name', ['recipe', 'defaults', 'short', 'one'])
def test_teacher_temperature(name):
    t, s = load('schedules_shared')
    a, b, ramp, epochs = s[f'temp.{name}']
    f = linear_ramp(a, b, ramp/epochs, n_steps=epochs)
    want = t[f'temp.{name}']
    assert_close(torch.tensor([f(e/epochs) for e in range(epochs)], dtype=want.dtype), want, **TOL)
    assert_close(torch.tensor([f((e + .9)/epochs) for e in range(epochs)], dtype=want.dtype), want, **TOL)   # constant within an epoch


@pytest.mark.parametrize('name', ['lr', 'wd', 'momentum', 'constant', 'warm_from'])
def test_cosine(name):
    t, s = load('schedules_shared')
    base, final, epochs, n, warm, start = s[f'cosine.{name}']
    steps, want = epochs*n, t[f'cosine.{name}']
    f = warmup_cosine(base, final, warm/epochs, start, n_steps=steps)
    assert_close(torch.tensor([f(i/steps) for i in range(steps)], dtype=want.dtype), want, **TOL)
    if not warm:
        f = cosine(base, final)
        assert_close(torch.tensor([f(i/steps) for i in range(steps)], dtype=want.dtype), want, **TOL)


def test_progress_as_fastai_counts_it():
    "fastai adds 1/(epochs*batches) after each batch: rounding must not shift the sequence"
    t, s = load('schedules_shared')
    base, final, epochs, n, warm, start = s['cosine.lr']
    f, got = warmup_cosine(base, final, warm/epochs, start, n_steps=epochs*n), []
    for epoch in range(epochs):
        pct = epoch/epochs
        for _ in range(n): got.append(f(pct)); pct += 1./(n*epochs)
    assert_close(torch.tensor(got, dtype=torch.float64), t['cosine.lr'], **TOL)


# ---- clipping and LARS

@pytest.mark.parametrize('name', ['a', 'b'])
def test_clip(name):
    t, s = load(f'clip_{name}')
    ps = {}
    for k in ('small', 'large', 'vec', 'zero'):
        ps[k] = nn.Parameter(torch.zeros_like(t[f'before.{k}']))
        ps[k].grad = t[f'before.{k}'].clone()
    assert_close(torch.stack([p.grad.norm() for p in ps.values()]), t['norms'], **TOL)
    clip_per_parameter_([*ps.values(), nn.Parameter(torch.zeros(2))], s['clip'])
    for k,p in ps.items(): assert_close(p.grad, t[f'after.{k}'], **TOL)


def run_lars(t, keys, lrs, first, buffers=False, **kwargs):
    ps = {k: nn.Parameter(t[f'p0.{k}'].clone()) for k in keys}
    opt = Lars(ps.values(), lr=0., **kwargs)
    for i,lr in enumerate(lrs):
        opt.param_groups[0]['lr'] = float(lr)
        for k,p in ps.items(): p.grad = t[f'g{i+first}.{k}'].clone()
        opt.step()
        for k,p in ps.items():
            assert_close(p.detach(), t[f'p{i+1}.{k}'], **TOL)
            if buffers: assert_close(opt.state[p]['momentum_buffer'], t[f'm{i+1}.{k}'], **TOL)


def test_lars_of_flsl():
    t, s = load('flsl_lars_a')
    run_lars(t, ['w', 'b', 'conv', 'gain'], [s['lr']]*s['steps'], 0, momentum=s['momentum'], weight_decay=s['weight_decay'], trust_coefficient=s['eta'], eps=0.)


@pytest.mark.parametrize('name', ['a', 'b'])
def test_lars_of_clove(name):
    t, s = golden('clove', f'lars_{name}')
    keys = [k[3:] for k in t if k.startswith('p0.')]
    run_lars(t, keys, t['lr'], 1, buffers=True, momentum=s['momentum'], weight_decay=s['weight_decay'], trust_coefficient=s['trust'], eps=s['eps'])
