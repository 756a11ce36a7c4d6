"""One whole training step of FLSL's public code, reproduced: tokens, logits, objective, gradients, update, teacher.

The numbers in `golden/flsl` were made by running ISL-CV/FLSL unchanged on a tiny ViT. Queries are drawn by the test data, so
`query_mask` is replaced where they matter. Tokens are ordered view by view there and photograph by photograph here.
"""
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from torch import nn
from torch.testing import assert_close

import densessl.methods.flsl
from golden_numbers import golden, GOLDEN, TOL
from densessl.theory.attention import mean_shift
from densessl.theory.pooling import query_index, query_mask
from densessl.data.augment import make_views
from densessl.training.teacher import TeacherEMA
from densessl.methods.encoders import dense_encoder
from densessl.theory.positions import sincos_positions
from densessl.methods.flsl import FLSL, FLSLConfig, FLSLLoss, flsl_presets, flsl_recipe
from densessl.methods.heads import PrototypeHead
from densessl.theory.modes import flsl_objective
from densessl.training.optim import ClipGrad, FreezeLastLayer, adamw, clip_per_parameter_, split_decay

GRAD = dict(rtol=1e-9, atol=1e-10)
load = partial(golden, 'flsl')


def part(t, prefix): return {k[len(prefix):]: v for k,v in t.items() if k.startswith(prefix)}


def ours(state):
    "Our names of the public code's parameters; what we have no use for must be what it is assumed to be"
    res = {}
    for k,v in state.items():
        if k.endswith('weight_g'): assert (v==1).all()                # prototypes of length 1
        elif k!='backbone.cls_token': res[k.replace('backbone.', 'encoder.net.').replace('head.last_layer.weight_v', 'head.prototypes')] = v
    return res


def encoder(s):
    return dense_encoder('vit_tiny_patch16_224', s['sizes'][0], pos_offset=.1, patch_size=s['patch'], embed_dim=s['dim'], depth=s['depth'], num_heads=s['heads']).double()


def config(s):
    u, e, g = s['coefficients']
    return FLSLConfig(img_size=s['sizes'][0], local_size=s['sizes'][2], normalize=False, beta_sa=s['temp_sa'], beta_ca=s['temp_ca'], window=s['windows'][0],
                      local_window=s['windows'][1], n_prototypes=s['K'], hidden_dim=s['head_hidden'], bottleneck_dim=s['head_bottleneck'],
                      upsilon=u, eta=e, gamma=g, temp_s=s['temp_s'], clip=s['clip'], lr=s['lr'])


def views(t):
    "The stored crops in the groups that go through the student together"
    return dict(teacher=SimpleNamespace(images=t['aug.0'][None]), student=SimpleNamespace(images=t['aug.1'][None]), local=SimpleNamespace(images=torch.stack([t['aug.2'], t['aug.3']])))


def stored_masks(t, monkeypatch):
    "Let FLSL find the stored queries in place of its own draw"
    asked = []
    def mask(H, W, window, n=1, random=True, **kwargs):
        asked.append((H, W, window, n, random))
        return [t['mask.1'], torch.cat([t['mask.2'], t['mask.3']])][(len(asked)-1)%2]
    monkeypatch.setattr(densessl.methods.flsl, 'query_mask', mask)
    return asked


def by_photograph(x, t):
    "From the order of the public code, view by view, to ours"
    B, counts = len(t['mask.1']), [int(t[f'mask.{v}'][0].sum()) for v in (1, 2, 3)]
    return torch.cat([o.unflatten(0, (B, -1)) for o in x.split([B*c for c in counts])], 1).flatten(0, 1)


def flsl_model(t, s):
    model = FLSL(encoder(s), config(s)).double()
    assert_close(model.student.encoder.net.pos_embed[0].double(), t['student.backbone.pos_embed'][0], rtol=0, atol=1e-6)   # made in float32
    assert_close(sincos_positions(s['dim'], (4, 4)), t['student.backbone.pos_embed'][0], rtol=0, atol=1e-7)                # stored as float32 numbers
    for net in ('student', 'teacher'): getattr(model, net).load_state_dict(ours(part(t, net+'.')))
    return model.train()


def flsl_loss(t, s):
    loss = FLSLLoss(config(s))
    loss.temp_t = t['temp_t'][s['epoch']].item()
    return loss


def check_step(out, total, parts, t):
    for got,k in zip((out.z, out.mode, out.student_logits, out.teacher_logits), ('x', 'mode', 'pred_s', 'pred_t'), strict=True): assert_close(got.detach(), by_photograph(t[k], t), **TOL)
    assert_close(total.detach(), t['total'], **TOL)
    for got,k in zip(parts, ('ms', 'kmeans', 'vmr'), strict=True): assert_close(got, t[k], **TOL)


