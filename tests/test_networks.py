"Networks of every family of timm train or are refused in a sentence before any work; an export is the network that was trained"
import json, os, re
from argparse import Namespace
from dataclasses import fields, replace

import numpy as np, pytest, timm, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from densessl.methods import export as transfer
from densessl.ground.core import InputError
from densessl.methods.encoders import DenseEncoder, check_exportable, dense_encoder
from densessl.theory.positions import resample_positions
from densessl.methods.export import export_backbone, load_backbone
from densessl.methods.weights import init_backbone, open_backbone

VIT = dict(img_size=64, embed_dim=64, depth=2, num_heads=2)

def vit(seed=0, **kw):
    torch.manual_seed(seed)
    return dense_encoder('vit_tiny_patch16_224', **(VIT | kw))

def images(size=64, n=2): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))

# ---- one step of each family

SMALL = dict(   # family -> smallest network of it
    beit='beit_base_patch16_224', byoanet='halonet_h1', byobnet='test_byobnet', cait='cait_xxs24_224', coat='coat_tiny', convit='convit_tiny',
    convmixer='convmixer_768_32', convnext='test_convnext', cpubone='cpubone_nano', crossvit='crossvit_tiny_240', csatv2='csatv2',
    cspnet='cs3darknet_focus_s', cspnext='cspnext_tiny', davit='davit_tiny', deepseek_vit='deepseek_vit_412m', deit='deit_tiny_patch16_224',
    densenet='densenet121', dla='dla34', dpn='dpn68', edgenext='edgenext_xx_small', efficientformer='efficientformer_l1',
    efficientformer_v2='efficientformerv2_s0', efficientnet='test_efficientnet', efficientvim='efficientvim_m1',
    efficientvit_mit='efficientvit_b0', efficientvit_msra='efficientvit_m0', eva='vit_tiny_patch16_dinov3_qkvb', fasternet='fasternet_t0',
    fastvit='fastvit_s12', focalnet='focalnet_tiny_srf', gcvit='gcvit_xxtiny', gemma4_vit='gemma4_vit_167m', ghostnet='ghostnet_050',
    hardcorenas='hardcorenas_b', hgnet='hgnetv2_b0', hiera='hiera_tiny_224', hieradet_sam2='sam2_hiera_tiny', hrnet='hrnet_w18_small',
    iformer='iformer_s', inception_next='inception_next_atto', inception_resnet_v2='inception_resnet_v2', inception_v3='inception_v3',
    inception_v4='inception_v4', lcnetv2='lcnetv2_small', levit='levit_384_s8', lowformer='lowformer_b0', mambaout='test_mambaout',
    maxxvit='test_coatnet', metaformer='caformer_s18', mlp_mixer='mixer_s16_224', mobilenetv3='mobilenetv3_small_050',
    mobilenetv5='mobilenetv5_base', mobilevit='mobilevit_xxs', mvitv2='mvitv2_tiny', naflexvit='naflexvit_base_patch16_siglip',
    nasnet='nasnetalarge', nest='nest_tiny', nextvit='nextvit_small', nfnet='test_nfnet', pit='pit_xs_224', pnasnet='pnasnet5large',
    pvt_v2='pvt_v2_b0', qwen3_vit='qwen3_vit_88m', rdnet='rdnet_tiny', regnet='regnetx_002', repghost='repghostnet_050', repvit='repvit_m1',
    res2net='res2next50', resnest='resnest14d', resnet='test_resnet', resnetv2='resnetv2_18', rexnet='rexnet_100', selecsls='selecsls42',
    senet='legacy_seresnet18', sequencer='sequencer2d_s', shvit='shvit_s1', sknet='skresnet18', starnet='starnet_s1',
    swiftformer='swiftformer_xs', swin_transformer='swin_tiny_patch4_window7_224', swin_transformer_v2='swinv2_tiny_window8_256',
    swin_transformer_v2_cr='swinv2_cr_tiny_224', tiny_vit='tiny_vit_5m_224', tnt='tnt_s_legacy_patch16_224', tresnet='tresnet_m',
    twins='twins_svt_small', vgg='vgg11', visformer='visformer_tiny', vision_transformer='test_vit',
    vision_transformer_hybrid='vit_tiny_r_s16_p8_224', vision_transformer_relpos='test_vit_relpos',
    vision_transformer_sam='samvit_base_patch16_224', vitamin='vitamin_small_224', volo='volo_d1_224', vovnet='ese_vovnet19b_slim_dw',
    xception='legacy_xception', xception_aligned='xception41p', xcit='xcit_nano_12_p8_224')

