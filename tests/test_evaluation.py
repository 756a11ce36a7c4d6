"What of the dense scores is not a lesson: memory, half precision, odd sizes, data in other shapes, folders"
import json
from dataclasses import replace

import numpy as np, pytest, timm, torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.testing import assert_close

from densessl.ground.core import InputError
from densessl.data.labelled import SegmentationData, labelled_data, segmentation_folder
from densessl.evaluation.features import *
from densessl.evaluation.scores import *
from densessl.evaluation.probes import *
from densessl.ground.synthetic import CLASSES, draw_scenes

def scenes(n, seed, size=32): return SegmentationData(*draw_scenes(n, size, seed=seed), 7, name='scenes', classes=CLASSES)
def pixels(x): return F.pixel_unshuffle(x, 4)
def by(probe, *data, **kwargs): return dense_scores(*data, probes=probe, clusters=60, **kwargs)[0]
TRAIN, TEST = scenes(24, 1), scenes(12, 2)
PROBES = ('nearest neighbor', 'linear', 'overclustering')
ALL = ('nearest neighbor', 'linear', 'clustering', 'overclustering')

def test_iou_is_sklearns_over_the_whole_pipeline():
    "Upsample, argmax and count by other means"
    maps = torch.randn(5, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(5, (5,12,20), generator=torch.Generator().manual_seed(1))
    data = SegmentationData(torch.zeros(5,3,12,20, dtype=torch.uint8), masks, 4, ignore_index=4)
    pred = torch.stack([F.interpolate(m[None], scale_factor=4, mode='bilinear').argmax(1)[0] for m in maps])
    keep = masks!=4
    want = jaccard_score(masks[keep], pred[keep], average='macro')
    for n in (5, 2):
        assert class_map_ious(None, data, dict(same=lambda z: z), maps=maps, batch_size=n)[0]['same'][0]==pytest.approx(want, abs=1e-6)
    for budget in (2**24, 1):
        assert mean_iou(count_pixels(maps, masks, 4, budget), 4)[0]==pytest.approx(want, abs=1e-6)

def test_one_neighbor_is_sklearns():
    maps = [extract_features(pixels, d) for d in (TRAIN, TEST)]
    flat = lambda f: F.normalize(f, dim=1).permute(0,2,3,1).reshape(-1, f.shape[1])
    hard = patch_labels(TRAIN.masks, (8,8), 7)[0].permute(0,2,3,1).reshape(-1,7)
    got = neighbor_labels(flat(maps[1]), flat(maps[0]), hard, k=1)
    i = KNeighborsClassifier(1).fit(flat(maps[0]).numpy(), np.arange(len(hard))).predict(flat(maps[1]).numpy())
    assert_close(got, hard[torch.as_tensor(i)])

@pytest.mark.parametrize('probe', PROBES)
def test_score_does_not_depend_on_the_order_or_batch(probe):
    a = by(probe, pixels, TRAIN, TEST)
    order = torch.randperm(len(TEST), generator=torch.Generator().manual_seed(0))
    b = by(probe, pixels, TRAIN, replace(TEST, images=TEST.images[order], masks=TEST.masks[order]), batch_size=5)
    assert a.value==pytest.approx(b.value, abs=1e-6) and a.protocol==b.protocol
    assert a.per_class==pytest.approx(b.per_class, abs=1e-6, nan_ok=True)

@pytest.mark.parametrize('probe', PROBES)
def test_images_and_masks_must_belong_together(probe):
    "Test masks of other images lower the score, and so do features of another place"
    good = by(probe, pixels, TRAIN, TEST).value
    assert by(probe, pixels, TRAIN, replace(TEST, masks=TEST.masks.roll(1, 0))).value < good
    assert by(probe, lambda x: pixels(x).roll((3,3), (2,3)), TRAIN, TEST).value < good

@pytest.mark.parametrize('probe', PROBES)
def test_a_shift_by_one_patch_costs(probe):
    "The features are the class shares of the patches, read one patch off in each of four directions"
    masks = lambda d: SegmentationData(d.masks[:,None].expand(-1,3,-1,-1).byte(), d.masks, 7)
    def read(dy, dx): return lambda x: F.avg_pool2d(F.one_hot((x[:,0]*255).round().long(), 7).permute(0,3,1,2).float(), 4).roll((dy,dx), (2,3))
    score = lambda dy, dx: by(probe, read(dy, dx), masks(TRAIN), masks(TEST), mean=(0,0,0), std=(1,1,1)).value
    best = score(0, 0)
    assert best>.75
    for d in ((1,0), (-1,0), (0,1), (0,-1)): assert score(*d) < best-.1

@pytest.mark.parametrize('shift', (1, 2, -2))
def test_upsampling_puts_the_patches_where_they_are(shift):
    "Predictions that lie half a patch off lower the score of perfect features: a check of the upsampling, not of the probe"
    classes = patch_labels(TEST.masks, (8,8), 7)[0]
    score = lambda masks: class_map_ious(None, replace(TEST, masks=masks), dict(same=lambda z: z), maps=classes)[0]['same'][0]
    for dim in (1, 2): assert score(TEST.masks.roll(shift, dim)) < score(TEST.masks)-.02

def test_other_sizes_and_an_ignored_class():
    "Images that are not square, masks finer than images, a grid that does not divide the mask, a label that is left out"
    g = torch.Generator().manual_seed(0)
    data = SegmentationData(torch.randint(256, (4,3,24,36), generator=g, dtype=torch.uint8), torch.randint(4, (4,50,70), generator=g, dtype=torch.uint8), 3, ignore_index=3)
    for s in dense_scores(lambda x: F.adaptive_avg_pool2d(x, (5,7)), data, data, steps=5, k=3, probes=ALL, clusters=20):
        assert 0 < s.value < 1 and s.protocol['image']=='24x36 mask 50x70' and s.features=='last 5x7x3'

def test_ignored_test_pixels_do_not_count():
    void = TEST.masks.clone(); void[:,:,:16] = 255
    a = by('nearest neighbor', pixels, replace(TRAIN, ignore_index=255), replace(TEST, masks=void, ignore_index=255))
    half = replace(TEST, images=TEST.images[...,16:], masks=TEST.masks[...,16:])
    b = by('nearest neighbor', pixels, TRAIN, half)
    # the right halves alone differ only by the upsampling along their left border
    assert a.value==pytest.approx(b.value, abs=.03)

def test_half_precision_and_gradients():
    torch.manual_seed(0)
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, class_token=False, global_pool='avg', num_classes=0)
    full, half = (dense_scores(m, TRAIN, TEST, amp=amp, steps=50) for amp in (False, True))
    for a,b in zip(full, half): assert abs(a.value-b.value) < .03 and a.protocol!=b.protocol
    assert all(p.grad is None and p.requires_grad for p in m.parameters()) and m.training