def check_grads(named, t):
    got, want, norms = {k: p.grad for k,p in named if p.grad is not None}, ours(part(t, 'grad.')), ours(part(t, 'gradnorm.'))
    assert got.keys()==want.keys()==norms.keys()
    for k,g in got.items():
        assert_close(g, want[k], **GRAD, msg=lambda o: f'{k}: {o}')
        assert_close(g.norm(), norms[k], **GRAD)
    return norms


def check_after(model, t, s, frozen=()):
    "Student and teacher after the update; `frozen` parameters of the student rest"
    before, after = ours(part(t, 'student.')), ours(part(t, 'after.student.'))
    for k,p in model.student.named_parameters():
        assert_close(p.detach(), before[k] if k in frozen else after.get(k, before[k]), **TOL, msg=lambda o: f'{k}: {o}')
    teacher, m = ours(part(t, 'after.teacher.')), s['ema_momentum']
    assert teacher.keys() == dict(model.teacher.named_parameters()).keys()
    for k,p in model.teacher.named_parameters():
        want = m*ours(part(t, 'teacher.'))[k] + (1-m)*before[k] if k in frozen else teacher[k]
        assert_close(p, want, **TOL, msg=lambda o: f'{k}: {o}')


# ---- the recipe's step

def test_step_by_hand(monkeypatch):
    t, s = load('step_default')
    model, loss, asked = flsl_model(t, s), flsl_loss(t, s), stored_masks(t, monkeypatch)
    assert model.teacher.encoder.net._pos_embed.args[0] is model.teacher.encoder.net     # the copy resamples its own positions
    assert_close(model.teacher.encoder.tokens(t['aug.0']), t['enc_t'], **TOL)
    out = model(views(t))
    assert asked == [(4, 4, s['windows'][0], s['B'], True), (2, 2, s['windows'][1], 2*s['B'], True)]
    total = loss(out)
    check_step(out, total, loss.parts, t)
    assert not out.teacher_logits.requires_grad

    total.backward()
    norms = check_grads(model.student.named_parameters(), t)
    assert all(p.grad is None for p in model.teacher.parameters())
    assert min(norms.values()) > s['clip']            # every one is clipped
    params = dict(model.student.named_parameters())
    clip_per_parameter_(params.values(), s['clip'])
    free, decay = split_decay(model.student)
    assert {k for k,p in params.items() if any(p is q for q in decay)} == {k for k in ours(part(t, 'after.student.')) if params[k].ndim>1}
    opt = adamw([free, decay], lr=s['lr'], wd=s['weight_decay'])
    opt.step()
    model.update_teacher(s['ema_momentum'])
    check_after(model, t, s)


@pytest.mark.parametrize('rest', [False, True])
def test_step_of_the_learner(monkeypatch, rest):
    "The callbacks in their order; `rest`: the public code's first epoch, in which the prototypes are left alone"
    t, s = load('step_default')
    model, loss = flsl_model(t, s), flsl_loss(t, s)
    stored_masks(t, monkeypatch)
    class Keep(Callback):
        def after_loss(self): self.step = self.pred, self.loss, loss.parts
    keep, batch = Keep(), [(views(t), torch.zeros(1))]
    learn = Learner(DataLoaders(batch, []), model, loss_func=loss, opt_func=adamw, splitter=lambda m: split_decay(m.student), lr=s['lr'], wd=s['weight_decay'],
                    cbs=[keep, TeacherEMA(s['ema_momentum']), ClipGrad(s['clip']), FreezeLastLayer(1 if rest else 0)])
    learn.remove_cbs([Recorder, ProgressCallback])           # they smooth the loss in float32
    learn.fit(1)
    check_step(*keep.step, t)
    check_after(model, t, s, ('head.prototypes',) if rest else ())


# ---- normalized modes, random queries

