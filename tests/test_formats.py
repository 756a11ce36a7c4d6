"Other libraries read what is written: names and shapes are those of their real models, values those of ours"
import json

import pytest, timm, torch, torchvision
from golden_numbers import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from densessl.ground.core import InputError
from densessl.methods.encoders import dense_encoder
from densessl.methods.export import export_backbone
from densessl.methods.weights import open_backbone
from densessl.transfer.detector import Detector, DetectorConfig
from densessl.transfer.formats import FORMATS, export_as, foreign_weights, own_weights
from densessl.transfer.semantic import Segmenter, SegmenterConfig


NAMES = json.loads((GOLDEN/'transfer/names.json').read_text())
SYNC = dict(norm='sync', norm_heads=False)
DETECTORS = {   # name of a real model -> encoder, its arguments, classes, settings, format
    'd2_mask_rcnn_r50_fpn_4conv1fc': ('resnet50', {}, 80, dict(norm='sync', box_convs=4), 'detectron2'),
    'd2_mask_rcnn_r50_c4': ('resnet50', {}, 80, dict(norm='sync', pyramid='c4'), 'detectron2'),
    'd2_keypoint_rcnn_r50_fpn': ('resnet50', {}, 1, SYNC | dict(masks=False, n_keypoints=17), 'detectron2'),
    'd2_cityscapes_r50_fpn': ('resnet50', {}, 8, SYNC, 'detectron2'),
    'd2_vitdet_b_backbone': ('vit_base_patch16_224', {}, 2, dict(pyramid='simple', norm='layer', channels=256), 'detectron2'),
    'mmdet_flsl_mask_rcnn_heads': ('vit_small_patch16_224', {}, 80, {}, 'mmdet')}

def shapes(weights): return {k: list(v.shape) for k,v in weights.items()}

def detector(arch, kwargs, n_classes, settings, size=64):
    torch.manual_seed(0)
    return Detector(dense_encoder(arch, size, **kwargs), n_classes, DetectorConfig(**settings)).eval()

def segmenter(arch, settings): return Segmenter(dense_encoder(arch, 64), 5, SegmenterConfig(**dict(channels=16, width=8) | settings))

def assert_same_but_background(found, own):
    "Every tensor is back; the rows of background that were dropped are zeros"
    for k,v in found.items():
        first = 4 if 'box_predictor.bbox_pred' in k else 1 if 'mask_fcn_logits' in k else 0
        assert torch.equal(v[first:] if first else v, own[k][first:] if first else own[k]), k
        assert not first or v[:first].abs().max()==0, k

@pytest.mark.parametrize('name', DETECTORS)
def test_names_and_shapes_of_real_detectors_and_back(name):
    *made, format = DETECTORS[name]
    size = 224 if 'vit' in made[0] else 64
    model = detector(*made, size=size)
    weights, want = foreign_weights(model, format), NAMES[name]
    if name=='mmdet_flsl_mask_rcnn_heads': want = want | NAMES['mmdet_flsl_vit_s16_backbone']
    got = shapes(weights)
    if 'vitdet' in name:        # of the backbone alone; positions there are those of pretrain_img_size, here of img_size
        got = {k: s for k,s in got.items() if k.startswith('backbone.')}
        assert got.pop('backbone.net.pos_embed')==[1, 64*64, 768] and (want := dict(want)).pop('backbone.net.pos_embed')
    assert got==want
    own, found = model.state_dict(), own_weights(weights, model, format)
    assert_same_but_background(found, own)
    assert {k for k in own if k not in found}<={f'pyramid.taps.net.norm.{k}' for k in ('weight','bias')}    # never read

def test_names_of_layers_that_stand_in_other_libraries_only_with_two_proposal_convolutions():
    settings = dict(proposal_convs=2, channels=16, hidden=16, box_convs=4, norm='sync')
    model = detector('resnet18', {}, 2, settings)
    d2, mm = (foreign_weights(model, f) for f in ('detectron2', 'mmdet'))
    assert {'proposal_generator.rpn_head.conv.conv0.weight', 'proposal_generator.rpn_head.conv.conv1.bias'}<=d2.keys()
    assert {'rpn_head.rpn_conv.0.conv.weight', 'rpn_head.rpn_conv.1.conv.bias', 'neck.fpn_convs.0.bn.weight',
            'roi_head.bbox_head.shared_convs.3.bn.bias', 'roi_head.mask_head.convs.0.bn.running_var'}<=mm.keys()
    for weights,format in ((d2,'detectron2'), (mm,'mmdet')):
        found = own_weights(weights, model, format)
        assert found.keys()==model.state_dict().keys()
        assert_same_but_background(found, model.state_dict())

