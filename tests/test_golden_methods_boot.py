"""Public numbers of the methods that bootstrap, by the code that training runs: boxes and aligned maps, SCRL's head, PixPro"""
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.data.augment import augment, make_views
from densessl.data.views import CropSpec, Recipe, View, crop_resize, flip_boxes, nest_boxes, random_boxes
from densessl.ground.synthetic import draw_scenes
from densessl.methods.align import align
from densessl.methods.bootstrap import PixPro, PixProConfig, pixpro_terms
from densessl.methods.heads import MLP
from densessl.theory.matching import match_cells
from densessl.theory.regression import matched_cosine, propagate

load = partial(golden, 'methods')
GRAD = dict(rtol=1e-9, atol=1e-10)
COUNT = dict(rtol=1e-6, atol=1e-9)     # the public code counts matches in float32


def cells(x): return x.flatten(2).mT   # a map (B, D, H, W) as cells


def test_maps_are_brought_into_register():
    t, s = load('invaug_a')
    x = t['x'].requires_grad_()
    out = align(x, t['box'], t['flag'])
    assert tuple(out.shape[-2:])==tuple(s['cells']) and 0<t['flag'].sum()<s['B']
    assert_close(out, t['out'], **TOL)
    (out*t['g_out']).sum().backward()
    assert_close(x.grad, t['grad_x'], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('name', ['byol_head_boxes', 'byol_head_boxes_sampled'])
def test_features_of_boxes(name):
    "Each box is given with the map of its image; boxes are counted in pixels of a view of 224"
    t, s = load(name)
    image, boxes = t['rois'][:,0].long(), t['rois'][:,1:]/224
    out = align(t['feature_map'][image], boxes, size=(1, 1), aligned=False, sampling_ratio=s['sampling_ratio'])
    assert_close(out.flatten(1), t['pooled'], **TOL)
    head = MLP(s['E'], s['hidden'], s['C'], last_bias=False).double().train()
    names = {'net.0': '0', 'net.1': '1', 'net.3': '3'}
    def own(k): return names[k.rpartition('.')[0]] + '.' + k.rpartition('.')[2]
    head.load_state_dict({own(k[2:]): v for k, v in t.items() if k.startswith('w.')} | {'1.num_batches_tracked': torch.tensor(0)})
    x = t['feature_map'].clone().requires_grad_()
    out = head(align(x[image], boxes, size=(1, 1), aligned=False, sampling_ratio=s['sampling_ratio']).flatten(1))
    assert_close(out, t['out'], **TOL)
    (out*t['g_out']).sum().backward()
    assert_close(x.grad, t['grad_feature_map'], **GRAD)
    params, buffers = dict(head.named_parameters()), dict(head.named_buffers())
    for k, v in t.items():
        if k.startswith('grad.'): assert_close(params[own(k[5:])].grad, v, **GRAD)
        if k.startswith('after.'): assert_close(buffers[own(k[6:])], v, **TOL)
    per_image = torch.stack([boxes[image==0][:2], boxes[image==1][:2]])        # several boxes an image give the same
    many = align(t['feature_map'][:2], per_image, size=(1, 1), aligned=False, sampling_ratio=s['sampling_ratio'])
    assert_close(many.flatten(2), torch.stack([t['pooled'][image==i][:2] for i in (0, 1)]), **TOL)


def test_recipes_without_overlap_draw_as_before():
    "The draws of a recipe, one after the other, as they were before a crop could be asked to overlap"
    recipe = Recipe((CropSpec('a', 24, (.3, 1.)), CropSpec('b', 16, (.1, .5), within='a', count=2), CropSpec('c', 24)))
    canvas, hw, g = draw_scenes(5, 40)[0], torch.tensor([[40, 60]]*5).float(), torch.Generator().manual_seed(3)
    views = make_views(recipe, canvas, hw, torch.Generator().manual_seed(3))
    first = None
    for c in recipe.crops:
        xs = []
        for i in range(c.count):
            b = random_boxes(torch.ones(5, 2) if c.within else hw, c.scale, c.ratio, g)
            if c.within: b = nest_boxes(b, first)
            x, b = crop_resize(canvas, flip_boxes(b, torch.rand(5, generator=g)<c.flip), c.size)
            first = b if first is None else first
            xs.append(x)
            assert torch.equal(views[c.name].boxes[i], b)
        x = augment(torch.cat(xs), c.augment, recipe.mean, recipe.std, g)
        assert torch.equal(views[c.name].images.flatten(0, 1), x)
    assert not any('overlap' in c for c in recipe.to_dict()['crops'])          # so a run that was saved before resumes


def test_crops_overlap_the_first():
    "Whatever is nested and mirrored in between"
    canvas = torch.zeros(300, 3, 200, 200, dtype=torch.uint8)
    for overlap in (.01, .4):
        recipe = Recipe((CropSpec('a', 8, (.2, .5)), CropSpec('b', 8, (.05, .2), count=2, overlap=overlap)))
        v = make_views(recipe, canvas, generator=torch.Generator().manual_seed(0))
        (x1, y1, x2, y2), (u1, w1, u2, w2) = v['a'].boxes.unbind(-1), v['b'].boxes.unbind(-1)
        x1, x2, u1, u2 = torch.minimum(x1, x2), torch.maximum(x1, x2), torch.minimum(u1, u2), torch.maximum(u1, u2)
        w, h = torch.minimum(x2, u2)-torch.maximum(x1, u1), torch.minimum(y2, w2)-torch.maximum(y1, w1)
        share = w.clamp(min=0)*h.clamp(min=0)/((u2-u1)*(w2-w1))
        assert (share>=overlap-.03).float().mean()>.995 and share.std()>.1


# ---- PixPro (zdaxie/PixPro)

@pytest.mark.parametrize('name', ['ppm_recipe', 'ppm_plain'])
def test_propagation(name):
    "y_i = sum_j max(cos(x_i, x_j), clamp)^p g(x_j)/|g(x_j)|"
    t, s = load(name)
    x, g = t['x'].requires_grad_(), nn.Identity()
    if s['layers']:
        g = nn.Linear(s['C'], s['C']).double()
        g.load_state_dict(dict(weight=t['weight'][:,:,0,0], bias=t['bias']))
    z = cells(x)
    y = propagate(z, g(z), s['p'], s['clamp'])
    assert_close(y, cells(t['y']), **TOL)
    (y*cells(t['g_out'])).sum().backward()
    assert_close(x.grad, t['grad_x'], **GRAD)
    if s['layers']:
        assert_close(g.weight.grad, t['grad_weight'][:,:,0,0], **GRAD)
        assert_close(g.bias.grad, t['grad_bias'], **GRAD)


@pytest.mark.parametrize('name', ['pixpro_loss_overlap', 'pixpro_loss_one_disjoint'])
def test_consistency_of_cells(name):
    "-2 mean over all photographs of the mean cosine of matched cells"
    t, s = load(name)
    q, k, grid = t['q'].requires_grad_(), t['k'].requires_grad_(), tuple(s['cells'])
    match = match_cells(t['coord_q'], grid, t['coord_k'], grid, s['pos_ratio'])
    if name.endswith('disjoint'): assert not match[0].any() and match[1].any()
    loss = -2*matched_cosine(cells(q), cells(k), match).mean()
    assert_close(loss, t['loss'], **COUNT)
    loss.backward()
    assert_close(q.grad, t['grad_q'], **COUNT)
    assert_close(k.grad, t['grad_k'], **COUNT)


class Small(nn.Module):
    "A convolution 8 x 8 of stride 8, batch norm, ReLU, as an encoder"
    arch, embed_dim = 'small', 8
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 8, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    def grid(self, h, w): return h//8, w//8
    def tokens(self, x): return cells(self.net(x))


NAMES = {'projector.linear1': 'projector.0', 'projector.bn1': 'projector.1', 'projector.linear2': 'projector.3', 'value_transform': 'value'}
def own_name(k):
    "The public code's name of a parameter or buffer -> ours"
    part, _, last = k.rpartition('.')
    side = 'teacher' if '_k' in part else 'student'
    part = part.replace('_k', '')
    part = NAMES.get(part, part.replace('encoder.', 'encoder.net.'))
    return f'{side}.{part}.{last}'


def test_pixpro_step():
    "The whole model: views in, loss, gradients, statistics and the teacher's average out"
    t, s = load('pixpro_step_a')
    c = PixProConfig(img_size=56, hidden_dim=s['hidden'], out_dim=s['C'], power=s['p'], threshold=s['pos_ratio'])
    model = PixPro(Small(), c).double().train()
    state = {own_name(k[7:]): v for k, v in t.items() if k.startswith('before.')}
    state = {k: v[:,:,0,0] if v.ndim==4 and 'net.0' not in k else v for k, v in state.items()}
    unknown = model.load_state_dict(state, strict=False)
    assert not unknown.unexpected_keys and all('num_batches' in k for k in unknown.missing_keys)
    model.update_teacher(s['m0'])          # the public code does this before the forward pass
    views = {f'global{i}': View(t[f'x{i}'][None], t[f'coord{i}'][None]) for i in (1, 2)}
    terms = pixpro_terms(model(views))
    assert_close(terms.loss, t['loss'], **COUNT)
    terms.loss.backward()
    found = dict(model.named_parameters())
    grads = {own_name(k[5:]): v for k, v in t.items() if k.startswith('grad.')}
    assert grads.keys()=={k for k, p in found.items() if k.startswith('student')} and len(grads)==11
    for k, v in grads.items(): assert_close(found[k].grad, v.view_as(found[k]), rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for k, p in found.items() if k.startswith('teacher'))
    after = {own_name(k[6:]): v for k, v in t.items() if k.startswith('after.')}
    now = model.state_dict()
    for k, v in after.items(): assert_close(now[k], v.view_as(now[k]), **TOL)
