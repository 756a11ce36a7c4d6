"CLoVE's margin ranking loss and its multi-crop objective against the numbers of the public code"
from functools import partial

import pytest, torch
from torch.autograd import grad
from torch.testing import assert_close

from golden_numbers import golden, GOLDEN
from densessl.theory.margin import clove_objective, margin_ranking_loss
from densessl.theory.matching import match_cells

load = partial(golden, 'clove')

def tokens(x): return x.flatten(-2).mT
def close(got, want, rtol=1e-6, atol=None):
    assert_close(got, want, rtol=rtol, atol=(1e-7 if want.dtype==torch.float32 else 1e-12) if atol is None else atol)

pairs = sorted(p.stem for p in (GOLDEN/'clove').glob('pair_*.safetensors'))

def test_all_pair_files_are_here(): assert len(pairs)==9

@pytest.mark.parametrize('name', pairs)
@pytest.mark.parametrize('boxes', [False, True], ids=['golden mask', 'matched here'])
def test_pair(name, boxes):
    d, cfg = load(name)
    M = match_cells(d['coord_q'], tuple(cfg['q_cells']), d['coord_k'], tuple(cfg['k_cells']), threshold=cfg['pos_ratio']) if boxes else d['pos_mask']
    assert torch.equal(M, d['pos_mask']) and torch.equal(M.sum((1,2)), d['n_pos'])
    q, k = (d[x].clone().requires_grad_() for x in 'qk')
    t = margin_ranking_loss(tokens(q), tokens(k), M, lam=cfg['gamma'], margin=cfg['margin'], reduction='mean')
    close(-2*t.positive, d['positives']); close(-2*t.negative, d['negatives'])
    close(t.loss, d['loss_b']); close(t.loss.mean(), d['loss'])
    for got,want in zip(grad(t.loss.mean(), (q,k)), (d['grad_q'], d['grad_k'])):
        assert want.any(); close(got, want)
    # image by image, and as the objective of one pair of views
    for i in range(len(M)): close(margin_ranking_loss(tokens(q)[i], tokens(k)[i], M[i], lam=cfg['gamma'], margin=cfg['margin'], reduction='mean').loss, d['loss_b'][i])
    total, parts = clove_objective([(tokens(q)[None], tokens(k)[None], M[None])], lam=cfg['gamma'], margin=cfg['margin'], reduction='mean')
    close(total, d['loss']); close(parts.empty, (d['n_pos']==0).to(total.dtype).mean())

def objective(gl, lo, key, boxes, cfg, how):
    "The groups of the multi-crop objective from stacked maps (views*B, C, H, W), and its total and terms"
    B = cfg['B']
    G, L, K = (tokens(x).unflatten(0, (-1,B)) for x in (gl, lo, key))
    j, i = torch.tensor([(j,i) for j in range(len(G)) for i in range(len(G)) if i!=j]).T
    b, a = torch.cartesian_prod(torch.arange(len(G)), torch.arange(len(L))).T
    gb, lb = boxes[:len(G)], boxes[len(G):]
    def match(x, n, y): return match_cells(x, (n,n), y, (7,7), threshold=cfg['pos_ratio'])
    glob = (G[i], K[j], match(gb[i], 7, gb[j]))
    if how=='indexed': local = (L[a], K[b], match(lb[a], 3, gb[b]))
    else: local = (L[None], K[:,None], match(lb[None], 3, gb[:,None]))
    kw = dict(lam=cfg['gamma'], margin=cfg['margin'], reduction='mean')
    g, l = (margin_ranking_loss(*x, **kw).loss.reshape(-1,B).mean(-1) for x in (glob, local))
    terms = torch.cat([torch.cat([g[j==n], l[b==n]]) for n in range(len(G))])  # the public order: teacher view by teacher view
    return clove_objective([glob, local], **kw)[0], terms

@pytest.mark.parametrize('how', ['indexed', 'broadcast'])
def test_objective(how):
    d, cfg = load('loss_2g6l')
    gl, lo = (d[x].clone().requires_grad_() for x in ('gl_ctx', 'lo_ctx'))
    total, terms = objective(gl, lo, d['gl_key'], torch.stack([d[f'coord.{v}'] for v in range(8)]), cfg, how)
    assert len(terms)==14
    close(terms, d['terms']); close(total, d['total'])
    for got,want in zip(grad(total, (gl,lo)), (d['grad_gl_ctx'], d['grad_lo_ctx'])): close(got, want)

def test_objective_of_a_training_step():
    d, cfg = load('step_a')
    total, _ = objective(d['gl_ctx'], d['lo_ctx'], d['gl_key'], torch.stack([d[f'coord.{v}'] for v in range(8)]), cfg, 'broadcast')
    close(total, d['total'])