def test_background_is_last_there():
    g = load_file(GOLDEN/'transfer/fast_rcnn.safetensors')
    n = len(g['cls_score.weight'])-1
    model = detector('resnet18', {}, n, dict(channels=16, hidden=g['cls_score.weight'].shape[1]))
    last = model.heads.box_predictor
    with torch.no_grad():
        for name in ('weight', 'bias'):
            w, boxes = g[f'cls_score.{name}'], g[f'bbox_pred.{name}']
            getattr(last.cls_score, name).copy_(torch.cat([w[n:], w[:n]]))
            getattr(last.bbox_pred, name).copy_(torch.cat([torch.ones_like(boxes[:4]), boxes]))
    for format,place in (('detectron2', 'roi_heads.box_predictor.{}'), ('mmdet', 'roi_head.bbox_head.{}')):
        weights = foreign_weights(model, format)
        for ours,theirs in (('cls_score','fc_cls'), ('bbox_pred','fc_reg')):
            layer = place.format(theirs if format=='mmdet' else ours)
            for name in ('weight', 'bias'): assert torch.equal(weights[f'{layer}.{name}'], g[f'{ours}.{name}'])
    masks = model.heads.mask_predictor.mask_fcn_logits.bias
    assert torch.equal(weights['roi_head.mask_head.conv_logits.bias'], masks[1:])

# ---- torchvision

def test_a_whole_detector_loads_into_torchvision():
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
    theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4).eval()
    model = detector('resnet50', {}, 3, dict(norm='sync', box_convs=4, proposal_convs=2))
    theirs.load_state_dict(foreign_weights(model, 'torchvision'))
    theirs.backbone.body.to(memory_format=torch.channels_last)      # as ours is: the same sums in the same order
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours,m in zip(model.pyramid.taps(x), theirs.backbone.body(x).values(), strict=True): assert torch.equal(ours, m)
        maps = theirs.backbone(x)
        assert_close(maps, model.pyramid(x), rtol=1e-4, atol=1e-4)
        pooled = torch.randn(5, 256, 7, 7)
        for ours,m in zip(model.heads.box_predictor(model.heads.box_head(pooled)), theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))):
            assert_close(ours, m)

def test_keypoints_load_into_torchvision():
    from torchvision.models.detection import keypointrcnn_resnet50_fpn
    with torch.device('meta'): want = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    got = foreign_weights(detector('resnet50', {}, 1, dict(masks=False, n_keypoints=17)), 'torchvision')
    assert shapes(got)==shapes(want)

@pytest.mark.parametrize('arch', ('resnet18', 'resnext50_32x4d'))
def test_a_backbone_loads_into_torchvision(arch, tmp_path):
    encoder = dense_encoder(arch, 64).eval()
    export_as(encoder, tmp_path/'net.pth', 'torchvision')
    net = torchvision.models.get_model(arch, weights=None).eval()
    lost, extra = net.load_state_dict(torch.load(tmp_path/'net.pth', weights_only=True), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): got = nn.Sequential(*list(net.children())[:-2])(x)
    assert lost==['fc.weight','fc.bias'] and not extra
    assert_close(got, encoder.feature_map(x))

# ---- Hugging Face

def test_a_vit_of_hugging_face_gives_its_features_here_and_goes_back(tmp_path):
    g = load_file(GOLDEN/'transfer/huggingface_vit.safetensors')
    weights = {k.removeprefix('w.'): v for k,v in g.items() if k.startswith('w.')}
    save_file(weights, tmp_path/'a.safetensors')
    encoder, _ = open_backbone(f'{tmp_path}/a.safetensors@vit_tiny_patch16_224', 64, embed_dim=24, depth=2, num_heads=3)
    with torch.no_grad(): assert_close(encoder(g['x']), g['out'], rtol=1e-5, atol=1e-5)
    written = foreign_weights(encoder, 'huggingface')
    assert written.keys()==weights.keys() and all(torch.equal(written[k], v) for k,v in weights.items())
    assert_same_but_background(own_weights(written, encoder, 'huggingface'), encoder.state_dict())

