"The parts of detectors and segmenters equal those of detectron2, mmdet and mmsegmentation"
import json, math
from collections import OrderedDict

import pytest, torch, torchvision
import torch.nn.functional as F
from golden_numbers import GOLDEN
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference

from densessl.ground.core import InputError
from densessl.methods.encoders import dense_encoder
from densessl.transfer.ap import COCO_NUMBERS, COCO_SIGMAS, coco_eval, coco_scores, keypoint_similarity
from densessl.transfer.detector import Detector, DetectorConfig, as_results
from densessl.transfer.heads import RegionHeads, box_losses, mask_targets, paste_masks, visible_inside
from densessl.transfer.instances import InstanceData, scene_instances
from densessl.transfer.pyramid import FeaturePyramid, FeatureTaps, SimplePyramid, change_stride, windowed_vit
from densessl.transfer.regions import Anchors, ProposalHead, Proposals, RegionPool
from densessl.transfer.together import DetrStyle, LargeScale, ShortSide, mirror, resize


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

# ---- anchors and regions of odd sizes

def test_anchors_of_odd_sizes():
    "Maps that do not divide the image, cell by cell"
    maps = [torch.zeros(1, 1, 7, 5), torch.zeros(1, 1, 4, 3)]
    got = Anchors([16, 32], [[32], [64, 100]])(images_of((99,75), [(99,75)]), maps)[0].double()
    want = []
    for stride, sides, (rows, columns) in ((16, (32,), (7,5)), (32, (64,100), (4,3))):
        for y in range(rows):
            for x in range(columns):
                for side in sides:
                    for ratio in (.5, 1, 2):
                        w, h = side/math.sqrt(ratio)/2, side*math.sqrt(ratio)/2
                        want.append([x*stride-w, y*stride-h, x*stride+w, y*stride+h])
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-5)

def test_detections(boxes):
    "Decoded, suppressed and ranked as detectron2 does"
    g, logits, offsets, *_ = boxes
    heads = RegionHeads(None, None, None, .5, .5, 512, .25, (10.,10.,5.,5.), .05, .5, 100)
    found, scores, labels = heads.postprocess_detections(logits, offsets, [g['proposals']], [(96,128)])
    assert torch.equal(labels[0]-1, g['classes'])
    assert_close(scores[0], g['scores'], rtol=1e-6, atol=1e-7)
    assert_close(found[0], g['boxes'], rtol=0, atol=1e-4)

# ---- C4

def test_c4_has_the_layers_of_detectron2():
    "Shapes of all parameters and statistics; background is one class here and none there"
    want = json.loads((GOLDEN/'transfer/names.json').read_text())['d2_mask_rcnn_r50_c4']
    net = Detector(dense_encoder('resnet50', 64), 80, DetectorConfig(pyramid='c4', norm='sync'))
    background, got = {'heads.box_predictor.bbox_pred': 4, 'heads.mask_predictor.mask_fcn_logits': 1}, []
    for k,v in net.state_dict().items():
        n, *rest = [*v.shape] or [None]
        got.append([n-background.get(k.rpartition('.')[0], 0), *rest] if n else [])
    assert sorted(got)==sorted(want.values())

@pytest.fixture
def c4():
    torch.manual_seed(0)
    encoder = dense_encoder('test_resnet', 64)
    config = DetectorConfig(pyramid='c4', channels=8, n_anchors=16, n_regions=16, n_before=(40,40), n_after=(20,20), least_score=0.)
    return encoder, Detector(encoder, 3, config)

