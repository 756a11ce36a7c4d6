"What of the video scores is not a lesson: J and F against other code on many masks, memory, streaming, half precision, layouts on disk"
import json, math

import numpy as np, pytest, timm, torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.metrics import jaccard_score
from torch import nn
from torch.testing import assert_close

from densessl.ground.core import InputError, rng
from densessl.evaluation.features import patch_labels
from densessl.evaluation.scores import read_scores, scores_table, write_scores
from densessl.evaluation.davis import *
from densessl.evaluation.davis import missing_frames
from densessl.evaluation.video import *

def unit(*shape, seed=0, dtype=torch.float32): return F.normalize(torch.randn(*shape, generator=rng(seed), dtype=dtype), dim=-3)
def colors(x): return F.avg_pool2d(x, 4)

def drifting(T=6, h=32, w=48, name='drifting', objects=2):
    "Squares of one color that move by one cell of four pixels a frame"
    frames, masks = torch.full((T,3,h,w), 30, dtype=torch.uint8), torch.zeros(T,h,w, dtype=torch.uint8)
    for t in range(T):
        for o in range(objects):
            y, x = slice(4+12*o, 16+12*o), slice(4+4*t, 20+4*t)
            frames[t,o,y,x], masks[t,y,x] = 220, o+1
    return Video(frames, masks, name)

def save(root, v, year='2017', mode='P', masks=None):
    "One more video in the layout of DAVIS"
    lists = root/'ImageSets'/year
    lists.mkdir(parents=True, exist_ok=True)
    with (lists/'val.txt').open('a') as f: f.write(v.name+'\n')
    for kind,stack in (('JPEGImages', v.frames.permute(0,2,3,1)), ('Annotations', v.masks if masks is None else masks)):
        d = root/kind/'480p'/v.name
        d.mkdir(parents=True)
        for t,o in enumerate(stack):
            im = Image.fromarray(o.numpy())
            if kind=='Annotations' and mode=='P':
                im.putpalette([7*i%256 for i in range(768)])
                assert im.mode=='P'
            im.save(d/f'{t:05}.png')

# ---- J and F by other code

def f_loops(pred, true, tolerance=.008):
    "The definition, pixel by pixel and pair by pair"
    h, w = true.shape
    def boundary(m):
        inside = lambda y,x: m[min(y,h-1)][min(x,w-1)]
        # beyond the last row and column the pixel's own row and column goes on
        return [(y,x) for y in range(h) for x in range(w) if any(inside(y+a,x+b)!=m[y][x] for a,b in ((0,1),(1,0),(1,1)))]
    p, t = boundary(pred.tolist()), boundary(true.tolist())
    rho2 = math.ceil(tolerance*math.sqrt(h*h+w*w))**2
    near = lambda o, others: any((o[0]-q[0])**2+(o[1]-q[1])**2<=rho2 for q in others)
    P = sum(near(o, t) for o in p)/len(p) if p else 1
    R = sum(near(o, p) for o in t)/len(t) if t else 1
    return 2*P*R/(P+R) if P+R else 0

def f_scipy(pred, true, tolerance=.008):
    "Edges of the mask padded by itself as an exclusive or, and distances to the other edge"
    def boundary(m):
        e = np.pad(m, ((0,1),(0,1)), mode='edge').astype(int)
        window = e[:-1,:-1]+e[:-1,1:]+e[1:,:-1]+e[1:,1:]
        return (window>0)&(window<4)
    p, t = boundary(pred.numpy()), boundary(true.numpy())
    if not p.any() or not t.any(): return float(p.any()==t.any())
    rho = np.ceil(tolerance*np.hypot(*true.shape))
    P, R = ((ndimage.distance_transform_edt(~o)[m]<=rho).mean() for m,o in ((p,t), (t,p)))
    return 2*P*R/(P+R) if P+R else 0.

def random_masks(n, h, w, seed):
    "Blobs, specks, frames, nearly empty and nearly full"
    g = rng(seed)
    x = F.interpolate(torch.randn(n,1,4,5, generator=g), (h,w), mode='bicubic')[:,0] + .3*torch.randn(n,h,w, generator=g)
    return x > torch.linspace(-1.5, 2., n)[:,None,None]