QUICK = {   # family -> (arguments, sizes of the views, what is said if it is refused)
    'vision_transformer': ({}, (64, 32), None), 'deit': (dict(depth=1), (64, 32), None), 'resnet': ({}, (64, 32), None),
    'convnext': ({}, (64, 32), None), 'efficientnet': ({}, (64, 32), None), 'mambaout': ({}, (64, 32), None), 'nfnet': ({}, (64, 32), None),
    'swin_transformer': (dict(depths=(1,1,1,1), embed_dim=24, num_heads=(1,1,2,2)), (64, 32), None),
    'swin_transformer_v2': (dict(depths=(1,1,1,1), embed_dim=24, num_heads=(1,1,2,2)), (64, 32), None),
    'eva': (dict(depth=1), (64, 32), None), 'pvt_v2': ({}, (64, 32), None), 'mobilevit': ({}, (64, 32), None),
    'xcit': (dict(depth=1), (64, 32), None), 'cait': (dict(depth=1), (64, 32), 'cannot take local_size=32'),
    'beit': (dict(depth=1, embed_dim=48, num_heads=2), (64, 32), 'cannot take local_size=32'),
    'maxxvit': ({}, (128, 64), 'cannot take local_size=64'), 'vision_transformer_relpos': ({}, (64, 32), 'cannot take local_size=32')}

def step(arch, sizes, folder, kwargs={}, n=4):
    "Build, check, one forward and backward pass, export and reload; '' or the sentence with which it was refused"
    torch.manual_seed(0)
    try:
        e = dense_encoder(arch, img_size=sizes[0], **kwargs)
        for s,name in zip(sizes, ('img_size', 'local_size')): e.check_size(s, s, name)
        check_exportable(e)
    except InputError as refused: return str(refused)
    e.train()
    for s in dict.fromkeys(sizes):
        z = e(images(s, n))
        assert z.shape==(n, e.grid(s, s)[0]*e.grid(s, s)[1], e.embed_dim) and z.isfinite().all()
        z.square().mean().backward()
    dead = [k for k,p in e.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead, dead
    assert any(p.grad is not None and p.grad.abs().sum()>0 for p in e.parameters())
    export_backbone(e, folder/'b.safetensors', overwrite=True)
    with torch.no_grad(): torch.testing.assert_close(load_backbone(folder/'b.safetensors')(images(sizes[0])), e.eval()(images(sizes[0])))
    return ''

@pytest.mark.parametrize('family', QUICK)
def test_a_step_of_a_family(family, tmp_path):
    kwargs, sizes, says = QUICK[family]
    said = step(SMALL[family], sizes, tmp_path, kwargs)
    assert said=='' if says is None else says in said and 'choose a network for any size' in said, said
    if says: assert step(SMALL[family], sizes[:1], tmp_path, kwargs)==''          # what the sentence advises

REFUSED = {'coat', 'efficientvim', 'pit', 'volo'}   # at whatever size

@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('DENSESSL_SLOW'), reason='twenty minutes: set DENSESSL_SLOW=1')
@pytest.mark.parametrize('family', sorted({*SMALL, *timm.list_modules()}))
def test_every_family_trains_or_is_refused(family, tmp_path):
    arch = SMALL.get(family) or min(timm.list_models(module=family), key=len)
    for sizes in ((128, 64), (224, 224), (256, 256), (240, 240)):
        said = step(arch, sizes, tmp_path, n=2)
        print(f'{family:28}{arch:34}{sizes} {said or "trains"}')
        assert '\n' not in said and len(said)<600
        if not said: break
    assert bool(said)==(family in REFUSED)

# ---- what is refused before any work

@pytest.mark.parametrize('kw, says', [
    (dict(features_only=True), 'leave features_only out of model_kwargs'), (dict(out_indices=(1,)), 'leave out_indices out'),
    (dict(checkpoint_path='x.pth'), 'use init=FILE'), (dict(num_classes=5), 'dense_encoder sets num_classes itself')])
def test_arguments_that_no_dense_encoder_has(kw, says):
    for arch in ('vit_tiny_patch16_224', 'test_resnet'):
        with pytest.raises(InputError, match=says): dense_encoder(arch, img_size=64, **kw)

@pytest.mark.parametrize('arch, says', [
    ('resnet50.a1_in1kk', "no weights 'a1_in1kk' of resnet50: use a1_in1k"), ('test_resnet.zzz', "no weights 'zzz' of test_resnet: use r160_in1k"),
    (['test_vit', 'test_resnet'], 'arch is one name of timm'), (5, 'arch is one name of timm, as "resnet50", got 5'), ('', 'arch is one name of timm'),
    ('weights.pth', "'weights.pth' is a file: start from its weights with init=weights.pth"), (timm.create_model('test_vit'), 'wrap it, as DenseEncoder'),
    ('vit_smal_patch16_224', 'did you mean vit_small_patch16_224'), ('dinov2_vits14', 'did you mean vit_.*dinov2'), ('zzz', 'see timm.list_models'),
    ('facebook/dinov2-small', 'write hf-hub:facebook/dinov2-small if it is one of timm on the Hub, or else download its weights')], ids=lambda v: str(v)[:20])
def test_names_that_are_none(arch, says):
    with pytest.raises(InputError, match=says) as e: dense_encoder(arch, img_size=64)
    assert '\n' not in str(e.value)

def test_a_network_of_ones_own_is_wrapped(tmp_path):
    "What the sentence advises"
    own = DenseEncoder(timm.create_model('test_vit', num_classes=0, img_size=32, patch_size=8), 'test_vit', dict(num_classes=0, img_size=32, patch_size=8), 32)
    learn = learner('flsl', own, settings=dict(img_size=32, local_size=32))
    with pytest.raises(InputError, match='leave out model_kwargs'): learner('flsl', own, model_kwargs=dict(depth=1))
    with learn.no_bar(): learn.fit(1)
    export_backbone(learn, tmp_path/'own.safetensors')

