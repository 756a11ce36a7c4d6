"""FLSL's public code, reproduced: masked mean-shift, the map of an earlier stage, query masks.

The numbers in `golden/flsl` were made by running ISL-CV/FLSL unchanged. Training in stages (`mixture`, the sharpened map)
is not part of densessl; its formulas stand here in a few lines, built from `attention_weights`.
"""
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.theory.attention import attention_weights, mean_shift
from densessl.theory.pooling import query_index, query_mask

MASKS = ['14_3', '14_3_random', '6_2', '6_2_random', '28_3', '14_2', '12_1']
load = partial(golden, 'flsl')


def queries(src, mask): return src.gather(1, query_index(mask)[...,None].expand(-1, -1, src.shape[-1]))


def mixed(q, Z, beta, previous, mixture):
    "Multi-stage: the weights mixed with those of an earlier model, rows divided by their sum"
    A = mixture*attention_weights(q, Z, beta) + (1-mixture)*previous
    return A / A.sum(-1, keepdim=True) @ Z


@pytest.mark.parametrize('name', ['self_all', 'self_grid', 'cross_grid_corners', 'one_token', 'cross_attn_mix05', 'cross_attn_mix0', 'cross_attn_mix1'])
def test_mean_shift(name):
    t, s = load(f'meanshift_{name}')
    src = t['src'].requires_grad_()
    Z = t['tgt'].requires_grad_() if s['kind']=='cross' else src
    q = queries(src, t['mask'])
    mode = mean_shift(q, Z, s['temp']) if s['mixture'] is None else mixed(q, Z, s['temp'], t['tgt_attn'], s['mixture'])
    assert tuple(q.shape) == (s['B'], s['M'], s['C'])
    assert_close(q, t['src_sel'], rtol=0, atol=0)
    assert_close(mode, t['mode'], **TOL)
    ((t['g_src_sel']*q).sum() + (t['g_mode']*mode).sum()).backward()
    assert_close(src.grad, t['grad_src'], rtol=1e-9, atol=1e-10)
    if s['kind']=='cross': assert_close(Z.grad, t['grad_tgt'], rtol=1e-9, atol=1e-10)


def test_mixture_of_one_is_plain_mean_shift():
    t, s = load('meanshift_cross_attn_mix1')
    assert_close(mean_shift(queries(t['src'], t['mask']), t['tgt'], s['temp']), t['mode'], **TOL)


def test_one_reference_is_the_mode():
    t, s = load('meanshift_one_token')
    assert_close(mean_shift(queries(t['src'], t['mask']), t['tgt'], s['temp']), t['tgt'], **TOL)


def test_map_of_an_earlier_stage():
    t, s = load('attnmap_a')
    P = attention_weights(queries(t['src'], t['mask']), t['tgt'], s['temp'])
    Q = torch.sigmoid(s['sharpness']*(P - P.mean(-1, keepdim=True)))
    assert_close(Q / Q.sum(-1, keepdim=True), t['map'], **TOL)


def blocks(mask, side, window, corner):
    "The windows of a block of windows in the given corner, (windows, window*window)"
    g = side//window
    gap = side - g*window
    top, left = gap*(corner//2), gap*(corner%2)
    m = mask.view(side, side)
    inside = m[top:top+g*window, left:left+g*window]
    assert inside.sum() == m.sum()
    return inside.reshape(g, window, g, window).transpose(1, 2).reshape(g*g, window**2)


@pytest.mark.parametrize('name', MASKS)
def test_masks_exactly(name):
    "Same seed, same corner, same mask: also for the random ones, whose offsets are the first draw of torch's generator"
    t, s = load(f'mask_{name}')
    side, w, random = s['feature'], s['window'], s['random_sampling']
    assert bool((t['corner']==-1).all()) == (side%w==0)
    for seed,corner,mask in zip(t['seeds'].tolist(), t['corner'].clamp(min=0).tolist(), t['masks']):
        got = query_mask(side, side, w, random=random, corner=corner, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(got[0], mask)
        assert (blocks(mask, side, w, corner).sum(1)==1).all()
        if not random: assert blocks(mask, side, w, corner)[:,0].all()
    assert (t['masks'].sum(1)==t['n_true']).all() and query_index(t['masks']).shape[1]==t['n_true']
    if not random:
        n = len(t['masks'])
        assert torch.equal(query_mask(side, side, w, n=n, random=False, corner=t['corner'].clamp(min=0)), t['masks'])


@pytest.mark.parametrize('name', MASKS)
def test_mask_frequencies(name):
    "Drawn with our own corners, tokens are as often true as in 4,000 draws of the public code"
    t, s = load(f'mask_{name}')
    side, w = s['feature'], s['window']
    n = 4000
    got = query_mask(side, side, w, n=n, random=s['random_sampling'], generator=torch.Generator().manual_seed(0))
    assert (got.sum(1)==t['n_true']).all()
    want = t['token_freq'].double()
    count, p = got.sum(0).double(), (got.sum(0) + want) / (2*n)
    assert ((count==0)==(want==0)).all()
    assert ((count - want).abs() <= 5*(2*n*p*(1-p)).sqrt()).all()
    if side%w:                                       # all four corners, about equally often
        own = torch.stack([query_mask(side, side, w, random=False, corner=c)[0] for c in range(4)])
        if not s['random_sampling']:
            corners = (got[:,None]==own).all(-1).sum(0)
            assert corners.sum()==n and ((corners - n/4).abs() < 5*(n*3/16)**.5).all()
        assert t['count_corners'].sum()==n