def test_encoder_and_its_method_run_in_eval_mode():
    class Encoder(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm2d(3)
        def feature_map(self, x): return F.avg_pool2d(self.bn(x), 4)
    e = Encoder()
    for f in (e, e.feature_map):
        extract_features(f, TRAIN)
        assert e.bn.num_batches_tracked==0 and e.training

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same_scores():
    torch.manual_seed(0)
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, class_token=False, global_pool='avg', num_classes=0)
    cpu = dense_scores(m, TRAIN, TEST, steps=50, probes=ALL, memory=700)
    for a,b in zip(cpu, dense_scores(m.cuda(), TRAIN, TEST, steps=50, probes=ALL, memory=700)):
        assert abs(a.value-b.value) < (.01 if a.probe in ALL[:2] else .03) and a.protocol==b.protocol

def test_memory_is_bounded():
    "Similarities of 20,000 queries with 20,000 keys would take 1.6 GB; they come in pieces of `budget`"
    seen = []
    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): seen.append(out.shape)
            return out
    q = F.normalize(torch.randn(3000, 4), dim=-1)
    with Spy(): neighbor_labels(q, q, torch.ones(3000, 2), k=3, budget=2**18)
    assert max(s.numel() for s in seen) <= 2**18
    seen.clear()   # and of the features of 24 images, 64 patches each, there are never more than a batch or 100
    with Spy(): by('nearest neighbor', pixels, TRAIN, TEST, memory=100, batch_size=2)
    assert max(s.numel() for s in seen if 48 in s) == 2*64*48

