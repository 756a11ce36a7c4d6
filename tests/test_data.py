"Odd image files, worker processes, and training on what is left"
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from densessl.core import InputError
from densessl.data import CanvasDataset, find_images, image_dls, load_canvas, scene_dls
from densessl.synthetic import draw_scenes
from densessl.views import CropSpec, Recipe

S = 32
RECIPE = Recipe((CropSpec('teacher', 32, (.8, 1.)), CropSpec('local', 16, (.05, .4), within='teacher', count=2)))
# 36 rows, 48 columns, smooth and different in all eight orientations, so that lossy formats keep it
SCENE = torch.stack([torch.linspace(10, 240, 48).expand(36, 48), torch.linspace(230, 40, 36)[:, None].expand(36, 48), torch.full((36, 48), 90.)]).round().byte()
RGB = Image.fromarray(SCENE.permute(1, 2, 0).contiguous().numpy())


def plain(): return load_image(RGB)
def load_image(im):
    import io
    f = io.BytesIO(); im.save(f, 'png'); f.seek(0)
    return load_canvas(f, S)[0].float()
def gray(): return load_image(RGB.convert('L'))


def deep(): return Image.fromarray((np.asarray(RGB.convert('L')).astype(np.uint16)*257))


MODES = {
    'rgb.png': (lambda: RGB, plain, 0), 'rgb.jpg': (lambda: RGB, plain, 8), 'RGB.JPEG': (lambda: RGB, plain, 8), 'rgb.bmp': (lambda: RGB, plain, 0),
    'rgb.tif': (lambda: RGB, plain, 0), 'rgb.webp': (lambda: RGB, plain, 8),
    'l.png': (lambda: RGB.convert('L'), gray, 0), 'l.jpg': (lambda: RGB.convert('L'), gray, 8), 'la.png': (lambda: RGB.convert('LA'), gray, 0),
    'rgba.png': (lambda: RGB.convert('RGBA'), plain, 0), 'rgba.webp': (lambda: RGB.convert('RGBA'), plain, 8),
    'cmyk.jpg': (lambda: RGB.convert('CMYK'), plain, 8), 'cmyk.tif': (lambda: RGB.convert('CMYK'), plain, 3), 'p.png': (lambda: RGB.quantize(256), plain, 8),
    'one_bit.png': (lambda: RGB.convert('1', dither=Image.Dither.NONE), lambda: load_image(RGB.convert('1', dither=Image.Dither.NONE).convert('RGB')), 0),
    'deep.png': (deep, gray, 1), 'deep.tif': (deep, gray, 1),
    'float.tif': (lambda: Image.fromarray(np.asarray(RGB.convert('L')).astype(np.float32)/7), lambda: stretched(), 2),
    'int.tif': (lambda: Image.fromarray(np.asarray(RGB.convert('L')).astype(np.int32)*1000), lambda: stretched(), 2),
}


def stretched():
    a = np.asarray(RGB.convert('L')).astype(np.float64)
    return load_image(Image.fromarray(((a-a.min())*255/(a.max()-a.min())).round().astype(np.uint8)))


@pytest.mark.parametrize('name', MODES)
def test_modes(tmp_path, name):
    make, want, tol = MODES[name]
    make().save(tmp_path/name)
    assert find_images(tmp_path) == [tmp_path/name]
    x, hw = load_canvas(tmp_path/name, S)
    assert x.shape == (3, S, S) and x.dtype == torch.uint8 and x.is_contiguous() and hw == (36, 48)
    assert (x.float()-want()).abs().mean() <= tol/2


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'P bytes', 'RGB', 'L'])
def test_transparent_is_white(tmp_path, mode):
    black, f = Image.new('RGBA', (8, 8), (0, 0, 0, 0)), tmp_path/'a.png'
    if mode == 'P': Image.new('P', (8, 8), 0).save(f, transparency=0)
    elif mode == 'P bytes': Image.new('P', (8, 8), 0).save(f, transparency=b'\x00\xff')
    elif mode == 'RGB': Image.new('RGB', (8, 8)).save(f, transparency=(0, 0, 0))
    elif mode == 'L': Image.new('L', (8, 8)).save(f, transparency=0)
    else: black.convert(mode).save(f)
    assert (load_canvas(f, 8)[0] == 255).all()


@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_exif(tmp_path, turn, ext):
    T = Image.Transpose      # how a picture that stands upright was stored
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[turn]
    exif = Image.Exif(); exif[0x0112] = turn
    (RGB if undo is None else RGB.transpose(undo)).save(tmp_path/f'a.{ext}', exif=exif)
    x, hw = load_canvas(tmp_path/f'a.{ext}', S)
    assert hw == (36, 48)
    assert (x.float()-plain()).abs().mean() < 5


@pytest.mark.parametrize('wh', [(1, 1), (1, 500), (3000, 2), (33, 31)])
@pytest.mark.parametrize('ext', ['jpg', 'png'])
def test_shapes(tmp_path, wh, ext):
    Image.new('RGB', wh, (200, 100, 50)).save(tmp_path/f'a.{ext}')
    x, hw = load_canvas(tmp_path/f'a.{ext}', S)
    assert x.shape == (3, S, S) and hw == tuple(min(o, 2*min(wh)) for o in wh[::-1])         # of a panorama, a window
    assert (x.float()-torch.tensor([200., 100., 50.])[:, None, None]).abs().max() < 6


