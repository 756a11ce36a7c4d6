"""Public numbers of the methods that bootstrap, by the functions that training runs: boxes that two views share, aligned maps"""
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from golden_numbers import golden, TOL
from densessl.data.augment import augment, make_views
from densessl.data.views import CropSpec, Recipe, crop_resize, flip_boxes, nest_boxes, random_boxes
from densessl.ground.synthetic import draw_scenes
from densessl.methods.align import align

load = partial(golden, 'methods')


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