def test_step_with_norm_on_modes():
    "A variant of the public code that `FLSL` leaves out: the backbone's last norm applies to the modes instead"
    t, s = load('step_layernorm_on_mode')
    nets = {}
    for name in ('student', 'teacher'):
        enc = encoder(s)
        enc.net.norm = nn.Identity()
        net = nn.ModuleDict(dict(encoder=enc, norm=nn.LayerNorm(s['dim'], eps=1e-6), head=PrototypeHead(s['dim'], s['K'], s['head_hidden'], s['head_bottleneck']))).double()
        net.load_state_dict(ours(part(t, name+'.')))
        nets[name] = net.requires_grad_(name=='student')
    nets['student'].encoder.net.pos_embed.requires_grad_(False)
    student, teacher = nets.values()
    Zt = teacher.encoder.tokens(t['aug.0'])
    assert_close(Zt, t['enc_t'], **TOL)
    zs, modes, positives = [], [], []
    for group in ((1,), (2, 3)):
        Z = student.encoder.tokens(torch.cat([t[f'aug.{v}'] for v in group]))
        mask = torch.cat([t[f'mask.{v}'] for v in group])
        z = Z.gather(1, query_index(mask)[...,None].expand(-1, -1, Z.shape[-1]))
        for out,x in ((zs, z), (modes, mean_shift(z, Z, s['temp_sa'])), (positives, mean_shift(z, Zt.repeat(len(group), 1, 1), s['temp_ca']))): out.append(x.flatten(0, 1))
    z, mode, positive = map(torch.cat, (zs, modes, positives))
    assert positive.requires_grad                     # the student's queries decide where the teacher is read
    out = (z, mode, student.head(student.norm(mode)), teacher.head(teacher.norm(positive)))
    for got,k in zip(out, ('x', 'mode', 'pred_s', 'pred_t')): assert_close(got.detach(), t[k], **TOL)
    c = config(s)
    total, parts = flsl_objective(*out, upsilon=c.upsilon, eta=c.eta, gamma=c.gamma, temp_s=c.temp_s, temp_t=t['temp_t'][s['epoch']].item())
    assert_close(total.detach(), t['total'], **TOL)
    for got,k in zip(parts, ('ms', 'kmeans', 'vmr'), strict=True): assert_close(got, t[k], **TOL)
    total.backward()
    check_grads(student.named_parameters(), t)
    for v,w in zip((1, 2, 3), s['windows']): assert (t[f'mask.{v}'].sum(1)==(s['sizes'][v]//s['patch']//w)**2).all()


# ---- the preset that follows the public code

def test_official_preset(monkeypatch):
    "Raw tokens, inverse temperatures of ViT-S/16 and its top-left queries: nothing is drawn"
    c = flsl_presets['official']
    assert (c.normalize, c.random_query, c.pos_offset, c.n_prototypes) == (False, False, .1, None)
    assert_close(torch.tensor([c.beta_sa, c.beta_ca]), torch.tensor([.1, .2])/384**.5)
    c = replace(c, n_prototypes=8, hidden_dim=16, bottleneck_dim=8)
    torch.manual_seed(0)
    enc = dense_encoder('vit_tiny_patch16_224', c.img_size, pos_offset=c.pos_offset, embed_dim=12, depth=1, num_heads=1)
    model = FLSL(enc, c).train()
    masks = []
    def noted(*args, **kwargs): masks.append(query_mask(*args, **kwargs)); return masks[-1]
    monkeypatch.setattr(densessl.methods.flsl, 'query_mask', noted)
    canvas = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
    v = make_views(flsl_recipe(c), canvas, torch.tensor([[256, 256]]*2))
    first, again = model(v), model(v)
    for a,b in zip(first, again): assert torch.equal(a, b)
    for got,name in zip(masks, ('mask_14_2', 'mask_6_2')*2, strict=True):
        t, s = load(name)
        assert not s['random_sampling'] and s['window']==2
        assert torch.equal(got, t['masks'][:1].expand_as(got))
    assert [len(m) for m in masks]==[2, 4]*2 and len(first.z)==2*(49+2*9)
    Z = model.student.encoder.tokens(v['student'].images[0])[0].unflatten(0, (14, 14))
    assert_close(first.z.unflatten(0, (2, -1))[0,:49], Z[::2,::2].flatten(0, 1))
    FLSLLoss(c)(first).backward()
    assert all(p.grad.isfinite().all() for p in model.student.parameters() if p.requires_grad)


# ---- all of them

def test_every_golden_file_is_read():
    "By its name, or by what follows its kind, in one of the tests of golden numbers"
    tests = [p for name in ('golden_*', 'transfer', 'formats', 'semantic') for p in Path(__file__).parent.glob(f'test_{name}.py')]
    text = '\n'.join(p.read_text() for p in tests)
    files = sorted(p for p in GOLDEN.rglob('*') if p.is_file())
    assert len(files)>40 and {p.suffix for p in files}=={'.safetensors', '.json'}
    for f in files: assert re.search(rf"[/'](?:{f.stem}|{f.stem.partition('_')[2] or f.stem})(?:{f.suffix})?'", text), f