def test_neighbors_in_blocks_are_the_neighbors():
    "Ties aside, blocks of keys change nothing: against a full sort"
    g = torch.Generator().manual_seed(0)
    q, k, v = F.normalize(torch.randn(50,6, generator=g), dim=-1), F.normalize(torch.randn(700,6, generator=g), dim=-1), torch.rand(700,3, generator=g)
    s, i = (q@k.T).sort(1, descending=True)
    for n in (1, 7, 699, 2000):
        want = ((s[:,:n]/.1).softmax(1)[...,None]*v[i[:,:n]]).sum(1)
        for budget in (1, 600, 5000, 2**25): assert_close(neighbor_labels(q, k, v, n, .1, budget), want)

def test_files_score_as_memory_does(tmp_path):
    "Read batch by batch from disk, or held: the same scores, the same protocol; what is wrong in one file stops the score"
    for s,d in (('train', TRAIN), ('val', TEST)):
        for kind in ('images', 'labels'): (tmp_path/f'set/{kind}/{s}').mkdir(parents=True)
        for i,(x,m) in enumerate(zip(d.images, d.masks)):
            Image.fromarray(x.permute(1,2,0).numpy()).save(tmp_path/f'set/images/{s}/{i:02}.png'); Image.fromarray(m.byte().numpy()).save(tmp_path/f'set/labels/{s}/{i:02}.png')
    kw = dict(steps=20, probes=ALL, clusters=20, memory=500)
    held, read = (dense_scores(pixels, *labelled_data(tmp_path/'set', 32, load=l), **kw) for l in (True, False))
    assert held==read and 'set-train (24) -> set-val (12) | image 32x32 mask 32x32' in held[0].line
    assert [s.value for s in held[:1]]==[s.value for s in dense_scores(pixels, TRAIN, TEST, **kw)[:1]]
    a, b = (foreground_data(labelled_data(tmp_path/'set', 32, load=l)[1], 2) for l in (True, False))
    assert_close(b.load().masks, a.masks); assert (a.masks==(TEST.masks!=2)).all() and a.name==b.name and a.classes==b.classes
    for f in (tmp_path/'set/labels/val').iterdir(): Image.new('L', (32,32), 255).save(f)
    with pytest.raises(InputError, match='set-val: every pixel has the ignored label 255'): dense_scores(pixels, *labelled_data(tmp_path/'set', 32, load=False), **kw)
    Image.new('L', (32,32), 9).save(tmp_path/'set/labels/val/11.png')
    with pytest.raises(InputError, match="masks hold the labels 9, outside 0 to 6"): dense_scores(pixels, *labelled_data(tmp_path/'set', 32, n_classes=7, load=False), **kw)

def test_rows_are_standardized_as_they_are_drawn():
    "The linear layer sees the same rows whether they are standardized before or batch by batch"
    g = torch.Generator().manual_seed(0)
    x, y = 5+3*torch.randn(300,4, generator=g), torch.rand(300,3, generator=g).softmax(1)
    a = fit_linear((x-x.mean(0))/x.std(0), y, torch.ones(300), 40, batch=64)
    b = fit_linear(x, y, torch.ones(300), 40, batch=64, mean=x.mean(0), std=x.std(0))
    assert_close(a.weight, b.weight); assert_close(a.bias, b.bias)

def test_a_class_that_never_occurs_is_left_out():
    "One more class changes no mean; one that only the test images have counts as 0"
    more = [replace(d, n_classes=9, classes=None) for d in (TRAIN, TEST)]
    a, b = dense_scores(pixels, TRAIN, TEST, probes=ALL[:1]), dense_scores(pixels, *more, probes=ALL[:1])
    assert a[0].value==pytest.approx(b[0].value, rel=1e-12) and all(np.isnan(b[0].per_class[7:]))
    new = replace(more[1], masks=more[1].masks.clone().index_fill(2, torch.tensor([0,1]), 8))
    assert dense_scores(pixels, more[0], new)[0].per_class[8]==0

