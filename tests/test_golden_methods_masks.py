"""Masked patches, reproduced: MAE's mask, target and loss.

The numbers in `golden/methods` were made by running public code under the Apache license; the losses are those that training calls.
"""
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from golden_numbers import TOL, golden
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
