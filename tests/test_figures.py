"densessl_show and the pictures, beyond what the page shows"
import os

import pytest, torch
from PIL import Image

from densessl.evaluation import figures
from densessl.theory.attention import unit_vectors
from densessl.ground.core import InputError
from densessl.methods.encoders import dense_encoder
from densessl.evaluation.figures import attention_maps, layer_tokens, mode_segments, show_aggregated_similarity, show_probing
from densessl import show
from densessl.evaluation import neighbors
from densessl.evaluation.neighbors import tsne_layers
from densessl.show import show_backbone
from densessl.theory.softmask import suggest_beta
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.methods.export import export_backbone
from processes import run_script

photos, masks = draw_scenes(3, 64, seed=5)

def vit(seed=0, **kw):
    torch.manual_seed(seed)
    return dense_encoder('vit_tiny_patch16_224', **(dict(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2) | kw))

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    d = tmp_path_factory.mktemp('show')
    for i,p in enumerate(photos): Image.fromarray(p.permute(1,2,0).numpy()).save(d/f'photo{i}.png')
    export_backbone(vit(), d/'a.safetensors')
    export_backbone(vit(1), d/'b.safetensors')
    torch.manual_seed(0)
    export_backbone(dense_encoder('test_resnet', img_size=64), d/'cnn.safetensors')
    (d/'broken.png').write_bytes(b'no image')
    return d

def names(home, n): return [str(home/f'photo{i}.png') for i in range(n)]

def test_page_of_two_backbones(home):
    path, notes = show_backbone(str(home/'a.safetensors'), names(home, 3), other=str(home/'b.safetensors'), out=home/'two.html')
    text = path.read_text()
    assert text.count('<img')==1+3+3+1+1+3+1 and notes==[] and str(home) not in text

def test_what_cannot_be_drawn_is_said(home):
    path, notes = show_backbone(str(home/'cnn.safetensors'), names(home, 1), out=home/'cnn.html')
    assert [n.split(':')[0] for n in notes]==['no probing', 'no tsne', 'no retrieval'] and 'attention maps need a ViT' in notes[0] and '16 patches are too few' in notes[1]
    assert path.read_text().count('<img')==4

def test_png_and_overwrite(home):
    out = home/'one.png'
    show_backbone(str(home/'a.safetensors'), names(home, 1), picture='probing', out=out)
    assert Image.open(out).size[0]>300
    with pytest.raises(InputError, match='--overwrite'): show_backbone(str(home/'a.safetensors'), names(home, 1), out=out)
    show_backbone(str(home/'a.safetensors'), names(home, 1), out=out, overwrite=True)

@pytest.mark.parametrize('kw, says', [
    (dict(images=['broken.png']), 'an image cannot be read'), (dict(images=['none.png']), 'an image cannot be read'), (dict(backbone='none.safetensors'), 'there is no file'),
    (dict(picture='probing', out='x.png', images=['photo0.png', 'photo1.png']), 'do not fit one PNG'), (dict(picture='probing', layer=5), 'there is no layer 5'),
    (dict(size=60), 'which do not divide'), (dict(picture='tsne', size=32), '16 patches are too few'), (dict(picture='retrieval'), 'give two or more')])
def test_bad_input_is_one_sentence_and_writes_nothing(home, kw, says, monkeypatch):
    monkeypatch.chdir(home)
    before = set(os.listdir(home))
    with pytest.raises(InputError, match=says): show_backbone(**(dict(backbone='a.safetensors', images=['photo0.png'], out='bad.html') | kw))
    assert set(os.listdir(home))==before

def test_as_a_process(home):
    (home/'show.py').write_text('from densessl.ground.commands import densessl_show\ndensessl_show()\n')
    run = lambda *a: run_script('show.py', a, home)
    r = run('a.safetensors', 'photo0.png', 'photo1.png', '--other', 'b.safetensors', '--picture', 'retrieval', '--out', 'process.html')
    assert r.returncode==0 and 'written to process.html' in r.stdout, r.stderr
    assert (home/'process.html').read_text().count('<img')==1
    r = run('none.safetensors', 'photo0.png')
    assert r.returncode==1 and r.stderr.strip().splitlines()[-1].startswith('densessl_show: there is no file') and 'Traceback' not in r.stderr

