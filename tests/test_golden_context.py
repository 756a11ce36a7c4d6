"""CLoVE's public code, reproduced: the contextualizing layer and the projector.

The numbers in `golden/clove` were made by running sthalles/CLoVE unchanged, in float64.
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.theory.context import NMHSA
from densessl.methods.heads import ConvProjector

ATTENTION = {'qkv.weight': 'in_proj_weight', 'qkv.bias': 'in_proj_bias', 'proj.weight': 'out_proj.weight', 'proj.bias': 'out_proj.bias'}
load = partial(golden, 'clove')


def tokens(maps): return maps.flatten(2).mT


@pytest.mark.parametrize('name', ['featprop_7x7', 'featprop_3x3'])
def test_nmhsa(name):
    t, s = load(name)
    layer = NMHSA(s['C'], s['heads']).double()
    layer.load_state_dict({ours: t[f'w.{theirs}'] for ours, theirs in ATTENTION.items()})
    x = t['x'].requires_grad_()
    assert tuple(x.shape) == (s['B'], s['C'], *s['cells'])
    out = layer.attend(tokens(x))
    assert_close(out, tokens(t['out']), **TOL)
    assert_close(layer.weights(tokens(x)), t['weights'], **TOL)
    assert_close(layer(tokens(x)), tokens(t['ctx']), **TOL)
    assert_close(F.normalize(t['out'], dim=1), t['ctx'], **TOL)
    (out*tokens(t['g_out'])).sum().backward()
    assert_close(x.grad, t['grad_x'], **TOL)
    grads = {ours: p.grad for ours, p in layer.named_parameters()}
    assert grads.keys() == ATTENTION.keys()
    for ours, theirs in ATTENTION.items(): assert_close(grads[ours], t[f'grad.{theirs}'], **TOL)


@pytest.mark.parametrize('name', ['featprop_7x7', 'featprop_3x3'])
def test_cosine_reading_is_another_layer(name):
    "The comparison above can tell the two readings apart"
    t, s = load(name)
    layer = NMHSA(s['C'], s['heads'], cosine=True).double()
    layer.load_state_dict({ours: t[f'w.{theirs}'] for ours, theirs in ATTENTION.items()})
    assert (layer(tokens(t['x'])) - tokens(t['ctx'])).abs().max() > .01


def test_projector():
    t, s = load('projector_a')
    theirs = lambda k: k.replace('conv', 'linear')
    proj = ConvProjector(s['in_dim'], s['inner'], s['out']).double()
    state = proj.state_dict()
    assert {f'w.{theirs(k)}' for k in state} == {k for k in t if k.startswith('w.')}
    proj.load_state_dict({k: t[f'w.{theirs(k)}'] for k in state})
    x = t['x'].requires_grad_()
    out = proj(x)
    assert_close(out, t['out'], **TOL)
    (out*t['g_out']).sum().backward()
    assert_close(x.grad, t['grad_x'], **TOL)
    grads = {k: p.grad for k, p in proj.named_parameters()}
    assert {f'grad.{theirs(k)}' for k in grads} == {k for k in t if k.startswith('grad.')}
    for k, g in grads.items(): assert_close(g, t[f'grad.{theirs(k)}'], **TOL)
    after = dict(proj.named_buffers())
    assert {f'buf_after.{k}' for k in after} == {k for k in t if k.startswith('buf_after.')}
    for k, b in after.items(): assert_close(b, t[f'buf_after.{k}'], **TOL)