@pytest.mark.parametrize('arch', ('resnet18', 'resnet50'))
def test_names_of_resnets_of_hugging_face(arch):
    want = json.loads((GOLDEN/'transfer/huggingface_names.json').read_text())[arch]
    encoder = dense_encoder(arch, 64)
    written = foreign_weights(encoder, 'huggingface')
    assert shapes(written)==want
    assert_same_but_background(own_weights(written, encoder, 'huggingface'), encoder.state_dict())

@pytest.mark.parametrize('arch,kwargs', (('resnet18',{}), ('resnet50',{}), ('test_vit',{}), ('vit_tiny_patch16_224',dict(patch_size=8, depth=2))))
def test_hugging_face_loads_a_folder(arch, kwargs, tmp_path):
    transformers = pytest.importorskip('transformers')
    encoder = dense_encoder(arch, 64, **kwargs).eval()
    export_as(encoder, tmp_path/'net', 'huggingface')
    net, said = transformers.AutoModel.from_pretrained(tmp_path/'net', output_loading_info=True)
    assert not said['missing_keys'] and not said['unexpected_keys']
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): got, want = net.eval()(x).last_hidden_state, encoder(x)
    assert_close(got if got.ndim==3 else got.flatten(2).mT, want, rtol=1e-5, atol=1e-5)

# ---- mmseg, timm, files

def test_a_vit_of_mmseg():
    encoder = dense_encoder('vit_small_patch16_224', 512)
    written = foreign_weights(encoder, 'mmseg')
    assert {f'backbone.{k}': s for k,s in shapes(written).items()}==NAMES['mmseg_vit_s16_backbone']
    assert written['cls_token'].abs().max()==0==written['pos_embed'][:,0].abs().max()
    found = own_weights(written, encoder, 'mmseg')
    assert encoder.state_dict().keys()-found.keys()=={'net.norm.weight', 'net.norm.bias'}
    assert_same_but_background(found, encoder.state_dict())

FLSL = dict(taps=(2,5,8,11), strides=(16,)*4, head_strides=(4,8,16,32))

def test_names_and_shapes_of_a_real_segmenter_and_back():
    model = Segmenter(dense_encoder('vit_small_patch16_224', 512), 150, SegmenterConfig(**FLSL))
    written, own = foreign_weights(model, 'mmseg'), model.state_dict()
    assert shapes(written)==NAMES['mmseg_vit_s16_backbone'] | NAMES['mmseg_semantic_fpn_heads']
    found = own_weights(written, model, 'mmseg')
    assert own.keys()-found.keys()=={'neck.taps.net.norm.weight', 'neck.taps.net.norm.bias'}    # never read
    assert all(torch.equal(v, own[k]) for k,v in found.items())

def test_a_segmenter_on_a_resnet():
    written = foreign_weights(segmenter('resnet18', {}), 'mmseg')
    assert {'backbone.layer4.1.bn2.running_var', 'neck.lateral_convs.3.conv.bias', 'decode_head.scale_heads.3.4.bn.weight',
            'decode_head.conv_seg.bias'}<=written.keys()

@pytest.mark.parametrize('arch', ('vit_tiny_patch16_224', 'deit_tiny_patch16_224'))
def test_timm_loads_a_vit_of_its_own_size_by_its_plain_name(arch, tmp_path):
    encoder = dense_encoder(arch).eval()
    export_backbone(encoder, tmp_path/'a.safetensors')
    net = timm.create_model(arch, num_classes=0, checkpoint_path=tmp_path/'a.safetensors').eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): near = torch.cosine_similarity(net.forward_features(x)[:,1:], encoder(x), dim=-1).min()
    assert near>.99
    for k,v in net.state_dict().items():
        if k not in ('cls_token', 'pos_embed'): assert torch.equal(v, encoder.net.state_dict()[k]), k