def test_nothing_of_the_encoder_changes():
    e = vit().train()
    e.net.norm.eval()
    state, mode = {k: v.clone() for k,v in e.state_dict().items()}, [m.training for m in e.modules()]
    fused = [b.attn.fused_attn for b in e.net.blocks]
    show_aggregated_similarity(e, photos), show_probing(e, photos[0]), tsne_layers(e, photos, masks, CLASSES, n_tokens=40, perplexity=5)
    assert all(torch.equal(v, state[k]) for k,v in e.state_dict().items()) and mode==[m.training for m in e.modules()]
    assert fused==[b.attn.fused_attn for b in e.net.blocks] and not any(b.attn.attn_drop._forward_hooks for b in e.net.blocks)
    with pytest.raises(InputError): attention_maps(e, torch.zeros(1, 3, 60, 64))
    assert fused==[b.attn.fused_attn for b in e.net.blocks]

def test_tsne_is_seeded():
    xy = [tsne_layers(vit(), photos, masks, CLASSES, layers=[-1], n_tokens=40, perplexity=5).axes[0].collections[0].get_offsets().tolist() for _ in range(2)]
    assert xy[0]==xy[1]

def test_tsne_from_the_shell_is_of_the_first_three_photographs(home):
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(show, 'tsne_layers', lambda e, p, **kw: seen.append(p) or tsne_layers(e, p, **kw))
        show_backbone(str(home/'a.safetensors'), names(home, 3)+names(home, 2), picture='tsne', out=home/'tsne.png')
    assert torch.equal(seen[0], photos) and Image.open(home/'tsne.png').size[0]>300

def test_segments_color_every_stage_of_a_cnn(monkeypatch):
    "The stages before the last are finer: each of their patches has the segment of the patch it lies in"
    torch.manual_seed(0)
    e = dense_encoder('test_resnet', img_size=128)
    photos = draw_scenes(2, 128, seed=5)[0]
    place = lambda z, *_: torch.stack([z.double()@torch.arange(z.shape[1]).double()]*2, 1)   # by which a patch is known
    monkeypatch.setattr(neighbors, '_tsne', place)
    before, last = layer_tokens(e, next(figures.normalized_inputs(e, photos))[-1], [-2,-1])
    labels = [mode_segments(z, suggest_beta(unit_vectors(z)))[0].view(last.grid)+1 for z in last.tokens]
    labels[1] += labels[0].max()
    fig = tsne_layers(e, photos, layers=[-2], n_tokens=10**4, perplexity=5)
    want = torch.stack(labels).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
    dots = fig.axes[1].collections[0]
    got = torch.cat([torch.as_tensor(dots.get_offsets()), torch.as_tensor(dots.get_array())[:,None]], 1)
    rows = torch.cat([place(unit_vectors(before.tokens.flatten(0, 1))), want[:,None]], 1)
    torch.testing.assert_close(got[got[:,0].argsort()], rows[rows[:,0].argsort()])
    assert want.unique().numel()>2 and want.max()<12
    assert fig.axes[0].get_title()==f'backbone: {want.max()} segments\nof the last layer' and 'within' in fig.axes[1].get_title()

def test_one_photograph_has_segments_but_no_classes():
    assert len(tsne_layers(vit(), photos[:1], layers=[-1]).axes)==2
    with pytest.raises(InputError, match='so give two or more'): tsne_layers(vit(), photos[:1], masks[:1], CLASSES, perplexity=5)
    with pytest.raises(InputError, match='give masks too'): tsne_layers(vit(), photos[:1], classes=CLASSES)

def test_images_that_are_not_square():
    e, x = vit(), torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert layer_tokens(e, x)[0].grid==(4,8) and attention_maps(e, x).shape==(2, 2, 32, 32)
    show_probing(dict(a=e), photos[0,:,:32], (1.,1.)), tsne_layers(e, photos[:1,:,:32], layers=[0])

def test_segments_of_each_image_are_its_own():
    z = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    labels, n = mode_segments(z, 10.)
    for b in range(3):
        one = mode_segments(z[b], 10.)
        assert torch.equal(labels[b], one[0]) and n[b]==one[1]

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same_pictures():
    e, x = vit(), torch.randn(2, 3, 64, 64)
    A, t = attention_maps(e, x), layer_tokens(e, x)
    e = e.cuda()
    torch.testing.assert_close(attention_maps(e, x).cpu(), A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer_tokens(e, x)[0].tokens.cpu(), t[0].tokens, rtol=1e-3, atol=1e-3)
    show_aggregated_similarity(e, photos), show_probing(e, photos[0]), tsne_layers(e, photos, masks, CLASSES, n_tokens=40, perplexity=5)