@pytest.mark.parametrize('h,w', ((1,1), (1,9), (7,2), (11,13), (20,16)))
def test_contour_is_the_definition(h, w):
    a, b = random_masks(8,h,w,0), random_masks(8,h,w,1)
    for tol in (.008, .1, .2):
        assert_close(contour_accuracy(a, b, tol), torch.tensor([f_loops(p, t, tol) for p,t in zip(a,b)], dtype=torch.float64))

@pytest.mark.parametrize('h,w', ((240,427), (480,854), (125,90)))
def test_contour_and_region_are_scipys_and_sklearns(h, w):
    a = random_masks(6,h,w,0)
    b = torch.cat([a[:3].roll((2,5), (1,2)), random_masks(3,h,w,1)])
    assert_close(contour_accuracy(a, b), torch.tensor([f_scipy(p, t) for p,t in zip(a,b)], dtype=torch.float64))
    assert_close(region_similarity(a, b), torch.tensor([jaccard_score(t.flatten(), p.flatten(), zero_division=1.) for p,t in zip(a,b)], dtype=torch.float64))

def test_tolerance_of_davis_is_eight_pixels_at_480p():
    a = torch.zeros(480,854, dtype=torch.bool); a[100:300,200:500] = True
    assert [contour_accuracy(a.roll(n, -1), a).item()==1 for n in (8,9)]==[True, False]

def test_scores_are_symmetric_and_ignore_what_is_common():
    a, b = random_masks(5,30,40,0), random_masks(5,30,40,1)
    for f in (region_similarity, contour_accuracy):
        assert_close(f(a,b), f(b,a)); assert_close(f(a,a), torch.ones(5, dtype=torch.float64))
        assert_close(f(a.view(5,1,30,40), b.view(5,1,30,40)), f(a,b)[:,None])

def test_davis_rule_by_other_code():
    "Objects of the first mask, no first and last frame, each object once: in numpy, frame by frame"
    g = rng(0)
    true = F.interpolate(torch.randint(5, (12,1,6,8), generator=g).float(), (60,80))[:,0].byte()
    pred = torch.where(torch.rand(12,1,1, generator=g)<.5, true.roll((1,2), (1,2)), true)
    true[0][true[0]==3] = 0  # object 3 comes later
    got = video_scores(pred, true)
    assert got.objects==(1,2,4)
    for i,o in enumerate(got.objects):
        assert got.J[i].item()==pytest.approx(np.mean([jaccard_score((t==o).flatten(), (p==o).flatten(), zero_division=1.) for p,t in list(zip(pred,true))[1:-1]]))
        assert got.F[i].item()==pytest.approx(np.mean([f_scipy(p==o, t==o) for p,t in list(zip(pred,true))[1:-1]]))

# ---- propagation

def unfolded(target, keys, labels, radius, k, temp):
    "By gathering each cell's neighborhood, and by exp and sum as in the formula"
    n, D, H, W = keys.shape
    side = 2*radius+1
    pad = lambda x, v: F.pad(x, (radius,)*4, value=v).unfold(2, side, 1).unfold(3, side, 1)    # (n,D,H,W,side,side)
    exists = pad(torch.ones(n,1,H,W, dtype=keys.dtype), 0.)
    a = torch.einsum('dhw,ndhwab->hwnab', target, pad(keys, 0.)).div(temp).exp()*exists[:,0].permute(1,2,0,3,4)
    a = a.flatten(2)
    kth = a.sort(-1, descending=True).values[..., min(k, a.shape[-1])-1]
    a = a*(a>=kth[...,None])
    return torch.einsum('hwm,chwm->chw', a/a.sum(-1, keepdim=True), pad(labels, 0.).permute(1,2,3,0,4,5).flatten(3))

@pytest.mark.parametrize('H,W,radius,k', ((9,13,3,5), (13,4,1,9), (6,6,12,5), (1,17,2,3), (8,8,0,2)))
@pytest.mark.parametrize('budget', (1, 500, 4000, 2**21))
def test_propagation_is_the_unfolded_one(H, W, radius, k, budget):
    Z, Y = unit(4,6,H,W, dtype=torch.float64), torch.rand(3,3,H,W, generator=rng(1), dtype=torch.float64)
    got = propagate_frame(Z[3], Z[:3], Y, radius, k, .1, budget)
    assert_close(got, unfolded(Z[3], Z[:3], Y, radius, k, .1))

