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

from densessl.core import InputError
from densessl.evaluation import *
from densessl.evaluation import _upsampled_iou
from densessl.synthetic import CLASSES, draw_scenes

def scenes(n, seed, size=32): return SegmentationData(*draw_scenes(n, size, seed=seed), 7, name='scenes', classes=CLASSES)
def pixels(x): return F.pixel_unshuffle(x, 4)
TRAIN, TEST = scenes(24, 1), scenes(12, 2)

def test_iou_is_sklearns_over_the_whole_pipeline():
    "Upsample, argmax and count by other means"
    maps = torch.randn(5, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(5, (5,12,20), generator=torch.Generator().manual_seed(1))
    data = SegmentationData(torch.zeros(5,3,12,20, dtype=torch.uint8), masks, 4, ignore_index=4)
    pred = torch.stack([F.interpolate(m[None], scale_factor=4, mode='bilinear').argmax(1)[0] for m in maps])
    keep = masks!=4
    want = jaccard_score(masks[keep], pred[keep], average='macro')
    for pieces in (maps.split(5), maps.split(2)):
        for budget in (2**24, 1): assert _upsampled_iou(pieces, data, budget)[0]==pytest.approx(want, abs=1e-6)

def test_one_neighbour_is_sklearns():
    maps = [extract(pixels, d) for d in (TRAIN, TEST)]
    flat = lambda f: F.normalize(f, dim=1).permute(0,2,3,1).reshape(-1, f.shape[1])
    hard = patch_labels(TRAIN.masks, (8,8), 7)[0].permute(0,2,3,1).reshape(-1,7)
    got = neighbour_labels(flat(maps[1]), flat(maps[0]), hard, k=1)
    i = KNeighborsClassifier(1).fit(flat(maps[0]).numpy(), np.arange(len(hard))).predict(flat(maps[1]).numpy())
    assert_close(got, hard[torch.as_tensor(i)])

@pytest.mark.parametrize('probe', (nearest_neighbour_miou, linear_probe_miou))
def test_score_does_not_depend_on_the_order_or_batch(probe):
    a = probe(pixels, TRAIN, TEST)
    order = torch.randperm(len(TEST), generator=torch.Generator().manual_seed(0))
    b = probe(pixels, TRAIN, replace(TEST, images=TEST.images[order], masks=TEST.masks[order]), batch_size=5)
    assert a.value==pytest.approx(b.value, abs=1e-6) and a.protocol==b.protocol
    assert a.per_class==pytest.approx(b.per_class, abs=1e-6, nan_ok=True)

@pytest.mark.parametrize('probe', (nearest_neighbour_miou, linear_probe_miou))
def test_images_and_masks_must_belong_together(probe):
    "Test masks of other images lower the score, and so do features of another place"
    good = probe(pixels, TRAIN, TEST).value
    assert probe(pixels, TRAIN, replace(TEST, masks=TEST.masks.roll(1, 0))).value < good
    assert probe(lambda x: pixels(x).roll((3,3), (2,3)), TRAIN, TEST).value < good

def test_other_sizes_and_an_ignored_class():
    "Images that are not square, masks finer than images, a grid that does not divide the mask, a label that is left out"
    g = torch.Generator().manual_seed(0)
    data = SegmentationData(torch.randint(256, (4,3,24,36), generator=g, dtype=torch.uint8), torch.randint(4, (4,50,70), generator=g, dtype=torch.uint8), 3, ignore_index=3)
    for s in dense_scores(lambda x: F.adaptive_avg_pool2d(x, (5,7)), data, data, steps=5, k=3):
        assert 0 < s.value < 1 and 'image 24x36 mask 50x70' in s.protocol and s.features=='last 5x7x3'

def test_ignored_test_pixels_do_not_count():
    void = TEST.masks.clone(); void[:,:,:16] = 255
    a = nearest_neighbour_miou(pixels, replace(TRAIN, ignore_index=255), replace(TEST, masks=void, ignore_index=255))
    half = replace(TEST, images=TEST.images[...,16:], masks=TEST.masks[...,16:])
    b = nearest_neighbour_miou(pixels, TRAIN, half)
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
        extract(f, TRAIN)
        assert e.bn.num_batches_tracked==0 and e.training

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same_scores():
    torch.manual_seed(0)
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, class_token=False, global_pool='avg', num_classes=0)
    cpu = dense_scores(m, TRAIN, TEST, steps=50)
    for a,b in zip(cpu, dense_scores(m.cuda(), TRAIN, TEST, steps=50)): assert abs(a.value-b.value) < .01

def test_memory_is_bounded():
    "Similarities of 20,000 queries with 20,000 keys would take 1.6 GB; they come in pieces of `budget`"
    seen = []
    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): seen.append(out.numel())
            return out
    q = F.normalize(torch.randn(3000, 4), dim=-1)
    with Spy(): neighbour_labels(q, q, torch.ones(3000, 2), k=3, budget=2**18)
    assert max(seen) <= 2**18

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

def test_scores_are_plain_json(tmp_path):
    scores = dense_scores(pixels, TRAIN, TEST, 'pixels', steps=5, layer=None)
    assert [s.model for s in scores]==['pixels']*2 and [s.probe for s in scores]==['nearest neighbour', 'linear']
    d = json.loads(write_scores(scores, tmp_path/'s.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert d[0]['value']==scores[0].value and read_scores(tmp_path/'s.json')==scores
    lines = scores_table(scores, protocol=False).splitlines()
    assert len({len(l) for l in lines})==1 and len(lines)==3
    with pytest.raises(InputError, match='is not a folder'): segmentation_folder(tmp_path/'nowhere')
