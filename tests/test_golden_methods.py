"""Losses of the other methods, reproduced by the code that training runs.

The numbers in `golden/methods` were made by public implementations; which one, and the formula, stands above each test.
"""
from functools import partial

import torch
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.methods.bootstrap import Predictions, byol_terms

load = partial(golden, 'methods')
GRAD = dict(rtol=1e-9, atol=1e-10)


# ---- BYOL: |p/|p| - t/|t||^2 both ways (lucidrains/byol-pytorch; open-mmlab/mmselfsup agrees)

def test_byol():
    t, _ = load('byol_a')
    p1, p2 = (t[k].requires_grad_() for k in ('p1', 'p2'))
    terms = byol_terms(Predictions(torch.stack([p1, p2]), torch.stack([t['t1'], t['t2']]), p1, p1[None]))
    assert_close(terms.loss, t['loss'], **TOL)
    terms.loss.backward()
    for k,p in dict(grad_p1=p1, grad_p2=p2).items(): assert_close(p.grad, t[k], **GRAD)
