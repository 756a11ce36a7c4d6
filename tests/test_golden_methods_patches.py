"""SelfPatch, reproduced: neighbors, aggregation and loss.

The numbers in `golden/methods` were made by running public code under the Apache license; the functions are those that training calls.
"""
from functools import partial

import torch
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.methods.patches import Aggregation, SelfPatchOutput, neighbors, selfpatch_terms, similar_neighbors
from densessl.theory.codes import center_update

load = partial(golden, 'methods')

def test_selfpatch_head():
    "Neighbors in their order; views, patches and aggregates of positives; the gradient at the tokens"
    t, s = load('selfpatch_head_a')
    assert torch.equal(neighbors((6,6)), t['neighbours'])
    net = Aggregation(s['D'], s['heads']).double()
    own = {k[2:].replace('cls_token', 'token').replace('cls_blocks', 'blocks'): v for k,v in t.items() if k.startswith('w.')}
    keys = net.load_state_dict(own, strict=False)
    assert not keys.unexpected_keys and all('gamma' in k for k in keys.missing_keys)
    x = t['x'].requires_grad_()
    near = similar_neighbors(x, (6,6), s['k'])
    assert not near.requires_grad and not (near==torch.arange(36)[:,None]).any()
    def joined(view, patches): return torch.cat([view[:,None], patches], 1)
    near_tol = dict(rtol=1e-9, atol=1e-10)
    assert_close(joined(*net(x, near)), t['loc'], **near_tol)
    plain = joined(*net(x))
    assert_close(plain, t['plain'], **near_tol)
    assert_close(torch.autograd.grad((plain*t['g_plain']).sum(), x)[0], t['grad_x'], **near_tol)

def test_selfpatch_loss():
    "Two global and two local views, each with the same weight for its patches; the centers follow all of them"
    t, s = load('selfpatch_loss_a')
    cls = [t[f's_cls.{i}'].requires_grad_() for i in range(4)]
    patches = [t[f's_patch.{i}'].requires_grad_() for i in range(4)]
    seen = torch.cat([t[f't_patch.{i}'].flatten(0, 1) for i in range(4)])
    weight = torch.cat([torch.full((s['B']*n,), 1/(4*s['B']*n), dtype=torch.float64) for n in s['patches']])
    none = torch.zeros(2, 1, 1)
    out = SelfPatchOutput(torch.stack(cls), torch.stack([t[f't_cls.{i}'] for i in range(4)]), t['center'],
                          torch.cat([x.flatten(0, 1) for x in patches]), seen, t['patch_center'], weight, none, none)
    terms = selfpatch_terms(out, s['T_s'], s['T_t'])
    for k,got in dict(loss=terms.loss, c_loss=terms.view, p_loss=terms.patch).items(): assert_close(got, t[k], **TOL)
    grads = torch.autograd.grad(terms.loss, [*cls, *patches])
    for name,g in zip([*(f'grad_cls.{i}' for i in range(4)), *(f'grad_patch.{i}' for i in range(4))], grads):
        assert_close(g, t[name], rtol=1e-9, atol=1e-10)
    assert_close(center_update(t['center'], out.teacher_logits), t['center_after'], **TOL)
    assert_close(center_update(t['patch_center'], seen), t['patch_center_after'], **TOL)