@pytest.mark.parametrize('kw, says', [
    ('depth=1', "model_kwargs must be a dict, as dict.patch_size=8., got 'depth=1'"), (['depth'], 'model_kwargs must be a dict'), ({1: 2}, 'model_kwargs has 1 for a name'),
    (dict(img_size=64), 'leave img_size out of model_kwargs'), (dict(pretrained=True), 'use pretrained=True'), (dict(patch_drop_rate=.5), 'a feature for every patch')])
def test_arguments_for_timm_that_are_none(kw, says):
    with pytest.raises(InputError, match=says): learner(model_kwargs=kw)

def test_published_weights_offline(monkeypatch):
    "The sentence names no argument that the caller did not give"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for f in (lambda: dense_encoder('test_vit', pretrained=True), lambda: open_backbone('test_vit'), lambda: learner(arch='test_vit', pretrained=True)):
        with pytest.raises(InputError, match='weights of test_vit cannot be loaded .*download its weights elsewhere and give the file$'): f()

def test_a_folder_of_another_library(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='dinov2')))
    with pytest.raises(InputError, match='is no network of timm: download its weights and give the file'): dense_encoder(f'local-dir:{tmp_path}')

def settings(method):
    import densessl.all as D
    return getattr(D, f'{method}_presets')['scenes'], getattr(D, f'{method}_recipe')

def learner(method='flsl', arch='vit_tiny_patch16_224', **kw):
    import densessl.all as D
    c = replace(settings(method)[0], n_local=1, **kw.pop('settings', {}))
    dls = D.scene_dls(8, getattr(D, f'{method}_recipe')(c), bs=4, seed=0)
    return getattr(D, f'{method}_learner')(dls, arch, c, **kw)

SMALL_VIT = dict(embed_dim=64, depth=2, num_heads=2)

@pytest.mark.parametrize('method, arch, kw, says', [
    ('flsl', 'vit_tiny_patch16_224', dict(model_kwargs=SMALL_VIT|dict(in_chans=1)), 'leave in_chans out'),
    ('flsl', 'vit_tiny_patch16_224', dict(model_kwargs=SMALL_VIT|dict(patch_size=14), settings=dict(img_size=56, local_size=32)), 'local_size=32: use 28 or 42'),
    ('flsl', 'cait_xxs24_224', dict(model_kwargs=dict(depth=1)), 'n_local=0., or choose a network'),
    ('dino', 'test_vit_relpos', {}, 'cannot take local_size=32'),
    ('flsl', 'vit_tiny_patch16_224', dict(model_kwargs=SMALL_VIT|dict(act_layer=torch.nn.GELU)), 'act_layer'),
    ('flsl', None, {}, 'arch=None takes the network of init'), ('flsl', 'test_vit', dict(pretrained=True, init='x'), 'leave out init'),
    ('flsl', 'test_vit', dict(init='nowhere.pth'), "there is no file 'nowhere.pth'")])
def test_a_learner_refuses_before_the_first_step(method, arch, kw, says):
    with pytest.raises(InputError, match=says): learner(method, arch, **kw)

@pytest.mark.parametrize('method', ['flsl', 'clove', 'dino'])
def test_every_number_among_the_settings_has_a_range(method):
    "Whatever field is not a number, or lies outside, is refused when the settings or the views are made"
    c, recipe = settings(method)
    numbers = [f.name for f in fields(c) if f.type in (int, float)]
    assert len(numbers)>=15
    for k in numbers:
        with pytest.raises(InputError, match=k): recipe(replace(c, **{k: float('nan')}))
    for k,wrong in dict(drop_path_rate=2, warmup=1.5, lr=float('inf'), n_local=-1, img_size=64.5, hidden_dim='wide', flip=-.1).items():
        with pytest.raises(InputError, match=f'{k}.*{wrong}'): recipe(replace(c, **{k: wrong}))
    replace(c, drop_path_rate=0, warmup=0, lr=1)

@pytest.mark.parametrize('method, k, wrong', [
    ('flsl', 'wd', (0., float('inf'))), ('flsl', 'beta_sa', -2.), ('flsl', 'gamma', float('inf')), ('flsl', 'final_lr', -1e-6), ('flsl', 'freeze_epochs', -1),
    ('clove', 'wd', -1e-4), ('clove', 'lr_floor', 2.), ('clove', 'num_heads', 0), ('clove', 'k', 1), ('dino', 'clip', 0.), ('dino', 'temp_s', 0.),
    ('dino', 'temp_t_warmup', -1.), ('dino', 'n_prototypes', 2.5)])
def test_settings_out_of_range(method, k, wrong):
    with pytest.raises(InputError, match=k) as e: replace(settings(method)[0], **{k: wrong})
    assert '\n' not in str(e.value)

# ---- export

