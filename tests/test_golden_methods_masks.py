"""Masked patches, reproduced: masks, targets and losses of MAE, iBOT, DINOv2 and CAPI.

The numbers in `golden/methods` were made by running public code under the Apache license; the losses are those that training calls.
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.methods.hidden import CAPIOutput, capi_terms
from densessl.methods.ibot import IBOTOutput, hidden_rows, ibot_terms, koleo, patch_cross_entropy
from densessl.theory.attention import unit_vectors
from densessl.theory.codes import center_update, centered_target, sinkhorn
from densessl.theory.hiding import hidden_error, patchify, restore_patches, split_patches, standardize_patches

load = partial(golden, 'methods')

@pytest.mark.parametrize('name', ['mae_plain', 'mae_norm'])
def test_mae(name):
    t, s = load(name)
    n_keep = int(t['noise'].shape[1]*(1-s['ratio']))
    h = split_patches(t['noise'], n_keep)
    assert torch.equal(h.keep, t['ids_keep']) and torch.equal(h.restore, t['ids_restore']) and torch.equal(h.mask, t['mask'].bool())
    kept = t['tokens'].gather(1, h.keep[...,None].expand(-1, -1, t['tokens'].shape[-1]))
    assert torch.equal(restore_patches(kept, h.restore, t['mask_token']), t['full'])
    target = patchify(t['images'], s['P'])
    if s['norm_pix']: target = standardize_patches(target)
    assert_close(target, t['target'], **TOL)
    pred = t['pred'].requires_grad_()
    loss = hidden_error(pred, target, h.mask)
    assert_close(loss, t['loss'], **TOL)
    assert_close(torch.autograd.grad(loss, pred)[0], t['grad_pred'], **TOL)

def ibot_output(t, masks):
    "The golden tensors as a model's output, and the leaves whose gradients are asked for"
    cls = [t[f's_cls.{i}'].requires_grad_() for i in range(4)]
    patches = [t[f's_patch.{i}'].requires_grad_() for i in range(2)]
    rows, weight = hidden_rows(masks, int(masks.sum()))
    teacher = torch.cat([t[f't_patch.{i}'] for i in range(2)])
    none = torch.zeros(2, 1, 1)
    out = IBOTOutput(torch.stack(cls), torch.stack([t['t_cls.0'], t['t_cls.1']]), t['center'], torch.cat(patches).flatten(0, 1)[rows],
                     teacher.flatten(0, 1)[rows], t['patch_center'], weight.double(), none, none, none)
    return out, cls, patches

def test_ibot():
    t, s = load('ibot_a')
    masks = torch.cat([t[f'mask.{i}'] for i in range(2)]).flatten(1)
    assert (masks.sum(1)==0).any() and (masks.sum(1)>1).any()
    out, cls, patches = ibot_output(t, masks)
    terms = ibot_terms(out, s['T_s'], s['T_t'], s['lambda2'], temp_patch=s['T_t2'])
    near = dict(rtol=1e-6, atol=1e-8)     # the weights of the patches are in single precision
    assert_close(terms.view, t['cls'], **TOL)
    assert_close(terms.patch, t['patch'], **near)
    assert_close(terms.loss, t['loss'], **near)
    grads = torch.autograd.grad(terms.loss, [*cls, *patches])
    for name,g in zip([*(f'grad_cls.{i}' for i in range(4)), *(f'grad_patch.{i}' for i in range(2))], grads): assert_close(g, t[name], **near)
    for k,rows in dict(center=out.teacher_logits, patch_center=torch.cat([t['t_patch.0'], t['t_patch.1']])).items():
        assert_close(center_update(t[k], rows), t[f'{k}_after'], **TOL)
        mean = rows.flatten(0, -2).mean(0, keepdim=True)     # as the model gives the patches: their mean score alone
        assert_close(center_update(t[k], mean), t[f'{k}_after'], **TOL)

def test_dinov2():
    t, s = load('dinov2_a')
    rows, weight = hidden_rows(t['mask'], len(t['s']))
    assert torch.equal(rows, t['mask'].flatten().nonzero()[:,0]) and not t['mask'][0].any()
    assert_close(centered_target(t['t'], t['center'], s['T_t']), t['target'], **TOL)
    assert_close(sinkhorn(t['t'], s['T_t']), t['target_sk'].double(), rtol=1e-5, atol=1e-7)
    logits, x = t['s'].requires_grad_(), t['x'].requires_grad_()
    loss = patch_cross_entropy(t['target'], logits, weight, s['T_s'])
    assert_close(loss, t['loss'].double(), rtol=1e-6, atol=1e-8)
    assert_close(torch.autograd.grad(loss, logits)[0], t['grad_s'], rtol=1e-6, atol=1e-8)
    assert_close(patch_cross_entropy(sinkhorn(t['t'], s['T_t']), logits, weight, s['T_s']), t['loss_sk'].double(), rtol=1e-5, atol=1e-7)
    assert_close(koleo(x), t['koleo'], rtol=1e-7, atol=1e-9)
    assert_close(torch.autograd.grad(koleo(x), x)[0], t['grad_x'], rtol=1e-7, atol=1e-9)

@pytest.mark.parametrize('name', ['capi_positionwise', 'capi_all'])
def test_capi(name):
    t, s = load(name)
    w, b, scores = (t[k].requires_grad_() for k in ('weight', 'bias', 's'))
    clusters = F.linear(unit_vectors(t['x']), w, b)     # as the layer of the model does
    none = torch.zeros(1)
    out = CAPIOutput(clusters, scores, t['where'], none, none)
    terms = capi_terms(out, s['T_student'], s['T_target'], s['T_pred'], s['iterations'], s['positionwise'])
    q = sinkhorn(clusters.detach(), s['T_target'], s['iterations'], dim=0 if s['positionwise'] else (0, 1), floor=1e-8)
    assert_close(q, t['targets'], **TOL)
    assert_close(terms.student, t['student_loss'], **TOL)
    assert_close(terms.cluster, t['cluster_loss'].double(), rtol=1e-6, atol=0.)
    assert_close(terms.loss, terms.student+terms.cluster, **TOL)
    assert_close(torch.autograd.grad(terms.loss, scores, retain_graph=True)[0], t['grad_s'], **TOL)
    for g,k in zip(torch.autograd.grad(terms.loss, (w, b)), ('grad_weight', 'grad_bias')): assert_close(g, t[k], rtol=1e-5, atol=1e-7)