def test_results_grow_and_never_break(tmp_path):
    f = tmp_path/'results.json'
    s = dense_scores(pixels, TRAIN, TEST, 'pixels', steps=5, probes=ALL, clusters=20)
    for part in (s[:2], s[1:], s, s[:1]): write_scores(part, f, add=True)
    assert sorted(o.probe for o in read_scores(f))==sorted(ALL)
    f.chmod(0o640); write_scores([replace(s[0], model='other')], f, add=True)
    assert len(read_scores(f))==5 and f.stat().st_mode&0o777==0o640 and [p.name for p in tmp_path.iterdir()]==['results.json']
    with pytest.raises(AttributeError): write_scores([None], f, add=True)   # no score: the file stays as it was
    assert len(read_scores(f))==5 and len(list(tmp_path.iterdir()))==1
    with pytest.raises(InputError, match='is no results file'): read_scores(tmp_path/'none.json')
    assert s[0].id.endswith('features last 8x8x48')

def test_progress_is_shown_where_it_is_wanted(capsys, monkeypatch):
    "The bar of fastprogress itself: batch by batch, the name of the data beside it; none for short runs, none if it is not wanted"
    probe = lambda **kw: by('nearest neighbor', pixels, TRAIN, TEST, **kw).value
    plain = [probe(), probe(batch_size=1, progress=False)]
    assert capsys.readouterr().out==''
    assert probe(batch_size=8, progress=True)==plain[0]
    out = capsys.readouterr().out
    assert '[3/3' in out and '[2/2' in out and 'scenes' in out
    monkeypatch.setattr('densessl.evaluation.features.IN_NOTEBOOK', True)
    for n,shown in ((9, False), (10, True)):
        extract_features(pixels, TEST[:n], 1)
        assert ('scenes' in capsys.readouterr().out)==shown

def test_picture_of_scores():
    import matplotlib; matplotlib.use('Agg')
    s = dense_scores(pixels, TRAIN, TEST, 'pixels', steps=5)
    fig = scores_plot([*s, *[replace(o, model='b', value=o.value+d) for o in s for d in (0,.1)]])
    bars = [c for c in fig.axes[0].containers if c.get_label() in ('pixels', 'b')]
    assert [b.get_height() for b in bars[1]]==pytest.approx([100*o.value+5 for o in s])

def test_folder_reads_palette_masks_and_any_image_mode(tmp_path):
    for kind in ('images', 'labels'): (tmp_path/kind/'val').mkdir(parents=True)
    rng = np.random.default_rng(0)
    index = rng.integers(0, 3, (9,12), dtype=np.uint8)
    for name,mode,ext in (('a','RGB','jpg'), ('b','L','png'), ('c','RGBA','webp')):
        Image.fromarray(rng.integers(0, 255, (9,12,4), dtype=np.uint8)).convert(mode).save(tmp_path/f'images/val/{name}.{ext}')
        m = Image.fromarray(index, 'L'); m = m.copy()
        p = Image.new('P', (12,9)); p.putpalette([7*i%256 for i in range(768)]); p.putdata(index.flatten().tolist())
        (p if name!='b' else m).save(tmp_path/f'labels/val/{name}.png')
    (tmp_path/'images/val/.hidden.jpg').write_bytes(b'x'); (tmp_path/'images/val/notes.txt').write_text('x')
    data = segmentation_folder(tmp_path, 'val')
    assert data.n_classes==3 and tuple(data.images.shape)==(3,3,9,12) and data.name.endswith('-val')
    assert (data.masks.numpy()==index).all()

def test_the_seed_chooses_the_memory():
    "Three seeds, three memories of two patches of every image; one seed, one memory, whatever the batch size"
    banks = [patch_bank(pixels, TRAIN, 2*len(TRAIN), seed=s, batch_size=n).features for s,n in ((0,32), (1,32), (2,32), (0,5), (2,7))]
    assert not any(torch.equal(banks[i], banks[j]) for i,j in ((0,1), (0,2), (1,2)))
    assert torch.equal(banks[0], banks[3]) and torch.equal(banks[2], banks[4])
    values = [by('nearest neighbor', pixels, TRAIN, TEST, memory=2*len(TRAIN), seed=s).value for s in (0, 1, 2, 0)]
    assert len(set(values))==3 and values[0]==values[3]