def test_a_device_that_rounds_as_tf32_exports(tmp_path, monkeypatch):
    "The parameters that were trained are on a device whose convolutions keep 10 bits; a copy of them is on the CPU"
    torch.manual_seed(0)
    e = dense_encoder('test_resnet', img_size=64)
    on_device, conv = {id(p) for p in e.parameters()}, F.conv2d
    def tf32(x): return (x.detach().view(torch.int32) & ~0x1fff).view(torch.float32)
    def rounded(x, w, *args, **kw): return conv(tf32(x.contiguous()), tf32(w.contiguous()), *args, **kw) if id(w) in on_device else conv(x, w, *args, **kw)
    exact = e.eval()(images())
    monkeypatch.setattr(F, 'conv2d', rounded)
    assert (e(images())-exact).abs().max()>1e-3*exact.abs().max()       # the simulation bites
    card = export_backbone(e, tmp_path/'b.safetensors')
    assert card['difference']==0
    torch.testing.assert_close(load_backbone(tmp_path/'b.safetensors')(images()), exact, rtol=0, atol=0)

@pytest.mark.parametrize('wrong', ['bits', 'features', 'nan'])
def test_other_weights_are_no_export(wrong, tmp_path, monkeypatch):
    e, save, load = vit(), transfer.save, transfer.load_backbone
    def other_bits(state, **kw): return save(state | {'norm.weight': torch.nextafter(state['norm.weight'], torch.tensor(2.))}, **kw)
    def other_features(path):
        b = load(path)
        b.net.blocks[1].mlp.fc2.weight.data *= 1.1
        return b
    if wrong=='bits': monkeypatch.setattr(transfer, 'save', other_bits)
    if wrong=='features': monkeypatch.setattr(transfer, 'load_backbone', other_features)
    if wrong=='nan': e.net.norm.weight.data[0] = float('nan')
    with pytest.raises(RuntimeError, match='nothing was written'): export_backbone(e, tmp_path/'b.safetensors')
    assert not list(tmp_path.iterdir())

def test_an_export_leaves_the_encoder_as_it_was(tmp_path):
    e = vit().train()
    e.net.pos_embed.requires_grad_(True)
    before = {k: v.clone() for k,v in e.state_dict().items()}
    export_backbone(e, tmp_path/'b.safetensors')
    assert e.training and e.net.pos_embed.requires_grad and all(torch.equal(v, before[k]) for k,v in e.state_dict().items())

def test_the_plain_name_of_timm_loads_and_the_record_says_how_to_have_equal_features(tmp_path):
    f = tmp_path/'b.safetensors'
    e = vit().eval()
    card = export_backbone(e, f)
    net = timm.create_model('vit_tiny_patch16_224', num_classes=0, checkpoint_path=f, **VIT).eval()
    x = images()
    with torch.no_grad():
        near = F.cosine_similarity(net.forward_features(x)[:,1:], e(x), dim=-1).min()
        line = card['note'][card['note'].index('net = '):card['note'].index('. The plain')]      # the line that is printed, as it is printed
        said = dict(timm=timm, safetensors=__import__('safetensors.torch'), file=f, arch=card['arch'], model_kwargs=card['model_kwargs'])
        exec(line, said)
        own = said['net'].eval()
        assert .99<near<1
        torch.testing.assert_close(own.forward_features(x), e(x), rtol=0, atol=0)
    assert 'model_kwargs' in card['note'] and transfer.plain_arguments(e)==VIT | dict(num_classes=0, dynamic_img_size=True)
    for arch in ('test_vit', 'vit_base_patch16_clip_224', 'vit_medium_patch16_gap_256', 'vit_wee_patch16_reg1_gap_256', 'deit_tiny_distilled_patch16_224'):
        other = dense_encoder(arch, img_size=64, depth=1)
        export_backbone(other, f, overwrite=True)
        timm.create_model(arch, checkpoint_path=f, **transfer.plain_arguments(other))
        load_backbone(f)
    e = dense_encoder('test_resnet', img_size=64).eval()
    export_backbone(e, tmp_path/'cnn.safetensors')
    net = timm.create_model('test_resnet', num_classes=0, checkpoint_path=tmp_path/'cnn.safetensors').eval()
    torch.testing.assert_close(net.forward_features(x), e.feature_map(x))

@pytest.mark.parametrize('first', [0x80, 0x50])
def test_a_header_of_any_length_is_read(first, tmp_path):
    "The first byte of the file is the lowest of that length, which may be the first byte of a pickle or of a zip archive"
    f, e = tmp_path/'b.safetensors', vit()
    card = dict(arch=e.arch, model_kwargs=e.model_kwargs, img_size=64)
    for n in range(0, 264, 8):
        save_file(e.net.state_dict(), f, metadata=dict(densessl=json.dumps(card | dict(pad='x'*n))))
        if f.read_bytes()[0]==first: break
    assert f.read_bytes()[0]==first
    load_backbone(f)

# ---- checkpoints as people have them

def donor(arch='test_vit', **kw):
    torch.manual_seed(5)
    return timm.create_model(arch, num_classes=10, **kw).eval()

def under(prefix, state, plus=0.): return {prefix+k: v+plus if v.is_floating_point() else v for k,v in state.items()}