def test_static_video_keeps_its_labels():
    "Features that are all different and do not change: with a low temperature nothing moves, however long"
    z = unit(1,64,8,8).expand(30,-1,-1,-1)
    mask = torch.randint(4, (8,8), generator=rng(0))
    got = propagate_labels(z, mask, temp=.01)
    assert (got.argmax(1)==mask).all()

def test_shift_is_followed():
    "Every feature moves one cell a frame; so do the labels"
    base = unit(32,6,20)
    z = torch.stack([base.roll(t, -1) for t in range(10)])
    mask = (torch.arange(20)>=5)&(torch.arange(20)<9)&torch.ones(6,1, dtype=torch.bool)
    got = propagate_labels(z, mask.long(), radius=2, k=1).argmax(1)
    for t in range(10): assert (got[t]==mask.roll(t, -1)).all()
    # without the last frames the thing soon leaves the radius
    far = propagate_labels(z, mask.long(), n_last=0, radius=2, k=1).argmax(1)
    assert (far[1]==mask.roll(1, -1)).all() and not (far[9]==mask.roll(9, -1)).all()

def test_labels_stay_shares_and_objects_permute():
    Z, mask = unit(8,5,7,9), torch.randint(4, (28,36), generator=rng(0))
    got = propagate_labels(Z, mask)
    assert got.min()>=0 and got.dtype==torch.float32
    assert_close(got.sum(1), torch.ones(8,7,9))
    swap = torch.tensor([0,3,1,2])
    assert_close(propagate_labels(Z, swap[mask])[:,swap], got)

def test_frames_may_come_one_by_one_and_few_are_held():
    import weakref
    alive, most = weakref.WeakSet(), 0
    class Map(torch.Tensor): pass
    def stream():
        nonlocal most
        for t in range(20):
            z = unit(3,4,4, seed=t).as_subclass(Map)
            alive.add(z)
            most = max(most, len(alive))
            yield z
            del z
    propagate_labels(stream(), torch.ones(4,4, dtype=torch.uint8), n_last=3)
    assert most <= 3+2

def test_memory_is_bounded():
    "All similarities of 8 frames of 40 x 40 cells would be 20 million; they come in pieces"
    seen = []
    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): seen.append(out.numel())
            return out
    z, y = unit(9,4,40,40), torch.rand(8,2,40,40)
    with Spy(): propagate_frame(z[8], z[:8], y, radius=6, budget=2**17)
    assert max(seen) <= 2**17

