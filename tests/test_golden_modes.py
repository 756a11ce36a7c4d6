"FLSL's objective and its volume term against the numbers of the public code"
import math
from functools import partial

import pytest, torch
from torch.autograd import grad
from torch.testing import assert_close

from golden_numbers import golden
from densessl.theory.modes import flsl_objective, mode_loss, prototype_loss, volume_kl

load = partial(golden, 'flsl')

def close(got, want, gradient=False):
    if want.dtype==torch.float32: assert_close(got, want, rtol=1e-5, atol=1e-7)
    else: assert_close(got, want, rtol=1e-9, atol=1e-10 if gradient else 1e-11)

def objective(x, mode, s, t, cfg, temp_t):
    u,e,g = cfg['coefficients']
    return flsl_objective(x, mode, s, t, upsilon=u, eta=e, gamma=g if cfg['vmr'] else 0., temp_s=cfg['temp_s'], temp_t=temp_t[cfg['epoch']].item())

@pytest.mark.parametrize('name', ['default', 'no_vmr', 'other_coeffs', 'float32', 'single_token'])
def test_objective(name):
    d, cfg = load(f'loss_{name}')
    x, mode, s, t = (d[k].clone().requires_grad_() for k in ('x', 'mode', 'student_pred', 'teacher_pred'))
    total, parts = objective(x, mode, s, t, cfg, d['temp_t'])
    close(total.detach(), d['total'])
    close(parts.intra, d['ms']); close(parts.inter, d['kmeans'])
    if cfg['vmr']: close(parts.volume, d['vmr'])
    else: assert d['vmr']==0
    grads = grad(total, (x,mode,s,t), allow_unused=True)
    for g,k in zip(grads, ('x', 'mode', 'student_pred')): close(g, d[f'grad_total_{k}'], gradient=True)
    assert grads[3] is None

    for g,k in zip(grad(mode_loss(x, mode), (x,mode)), ('x', 'mode')): close(g, d[f'grad_ms_{k}'], gradient=True)
    loss = prototype_loss(s, t, cfg['temp_s'], d['temp_t'][cfg['epoch']].item())
    close(grad(loss.ce, s, retain_graph=True)[0], d['grad_kmeans_student_pred'], gradient=True)
    if cfg['vmr']: close(grad(loss.kl, s)[0], d['grad_vmr_student_pred'], gradient=True)

def test_objective_of_centered_teacher():
    "Centering belongs to DINO and is off in FLSL's recipe: a running center taken from the teacher's logits before the call"
    d, cfg = load('loss_centering_shared')
    center, m = torch.zeros(cfg['K'], dtype=torch.float64), cfg['center_momentum']
    for i in range(cfg['steps']):
        x, mode, s, t = (d[f'step{i}.{k}'] for k in ('x', 'mode', 'student_pred', 'teacher_pred'))
        s = s.clone().requires_grad_()
        total, parts = objective(x, mode, s, t-center, cfg, d['temp_t'])
        center = m*center + (1-m)*t.mean(0)
        close(total.detach(), d[f'step{i}.total'])
        for got,k in zip(parts, ('ms', 'kmeans', 'vmr')): close(got, d[f'step{i}.{k}'])
        close(grad(total, s)[0], d[f'step{i}.grad_total_student_pred'], gradient=True)
        close(center[None], d[f'step{i}.center_after'])

VMR = ['balanced_onehot', 'collapsed_exact', 'nearly_collapsed', 'prior', 'prior_equal', 'random', 'single_row', 'uniform']

@pytest.mark.parametrize('name', VMR)
def test_volume(name):
    d, cfg = load(f'vmr_{name}')
    prior = d['prior'][0] if cfg['prior'] else None
    probs = d['probs'].clone().requires_grad_()
    kl = volume_kl(probs.mean(0), prior)
    assert kl.shape==()
    close(kl.detach(), d['limit'])
    g, = grad(kl, probs)
    if name=='collapsed_exact':  # the public code has no value here
        assert d['value'].isnan() and d['grad_probs'].isnan().any()
        assert_close(kl.item(), math.log(cfg['K'])); assert g.isfinite().all()
    else:
        assert d['value'].shape==((1,) if cfg['prior'] else ())
        close(kl.detach(), d['value'].squeeze())
        close(g, d['grad_probs'], gradient=True)

@pytest.mark.parametrize('name', [n for n in VMR if n not in ('balanced_onehot', 'collapsed_exact')])
def test_volume_of_logits(name):
    "The fused loss has the same volume term: value, and gradient through the softmax"
    d, cfg = load(f'vmr_{name}')
    prior, logits = d['prior'][0] if cfg['prior'] else None, d['probs'].log().requires_grad_()
    kl = prototype_loss(logits, logits, temp_s=1., temp_t=1., prior=prior).kl
    close(kl.detach(), d['limit'])
    close(grad(kl, logits)[0], grad(logits.softmax(-1), logits, d['grad_probs'])[0], gradient=True)