def test_each_backbone_sees_its_own_normalization(home, monkeypatch):
    export_backbone(vit(), home/'half.safetensors', overwrite=True, mean=(.5,.4,.3), std=(.2,.2,.1))
    seen, layers = {}, figures.layer_tokens
    monkeypatch.setattr(figures, 'layer_tokens', lambda e, x, *a: seen.setdefault(e.arch, []).append(x) or layers(e, x, *a))
    show_backbone(str(home/'half.safetensors'), names(home, 2), other=str(home/'cnn.safetensors'), out=home/'norms.html')
    norms = dict(vit_tiny_patch16_224=((.5,.4,.3), (.2,.2,.1)), test_resnet=((.485,.456,.406), (.229,.224,.225)))
    assert seen.keys()==norms.keys() and all(len(o)>=5 for o in seen.values())
    for arch,norm in norms.items():
        mean, std = (torch.tensor(o)[:,None,None] for o in norm)
        for x in seen[arch]:
            colors = 255*(x*std+mean)
            torch.testing.assert_close(colors, colors.round(), rtol=0, atol=1e-3)   # whole numbers again

def test_damaged_photographs_are_named_and_left_out(home, tmp_path):
    (tmp_path/'in').mkdir()
    for i in range(2): Image.open(home/f'photo{i}.png').save(tmp_path/'in'/f'{i}.jpg')
    (tmp_path/'in'/'2.jpg').write_bytes((tmp_path/'in'/'0.jpg').read_bytes()[:400])
    (tmp_path/'in'/'3.tif').write_bytes(b'II*\0')
    path, notes = show_backbone(str(home/'a.safetensors'), [str(tmp_path/'in')], picture='pca', out=tmp_path/'p.html')
    assert len(notes)==2 and '2.jpg' in notes[0] and '3.tif' in notes[1] and all('left out' in n and '\n' not in n for n in notes)
    assert notes[0].split('(')[0].strip() in path.read_text()

def test_two_photographs_of_one_name_are_told_apart(home, tmp_path):
    for i,d in enumerate('xy'):
        (tmp_path/d).mkdir()
        Image.open(home/f'photo{i}.png').save(tmp_path/d/'img.png')
    path, _ = show_backbone(str(home/'a.safetensors'), [str(tmp_path/'x'/'img.png'), str(tmp_path/'y'/'img.png')], picture='segments', out=tmp_path/'p.html')
    assert '>x/img.png<' in path.read_text() and '>y/img.png<' in path.read_text()

def test_the_home_folder_in_every_path(home, monkeypatch):
    monkeypatch.setenv('HOME', str(home))
    path, _ = show_backbone('~/a.safetensors', ['~/photo0.png'], picture='pca', out='~/tilde.html')
    assert path==home/'tilde.html' and path.is_file()

def test_a_backbone_beside_itself_is_refused(home):
    with pytest.raises(InputError, match='the backbone itself'): show_backbone(str(home/'a.safetensors'), names(home, 1), other=str(home/'a.safetensors'), out=home/'twice.html')

def test_a_folder_of_many_photographs(home, tmp_path):
    "Twelve of them, from first to last, and a note; all that are named one by one"
    for i in range(30): Image.open(home/f'photo{i%3}.png').save(tmp_path/f'{i:02}.png')
    path, notes = show_backbone(str(home/'a.safetensors'), [str(tmp_path)], picture='segments', out=tmp_path/'some.html')
    assert path.read_text().count('<img')==12 and '>00<' in path.read_text() and '>27<' in path.read_text()
    assert len(notes)==1 and notes[0].startswith('12 of the 30 photographs') and notes[0] in path.read_text().replace('&#x27;', "'")
    named = [str(tmp_path/f'{i:02}.png') for i in range(13)]
    path, notes = show_backbone(str(home/'a.safetensors'), named, picture='segments', out=tmp_path/'named.html')
    assert path.read_text().count('<img')==13 and notes==[]

def test_pictures_that_do_not_fit_are_refused_before_they_are_drawn(home, tmp_path, monkeypatch):
    monkeypatch.setattr(show, '_draw', lambda *a: pytest.fail('drawn'))
    with pytest.raises(InputError, match='2 pictures of segments do not fit one PNG'):
        show_backbone(str(home/'a.safetensors'), names(home, 2), picture='segments', out=tmp_path/'x.png')

@pytest.mark.parametrize('out', ['A.PNG', 'A.Html'])
def test_suffixes_in_capitals(home, tmp_path, out):
    path, _ = show_backbone(str(home/'a.safetensors'), names(home, 1), picture='pca', out=tmp_path/out)
    assert path.name==out and path.read_bytes().startswith(b'\x89PNG' if out=='A.PNG' else b'<!doctype')

def test_what_is_no_photograph_is_named(home, tmp_path):
    (tmp_path/'film.mp4').write_bytes(b'\0\0\0\x18ftypmp42')
    with pytest.raises(InputError, match='film.mp4.* a video'): show_backbone(str(home/'a.safetensors'), [str(tmp_path/'film.mp4')], out=tmp_path/'x.html')