def test_c4_is_the_resnet_cut_in_two(c4):
    "Stages one after another by hand: map, pooled region, stage 5, mean, linear layers; masks from the same features"
    encoder, net = c4
    net.eval()
    p = net.heads.mask_predictor
    for layer in (net.heads.box_predictor.cls_score, net.heads.box_predictor.bbox_pred, p.mask_fcn_logits):
        torch.nn.init.normal_(layer.weight, std=.1)          # features count
    image = torch.randint(0, 256, (3,50,70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): found = net([image])[0]
    r = encoder.net
    x = (image/255-net.mean)/net.std
    x = r.layer3(r.layer2(r.layer1(r.maxpool(r.act1(r.bn1(r.conv1(x[None])))))))
    assert x.shape[-2:]==(4,5)
    heads = net.heads
    def by_hand(boxes): return r.layer4(torchvision.ops.roi_align(x, [boxes], 14, 1/16, aligned=True))
    proposals, _ = net.proposals(net.image_list([image]), OrderedDict({'0': x}))
    features = by_hand(proposals[0]).mean((2,3))
    logits, offsets = [F.linear(features, l.weight, l.bias) for l in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred)]
    want = heads.postprocess_detections(logits, offsets, proposals, [(50,70)])
    assert len(found['boxes'])>5
    assert_close(found['boxes'], want[0][0], rtol=0, atol=1e-3)
    assert_close(found['scores'], want[1][0], rtol=1e-4, atol=1e-5)
    masks = p.mask_fcn_logits(F.relu(p.conv5_mask(by_hand(found['boxes']))))
    number = torch.arange(len(masks))
    assert_close(found['masks'], masks[number,found['labels']].sigmoid(), rtol=1e-4, atol=1e-5)
    assert found['masks'].shape[1:]==(14,14)

def test_c4_settings():
    c = DetectorConfig(pyramid='c4').complete()
    assert (c.n_before, c.n_after, c.anchors)==((12000,6000), (2000,1000), (32,64,128,256,512))
    f = DetectorConfig().complete()
    assert (f.n_before, f.n_after)==((2000,1000), (1000,1000))
    assert DetectorConfig(pyramid='c4', n_before=(9,9)).complete().n_before==(9,9)

def test_c4_takes_nothing_from_the_encoder(c4):
    encoder, net = c4
    x = torch.randn(1, 3, 64, 64)
    encoder.eval()
    assert encoder.feature_map(x).shape==(1,96,2,2)
    owned = {id(p) for p in net.parameters()}
    assert all(id(p) in owned for p in encoder.net.parameters())     # trained in place
    assert len(net.state_dict())==len({v.data_ptr() for v in net.state_dict().values()})

# ---- patches that fit no pyramid, FLSL's patches of 8

