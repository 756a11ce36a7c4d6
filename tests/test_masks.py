"Masks that are drawn in a step: two processes with the masks of one, and no wait for their number"
import pytest, torch
from torch.testing import assert_close

import test_distributed as several
from test_methods import batch, make, step, tiny
from densessl.data.views import View
from densessl.methods.hidden import capi_method, mae_method
from densessl.methods.ibot import ibot_method
from densessl.theory.hiding import Hidden, block_mask, inverse_block_mask, random_mask, sample_hidden

V2 = dict(shared_head=False, targets='sinkhorn', koleo=.1)
RUNS = [('ibot', ibot_method, {}), ('dinov2', ibot_method, V2), ('mae', mae_method, {}), ('capi', capi_method, {})]

def draws(name, c, grid=(4,4)):
    "What the model draws for eight photographs, the same in all processes"
    g = torch.Generator().manual_seed(0)
    if name=='mae': return random_mask(8, 16, c.mask_share, g)
    if name=='capi':
        h = inverse_block_mask(8, grid, c.mask_share, generator=g)
        return h.keep, sample_hidden(h.mask, 2, g)
    return block_mask(torch.tensor([4, 0]*8), grid, generator=g)     # of both global views

def numbers(name, m, changes, share, wrap=lambda m: m, average=lambda x: x):
    "Loss, gradients and buffers after a step on a share of the photographs"
    c = tiny(m, **changes)
    model, loss_func = make(m, c, double=True)
    drawn = draws(name, c)
    if name=='mae': model.draw_mask = lambda n, N: Hidden(*(o[share] for o in drawn))
    elif name=='capi': model.draw_mask = lambda n, grid: tuple(o[share] for o in drawn)
    else:
        mine = drawn.unflatten(0, (2, 8))[:,share].flatten(0, 1)
        model.draw_masks = lambda n, grid: (mine, int(mine.sum()))
    views = {k: View(*(t[:,share] for t in (v.images, v.boxes))) for k,v in batch(m, c, double=True).items()}
    net = wrap(model)
    _, loss = step(net, loss_func, views)
    loss.backward()
    grads = {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}
    return dict(loss=average(loss.detach().clone()), grads=grads, buffers={n: b.clone() for n,b in model.named_buffers()})

def with_group(rank, world):
    torch.distributed.init_process_group('gloo')
    def average(x): torch.distributed.all_reduce(x); return x/world
    share = slice(rank*4, rank*4+4)
    return {name: numbers(name, m, c, share, torch.nn.parallel.DistributedDataParallel, average) for name,m,c in RUNS}

@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason='needs gloo')
def test_two_processes_equal_one(tmp_path):
    "Loss, gradients and centers, given the masks"
    for got in several.run(with_group, 2, tmp_path/'out'):
        for name,m,c in RUNS:
            want = numbers(name, m, c, slice(None))
            assert_close(got[name]['loss'], want['loss'], rtol=1e-6, atol=1e-8, msg=lambda s: f'{name}: {s}')
            for k in ('grads', 'buffers'):
                assert got[name][k].keys()==want[k].keys()
                for n in want[k]: assert_close(got[name][k][n], want[k][n], rtol=1e-5, atol=1e-7, msg=lambda s: f'{name} {k} {n}: {s}')

@pytest.mark.parametrize('name,m,changes', RUNS, ids=[o[0] for o in RUNS])
def test_every_step_has_the_same_shapes(name, m, changes):
    "Whatever is drawn: a step needs no count from the device, and its memory does not vary"
    c = tiny(m, **changes)
    model, loss_func = make(m, c)
    shapes = {str([tuple(x.shape) for x in step(model, loss_func, batch(m, c), seed=i)[0]]) for i in range(3)}
    assert len(shapes)==1

@pytest.mark.parametrize('name,m,changes', RUNS, ids=[o[0] for o in RUNS])
def test_the_teacher_sees_everything_and_the_student_does_not(name, m, changes):
    "Pixels of hidden patches change what the teacher or the target says, and nothing that the student predicts"
    c = tiny(m, **changes)
    model, _ = make(m, c)
    model.eval()
    views, drawn = batch(m, c), draws(name, c)
    if name=='mae': model.draw_mask, hidden = lambda n, N: drawn, drawn.mask
    elif name=='capi':
        model.draw_mask = lambda n, grid: drawn
        hidden = torch.ones(8, 16, dtype=torch.bool).scatter_(1, drawn[0], False)
    else: model.draw_masks, hidden = lambda n, grid: (drawn, int(drawn.sum())), drawn
    pixels = hidden.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    names = ['view'] if 'view' in views else ['global1', 'global2']
    other = dict(views)
    for k,p in zip(names, pixels.split(8)): other[k] = View(torch.where(p, -views[k].images, views[k].images), views[k].boxes)
    with torch.no_grad(): a, b = model(views), model(other)
    said, target = dict(mae=('predicted', 'target'), capi=('student_scores', 'cluster_scores')).get(name, ('student_patches', 'teacher_patches'))
    assert_close(getattr(a, said), getattr(b, said), rtol=0, atol=0)
    assert (getattr(a, target)-getattr(b, target)).abs().max()>1e-3