def test_draft_is_never_below_the_canvas(tmp_path):
    "A checkerboard of single pixels survives if the canvas is as large as the photograph, although 1/2 was on offer in one direction"
    board = ((torch.arange(64)[:, None]+torch.arange(256)[None]) % 2*255).byte()
    Image.fromarray(board.numpy()).save(tmp_path/'a.jpg', quality=100)
    assert load_canvas(tmp_path/'a.jpg', 64)[0].float().std() < 30       # four columns in one: grey
    tall = Image.fromarray((torch.arange(64)[:, None].expand(64, 256) % 2*255).byte().contiguous().numpy()); tall.save(tmp_path/'b.jpg', quality=100)
    assert load_canvas(tmp_path/'b.jpg', 64)[0].float().std() > 100      # rows are not to be halved


def test_animated_shows_the_first_frame(tmp_path):
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    for ext in ('webp', 'png', 'tif', 'gif'):
        frames[0].save(tmp_path/f'a.{ext}', save_all=True, append_images=frames[1:])
        x = load_canvas(tmp_path/f'a.{ext}', 8)[0].float()
        assert x[0].mean() > 230 and x[2].mean() < 30


@pytest.fixture
def mixed(tmp_path):
    "Nine readable images and five files that only look like images"
    for i, x in enumerate(draw_scenes(9, 48)[0]): Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()).save(tmp_path/f'good{i}.jpg')
    whole = (tmp_path/'good0.jpg').read_bytes()
    (tmp_path/'bad_truncated.jpg').write_bytes(whole[:len(whole)//2])
    (tmp_path/'bad_zero.jpg').write_bytes(b'')
    (tmp_path/'bad_text.jpg').write_text('this is a letter\n'*20)
    RGB.save(tmp_path/'cut.png'); cut = (tmp_path/'cut.png').read_bytes(); (tmp_path/'cut.png').unlink()
    (tmp_path/'bad_truncated.png').write_bytes(cut[:len(cut)//2])
    (tmp_path/'bad_dir.png').mkdir()                                     # a folder: not an image at all
    (tmp_path/'bad_link.jpg').symlink_to(tmp_path/'gone.jpg')
    return tmp_path


BAD = ['bad_link.jpg', 'bad_text.jpg', 'bad_truncated.jpg', 'bad_truncated.png', 'bad_zero.jpg']


@pytest.mark.parametrize('workers', [0, 2])
def test_bad_files_are_counted(mixed, workers):
    dls = image_dls(mixed, RECIPE, bs=7, num_workers=workers, seed=0, device='cpu')
    assert dls.bad_files == [] and len(dls.train_ds) == 14 and len(dls.train) == 2
    for _ in range(2):
        for views, hw in dls.train:
            assert views['teacher'].images.shape == (1, 7, 3, 32, 32) and views['local'].boxes.shape == (2, 7, 4)
            assert (hw == 48).all() and torch.isfinite(views['local'].images).all()
    assert sorted(o.name for o in dls.bad_files) == BAD                  # all, each once


def test_replacements_are_spread(mixed):
    "Five unreadable files in a row: each gives place to another readable one, the same at every reading"
    ds = CanvasDataset(find_images(mixed), S)
    assert [o.name for o in ds.paths[:5]] == BAD
    good = {load_canvas(f, S)[0].numpy().tobytes(): f.name for f in ds.paths[5:]}
    taken = [good[ds[i][0].numpy().tobytes()] for i in range(5)]
    assert len(set(taken)) >= 4 and taken == [good[ds[i][0].numpy().tobytes()] for i in range(5)]
    assert [ds[i][2].split('\0')[0] for i in range(5)] == [str(mixed/o) for o in BAD] and all(ds[i][2] == '' for i in range(5, 14))


def test_nothing_readable(tmp_path):
    for i in range(3): (tmp_path/f'{i}.jpg').write_bytes(b'x')
    with pytest.raises(InputError, match='none of the 3 images can be read'): image_dls(tmp_path, RECIPE, bs=2)


def test_same_views_whatever_the_number_of_workers(mixed):
    def run(workers):
        dls = image_dls(mixed, RECIPE, bs=7, num_workers=workers, seed=3, device='cpu')
        torch.manual_seed(5)
        return [v['local'].images for _ in range(2) for v, _ in dls.train]
    a, b = run(0), run(2)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], a[2])


def test_fit_with_and_without_validation(mixed):
    from fastai.learner import Learner
    import fastai.callback.progress  # noqa: F401  the progress bar must cope with an empty validation set
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.lin = torch.nn.Linear(3, 3)
        def forward(self, views): return self.lin(views['local'].images[0].mean((2, 3)))-views['teacher'].images[0].mean((2, 3))
    for pct in (0., .4):
        dls = image_dls(mixed, RECIPE, bs=4, num_workers=0, valid_pct=pct, seed=0, device='cpu')
        learn = Learner(dls, Net(), loss_func=lambda out, hw: out.square().mean()+0*hw.sum(), path=mixed)
        before = learn.model.lin.weight.clone()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(1)
        assert not torch.equal(before, learn.model.lin.weight)
        assert (learn.recorder.values[0][1] is None) == (pct == 0)


def test_scenes_are_the_drawn_ones():
    dls = scene_dls(6, RECIPE, bs=2, canvas=48, seed=4, device='cpu')
    assert torch.equal(dls.train_ds.images, draw_scenes(6, 48, 4)[0])
    with pytest.raises(InputError, match='bs is 8 but there are only 6 images'): scene_dls(6, RECIPE, bs=8, canvas=48)


def test_star_import_takes_no_everyday_words():
    "A user's own names outlive `from densessl.all import *`"
    import densessl.all as everything
    words = set('judge verdict plain reason printable unwrapped foreground share_out bad_note open_url read_index batch_edge check_state bad_ranks MAGIC FORMAT FORMATS VOID PROBES Found Draws'.split())
    assert not words & set(everything.__all__)
