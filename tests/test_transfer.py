"The parts of detectors and segmenters equal those of detectron2, mmdet and mmsegmentation"
import json, math
from collections import OrderedDict

import pytest, torch
import torch.nn.functional as F
from golden_numbers import GOLDEN
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList

from densessl.methods.encoders import dense_encoder
from densessl.transfer.ap import COCO_NUMBERS, coco_scores
from densessl.transfer.heads import box_losses, mask_targets, paste_masks
from densessl.transfer.pyramid import FeaturePyramid, SimplePyramid, windowed_vit
from densessl.transfer.regions import Anchors, ProposalHead, Proposals, RegionPool


STRIDES, SIZES = [4, 8, 16, 32, 64], [[32], [64], [128], [256], [512]]

def load(name): return load_file(GOLDEN/'transfer'/f'{name}.safetensors')
def maps_of(g, name='map'): return OrderedDict((str(i), g[f'{name}{i}']) for i in range(5) if f'{name}{i}' in g)
def weights(g, prefix='w.'): return {k.removeprefix(prefix): v for k,v in g.items() if k.startswith(prefix)}
def images_of(hw, sizes): return ImageList(torch.zeros(len(sizes), 3, *hw), [tuple(s) for s in sizes])

def test_anchors():
    g = load('anchors')
    images = images_of(g['image'].tolist(), [(96,128)])
    maps = [torch.zeros(1, 1, -(-96//s), -(-128//s)) for s in STRIDES]
    assert torch.equal(Anchors(STRIDES, SIZES)(images, maps)[0], g['fpn'])
    assert torch.equal(Anchors([16], [[32,64,128,256,512]])(images, [torch.zeros(1,1,6,8)])[0], g['c4'])

@pytest.fixture
def proposals():
    g, head = load('rpn'), ProposalHead(8, 3)
    names = dict(conv='conv.0.0', objectness_logits='cls_logits', anchor_deltas='bbox_pred')
    head.load_state_dict({f'{names[k.split(".")[1]]}.{k.split(".")[2]}': v for k,v in g.items() if k.startswith('head.')})
    before, after = [dict(zip(('training','testing'), g[k].tolist())) for k in ('pre_nms', 'post_nms')]
    network = Proposals(Anchors(STRIDES, SIZES), head, .7, .3, int(g['batch_size_per_image']), .5, before, after, .7)
    images = images_of((96,128), g['sizes'].tolist())
    return g, network, (images, maps_of(g), [dict(boxes=g[f'gt{i}']) for i in (0,1)])

def test_proposals(proposals):
    g, network, args = proposals
    found, losses = network(*args)
    for k,v in losses.items(): assert_close(v, g[k], rtol=1e-6, atol=0)
    for i in (0,1): assert_close(found[i], g[f'train_proposals{i}'], rtol=0, atol=1e-5)
    found, _ = network.eval()(*args[:2])
    for i in (0,1): assert_close(found[i], g[f'test_proposals{i}'], rtol=0, atol=1e-5)

def test_proposals_in_bf16(proposals):
    "Boxes are decoded in float32: within half a pixel, where anchors in bf16 are off by several"
    g, network, (images, maps, _) = proposals
    network.eval()
    with torch.autocast('cpu', torch.bfloat16): found, _ = network(images, maps)
    nearest = torch.cdist(found[0], g['test_proposals0'], p=float('inf')).amin(1)
    assert nearest.median()<.5

@pytest.mark.parametrize('size', (7, 14))
def test_region_features(size):
    g = load('pool')
    got = RegionPool(size, STRIDES[:4])(maps_of(g), [g['boxes0'], g['boxes1']])
    assert_close(got, g[f'pooled{size}'], rtol=1e-6, atol=1e-6)

@pytest.fixture
def boxes():
    "The box head: background is last there and first here"
    g = load('fast_rcnn')
    logits = F.linear(g['x'], g['cls_score.weight'], g['cls_score.bias']).roll(1, 1)
    offsets = F.pad(F.linear(g['x'], g['bbox_pred.weight'], g['bbox_pred.bias']), (4,0))
    last = int(g['note_background_is_last'])
    labels = torch.where(g['gt_classes']==last, 0, g['gt_classes']+1)
    targets = BoxCoder((10.,10.,5.,5.)).encode_single(g['gt_boxes'], g['proposals'])
    return g, logits, offsets, labels, targets

@pytest.mark.parametrize('beta,name', ((0., ''), (.5, '_beta_half')))
def test_box_losses(boxes, beta, name):
    g, *args = boxes
    classes, norm = box_losses(*args, beta=beta)
    assert_close(classes, g['loss_classifier'], rtol=1e-6, atol=0)
    assert_close(norm, g[f'loss_box_reg{name}'], rtol=1e-6, atol=0)

def test_masks():
    g = load('masks')
    number = torch.arange(len(g['boxes']))
    targets = mask_targets(g['masks'], g['boxes'], number, 28)
    assert torch.equal(targets, g['targets28'].bool())
    loss = F.binary_cross_entropy_with_logits(g['logits'][number, g['classes']], targets.float())
    assert_close(loss, g['loss_mask'], rtol=1e-6, atol=0)
    assert torch.equal(paste_masks(g['logits'][:,0].sigmoid(), g['boxes'], (96,128)), g['pasted'].bool())

def test_vitdet():
    g = load('vitdet')
    plain = dense_encoder('vit_tiny_patch16_224', 96, depth=3, embed_dim=32, num_heads=2)
    encoder = windowed_vit(plain, 96, window=4, global_blocks=[2]).eval()
    state = weights(g, 'w.net.')
    encoder.net.load_state_dict(state | dict(pos_embed=state['pos_embed'].unflatten(1, (6,6))))
    pyramid = SimplePyramid(encoder, 16).eval()
    assert_close(pyramid.taps(g['x'])[0], g['last'], rtol=1e-5, atol=1e-5)
    state = {}
    for k,v in weights(g, 'w.simfp_').items():      # a norm is part of its convolution there, and follows it here
        level, number, *rest = k.split('.')
        later = sum(f'w.simfp_{level}.{n}.norm.weight' in g for n in range(int(number)))
        state[f'{int(level)-2}.{int(number)+later+(rest[0]=="norm")}.{rest[-1]}'] = v
    pyramid.levels.load_state_dict(state)
    for (name,got),level in zip(pyramid(g['x']).items(), range(2, 7)):
        assert_close(got, g[f'pyramid.p{level}'], rtol=1e-5, atol=1e-5, msg=name)

@pytest.mark.parametrize('x,out', (('x','out'), ('x_other_size','other')))
def test_flsl_taps(x, out):
    "FLSL's adapters on a ViT, at the size it was trained on and at another"
    g = load('flsl_taps_p16')
    encoder = dense_encoder('vit_small_patch16_224', 64, embed_dim=24, num_heads=6, pos_offset=.1)
    state = weights(g)
    encoder.net.load_state_dict({k: v for k,v in state.items() if not k.startswith('fpn')}, strict=False)
    pyramid = FeaturePyramid(encoder, taps=[3,5,7,11]).eval()
    pyramid.adapters.load_state_dict({k.replace('fpn1', '0').replace('fpn2', '1'): v for k,v in state.items() if k.startswith('fpn')})
    for k,(adapt,m) in enumerate(zip(pyramid.adapters, pyramid.taps(g[x]))):
        assert_close(adapt(m), g[f'{out}{k}'], rtol=1e-5, atol=1e-5)

@pytest.fixture(scope='module')
def metrics(): return json.loads((GOLDEN/'transfer/metrics.json').read_text())

@pytest.mark.parametrize('kind', COCO_NUMBERS)
def test_ap(metrics, kind):
    of = 'keypoint_' if kind=='keypoints' else ''
    scores, _ = coco_scores(metrics[f'{of}ground_truth'], metrics[f'{of}detections'], kind)
    got = [-1 if math.isnan(v) else v for v in scores.values()]           # no such object
    assert got==pytest.approx(metrics['reference'][kind], abs=1e-6)

def test_ap_at_chosen_overlaps(metrics):
    scores, _ = coco_scores(metrics['ground_truth'], metrics['detections'], 'bbox', (.5, .7))
    assert list(scores.values())==pytest.approx(metrics['reference']['bbox_at_50_70'], abs=1e-6)
