"""CLoVE's public code, reproduced: distances and matches of cells, and the coordinates of its crops.

The numbers in `golden/clove` were made by running sthalles/CLoVE unchanged. Its crops are counted in pixel centers, j/(W-1);
densessl counts edges, j/W. The conversion stands here, and so does how far apart the two are.
"""
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from golden_numbers import golden
from densessl.theory.matching import cell_centers, cell_diagonal, cell_distances, match_cells, matched_share
from densessl.data.views import flip_boxes

PAIRS = ['disjoint_7x7', 'flip_q_7x7', 'identical_7x7', 'identical_flip_k', 'inner', 'local_3x3_to_7x7', 'local_float32', 'overlap_7x7', 'small_margin']
COORDS = ['500x375_global', '500x375_local', 'banner', 'tower']
load = partial(golden, 'clove')


def public(boxes, H, W):
    "Boxes by the edges of their pixels -> by the centers of their first and last pixel"
    flipped, size = boxes[:,0]>boxes[:,2], torch.tensor([W, H], dtype=boxes.dtype)
    b = flip_boxes(boxes, flipped)
    return flip_boxes(torch.cat([b[:,:2]*size/(size-1), (b[:,2:]*size-1)/(size-1)], 1), flipped)


def edges(t, s):
    "Top, left, height, width in pixels -> our boxes, mirrored where the public code mirrored"
    top, left, h, w = t['box'].double().T
    b = torch.stack([left/s['W'], top/s['H'], (left+w)/s['W'], (top+h)/s['H']], 1)
    return flip_boxes(b, t['flipped'])


@pytest.mark.parametrize('name', PAIRS)
def test_distances_and_matches(name):
    t, s = load(f'pair_{name}')
    q, k = (t['coord_q'], tuple(s['q_cells'])), (t['coord_k'], tuple(s['k_cells']))
    assert tuple(t['q'].shape[-2:])==q[1] and tuple(t['k'].shape[-2:])==k[1]
    tol = dict(rtol=1e-5, atol=2e-6) if s['dtype']=='float32' else dict(rtol=1e-12, atol=1e-13)
    assert_close(cell_distances(*q, *k), t['dist'], **tol)
    M = match_cells(*q, *k, threshold=s['pos_ratio'])
    assert torch.equal(M, t['pos_mask'])
    assert torch.equal(M.sum((-2,-1)), t['n_pos'])
    assert torch.equal(match_cells(*k, *q, threshold=s['pos_ratio']), t['pos_mask'].mT)
    assert torch.equal(matched_share(M)==0, t['n_pos']==0)
    if name=='disjoint_7x7': assert not M.any()


@pytest.mark.parametrize('name', PAIRS)
def test_plain_distance_is_the_golden_one_times_the_diagonal(name):
    t, s = load(f'pair_{name}')
    q, k = (t['coord_q'], tuple(s['q_cells'])), (t['coord_k'], tuple(s['k_cells']))
    longer = torch.maximum(cell_diagonal(*q), cell_diagonal(*k))[:,None,None]
    assert_close(cell_distances(*q, *k, unit='square'), t['dist']*longer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', COORDS)
def test_coordinates(name):
    "Crops in pixels give the public code's coordinates, before and after mirroring"
    t, s = load(f'coords_{name}')
    ours = edges(t, s)
    assert torch.equal(ours[:,0]>ours[:,2], t['flipped'])
    tol = dict(rtol=1e-12, atol=1e-15)
    assert_close(flip_boxes(t['coord'], t['flipped']), t['coord_final'], rtol=0, atol=0)
    assert_close(public(flip_boxes(ours, t['flipped']), s['H'], s['W']), t['coord'], **tol)
    assert_close(public(ours, s['H'], s['W']), t['coord_final'], **tol)


@pytest.mark.parametrize('name', COORDS)
def test_our_coordinates_are_within_a_pixel(name):
    "No edge and no cell center is more than 1/(W-1) from the public code's; and they do differ"
    t, s = load(f'coords_{name}')
    ours, pixel = edges(t, s), 1/(torch.tensor([s['W'], s['H']]).double()-1)
    off = (ours-t['coord_final']).abs()
    assert (off <= pixel.repeat(2)*(1+1e-9)).all() and off.max()>0
    for grid in ((7,7), (3,3)):
        assert ((cell_centers(ours, grid)-cell_centers(t['coord_final'], grid)).abs() <= pixel*(1+1e-9)).all()


def test_our_coordinates_change_few_matches():
    "Every global crop of the file against every local and global one: less than one match in fifty differs"
    (g, s), (l, _) = load('coords_500x375_global'), load('coords_500x375_local')
    for t,grid in ((g, (7,7)), (l, (3,3))):
        ours = match_cells(edges(t, s)[:,None], grid, edges(g, s)[None], (7,7))
        theirs = match_cells(t['coord_final'][:,None], grid, g['coord_final'][None], (7,7))
        assert ours.sum()>1000
        assert (ours^theirs).sum() < .02*(ours|theirs).sum()