def test_results_of_older_versions_are_read(tmp_path):
    "They hold the protocol as one line of text"
    s = dense_scores(pixels, TRAIN, TEST, 'pixels', steps=5, mean=(.5,)*3)
    f = write_scores(s, tmp_path/'s.json')
    old = json.loads(f.read_text())
    for d,o in zip(old, s): d['protocol'] = o.line
    f.write_text(json.dumps(old))
    assert read_scores(f)==s and write_scores(s, f, add=True) and len(read_scores(f))==2

def test_scores_are_plain_json(tmp_path):
    scores = dense_scores(pixels, TRAIN, TEST, 'pixels', steps=5, layer=None)
    assert [s.model for s in scores]==['pixels']*2 and [s.probe for s in scores]==['nearest neighbor', 'linear']
    d = json.loads(write_scores(scores, tmp_path/'s.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert d[0]['value']==scores[0].value and read_scores(tmp_path/'s.json')==scores
    lines = scores_table(scores, protocol=False).splitlines()
    assert len({len(l) for l in lines})==1 and len(lines)==3
    with pytest.raises(InputError, match='is not a folder'): segmentation_folder(tmp_path/'nowhere')


# ---- what the command reads and writes

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A tiny backbone and a folder of eight photographs"
    from densessl.methods.encoders import dense_encoder
    from densessl.ground.synthetic import draw_scenes
    from densessl.methods.export import export_backbone
    d = tmp_path_factory.mktemp('evaluate')
    torch.manual_seed(0)
    export_backbone(dense_encoder('vit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=24, depth=1, num_heads=2), d/'b.safetensors')
    (d/'photos').mkdir()
    for i,p in enumerate(draw_scenes(8, 64, natural=True)[0]): Image.fromarray(p.permute(1,2,0).numpy()).save(d/f'photos/{i}.png')
    return d


def test_the_home_folder_in_every_path_of_evaluate(place, monkeypatch):
    from densessl.evaluation.scores import read_scores
    from densessl.evaluation.report import evaluate
    monkeypatch.setenv('HOME', str(place))
    scores, _ = evaluate('~/b.safetensors', '~/photos', starts=1, out='~/home.json')
    assert (place/'home.json').is_file() and (place/'home.png').is_file() and not (place/'~').exists()
    assert len(read_scores('~/home.json'))==len(scores)


def test_the_picture_of_scores_replaces_no_other_file(place):
    "Refused before the work; with the scores beside it the picture is drawn again"
    from densessl.evaluation.report import evaluate
    (place/'mine.png').write_bytes(b'mine')
    with pytest.raises(InputError, match="mine.png' would be replaced"): evaluate(place/'b.safetensors', place/'photos', starts=1, out=place/'mine.json')
    with pytest.raises(InputError, match='is the name of a picture'): evaluate(place/'b.safetensors', place/'photos', starts=1, out=place/'mine.png')
    assert (place/'mine.png').read_bytes()==b'mine' and not (place/'mine.json').exists()
    for _ in range(2): evaluate(place/'b.safetensors', place/'photos', starts=1, out=place/'new.json')
    assert (place/'new.png').read_bytes().startswith(b'\x89PNG')


def test_a_folder_without_enough_photographs_is_one_short_sentence(place, tmp_path):
    from densessl.evaluation.report import evaluate
    with pytest.raises(InputError, match='is empty') as e: evaluate(place/'b.safetensors', tmp_path, starts=1)
    (tmp_path/'0.png').write_bytes((place/'photos'/'0.png').read_bytes())
    with pytest.raises(InputError, match='at least 2 photographs that can be read, got 1') as f: evaluate(place/'b.safetensors', tmp_path, starts=1)
    assert len(str(f.value)) < 300+len(str(tmp_path))*3


def test_a_backbone_is_scored_once(place):
    from densessl.evaluation.report import evaluate
    with pytest.raises(InputError, match="b.safetensors', which is scored already"): evaluate(place/'b.safetensors', place/'photos', others=str(place/'b.safetensors'), starts=1)
    with pytest.raises(InputError, match="names 'resnet18', which is scored already"): evaluate(place/'b.safetensors', place/'photos', others='resnet18,resnet18', starts=1)