def test_files_hold_tensors_and_plain_values(tmp_path):
    model = detector('resnet18', {}, 2, dict(channels=16, hidden=16))
    for format in ('torchvision', 'detectron2', 'mmdet'):
        said = export_as(model, tmp_path/f'{format}.pth', format)
        held = torch.load(tmp_path/f'{format}.pth', weights_only=True)
        held = dict(torchvision=lambda: held, detectron2=lambda: held['model'], mmdet=lambda: held['state_dict'])[format]()
        want = foreign_weights(model, format)
        assert held.keys()==want.keys() and all(torch.equal(held[k], v) for k,v in want.items())
        assert 'RGB' in said
    assert torch.load(tmp_path/'detectron2.pth', weights_only=True)['matching_heuristics'] is True
    with pytest.raises(InputError, match='exists: choose another name'): export_as(model, tmp_path/'mmdet.pth', 'mmdet')
    export_as(model, tmp_path/'mmdet.pth', 'mmdet', overwrite=True)

def test_a_file_of_ours_and_a_frozen_norm(tmp_path):
    encoder = dense_encoder('resnet18', 64)
    export_backbone(encoder, tmp_path/'a.safetensors')
    whole, same = foreign_weights(tmp_path/'a.safetensors', 'detectron2'), foreign_weights(encoder, 'detectron2')
    assert whole.keys()==same.keys() and all(torch.equal(v, same[k]) for k,v in whole.items())
    encoder.net = timm.utils.model.freeze_batch_norm_2d(encoder.net)
    frozen = foreign_weights(encoder, 'detectron2')
    assert {k for k in whole if k not in frozen}=={k for k in whole if k.endswith('num_batches_tracked')}

# ---- refused

SMALL = dict(channels=16, hidden=16)
@pytest.mark.parametrize('make,format,said', (
    (lambda: dense_encoder('test_vit', 64), 'onnx', "got 'onnx'"),
    (lambda: dense_encoder('test_vit', 64), 'torchvision', 'of test_vit: choose detectron2 or mmdet'),
    (lambda: dense_encoder('test_convnext', 64), 'detectron2', 'of test_convnext: no other format'),
    (lambda: dense_encoder('resnet18', 64, output_stride=16), 'detectron2', 'of resnet18: no other format'),
    (lambda: dense_encoder('vit_tiny_patch16_224', 64, depth=1, init_values=1.), 'huggingface', 'no other format'),
    (lambda: dense_encoder('resnext50_32x4d', 64), 'huggingface', 'no ResNet with groups or of other widths'),
    (lambda: detector('resnet18', {}, 2, SMALL), 'mmseg', 'FPN on a ResNet: choose torchvision or detectron2'),
    (lambda: detector('resnet18', {}, 2, dict(pyramid='c4', channels=16)), 'mmdet', 'C4 detector on a ResNet: choose detectron2'),
    (lambda: detector('test_vit', {}, 2, SMALL), 'detectron2', 'FPN on a VisionTransformer: choose mmdet'),
    (lambda: detector('resnet18', {}, 2, SMALL | dict(taps=(2,3,4), strides=(8,16,32))), 'detectron2', 'first one here has 8'),
    (lambda: detector('resnet18', {}, 2, SMALL | dict(taps=(2,3,4), strides=(4,8,16))), 'torchvision', 'build with strides='),
    (lambda: detector('resnet18', {}, 2, SMALL | dict(norm='layer')), 'mmdet', "norm='sync'"),
    (lambda: detector('resnet18', {}, 2, SMALL | dict(masks=False, n_keypoints=3)), 'mmdet', 'no keypoint head'),
    (lambda: segmenter('test_vit', {}), 'mmseg', 'of VisionTransformer: build with strides=\\(16, 16, 16, 16\\)'),
    (lambda: segmenter('resnet18', dict(head='linear')), 'mmseg', 'of a linear head: no other format'),
    (lambda: segmenter('resnet18', {}), 'mmdet', 'semantic FPN on a ResNet: choose mmseg'),
    (lambda: detector('vit_tiny_patch16_224', dict(patch_size=14, depth=4), 2, SMALL, 56), 'mmdet', 'patches of 14')))
def test_what_another_library_does_not_have_is_refused(make, format, said, tmp_path):
    with pytest.raises(InputError, match=said) as e: export_as(make(), tmp_path/('a' if format=='huggingface' else 'a.pth'), format)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_every_format_is_known(): assert len(set(FORMATS))==5