def test_flsl_taps_of_patches_of_8():
    "deconv 2, nothing, maximum of 2 x 2, maximum of 4 x 4"
    encoder = dense_encoder('vit_tiny_patch16_224', 64, patch_size=8, depth=4, embed_dim=24, num_heads=3)
    pyramid = FeaturePyramid(encoder, channels=16).eval()
    assert pyramid.strides==[4,8,16,32,64] and pyramid.taps.taps==[0,1,2,3]
    x = torch.randn(1, 3, 64, 96)
    maps = pyramid.taps(x)
    got = [adapt(m) for adapt,m in zip(pyramid.adapters, maps)]
    assert [tuple(m.shape) for m in got]==[(1,24,64//s,96//s) for s in (4,8,16,32)]
    (name, weight), (_, bias) = pyramid.adapters[0].named_parameters()
    assert weight.shape==(24,24,2,2)
    finer = torch.einsum('bihw,ioyx->bohywx', maps[0], weight).reshape(1, 24, 16, 24)+bias.view(1,-1,1,1)
    assert_close(got[0], finer, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1], maps[1])
    for m,g,n in ((maps[2], got[2], 2), (maps[3], got[3], 4)):
        assert torch.equal(g, m.unflatten(3, (-1,n)).unflatten(2, (-1,n)).amax((3,5)))
    assert list(pyramid(x))==['0','1','2','3','pool']

@pytest.mark.parametrize('pyramid', ('fpn', 'simple'))
def test_patches_of_14(pyramid):
    "A map of stride 16 from patches of 14: an object's place in the image is kept"
    encoder = dense_encoder('vit_tiny_patch16_224', 112, patch_size=14, depth=4, embed_dim=24, num_heads=3)
    config = DetectorConfig(pyramid=pyramid, img_size=128, channels=8, hidden=16, n_anchors=16, n_regions=16, n_before=(20,20),
                            n_after=(20,20), mask_convs=1)
    net = Detector(encoder, 2, config)
    assert net.pyramid.strides==[4,8,16,32,64]
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    maps = net.eval().pyramid(net.image_list([image]).tensors)
    assert [m.shape[-1] for m in maps.values()]==[32,16,8,4,2]
    net.train()
    target = dict(boxes=torch.tensor([[8.,8.,60.,60.]]), labels=torch.tensor([1]), masks=torch.ones(1,128,128,dtype=torch.bool))
    assert sum(net([image], [target]).values()).isfinite()
    spot = torch.zeros(1, 3, 128, 128)
    spot[:,:,64:80,96:112] = 50.                       # cell (4,6) of stride 16
    taps = FeatureTaps(encoder, [0]).eval()
    moved = (taps(spot)[0]-taps(spot*0)[0]).abs().sum(1)[0]
    assert divmod(moved.argmax().item(), 8)==(4,6)

def test_patches_that_no_power_of_two_divides():
    "Refused in one sentence, before any training"
    with pytest.raises(InputError, match='stride 12 cannot become one of stride 4: one must be the other times a power of 2'):
        change_stride(8, 12, 4)

# ---- bf16

@pytest.fixture
def wide():
    "A head over maps of an image of 800 x 1333 pixels whose logits are equal and whose offsets are not small"
    torch.manual_seed(0)
    head = ProposalHead(16, 3)
    torch.nn.init.normal_(head.bbox_pred.weight, std=.02)
    torch.nn.init.zeros_(head.cls_logits.weight)
    maps = OrderedDict((str(k), torch.randn(1, 16, -(-800//s), -(-1344//s))) for k,s in enumerate(STRIDES) if s>8)
    many = dict(training=10**6, testing=10**6)
    network = Proposals(Anchors(STRIDES[2:], SIZES[2:]), head, .7, .3, 256, .5, many, many, 1.)
    return network.eval(), images_of((800,1344), [(800,1333)]), maps

def test_every_proposal_in_bf16(wide):
    "No suppression and equal logits keep the order, so each proposal is compared with itself"
    network, *args = wide
    with torch.no_grad():
        want, _ = network(*args)
        with torch.autocast('cpu', torch.bfloat16): got, _ = network(*args)
    assert got[0].dtype==torch.float32 and len(got[0])==len(want[0])>5000
    assert (got[0]-want[0]).abs().max()<.5

def test_detections_in_bf16():
    "The boxes of the heads, likewise, on regions up to 1,333 pixels away from the origin"
    torch.manual_seed(0)
    heads = RegionHeads(RegionPool(7, STRIDES[:4]), TwoMLPHead(49*8, 32), FastRCNNPredictor(32, 2), .5, .5, 16, .25,
                        (10.,10.,5.,5.), 0., 1.1, 1000).eval()
    torch.nn.init.zeros_(heads.box_predictor.cls_score.weight)
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=.1)
    maps = OrderedDict((str(k), torch.randn(1, 8, -(-800//s), -(-1344//s))) for k,s in enumerate(STRIDES[:4]))
    corner = torch.rand(200, 2)*torch.tensor([1200.,700.])
    regions = torch.cat([corner, corner+10+90*torch.rand(200, 2)], 1)
    with torch.no_grad():
        want, _ = heads(maps, [regions], [(800,1333)])
        with torch.autocast('cpu', torch.bfloat16): got, _ = heads(maps, [regions], [(800,1333)])
    assert len(got[0]['boxes'])==len(want[0]['boxes'])==200
    assert (want[0]['boxes']-regions).abs().max()>1      # offsets that count
    assert got[0]['boxes'].dtype==torch.float32
    assert (got[0]['boxes']-want[0]['boxes']).abs().max()<.5

# ---- masks

def test_masks_come_back_from_their_targets():
    "Drawn objects through 28 x 28 bins and back"
    data, ious = scene_instances(40, 96, 7), []
    for _,target in data:
        masks, boxes = target['masks'], target['boxes'].as_subclass(torch.Tensor)
        targets = mask_targets(masks, boxes, torch.arange(len(boxes)), 28)
        back = paste_masks(targets.float(), boxes, (96,96))
        ious += ((back&masks).flatten(1).sum(1)/(back|masks).flatten(1).sum(1)).tolist()
    assert len(ious)>100 and sum(ious)/len(ious)>=.95

# ---- keypoints

def heat_place(point, box, size=56):
    "Number of the cell of a keypoint in its box, or None: row by row, a point on the far border in the last cell"
    x, y, seen = point
    x0, y0, x1, y1 = box
    if not seen or not (x0<=x<=x1 and y0<=y<=y1): return None
    column, row = [min(math.floor((v-lo)*size/(hi-lo)), size-1) for v,lo,hi in ((x,x0,x1), (y,y0,y1))]
    return row*size+column

@pytest.fixture
def people():
    "Regions of two images, the objects they lie on, and keypoints: inside, outside, on the border, not labelled"
    g = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[10.,10.,66.,38.], [0.,0.,30.,30.], [50.,50.,60.,60.]]), torch.tensor([[5.,5.,61.5,40.25]])]
    objects = [torch.tensor([0,1,1]), torch.tensor([0])]
    points = [torch.rand(2, 5, 3, generator=g)*40, torch.rand(1, 5, 3, generator=g)*40]
    for p in points: p[...,2] = torch.randint(0, 3, p.shape[:2], generator=g)
    points[0][0,0] = torch.tensor([66., 38., 2.])                   # the far corner of its region
    points[0][1,:,:2] = points[0][1,:,:2].clamp(max=29.5)           # never in the third region
    logits = torch.randn(4, 5, 56, 56, generator=g)
    return boxes, objects, points, logits

class OnlyKeypoints(RegionHeads):
    "Logits are given, in the order of regions"
    def keypoint_logits(self, maps, boxes): return torch.cat([maps[tuple(b.tolist())] for part in boxes for b in part])

def test_keypoint_loss(people):
    "Cross-entropy by hand over visible keypoints that lie in their region"
    boxes, objects, points, logits = people
    flat = torch.cat(boxes)
    maps = {tuple(b.tolist()): l[None] for b,l in zip(flat, logits)}
    heads = OnlyKeypoints(None, None, None, .5, .5, 4, .25, None, .05, .5, 100)
    got = heads.keypoint_loss(maps, boxes, objects, [dict(keypoints=p) for p in points])
    terms, at = [], 0
    for part,number,known in zip(boxes, objects, points):
        for box,k in zip(part.tolist(), number.tolist()):
            for j,point in enumerate(known[k].tolist()):
                place = heat_place(point, box)
                if place is not None: terms.append(logits[at,j].flatten().logsumexp(0)-logits[at,j].flatten()[place])
            at += 1
    assert 5<len(terms)<20
    assert heat_place(points[0][0,0].tolist(), boxes[0][0].tolist())==56*56-1
    assert_close(got, torch.stack(terms).mean(), rtol=1e-6, atol=0)

def test_no_keypoint_in_any_region(people):
    boxes, objects, points, logits = people
    heads = OnlyKeypoints(None, None, None, .5, .5, 4, .25, None, .05, .5, 100)
    unlabelled = [dict(keypoints=p*torch.tensor([1.,1.,0.])) for p in points]
    seen = [visible_inside(t['keypoints'][o], b) for t,o,b in zip(unlabelled, objects, boxes)]
    assert not torch.cat(seen).any()
    head = RegionHeads(None, None, None, .5, .5, 4, .25, None, .05, .5, 100, keypoint_roi_pool=RegionPool(14, [4]),
                       keypoint_head=KeypointRCNNHeads(4, (8,)), keypoint_predictor=KeypointRCNNPredictor(8, 5))
    loss = head.keypoint_loss({'0': torch.randn(2,4,32,32)}, boxes, objects, unlabelled)
    assert loss.item()==0

def cubic(t):
    "Keys' kernel of parameter -3/4"
    t, a = abs(t), -.75
    if t<=1: return (a+2)*t**3-(a+3)*t**2+1
    return a*(t**3-5*t**2+8*t-4) if t<2 else 0.

def enlarged(n, m):
    "Matrix (m,n) of bicubic resampling of n cells to m, borders repeated"
    out = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        at = (i+.5)*n/m-.5
        for k in range(math.floor(at)-1, math.floor(at)+3): out[i, min(max(k, 0), n-1)] += cubic(at-k)
    return out

def test_decoded_keypoints(people):
    "The heat map at the size of the region in whole pixels, its largest cell, and the center of that cell"
    boxes, _, _, logits = people
    got, _ = keypointrcnn_inference(logits, boxes)
    for box,maps,points in zip(torch.cat(boxes).tolist(), logits.double(), torch.cat(got)):
        w, h = box[2]-box[0], box[3]-box[1]
        columns, rows = math.ceil(w), math.ceil(h)
        heat = enlarged(56, rows) @ maps @ enlarged(56, columns).T
        for m,p in zip(heat, points):
            row, column = divmod(m.argmax().item(), columns)
            want = [box[0]+(column+.5)*w/columns, box[1]+(row+.5)*h/rows, 1.]
            assert_close(p, torch.tensor(want), rtol=0, atol=1e-3)

def test_keypoints_from_file_to_results():
    "A pixel's number becomes its center and comes back, at twice the size, too"
    notes = [dict(id=1, image_id=7, category_id=1, bbox=[1,1,4,2], area=8., iscrowd=0, keypoints=[2,1,2, 4,3,1, 0,0,0], num_keypoints=2)]
    truth = dict(images=[dict(id=7, height=8, width=12)], annotations=notes, categories=[dict(id=1, name='person')])
    data = InstanceData(truth, lambda entry: torch.zeros(3, 8, 12, dtype=torch.uint8), kinds=('keypoints',))
    _, target = data[0]
    assert target['keypoints'][0,0].tolist()==[2.5,1.5,2]
    image, target = resize(*data[0], (16,24))
    found = dict(boxes=target['boxes'].as_subclass(torch.Tensor), labels=torch.tensor([1]), scores=torch.ones(1),
                 keypoints=target['keypoints'])
    was = found['keypoints'].clone()
    said = as_results(found, truth['images'][0], (16,24), data)
    assert torch.equal(found['keypoints'], was)
    assert said[0]['keypoints'][:2]==[2,1] and said[0]['keypoints'][3:5]==[4,3]
    assert coco_scores(truth, said, 'keypoints', sigmas=(.05,)*3)[0]['AP']==pytest.approx(1)

def test_keypoint_similarity_is_the_scorers(metrics):
    "Every pair of a person and a prediction of the fixed set"
    truth, said = metrics['keypoint_ground_truth'], metrics['keypoint_detections']
    scorer, n = coco_eval(truth, said, 'keypoints'), 0
    for (image, category),overlaps in scorer.ious.items():
        if not len(overlaps): continue
        people = [a for a in truth['annotations'] if (a['image_id'],a['category_id'])==(image,category)]
        found = [d for d in said if (d['image_id'],d['category_id'])==(image,category)]
        found = sorted(found, key=lambda d: -d['score'])[:20]
        for row,d in zip(overlaps, found):
            for value,a in zip(row, people):
                points = [[*zip(*[iter(o['keypoints'])]*3)] for o in (d,a)]
                if not any(v for *_,v in points[1]): continue       # such people are ignored
                assert keypoint_similarity(*points, a['area'])==pytest.approx(value, abs=1e-9)
                n += 1
    assert n>10

def test_sigmas_are_cocos():
    from pycocotools.cocoeval import Params
    assert COCO_SIGMAS==pytest.approx(Params('keypoints').kpt_oks_sigmas)

# ---- all that is known of an image moves with it

@pytest.fixture
def marked():
    "One object whose pixels are white, with two opposite corners of its box as keypoints"
    mask = torch.zeros(1, 90, 120, dtype=torch.bool)
    mask[0,30:70,40:100] = True
    image = tv_tensors.Image(mask.expand(3,90,120).byte()*255)
    boxes = tv_tensors.BoundingBoxes([[40.,30.,100.,70.]], format='XYXY', canvas_size=(90,120))
    points = torch.tensor([[[40.,30.,2.], [100.,70.,2.]]])
    return image, dict(boxes=boxes, labels=torch.tensor([3]), masks=tv_tensors.Mask(mask), keypoints=points, image_id=5)

RECIPES = dict(short=ShortSide((45,70,120), 150, pairs=((0,1),)), detr=DetrStyle((64,96), 140, pairs=((0,1),)),
               jitter=LargeScale(100, (.4,1.8), pairs=((0,1),)))

@pytest.mark.parametrize('name', RECIPES)
def test_all_moves_together(marked, name):
    torch.manual_seed(0)
    full = 0
    for _ in range(40):
        image, target = RECIPES[name](*marked)
        hw = image.shape[-2:]
        assert target['boxes'].canvas_size==tuple(hw) and target['masks'].shape[1:]==hw
        if not len(target['boxes']): continue
        assert target['labels'].tolist()==[3] and target['image_id']==5
        mask, box = target['masks'][0], target['boxes'][0].as_subclass(torch.Tensor)
        inner = F.max_pool2d(F.pad((~mask)[None].float(), (3,)*4, value=1), 7, 1)[0]==0      # three pixels within
        outer = F.max_pool2d(mask[None].float(), 7, 1, 3)[0]==1                              # or near it
        assert (image[0][inner]>200).all() and (image[0][~outer]<50).all()
        own = torchvision.ops.masks_to_boxes(mask[None])[0]+torch.tensor([0.,0.,1.,1.])
        assert (own-box).abs().max()<=1
        (x0, y0, s0), (x1, y1, s1) = target['keypoints'][0].tolist()
        if s0 and s1:
            full += 1
            assert x0<x1                                      # left stays left, whatever changed its name
            assert (torch.tensor([x0, min(y0,y1), x1, max(y0,y1)])-box).abs().max()<=1.01
    assert full>5

def test_resized_masks_stay_where_they_are(marked):
    "At most half a pixel from the resized box, at any size"
    for hw in ((33,50), (60,80), (71,131), (200,260)):
        _, target = resize(*marked, hw)
        own = torchvision.ops.masks_to_boxes(target['masks'])[0]+torch.tensor([0.,0.,1.,1.])
        assert (own-target['boxes'][0].as_subclass(torch.Tensor)).abs().max()<=.51

def test_mirrored_twice_is_nothing(marked):
    back = mirror(*mirror(*marked, ((0,1),)), ((0,1),))
    assert torch.equal(back[0], marked[0])
    for k in ('boxes', 'masks', 'keypoints'): assert torch.equal(back[1][k], marked[1][k])

def test_jitter_at_scale_1_is_nothing(marked):
    "The long side fills the square; below it is filled up"
    image, target = LargeScale(120, (1,1), flip=0)(*marked)
    assert torch.equal(image[:,:90], marked[0]) and not image[:,90:].any()
    assert torch.equal(target['masks'][:,:90], marked[1]['masks'])
    for k in ('boxes', 'keypoints'): assert_close(target[k], marked[1][k])

# ---- what a detector may meet

def test_detector_without_objects_and_without_detections():
    "Images without objects among others, training and evaluation"
    torch.manual_seed(0)
    data = scene_instances(3, 64, 1, n_objects=(1,2))
    config = DetectorConfig(channels=16, hidden=32, n_anchors=32, n_regions=16, n_before=(30,30), n_after=(30,30), mask_convs=1)
    net = Detector(dense_encoder('test_resnet', 64), len(data.classes), config)
    images, targets = map(list, zip(*data))
    empty = {k: v[:0] if isinstance(v, torch.Tensor) else v for k,v in targets[1].items()}
    losses = net(images, [targets[0], empty, targets[2]])
    assert all(l.isfinite() for l in losses.values()) and losses['loss_mask']>0
    sum(losses.values()).backward()
    net.eval()
    net.heads.score_thresh = 1.
    with torch.no_grad(): found = net(images)
    assert [len(f['boxes']) for f in found]==[0,0,0]
    assert [as_results(f, e, (64,64), data) for f,e in zip(found, data.truth['images'])]==[[],[],[]]
    assert coco_scores(data.truth, [])[0]['AP']==0

def test_heads_without_targets_to_learn_from():
    data = scene_instances(2, 64, 1)
    images, targets = map(list, zip(*data))
    net = Detector(dense_encoder('test_resnet', 64), 6, DetectorConfig(channels=16, hidden=32, masks=False, n_keypoints=17))
    with pytest.raises(InputError, match='a head for keypoints, but the images come without'): net(images, targets)
