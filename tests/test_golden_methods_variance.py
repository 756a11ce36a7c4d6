"""VICReg, VICRegL, LeJEPA's SIGReg, Gram anchoring and PaKA against numbers of independent implementations"""
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from golden_numbers import TOL, golden
from densessl.theory.kernels import cka_loss, gram_loss
from densessl.theory.variance import covariance, lejepa_loss, sigreg, variance, vicreg_loss, vicregl_loss

load = partial(golden, 'methods')
GRAD = dict(rtol=1e-9, atol=1e-10)


def leaves(t, *names):
    "Tensors of these names that ask for a gradient"
    return [t[k].requires_grad_() for k in names]


@pytest.mark.parametrize('name', ['vicreg_vectors', 'vicreg_matches'])
def test_vicreg(name):
    t, _ = load(name)
    a, b = leaves(t, 'a', 'b')
    terms = vicreg_loss(a, b)
    assert_close(terms.invariance, t['inv'], **TOL)
    for f,key in ((variance, 'var'), (covariance, 'cov')):
        for side,z in (('a', a), ('b', b)): assert_close(f(z), t[f'{key}_{side}'], **TOL)
    assert_close(terms.loss, t['total'], **TOL)
    for side,g in zip('ab', torch.autograd.grad(terms.loss, (a, b))): assert_close(g, t[f'grad_{side}'], **GRAD)


@pytest.mark.parametrize('name', ['vicregl_pair', 'vicregl_multicrop'])
def test_vicregl(name):
    t, s = load(name)
    V = len(s['maps'])
    vectors, maps = leaves(t, *(f'z.{v}' for v in range(V))), leaves(t, *(f'map.{v}' for v in range(V)))
    terms = vicregl_loss(torch.stack(vectors), [m.flatten(1, 2) for m in maps], [t[f'grid.{v}'].flatten(1, 2) for v in range(V)],
                         s['n_global'], s['alpha'], s['num_matches'])
    assert_close(terms.loss, t['loss'], **TOL)
    assert_close(terms.local, t['local_loss'], **TOL)
    assert_close(25*terms.invariance + 25*terms.variance + terms.covariance, t['global_loss'], **TOL)
    grads = torch.autograd.grad(terms.loss, [*vectors, *maps])
    for v in range(V):
        assert_close(grads[v], t[f'grad_z.{v}'], **GRAD)
        assert_close(grads[V+v], t[f'grad_map.{v}'], **GRAD)


def test_sigreg():
    t, s = load('sigreg_a')
    z, = leaves(t, 'z')
    tol = dict(rtol=1e-6, atol=1e-8)     # its grid and weights are in single precision
    assert_close(sigreg(z, t['A']), t['sigreg'], **tol)
    terms = lejepa_loss(z, t['A'], s['G'], s['lam'])
    assert_close(terms.invariance, t['inv'], **TOL)
    assert_close(terms.loss, t['loss'], **tol)
    assert_close(torch.autograd.grad(terms.loss, z)[0], t['grad_z'], **tol)


def test_gram_anchoring():
    t, _ = load('gram_a')
    s, _ = leaves(t, 's', 't')
    loss = gram_loss(s, t['t'])
    assert_close(loss, t['loss'], **TOL)
    loss.backward()
    assert_close(s.grad, t['grad_s'], **GRAD)
    assert t['t'].grad is None


def test_paka():
    t, _ = load('paka_a')
    s, _ = leaves(t, 's', 't')
    loss = cka_loss(s, t['t'], t['valid'])
    assert_close(loss, t['loss'].double(), rtol=1e-5, atol=1e-6)     # its kernels are in single precision
    loss.backward()
    assert_close(s.grad, t['grad_s'], rtol=1e-5, atol=1e-6)
    assert t['t'].grad is None
