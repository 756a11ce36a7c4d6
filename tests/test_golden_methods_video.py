"The contrastive random walk and MAST against numbers of an independent implementation and of a formula"
from functools import partial

import torch
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.methods.video import Painted, Walked, paint_terms, walk_terms
from densessl.theory.walk import copy_colors, walk_loss

load = partial(golden, 'methods')
GRAD = dict(rtol=1e-9, atol=1e-10)


def test_walk():
    t, s = load('crw_a')
    q = t['q'].requires_grad_()
    nodes = q.permute(0, 2, 3, 1)                 # (B, T, N, C)
    loss = walk_terms(Walked(nodes, None, None), s['temp'], 0.).loss
    assert_close(loss, t['loss'], **TOL)
    assert_close(torch.autograd.grad(loss, q)[0], t['grad_q'], **GRAD)
    assert_close(walk_loss(nodes, s['temp']), t['loss'], **TOL)


def test_copied_colors():
    t, s = load('mast_a')
    f_t, f_r = (t[k].requires_grad_() for k in ('f_t', 'f_r'))
    assert_close(copy_colors(f_t, f_r, t['y_r'], s['radius']), t['out'], **TOL)
    out = Painted(torch.cat([f_r, f_t[None]]), torch.cat([t['y_r'], t['y_t'][None]]), None, None)
    loss = paint_terms(out, s['radius']).loss
    assert_close(loss, t['loss'], **TOL)
    for got,k in zip(torch.autograd.grad(loss, (f_t, f_r)), ('f_t', 'f_r')): assert_close(got, t[f'grad_{k}'], **GRAD)