V, R = donor().state_dict(), donor('test_resnet').state_dict()
BODY = {k: v for k,v in V.items() if not k.startswith('head')}
CNN = {k: v for k,v in R.items() if not k.startswith('fc')}
PUBLISHED = {   # name -> (what torch.save writes, donor's weights, what is said)
    'dino.pth': (dict(student=under('module.backbone.', BODY, 1.), teacher=under('backbone.', BODY) | under('head.mlp.', dict(w=torch.ones(2))),
                      optimizer=dict(state={0: dict(exp_avg=torch.ones(3))}), epoch=9, args=Namespace(arch='vit', lr=.1)), V, 'teacher.backbone'),
    'dino_backbone.pth': (BODY, V, 'class token is dropped'),
    'ibot.pth': (dict(state_dict=BODY | dict(masked_embed=torch.ones(1, 64))), V, 'masked_embed'),
    'mae.pth': (dict(model=BODY | under('decoder_', dict(V), 1.) | dict(mask_token=torch.ones(1,1,32), decoder_pos_embed=torch.ones(1,101,32))), V, 'left out'),
    'moco_v3.pth': (dict(arch='vit', epoch=3, state_dict=under('module.momentum_encoder.', V, 1.) | under('module.base_encoder.', V)), V, 'base_encoder'),
    'moco_v2.pth': (dict(state_dict=under('module.encoder_k.', R, 1.) | under('module.encoder_q.', R) | {'module.queue': torch.ones(8, 4)}), R, 'encoder_q'),
    'byol.pt': (under('target_encoder.net.', R, 1.) | under('online_encoder.net.', R), R, 'online_encoder'),
    'swav.tar': (under('module.', CNN) | {'module.projection_head.0.weight': torch.ones(2,2), 'module.prototypes.weight': torch.ones(2,2)}, R, 'projection_head'),
    'densecl.pth': (dict(meta=dict(epoch=2, loss=np.float64(1.5)), state_dict=under('backbone.', CNN)), R, 'state_dict.backbone'),
    'torchvision.pth': (R, R, 'fc.weight'),
    'compiled.pth': (dict(model=under('_orig_mod.', R)), R, '_orig_mod'),
    'dinov2.pth': (dict(teacher=under('backbone.', {k.replace('blocks.', 'blocks.0.'): v for k,v in BODY.items()}) | {'dino_head.mlp.0.weight': torch.ones(2,2)}), V, 'teacher.backbone'),
    'registers.pth': (BODY | dict(register_tokens=torch.ones(1,4,64)), V, 'class and register tokens are dropped'),
    'vissl.torch': (dict(classy_state_dict=dict(base_model=dict(model=dict(trunk=under('_feature_blocks.', CNN))))), R, '_feature_blocks'),
    'solo.ckpt': (dict(state_dict=under('momentum_backbone.', CNN, 1.) | under('backbone.', CNN)), R, "not from 'state_dict.momentum_backbone'"),
    'ema.pth': (dict(state_dict=under('', R, 1.), state_dict_ema=R), R, 'state_dict_ema'),
    'half.pth': ({k: v.half() if v.is_floating_point() else v for k,v in V.items()}, {k: v.half().float() if v.is_floating_point() else v for k,v in V.items()}, 'class token'),
    'larger.pth': (dict(net=V, opt=dict(state=[dict(exp_avg=torch.ones(2))])), V, 'net'),
    'lightning.ckpt': ({'state_dict': under('model.encoder.', V), 'pytorch-lightning_version': '2.1', 'optimizer_states': [dict(state={})]}, V, 'encoder')}

def same_weights(encoder, state):
    own = encoder.net.state_dict()
    assert own.keys()>={k for k in state if k.split('.')[0] not in ('head', 'fc', 'cls_token')}
    for k,v in own.items():
        want = state[k][:,1:] if k=='pos_embed' else state[k]
        assert torch.equal(v, want), k

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_checkpoints(name, tmp_path, capsys):
    held, state, says = PUBLISHED[name]
    torch.save(held, tmp_path/name)
    encoder, norm = open_backbone(tmp_path/name)
    same_weights(encoder, state)
    out = capsys.readouterr().out
    assert out.count('\n')==1 and name in out and encoder.arch in out and says in out, out
    assert norm['mean']==(0.485,0.456,0.406) and not encoder.training
    same_weights(open_backbone(f'{tmp_path/name}@{encoder.arch}')[0], state)

class OfAnotherLibrary:
    "A class that is there when the file is written; `loaded` says whether its code ran when it was read"
    loaded = False
    def __init__(self, **kw): self.__dict__.update(kw)
    def __setstate__(self, state): OfAnotherLibrary.loaded = True

def test_settings_and_networks_as_objects_are_read_and_nothing_of_them_runs(tmp_path):
    import collections, datetime, pathlib
    beside = dict(args=OfAnotherLibrary(out=pathlib.Path('x')), when=datetime.datetime.now(), losses=np.ones(3), scale=np.float64(2))
    whole = timm.create_model('test_resnet', num_classes=10)
    whole.load_state_dict(R)
    whole.settings = OfAnotherLibrary(lr=.1)
    for name,held,state in (('args.pth', dict(model=V) | beside, V), ('whole.pth', whole, R), ('whole_in_dict.pth', dict(model=whole, epoch=3), R)):
        torch.save(held, tmp_path/name)
        same_weights(open_backbone(tmp_path/name)[0], state)
    assert not OfAnotherLibrary.loaded
    torch.save(dict(model=V, config=collections.defaultdict(list, a=[1])), tmp_path/'config.pth')     # torch fills no dict of another class
    with pytest.raises(InputError, match='without running code from it .*collections.defaultdict'): open_backbone(tmp_path/'config.pth')
    class Evil:
        def __reduce__(self): return (eval, (f'open({str(tmp_path/"harm")!r}, "w")',))
    torch.save(dict(model=V, x=Evil()), tmp_path/'evil.pth')
    same_weights(open_backbone(tmp_path/'evil.pth')[0], V)
    assert not (tmp_path/'harm').exists()

