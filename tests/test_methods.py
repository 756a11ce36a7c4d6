"What holds for every method: gradients, monitor, null, collapse, resume to the bit, two processes that equal one"
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback
from torch.testing import assert_close

import test_distributed as several
from pretend_gpu import pretend_gpu
from densessl.data.augment import make_views
from densessl.data.images import scene_dls
from densessl.data.views import View
from densessl.ground.core import InputError, python_numbers
from densessl.ground.synthetic import draw_scenes
from densessl.methods.encoders import dense_encoder
from densessl.training import pictures   # `learn.show_modes`
from densessl.training.distributed import sync_batchnorm
from densessl.training.learner import learner, methods
from densessl.training.resume import SaveRun

NETWORKS = dict(vit=('vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)),
                cnn=('test_resnet', dict(output_stride=8, stem_width=8, channels=[8, 8, 8, 16])))
SIZES = dict(img_size=32, local_size=16, n_local=2, hidden_dim=16, out_dim=8, bottleneck_dim=8, n_prototypes=8, queue=16, num_heads=2,
             k=4, random_query=False, node_size=16)

def network(m): return NETWORKS['vit' if 'vit' in m.scene_arch else 'cnn']

def tiny(m, **changes):
    "The settings for scenes, made small; what is switched off there stays off"
    c = m.presets['scenes']
    small = {f.name: SIZES[f.name] for f in fields(c) if f.name in SIZES and (getattr(c, f.name) or f.name in ('n_prototypes', 'random_query'))}
    return replace(c, **small | changes)

def make(m, config, double=False):
    "Model and loss of equal start"
    torch.manual_seed(3)
    arch, kwargs = network(m)
    encoder = dense_encoder(arch, img_size=config.img_size, pos_scale=getattr(config, 'pos_scale', 1.), **kwargs)
    config = m.complete(config, encoder, 8*m.recipe(config).frames)
    model = m.model(encoder, config)
    return (model.double() if double else model).train(), m.loss(config)

def batch(m, config, n=8, seed=2, double=False):
    "Views of `n` photographs, or of `n` clips, each of as many scenes as it has frames"
    recipe = m.recipe(config)
    torch.manual_seed(7+seed)
    n *= recipe.frames
    views = make_views(recipe, draw_scenes(n, 48, seed=seed)[0], torch.full((n, 2), 48))
    return {k: View(v.images.double() if double else v.images, v.boxes) for k,v in views.items()}

def step(model, loss_func, views, seed=1):
    torch.manual_seed(seed)        # of what a method draws for itself
    out = model(views)
    return out, loss_func(out)

def watched(m, model, loss_func, views, out):
    "What the monitor measures in a step"
    return python_numbers(m.measure(SimpleNamespace(pred=out, loss_func=loss_func, model=model, xb=(views,))))

every = pytest.mark.parametrize('m', methods.values(), ids=lambda m: m.name)

@every
def test_gradients_and_monitor(m):
    "None at the teacher, one at every parameter of the student; the monitor's numbers are finite and have words"
    config = tiny(m)
    model, loss_func = make(m, config)
    views = batch(m, config)
    out, loss = step(model, loss_func, views)
    loss.backward()
    assert loss.isfinite() and not any(p.grad is not None or p.requires_grad for p in (model.teacher or torch.nn.Module()).parameters())
    without = [k for k,p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without        # DistributedDataParallel waits for every parameter
    parts = loss_func.parts._asdict()
    assert set(m.metrics) <= parts.keys() and not any(v.requires_grad for v in parts.values())
    state = watched(m, model, loss_func, views, out)
    assert all(math.isfinite(v) for v in state.values()) and {'rank'} <= state.keys()
    assert all(isinstance(s, str) for s in m.diagnose(state | dict(epoch=0, progress=.1)))
    model.update_teacher(.5)

@every
@pytest.mark.skipif(torch.cuda.is_available(), reason='pretends to have a GPU')
def test_a_step_stays_on_the_device(m):
    "Tensors that pretend to be on a GPU: no mixed devices, no wait, and the numbers of the CPU"
    config = tiny(m)
    views = batch(m, config)
    model, loss_func = make(m, config)
    _, want = step(model, loss_func, views)
    with pretend_gpu() as g:
        model, loss_func = make(m, config)
        model.to('cuda'); loss_func.to('cuda')
        there = {k: v.to('cuda') for k,v in views.items()}
        with g.counted() as counts:
            _, loss = step(model, loss_func, there)
            loss.backward()
        assert not counts.waits, counts.waits
        assert_close(float(loss), float(want), rtol=1e-3, atol=1e-4)

@every
def test_the_null_is_another_training(m):
    "Same start and views: settings that take away what the method learns from change the loss or its gradient"
    assert m.null, 'a gain is held against a null'
    found = []
    for config in (tiny(m), tiny(m, **m.null)):
        model, loss_func = make(m, config)
        _, loss = step(model, loss_func, batch(m, config))
        loss.backward()
        first = next(p for p in model.student.encoder.parameters() if p.grad is not None)
        found.append((loss.detach(), first.grad))
    assert not torch.allclose(found[0][1], found[1][1])

@pytest.mark.parametrize('m', [m for m in methods.values() if hasattr(m.presets['paper'], 'global_scale')], ids=lambda m: m.name)
def test_views_that_never_meet_are_refused(m):
    "By methods that match places, unless their views are cut so that they meet; no other method needs it"
    config, (arch, kwargs) = tiny(m, global_scale=(1e-4, 2e-4)), network(m)
    dls = scene_dls(8, m.recipe(config), bs=4)
    if m.matches=='place' and not hasattr(config, 'overlap'):
        with pytest.raises(InputError, match='views of 0.0001 to 0.0002 of the photograph are too small, raise global_scale'):
            learner(dls, arch, m, config, model_kwargs=kwargs)
    else: learner(dls, arch, m, config, model_kwargs=kwargs)

@pytest.mark.parametrize('m', [m for m in methods.values() if m.matches!='none'], ids=lambda m: m.name)
def test_a_view_of_one_cell_is_refused(m):
    config = tiny(m)
    if hasattr(config, 'n_local'): config = replace(config, n_local=0)
    if m.name=='flsl': config = replace(config, window=1)
    with pytest.raises(InputError, match='resnet10t turns a view of 32 px into one cell'):
        learner(scene_dls(16, m.recipe(config), bs=16), 'resnet10t', m, config, model_kwargs=dict(stem_width=8, channels=[8, 8, 8, 16]))

def trained(m, config, steps=60):
    "What the monitor says after some steps at a high rate, or at that of `collapse`"
    lr = max(1e-2, config.lr*8/256 if 'lr' in m.collapse else 0.)
    model, loss_func = make(m, config)
    opt = torch.optim.AdamW([p for p in model.student.parameters() if p.requires_grad], lr=lr, weight_decay=0.)
    for i in range(steps):
        views = batch(m, config, seed=i%4)
        out, loss = step(model, loss_func, views, seed=i)
        opt.zero_grad(); loss.backward(); opt.step()
        model.update_teacher(.9)
    state = watched(m, model, loss_func, views, out)
    return ' '.join(m.diagnose(state | dict(epoch=1, progress=1.)))

@every
def test_the_collapse_is_named(m):
    "Settings known to collapse do so, and the monitor says it; `collapse` is a setting like any other"
    if not m.collapse: pytest.skip('no collapse is known, or its page shows it')
    assert 'collapse' in trained(m, tiny(m, **m.collapse))

class StopAt(Callback):
    def after_batch(self):
        if self.train_iter==6: raise KeyboardInterrupt

def fit(m, out, *cbs, **kwargs):
    config, (arch, net) = tiny(m), network(m)
    torch.manual_seed(0)
    dls = scene_dls(16, m.recipe(config), bs=4, canvas=40, seed=0)
    learn = learner(dls, arch, m, config, model_kwargs=net, monitor_every=1)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda o: None
    torch.manual_seed(1)
    learn.fit(2, cbs=[SaveRun(out, minutes=None, every=2, **kwargs), *cbs])
    return learn

@every
def test_resumed_to_the_bit(m, tmp_path):
    "Weights, queues, centers, prototypes and what the monitor recorded"
    whole = fit(m, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): fit(m, tmp_path/'cut', StopAt())
    again = fit(m, tmp_path/'cut', resume=True)
    now = whole.model.state_dict()
    for k,v in again.model.state_dict().items(): assert torch.equal(v, now[k]), k
    rows = [[str(list(row.items())) for row in o.collapse_monitor.history] for o in (whole, again)]
    assert rows[0]==rows[1] and len(rows[0])==8

# ---- two processes

# each process draws for itself what its photographs hide or which of their boxes it looks at: tested with equal draws elsewhere
DRAWS = ('scrl', 'ibot', 'mae', 'capi')

def numbers(m, views, wrap=lambda m: m, average=lambda x: x):
    model, loss_func = make(m, tiny(m), double=True)
    net = wrap(model)                  # it averages as long as it lives
    _, loss = step(net, loss_func, views)
    loss.backward()
    return dict(loss=average(loss.detach().clone()), grads={n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None},
                buffers={n: b.clone() for n,b in model.named_buffers()})

def others(): return [m for name,m in methods.items() if name not in ('flsl', 'clove', 'dino', *DRAWS)]

def a_step_each(rank, world):
    def average(x): torch.distributed.all_reduce(x); return x/world
    res = {}
    for m in others():
        mine = {k: View(*(t[:,rank*4:(rank+1)*4] for t in (v.images, v.boxes))) for k,v in batch(m, tiny(m), double=True).items()}
        res[m.name] = numbers(m, mine, lambda net: torch.nn.parallel.DistributedDataParallel(sync_batchnorm(net, 'cpu')), average)
    return res

def with_group(rank, world):
    torch.distributed.init_process_group('gloo')
    return a_step_each(rank, world)

@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason='needs gloo')
def test_two_processes_equal_one(tmp_path):
    "Loss, gradients, and the queues and centers after the step"
    differ = {}
    for got in several.run(with_group, 2, tmp_path/'out'):
        for m in others():
            want = numbers(m, batch(m, tiny(m), double=True))
            pairs = {'loss': (got[m.name]['loss'], want['loss'])} | {n: (got[m.name][k][n], want[k][n]) for k in ('grads', 'buffers') for n in want[k]}
            if wrong := [n for n,(a,b) in pairs.items() if not torch.allclose(a, b, rtol=1e-7, atol=1e-10)]: differ[m.name] = wrong[:3]
    assert not differ
