"One whole step of CLoVE on a tiny encoder, and the schedules of its trainer, against the numbers of the public code"
from dataclasses import replace
from functools import partial

import pytest, torch
from torch import nn
from torch.testing import assert_close

from golden_numbers import golden
from densessl.methods.clove import CLoVE, CLoVELoss, clove_presets
from densessl.training.optim import lars, split_decay
from densessl.training.schedules import cosine, warmup_cosine
from densessl.data.views import View

load = partial(golden, 'clove')

class Stride8(nn.Module):
    "Convolution, batch norm, ReLU: the dense contract in four lines"
    arch, stride = 'stride8', 8
    def __init__(self, dim):
        super().__init__()
        self.net, self.embed_dim = nn.Sequential(nn.Conv2d(3, dim, 8, 8, bias=False), nn.BatchNorm2d(dim), nn.ReLU()), dim
    def grid(self, h, w): return h//8, w//8
    def feature_map(self, x): return self.net(x)

ATTN = {'self_attn.in_proj_weight': 'context.qkv.weight', 'self_attn.in_proj_bias': 'context.qkv.bias', 'self_attn.out_proj.weight': 'context.proj.weight', 'self_attn.out_proj.bias': 'context.proj.bias'}

def ours(name):
    "Name of a tensor of the public code in our modules"
    for a,b in (*ATTN.items(), ('encoder_k.', 'encoder.net.'), ('projector_k.', 'projector.'), ('encoder.', 'encoder.net.')):
        if name.startswith(a): name = b+name[len(a):]; break
    return name.replace('linear1', 'conv1').replace('linear2', 'conv2')

def test_step():
    d, cfg = load('step_a')
    config = replace(clove_presets['official'], img_size=56, local_size=24, hidden_dim=cfg['inner'], out_dim=cfg['out'], num_heads=cfg['heads'], threshold=cfg['pos_ratio'], lam=cfg['gamma'], margin=cfg['margin'])
    model = CLoVE(Stride8(cfg['encoder_channels']), config).double().train()
    for branch,net in (('q.', model.student), ('k.', model.teacher)):
        net.load_state_dict({ours(k[2:]): v for k,v in d.items() if k.startswith(branch)})
    views = {f'global{i+1}': View(d[f'view.{i}'][None], d[f'coord.{i}'][None]) for i in range(2)}
    views['local'] = View(torch.stack([d[f'view.{i}'] for i in range(2, 8)]), torch.stack([d[f'coord.{i}'] for i in range(2, 8)]))

    model.update_teacher(cfg['ema_momentum'])         # there the teacher moves before the forward pass
    pairs, loss_func = model(views), CLoVELoss(config)
    B, maps = cfg['B'], lambda x, v, n: x.unflatten(0, (v, -1)).flatten(3).mT
    gl, lo, key = maps(d['gl_ctx'], 2, 7), maps(d['lo_ctx'], 6, 3), maps(d['gl_key'], 2, 7)
    close = lambda a,b: assert_close(a, b, rtol=1e-9, atol=1e-11)
    close(pairs[0].context, gl.flip(0)); close(pairs[0].local, key)
    close(pairs[1].context, lo[None]); close(pairs[1].local, key[:,None])
    total = loss_func(pairs)
    assert_close(total.detach(), d['total'], rtol=1e-6, atol=0)

    total.backward()
    named = dict(model.student.named_parameters())
    for k,v in d.items():
        if k.startswith('grad.'): assert_close(named[ours(k[5:])].grad, v, rtol=1e-6, atol=1e-9)
    opt = lars(split_decay(model.student), lr=cfg['lr'], wd=cfg['weight_decay'], mom=cfg['sgd_momentum'])
    opt.step()
    state = [net.state_dict() for net in (model.student, model.teacher)]
    seen = 0
    for k,v in d.items():
        if k.startswith('after.'):
            s = state['_k.' in k][ours(k[6:])]
            if s.is_floating_point(): assert_close(s, v, rtol=1e-6, atol=1e-9)
            else: assert torch.equal(s, v), k
            seen += 1
    assert seen==len(state[0])+len(state[1])

@pytest.mark.parametrize('name', ['no_warmup', 'recipe', 'small'])
def test_schedules(name):
    d, cfg = load('schedules_shared')
    batch, world, base_lr, acc, E, n, w, m0 = cfg[name]
    peak = batch*world/256*base_lr*acc
    lr, m = warmup_cosine(peak, peak/100, w/E, start=peak/100, n_steps=E*n), cosine(m0, 1.)
    steps = [i/(E*n) for i in range(E*n)]
    assert_close(torch.tensor([lr(p) for p in steps], dtype=torch.float64), d[f'lr.{name}'], rtol=1e-9, atol=1e-12)
    assert_close(torch.tensor([m(p) for p in steps], dtype=torch.float64), d[f'm.{name}'], rtol=1e-9, atol=1e-12)