def test_a_resnet_in_a_sequential(tmp_path, capsys):
    "As lightly and many scripts write it; every weight is at its place"
    m = timm.create_model('resnet18', num_classes=0)
    for k,v in m.state_dict().items(): v.copy_(torch.rand_like(v) if v.is_floating_point() else v)
    parts = torch.nn.Sequential(*list(m.children())[:-1])
    head = {'projection_head.layers.0.weight': torch.ones(2,2), 'projection_head.layers.1.weight': torch.ones(2)}
    torch.save(dict(state_dict=under('backbone.', parts.state_dict()) | head), tmp_path/'lightly.ckpt')
    e, _ = open_backbone(tmp_path/'lightly.ckpt')
    assert e.arch=='resnet18' and "from 'state_dict.backbone'" in capsys.readouterr().out
    same_weights(e, m.state_dict())
    new = dense_encoder('resnet18', img_size=64)
    init_backbone(new, tmp_path/'lightly.ckpt')
    same_weights(new, m.state_dict())

def test_the_sentence_names_whole_networks_only(tmp_path, capsys):
    "The first convolution of a block has the name of that of the network"
    m = timm.create_model('resnet18', num_classes=0).state_dict()
    torch.save(dict(state_dict=under('backbone.', m)), tmp_path/'r.pth')
    open_backbone(tmp_path/'r.pth')
    assert capsys.readouterr().out.startswith(f"{tmp_path/'r.pth'}: resnet18, its weights from 'state_dict.backbone'. Its input")

def transformers_names(state, dinov2):
    "What transformers calls the tensors of timm's ViT"
    out, names = {}, [('blocks.', 'encoder.layer.'), ('attn.proj', 'attention.output.dense'), ('patch_embed.proj', 'embeddings.patch_embeddings.projection')]
    names += [('ls1.gamma', 'layer_scale1.lambda1'), ('ls2.gamma', 'layer_scale2.lambda1')] if dinov2 else \
             [('norm1', 'layernorm_before'), ('norm2', 'layernorm_after'), ('mlp.fc1', 'intermediate.dense'), ('mlp.fc2', 'output.dense')]
    for k,v in state.items():
        if k=='cls_token': k = 'embeddings.cls_token'
        elif k=='pos_embed': k = 'embeddings.position_embeddings'
        elif k.startswith('norm.'): k = k.replace('norm', 'layernorm')
        for a,b in names: k = k.replace(a, b)
        parts = zip(('query', 'key', 'value'), v.chunk(3)) if 'attn.qkv' in k else [('', v)]
        out |= {k.replace('attn.qkv', f'attention.attention.{n}'): p.clone() for n,p in parts}
    return out

@pytest.mark.parametrize('dinov2', [False, True])
def test_vits_of_transformers(dinov2, tmp_path):
    "A folder as it is downloaded, with and without layer scale"
    m = donor('vit_tiny_patch16_224', img_size=64, **(dict(init_values=.5) if dinov2 else {})).state_dict()
    body = {k: v for k,v in m.items() if not k.startswith('head')}
    (tmp_path/'config.json').write_text(json.dumps(dict(architectures=['Dinov2Model'], model_type='dinov2')))
    save_file(transformers_names(body, dinov2) | {'embeddings.mask_token': torch.ones(1, 192), 'classifier.weight': torch.ones(2,2)}, tmp_path/'model.safetensors')
    e, _ = open_backbone(tmp_path)
    assert e.arch=='vit_tiny_patch16_224' and e.img_size==64
    same_weights(e, m)

def test_names_that_timm_can_rewrite(tmp_path):
    "Swin as its authors write it: the reduction stands at the end of a stage"
    m = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0)
    old = {re.sub(r'layers\.(\d)\.downsample', lambda k: f'layers.{int(k[1])-1}.downsample', k): v for k,v in m.state_dict().items()}
    torch.save(dict(model=old | {'head.weight': torch.ones(5, 768), 'layers.0.blocks.1.attn_mask': torch.ones(64, 49, 49)}, optimizer=dict(state={})), tmp_path/'swin.pth')
    e, _ = open_backbone(f'{tmp_path/"swin.pth"}@swin_tiny_patch4_window7_224')
    same_weights(e, m.state_dict())

def test_positions_of_a_grid_that_is_not_square(tmp_path):
    "51 positions are those of 5 x 10 patches and a class token, not of 7 x 7 and two tokens"
    torch.save(donor(img_size=(80, 160)).state_dict(), tmp_path/'wide.pth')
    with pytest.raises(InputError, match=r'pos_embed is \(1, 51, 64\) instead of'): open_backbone(tmp_path/'wide.pth')
    e, _ = open_backbone(tmp_path/'wide.pth', size=(80, 160))
    same_weights(e, donor(img_size=(80, 160)).state_dict())