def test_half_precision_and_autocast():
    Z, mask = unit(5,16,6,6), torch.randint(2, (6,6), generator=rng(0))
    want = propagate_labels(Z, mask)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert_close(propagate_labels(Z, mask), want, rtol=0, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        got = propagate_labels(Z.to(dtype), mask)
        assert got.dtype==torch.float32 and (got.argmax(1)==want.argmax(1)).float().mean()>.9

def test_cell_labels_are_pillows_nearest():
    for (h,w),grid in (((240,427),(15,27)), ((48,64),(6,8)), ((7,9),(3,4)), ((5,5),(5,5))):
        m = torch.randint(4, (h,w), generator=rng(0), dtype=torch.uint8)
        want = torch.from_numpy(np.array(Image.fromarray(m.numpy()).resize(grid[::-1], Image.Resampling.NEAREST)))
        assert (grid_labels(m, grid, 4).argmax(0)==want).all()

def test_upsampled_masks_lie_where_the_cells_do():
    "A planted shift of one pixel lowers J"
    m = torch.zeros(1,64,96, dtype=torch.uint8); m[:,15:41,22:61] = 1
    back = upsample_labels(patch_labels(m, (16,24), 2)[0], (64,96))
    best = region_similarity(back==1, m==1)
    assert best>.97
    for dy,dx in ((1,0), (-1,0), (0,1), (0,-1)): assert region_similarity(back.roll((dy,dx), (1,2))==1, m==1) < best

# ---- files and scores

@pytest.mark.parametrize('mode', ('P', 'L'))
def test_reader_takes_palettes_and_gray_masks(tmp_path, mode):
    v = drifting()
    save(tmp_path, v, mode=mode)
    (s,) = davis_sequences(tmp_path)
    got = s.load()
    assert (got.masks==v.masks).all() and (got.frames==v.frames).all() and got.name=='drifting' and len(s)==6

def test_reader_takes_the_lists_of_2016(tmp_path):
    v, w = drifting(name='a'), drifting(name='b')
    for o in (v, w): save(tmp_path, o, '2016', 'L', masks=(o.masks>0).byte()*255)
    (tmp_path/'ImageSets/480p').mkdir()
    (tmp_path/'ImageSets/480p/val.txt').write_text(''.join(f'/JPEGImages/480p/b/{t:05}.png /Annotations/480p/b/{t:05}.png\n' for t in range(6)))
    assert [s.name for s in davis_sequences(tmp_path)]==['a','b']
    (s,) = davis_sequences(tmp_path, year='480p')
    assert s.name=='b' and (s.load().masks==(w.masks>0)).all()

def test_reader_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match='is it the folder of DAVIS'): davis_sequences(tmp_path/'nowhere')
    save(tmp_path, drifting())
    with pytest.raises(InputError, match='has no sequence x: it has drifting'): davis_sequences(tmp_path, names='x')
    Image.new('L', (10,10)).save(tmp_path/'Annotations/480p/drifting/00003.png')
    with pytest.raises(InputError, match='00003.png is 10x10, its image 48x32'): davis_score(colors, tmp_path, multiple=4)
    Image.new('RGB', (48,32), 'red').save(tmp_path/'Annotations/480p/drifting/00003.png')
    with pytest.raises(InputError, match='holds the numbers of its objects'): davis_score(colors, tmp_path, multiple=4)
    (tmp_path/'Annotations/480p/drifting/00003.png').write_bytes(b'none')
    with pytest.raises(InputError, match='cannot read'): davis_score(colors, tmp_path, multiple=4)

def test_scores_in_table_and_file(tmp_path):
    save(tmp_path, drifting())
    scores = davis_score(colors, tmp_path, multiple=4, label='colors')
    assert [s.probe for s in scores]==['DAVIS J&F', 'DAVIS J', 'DAVIS F'] and all(s.value>.9 for s in scores)
    assert scores[0].value==pytest.approx((scores[1].value+scores[2].value)/2)
    for part in (f'{tmp_path.name}-2017-val (1 sequences, 2 objects, 6 frames)', 'image 32x48 mask 32x48', 'n_last=7', 'radius=12', 'k=5', 'temp=0.1', 'tolerance=0.008', 'densessl '):
        assert part in scores[0].line
    assert read_scores(write_scores(scores, tmp_path/'s.json'))==scores
    json.loads((tmp_path/'s.json').read_text())
    assert 'DAVIS J&F' in scores_table(scores) and davis_score(colors, tmp_path, multiple=4, names='drifting')[0].protocol!=scores[0].protocol

def test_score_does_not_depend_on_batch_or_order():
    v, w = drifting(), drifting(4, 40, 56, 'w', 1)
    a, b = (davis_score(colors, o, multiple=4, batch_size=n)[0] for o,n in (([v,w],8), ([w,v],1)))
    assert a.value==pytest.approx(b.value, abs=1e-9) and a.protocol==b.protocol

def test_network_is_left_as_it_was():
    class Net(nn.Module):
        stride = 4
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm2d(3)
        def feature_map(self, x): return F.avg_pool2d(self.bn(x), 4)
    n = Net()
    s = davis_score(n, [drifting()])[0]
    assert n.training and n.bn.num_batches_tracked==0 and n.bn.weight.grad is None and s.features=='last 8x12x3'

def test_timm_networks_and_amp():
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(32,48), patch_size=8, embed_dim=48, depth=1, num_heads=2, num_classes=0)
    cnn = timm.create_model('test_efficientnet', features_only=True)
    a, b = (davis_score(vit, [drifting()], amp=amp)[0] for amp in (False, True))
    assert abs(a.value-b.value)<.1 and a.protocol!=b.protocol and a.features=='last 4x6x48'
    assert davis_score(cnn, [drifting()], layer=1)[0].features.startswith('layer 1 8x16x')