@pytest.mark.parametrize('size', [96, 48, 32])
def test_positions_of_another_size_are_resampled(size, tmp_path):
    "Also where the grid is so small that the difference in number could be that of tokens"
    torch.save(donor(img_size=64).state_dict(), tmp_path/'p.pth')
    e = dense_encoder('test_vit', img_size=size)
    init_backbone(e, tmp_path/'p.pth')
    want = resample_positions(donor(img_size=64).pos_embed[:,1:], (4, 4), (size//16, size//16))
    torch.testing.assert_close(e.net.pos_embed, want)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(value, tmp_path):
    bad = V | {'norm.weight': torch.full((64,), value)}
    torch.save(bad, tmp_path/'bad.pth')
    for f in (lambda: open_backbone(tmp_path/'bad.pth'), lambda: init_backbone(dense_encoder('test_vit'), tmp_path/'bad.pth')):
        with pytest.raises(InputError, match='NaN or infinite in norm.weight'): f()
    e = vit()
    save_file({k: v*value if k=='norm.weight' else v for k,v in e.net.state_dict().items()}, tmp_path/'own.safetensors',
              metadata=dict(densessl=json.dumps(dict(arch=e.arch, model_kwargs=e.model_kwargs, img_size=64))))
    with pytest.raises(InputError, match='NaN or infinite'): load_backbone(tmp_path/'own.safetensors')

def test_files_that_are_something_else(tmp_path):
    (tmp_path/'page.pth').write_text('<!DOCTYPE html><html>Not found</html>')
    (tmp_path/'pointer.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:abc')
    (tmp_path/'none.pth').write_bytes(b'')
    np.savez(tmp_path/'jax.npz', a=np.ones(3))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path/'script.pt')
    for name,says in (('page.pth', "it is text, '<!DOCTYPE"), ('pointer.safetensors', 'git-lfs'), ('none.pth', 'is empty'),
                      ('jax.npz', 'no checkpoint that torch reads'), ('script.pt', 'no checkpoint that torch reads')):
        with pytest.raises(InputError, match=says) as e: open_backbone(tmp_path/name)
        assert '\n' not in str(e.value)

def test_foreign_safetensors_with_an_architecture_that_shapes_do_not_tell(tmp_path):
    m = timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=48, depth=2, num_heads=3)
    save_file(m.state_dict(), tmp_path/'m.safetensors')
    with pytest.raises(InputError, match='cannot be told from its tensors.*m.safetensors@vit'): open_backbone(tmp_path/'m.safetensors')
    with pytest.raises(InputError, match='do not fit vit_tiny_patch16_224.*instead of'): open_backbone(f'{tmp_path}/m.safetensors@vit_tiny_patch16_224')
    e, _ = open_backbone(tmp_path/'m.safetensors', arch='vit_tiny_patch16_224', embed_dim=48, depth=2, num_heads=3)
    assert e.img_size==64 and torch.equal(e.net.blocks[1].attn.qkv.weight, m.blocks[1].attn.qkv.weight)
    n = timm.create_model('convnext_atto', num_classes=7)
    save_file(n.state_dict(), tmp_path/'n.safetensors')
    e, _ = open_backbone(f'{tmp_path}/n.safetensors@convnext_atto')
    assert torch.equal(e.net.stages[3].blocks[0].mlp.fc1.weight, n.stages[3].blocks[0].mlp.fc1.weight)

def test_vits_of_torchvision_and_mmseg(tmp_path):
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    theirs = VisionTransformer(image_size=64, patch_size=16, num_layers=6, num_heads=2, hidden_dim=64, mlp_dim=192).eval()
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=.05)
    torch.save(theirs.state_dict(), tmp_path/'tv.pth')
    e, _ = open_backbone(tmp_path/'tv.pth')
    full = timm.create_model('test_vit', img_size=64, num_classes=0).eval()
    own = e.net.state_dict()
    full.load_state_dict(own | dict(cls_token=theirs.class_token.data, pos_embed=torch.cat([theirs.encoder.pos_embedding.data[:,:1], own['pos_embed']], 1)))
    x = images()
    with torch.no_grad():
        want = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(x)], 1))
        torch.testing.assert_close(full.forward_features(x), want)
    mm = {}
    for k,v in BODY.items():
        for a,b in (('patch_embed.proj', 'patch_embed.projection'), ('blocks.', 'layers.'), ('norm1', 'ln1'), ('norm2', 'ln2'), ('attn.qkv.', 'attn.attn.in_proj_'),
                    ('attn.proj', 'attn.attn.out_proj'), ('mlp.fc1', 'ffn.layers.0.0'), ('mlp.fc2', 'ffn.layers.1')): k = k.replace(a, b)
        mm['backbone.'+('ln1'+k[4:] if k.startswith('norm.') else k)] = v
    torch.save(dict(state_dict=mm | {'decode_head.conv_seg.weight': torch.ones(2)}), tmp_path/'mm.pth')
    same_weights(open_backbone(tmp_path/'mm.pth')[0], V)

def test_what_does_not_fit_is_refused(tmp_path):
    class Harm:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'harm'),))
    deeper = V | {k.replace('blocks.5', 'blocks.6'): v for k,v in V.items() if 'blocks.5' in k}
    shallow = {k: v for k,v in V.items() if 'blocks.5.mlp' not in k}
    for name,held,says in (('harm.pth', dict(state_dict=V, hook=Harm()), 'cannot be read without running code'), ('none.pth', dict(epoch=3), 'holds no named tensors'),
                           ('list.pth', [torch.ones(2)], 'holds no named tensors'), ('deeper.pth@test_vit', deeper, 'not of this network: blocks.6'),
                           ('shallow.pth', shallow, 'missing: blocks.5.mlp'), ('other.pth@test_resnet', V, 'none of its tensors has a name')):
        torch.save(held, tmp_path/name.split('@')[0])
        with pytest.raises(InputError, match=says) as e: open_backbone(f'{tmp_path}/{name}')
        assert '\n' not in str(e.value)
    (tmp_path/'cut.pth').write_bytes((tmp_path/'deeper.pth').read_bytes()[:3000])
    with pytest.raises(InputError, match='cut off, damaged'): open_backbone(tmp_path/'cut.pth')
    assert not (tmp_path/'harm').exists()

def test_names_that_mean_two_things(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'resnet50').mkdir()
    export_backbone(vit(), tmp_path/'run'/'backbone.safetensors')
    asked = []
    monkeypatch.setattr('densessl.methods.weights.dense_encoder', lambda name, **kw: asked.append(name) or dense_encoder('test_resnet'))
    monkeypatch.setattr('torch.nn.Module.pretrained_cfg', dict(mean=(0,0,0), std=(1,1,1)), raising=False)
    open_backbone('resnet50')
    assert asked==['resnet50'] and "for the file or folder of that name write ./resnet50" in capsys.readouterr().out
    open_backbone('run'), open_backbone('~/run/backbone.safetensors'), open_backbone('~/run')
    assert 'its backbone.safetensors is read' in capsys.readouterr().out
    for name,says in (('./resnet50', 'is a folder, not a backbone'), ('facebook/dino-vits16', 'or hf-hub:facebook/dino-vits16'), ('~/none.pth', 'there is no file')):
        with pytest.raises(InputError, match=says): open_backbone(name)

def test_the_hub_offline_and_a_folder_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(InputError, match='check the name and the connection'): open_backbone('hf-hub:timm/vit_small_patch14_dinov2.lvd142m')
    m = donor(img_size=64)
    cfg = dict(architecture='test_vit', num_classes=10, model_args=dict(img_size=64), pretrained_cfg=dict(input_size=[3,64,64], mean=[.5,.5,.5], std=[.4,.4,.4], num_classes=10, first_conv='patch_embed.proj', classifier='head'))
    (tmp_path/'config.json').write_text(json.dumps(cfg))
    save_file(m.state_dict(), tmp_path/'model.safetensors')
    e, norm = open_backbone(f'local-dir:{tmp_path}')
    same_weights(e, m.state_dict())
    assert norm==dict(mean=(.5,.5,.5), std=(.4,.4,.4)) and e.arch=='test_vit' and e.img_size==64
    export_backbone(e, tmp_path/'own.safetensors')

# ---- start from them

@pytest.mark.parametrize('method', ['flsl', 'clove', 'dino'])
def test_student_and_teacher_start_from_the_weights(method, tmp_path):
    arch, kw, state = ('test_resnet', dict(output_stride=8), CNN) if method=='clove' else ('test_vit', {}, V)
    torch.save(dict(model=state), tmp_path/'init.pth')
    for a in (arch, None):
        learn = learner(method, a, init=tmp_path/'init.pth', model_kwargs=kw)
        for m in (learn.model.student, learn.model.teacher):
            own = m.encoder.net.state_dict()
            assert all(torch.equal(v, state[k]) for k,v in own.items() if k!='pos_embed')
    with learn.no_bar(): learn.fit(1)
    export_backbone(learn, tmp_path/'out.safetensors')

def test_a_run_continues_from_an_export(tmp_path):
    e = vit(pos_scale=.25)
    export_backbone(e, tmp_path/'b.safetensors')
    learn = learner(init=str(tmp_path/'b.safetensors'), model_kwargs=SMALL_VIT)
    net = learn.model.student.encoder.net
    assert all(torch.equal(v, e.net.state_dict()[k]) for k,v in net.state_dict().items()) and not net.pos_embed.requires_grad
    for kw,says in ((dict(depth=3), 'missing: blocks.2'), (dict(num_heads=4), 'numbers of attention heads differ'), (dict(embed_dim=32), 'instead of')):
        with pytest.raises(InputError, match=says) as bad: learner(init=str(tmp_path/'b.safetensors'), model_kwargs=SMALL_VIT|kw)
        assert 'without arch' in str(bad.value)

def test_other_normalization_is_said(tmp_path):
    export_backbone(vit(), tmp_path/'b.safetensors', mean=(.5,.5,.5))
    with pytest.warns(UserWarning, match='mean'): learner(init=str(tmp_path/'b.safetensors'), model_kwargs=SMALL_VIT)