def test_other_features_of_the_same_place_score_lower():
    "Features of another place carry the labels away"
    good, bad = (davis_score(f, [drifting()], multiple=4)[0].value for f in (colors, lambda x: colors(x).flip(-1) if x[0,0,0,0]>9 else torch.rand(len(x),3,8,12, generator=rng(2))))
    assert bad < good-.3

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same():
    Z, mask = unit(6,16,12,14), torch.randint(3, (48,56), generator=rng(0))
    want = propagate_labels(Z, mask, radius=4)
    got = propagate_labels(Z.cuda(), mask, radius=4)
    assert_close(got.cpu(), want, atol=1e-3, rtol=0)
    up = [upsample_labels(o, (48,56)) for o in (want, got)]
    assert (up[0]==up[1].cpu()).float().mean()>.999
    a, b = random_masks(4,60,80,0), random_masks(4,60,80,1)
    assert_close(contour_accuracy(a.cuda(), b.cuda()).cpu(), contour_accuracy(a, b))

def test_progress_of_videos(capsys):
    a = davis_score(colors, [drifting()], multiple=4, batch_size=2)
    assert capsys.readouterr().out==''
    assert davis_score(colors, [drifting()], multiple=4, batch_size=2, progress=True)==a and '[3/3' in capsys.readouterr().out

@pytest.mark.parametrize('folder,said', (('JPEGImages', 'drifting: 1 of 6 masks have no frame, as 00003: a video with a gap'), ('Annotations', 'drifting: 1 of 6 frames have no mask, as 00003'), ('both', 'drifting: 1 of the frames 0 to 5 are missing, as 3')))
def test_missing_frames(tmp_path, folder, said):
    save(tmp_path, drifting())
    for kind in (('JPEGImages', 'Annotations') if folder=='both' else (folder,)): (tmp_path/kind/'480p/drifting/00003.png').unlink()
    with pytest.raises(InputError, match=said): davis_score(colors, tmp_path, multiple=4)

def test_a_video_of_one_frame(tmp_path):
    v = drifting()
    save(tmp_path, Video(v.frames[:1], v.masks[:1], 'one'))
    with pytest.raises(InputError, match='one has fewer than 3 frames, so none between the first and the last'): davis_score(colors, tmp_path, multiple=4)

@pytest.mark.parametrize('stems,said', (
    (('0', '5', '10', '15'), ''), (('00000', '00005', '00015'), '1 of the frames 0 to 15 are missing, as 10'), (('frame_1', 'frame_2', 'frame_4'), '1 of the frames 1 to 4 are missing, as 3'),
    (('a', 'b', 'c'), ''), (('2021-01-01', '2021-02-01', '2021-02-05'), ''), (('1', '01', '2', '3'), '')))
def test_frames_at_an_even_pace_have_no_gap(stems, said):
    "Every fifth frame of a video, as YouTube-VOS has them"
    assert missing_frames(stems)==said

def test_frames_in_the_order_of_their_numbers(tmp_path):
    "frame_10 after frame_9, whatever the number of digits"
    v = drifting()
    v = Video(v.frames.repeat(2,1,1,1), v.masks.repeat(2,1,1), 'long')
    save(tmp_path, v)
    for kind in ('JPEGImages', 'Annotations'):
        d = tmp_path/kind/'480p/long'
        for i in range(12): (d/f'{i:05}.png').rename(d/f'frame_{i+1}.png')
    got = davis_sequences(tmp_path)[0].load()
    assert torch.equal(got.frames, v.frames)

def test_davis_at_full_resolution(tmp_path):
    "The only resolution there is; 480p where there are two"
    save(tmp_path, drifting())
    want = davis_score(colors, tmp_path, multiple=4)[0].value
    for kind in ('JPEGImages', 'Annotations'): (tmp_path/kind/'480p').rename(tmp_path/kind/'Full-Resolution')
    assert davis_score(colors, tmp_path, multiple=4)[0].value==want
    for kind in ('JPEGImages', 'Annotations'): (tmp_path/kind/'480p').mkdir()
    with pytest.raises(InputError, match='no frame in .*480p'): davis_sequences(tmp_path)
